/* FFNs taken apart: against float64, the bytes of the FFN that is whole where rows are floats, and
 * the same bytes for every instruction set, number of threads and cut of tokens; with a predictor
 * the same of the neurons that it names, and with a threshold of those above it. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { HIDDEN = 96, INNER = 1100, TOKENS = 7, RANK = 32 };

typedef struct {
    em_neurons neurons;
    em_ffn whole;                  /* of float formats */
    uint8_t *decide, *up, *turned; /* 16 lanes; turned: down's columns as rows */
    uint8_t *reduce, *score;       /* the predictor's */
    uint8_t *bundle, *rows;
    float x[TOKENS * HIDDEN];
} problem;

static int32_t quant_bytes(int32_t dtype) {
    return dtype == EM_F32 ? 4 : dtype == EM_Q8_0 ? 32 : dtype == EM_Q4_0 ? 16 : 2;
}

/* Row `row` of a matrix of 16 lanes as a row that lies alone, in a row of `of_cols` from `at` on.
 */
static void copy_row(uint8_t *to, int32_t of_cols, int32_t at, const uint8_t *matrix, int32_t dtype,
                     int32_t cols, int32_t row) {
    const uint8_t *group = matrix + row / 16 * em_group_bytes(dtype, cols, 16);
    int32_t lane = row % 16, size = quant_bytes(dtype),
            plane = (int32_t)em_scale_bytes(dtype, cols, 16);
    if (dtype < EM_Q8_0) {
        for (int32_t k = 0; k < cols; k++)
            memcpy(to + (at + k) * size, group + (k * 16 + lane) * size, (size_t)size);
        return;
    }
    uint8_t *quants = to + em_scale_bytes(dtype, of_cols, 1);
    for (int32_t b = 0; b < cols / 32; b++) {
        memcpy(to + (at / 32 + b) * 2, group + (b * 16 + lane) * 2, 2);
        for (int32_t c = 0; c < size / 4; c++)
            memcpy(quants + (at / 32 + b) * size + 4 * c,
                   group + plane + ((b * (size / 4) + c) * 16 + lane) * 4, 4);
    }
}

/* The matrix whose rows are the columns of `turned`, of a float format. */
static void turn(uint8_t *to, const uint8_t *turned, int32_t dtype) {
    int32_t size = quant_bytes(dtype);
    for (int32_t i = 0; i < INNER; i++)
        for (int32_t r = 0; r < HIDDEN; r++)
            memcpy(to + r / 16 * em_group_bytes(dtype, INNER, 16) + (i * 16 + r % 16) * size,
                   turned + i / 16 * em_group_bytes(dtype, HIDDEN, 16) + (r * 16 + i % 16) * size,
                   (size_t)size);
}

/* Neurons' rows, with the row that decides where it is to be there. */
static void make_rows(problem *p, int32_t row_parts) {
    em_neurons *f = &p->neurons;
    int32_t cols = row_parts * HIDDEN, at;
    int64_t row_bytes = em_group_bytes(f->dtype, cols, 1);
    f->row_parts = row_parts;
    p->rows = exact((size_t)(INNER * row_bytes));
    for (int32_t i = 0; i < INNER; i++) {
        uint8_t *row = p->rows + i * row_bytes;
        at = cols - HIDDEN;
        copy_row(row, cols, at, p->turned, f->dtype, HIDDEN, i);
        if (f->gated) copy_row(row, cols, at -= HIDDEN, p->up, f->dtype, HIDDEN, i);
        if (at > 0) copy_row(row, cols, 0, p->decide, f->dtype, HIDDEN, i);
    }
}

static void make_problem(problem *p, int32_t deciding, int32_t dtype, int32_t gated,
                         int32_t activation) {
    /* F32 is the largest. */
    size_t matrix = matrix_bytes(EM_F32, INNER, HIDDEN), vector = INNER * sizeof(float);
    size_t down = matrix_bytes(dtype, HIDDEN, INNER);
    p->decide = random_matrix(deciding, INNER, HIDDEN, 1);
    p->up = random_matrix(dtype, INNER, HIDDEN, 2);
    p->turned = random_matrix(dtype, INNER, HIDDEN, 3);
    p->bundle = exact(2 * matrix + down + 3 * vector);
    memcpy(p->bundle, p->decide, matrix_bytes(deciding, INNER, HIDDEN));
    memcpy(p->bundle + matrix, p->up, matrix_bytes(dtype, INNER, HIDDEN));
    if (dtype < EM_Q8_0) turn(p->bundle + 2 * matrix, p->turned, dtype);
    int64_t biases = (int64_t)(2 * matrix + down);
    for (int32_t i = 0; i < 3; i++)
        fill_unit((float *)(p->bundle + biases + (int64_t)vector * i), INNER, 40 + (uint32_t)i);
    int64_t decide_bias = biases, up_bias = biases + (int64_t)vector;
    int64_t down_bias = up_bias + (int64_t)vector;
    p->neurons = (em_neurons){.deciding_bias = decide_bias,
                              .up_bias = gated ? up_bias : -1,
                              .down_bias = down_bias,
                              .reduce = -1,
                              .deciding_dtype = deciding,
                              .dtype = dtype,
                              .gated = gated,
                              .hidden = HIDDEN,
                              .intermediate = INNER,
                              .activation = activation};
    make_rows(p, gated ? 2 : 1);
    p->reduce = p->score = NULL;
    p->whole = (em_ffn){gated ? 0 : -1,
                        gated ? (int64_t)matrix : 0,
                        (int64_t)(2 * matrix),
                        gated ? decide_bias : -1,
                        gated ? up_bias : decide_bias,
                        down_bias,
                        dtype,
                        dtype,
                        dtype,
                        HIDDEN,
                        INNER,
                        activation};
    fill_unit(p->x, TOKENS * HIDDEN, 31);
}

static void free_problem(problem *p) {
    free(p->decide);
    free(p->up);
    free(p->turned);
    free(p->reduce);
    free(p->score);
    free(p->bundle);
    free(p->rows);
}

/* Lets a predictor of `dtype` name about half of the neurons, or with a large `bias` all. */
static void let_predict(problem *p, int32_t dtype, float bias) {
    em_neurons *f = &p->neurons;
    size_t reduce = matrix_bytes(dtype, RANK, HIDDEN), score = matrix_bytes(dtype, INNER, RANK);
    size_t vectors = 4 * INNER * sizeof(float);
    uint8_t *bundle = exact(reduce + score + vectors);
    float *biases = (float *)(bundle + reduce + score);
    const int64_t bias_at[3] = {f->deciding_bias, f->up_bias, f->down_bias};
    p->reduce = random_matrix(dtype, RANK, HIDDEN, 5);
    p->score = random_matrix(dtype, INNER, RANK, 6);
    memcpy(bundle, p->reduce, reduce);
    memcpy(bundle + reduce, p->score, score);
    for (int32_t i = 0; i < INNER; i++) biases[i] = bias;
    for (int32_t i = 0; i < 3; i++)
        if (bias_at[i] >= 0)
            memcpy(biases + (i + 1) * INNER, p->bundle + bias_at[i],
                   (i < 2 ? INNER : HIDDEN) * sizeof(float));
    int64_t at = (int64_t)(reduce + score), step = INNER * (int64_t)sizeof(float);
    f->deciding = -1;
    f->reduce = 0;
    f->score = (int64_t)reduce;
    f->score_bias = at;
    f->deciding_bias = at + step;
    if (f->up_bias >= 0) f->up_bias = at + 2 * step;
    f->down_bias = at + 3 * step;
    f->predictor_dtype = dtype;
    f->rank = RANK;
    free(p->bundle);
    p->bundle = bundle;
    free(p->rows);
    make_rows(p, f->gated ? 3 : 2);
}

static em_core *open_core(int32_t threads, const char *isa) {
    em_core *core;
    CHECK(em_core_open(threads, isa, &core) == EM_OK, "%d threads", threads);
    uint64_t need = em_neurons_scratch(threads, TOKENS, HIDDEN, INNER, RANK);
    uint64_t whole = em_ffn_scratch(TOKENS, TOKENS, HIDDEN, INNER);
    CHECK(em_core_reserve(core, need > whole ? need : whole) == EM_OK, "%lu", (unsigned long)need);
    return core;
}

static void run(em_core *core, const problem *p, int32_t first, int32_t n, float *out) {
    em_neuron_rows rows = {.resident = p->rows};
    int64_t used = 0;
    int32_t status = em_neurons_run(core, &p->neurons, p->bundle, &rows, p->x + first * HIDDEN, n,
                                    out + first * HIDDEN, &used);
    CHECK(status == EM_OK && used > 0 && used <= INNER, "status %d, %ld used", status, (long)used);
}

static double vector(const problem *p, int64_t offset, int32_t i) {
    return offset < 0 ? 0 : ((const float *)(p->bundle + offset))[i];
}

static bool named(const problem *p, int32_t token, int32_t i) {
    const em_neurons *f = &p->neurons;
    double score = vector(p, f->reduce < 0 ? -1 : f->score_bias, i);
    for (int32_t r = 0; f->reduce >= 0 && r < RANK; r++) {
        double reduced = 0;
        for (int c = 0; c < HIDDEN; c++)
            reduced += p->x[token * HIDDEN + c] *
                       matrix_element(p->reduce, f->predictor_dtype, HIDDEN, r, c);
        score += reduced * matrix_element(p->score, f->predictor_dtype, RANK, i, r);
    }
    return f->reduce < 0 || score > 0;
}

static double activated(int32_t activation, double x) {
    switch (activation) {
    case EM_SILU: return x / (1 + exp(-x));
    case EM_GELU: return x * 0.5 * (1 + erf(x / sqrt(2)));
    case EM_GELU_TANH: return x * 0.5 * (1 + tanh(0.7978845608 * (x + 0.044715 * x * x * x)));
    case EM_GELU_QUICK: return x / (1 + exp(-1.702 * x));
    default: return x > 0 ? (activation == EM_RELU2 ? x * x : x) : 0;
    }
}

static void it_is_right(const problem *p, double bound) {
    const em_neurons *f = &p->neurons;
    float out[TOKENS * HIDDEN];
    double worst = 0, top = 0;
    fill_unit(out, TOKENS * HIDDEN, 33);
    double expected[TOKENS * HIDDEN];
    for (int i = 0; i < TOKENS * HIDDEN; i++) expected[i] = out[i];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < INNER; i++) {
            double g = vector(p, f->deciding_bias, i), u = vector(p, f->up_bias, i);
            for (int c = 0; c < HIDDEN; c++) {
                g += p->x[t * HIDDEN + c] *
                     matrix_element(p->decide, f->deciding_dtype, HIDDEN, i, c);
                u += p->x[t * HIDDEN + c] * matrix_element(p->up, f->dtype, HIDDEN, i, c);
            }
            if (!named(p, t, i)) continue;
            double h = activated(f->activation, g);
            h = fabs(h) <= f->threshold ? 0 : h * (f->gated ? u : 1);
            for (int r = 0; r < HIDDEN; r++)
                expected[t * HIDDEN + r] += h * matrix_element(p->turned, f->dtype, HIDDEN, i, r);
        }
    for (int i = 0; i < TOKENS * HIDDEN; i++) expected[i] += vector(p, f->down_bias, i % HIDDEN);
    em_core *core = open_core(2, NULL);
    run(core, p, 0, TOKENS, out);
    em_core_close(core);
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        worst = fmax(worst, fabs(out[i] - expected[i]));
        top = fmax(top, fabs(expected[i]));
    }
    CHECK(worst <= bound * top, "%s: error %g of %g", DTYPES[f->dtype], worst, top);
}

static void the_bytes_are_those_of_the_whole(const problem *p) {
    float apart[TOKENS * HIDDEN], whole[TOKENS * HIDDEN], weights[TOKENS];
    int32_t tokens[TOKENS];
    const int32_t first[] = {0, TOKENS};
    const uint64_t address = (uint64_t)(uintptr_t)p->bundle;
    for (int32_t t = 0; t < TOKENS; t++) tokens[t] = t;
    for (int32_t t = 0; t < TOKENS; t++) weights[t] = 1;
    fill_unit(apart, TOKENS * HIDDEN, 34);
    fill_unit(whole, TOKENS * HIDDEN, 34);
    em_core *core = open_core(1, NULL);
    CHECK(em_ffn_run(core, &p->whole, 1, &address, NULL, NULL, first, tokens, weights, p->x, TOKENS,
                     whole) == EM_OK,
          "dtype %d", p->whole.up_dtype);
    run(core, p, 0, TOKENS, apart);
    em_core_close(core);
    CHECK(!memcmp(apart, whole, sizeof whole), "%s, gated %d", DTYPES[p->neurons.dtype],
          p->neurons.gated);
}

static void there_is_one_answer(const problem *p) {
    float plain[TOKENS * HIDDEN] = {0};
    em_core *core = open_core(1, "scalar");
    run(core, p, 0, TOKENS, plain);
    em_core_close(core);
    for (int32_t i = 0; em_isa_name(i); i++)
        for (int32_t threads = 1; em_isa_runs(i) && threads <= 3; threads++)
            for (int32_t cut = 1; cut <= TOKENS; cut += 2) {
                if (!is_chosen(i + threads + cut / 2)) continue;
                float out[TOKENS * HIDDEN] = {0};
                core = open_core(threads, em_isa_name(i));
                for (int32_t t = 0; t < TOKENS; t += cut)
                    run(core, p, t, t + cut < TOKENS ? cut : TOKENS - t, out);
                em_core_close(core);
                CHECK(!memcmp(out, plain, sizeof out), "%s, %d threads, %d tokens, %s",
                      em_isa_name(i), threads, cut, DTYPES[p->neurons.dtype]);
            }
}

/* Rows of an unbroken number of columns, of formats that take any. */
static void rows_of_any_length(const em_kernels *k) {
    for (int32_t dtype = EM_F32; dtype <= EM_BF16; dtype++)
        for (int l = 0; l < N_LENGTHS; l++) {
            int32_t cols = LENGTHS[l];
            uint8_t *matrix = random_matrix(dtype, 3, cols, (uint32_t)cols), *row[3];
            float *sum = exact((size_t)cols * 4);
            uint8_t *group = exact((size_t)em_group_bytes(dtype, cols, EM_LANES));
            const float weights[3] = {0.5f, 0, -2};
            for (int32_t i = 0; i < 3; i++) {
                row[i] = exact((size_t)em_group_bytes(dtype, cols, 1));
                copy_row(row[i], cols, 0, matrix, dtype, cols, i);
            }
            em_gathered rows = {(const uint8_t *const *)row, 3, dtype, 0};
            k->gather_rows(&rows, 0, cols, group);
            k->add_rows(&rows, 0, cols, weights, sum);
            for (int32_t i = 0; i < 3; i++)
                for (int32_t c = 0; c < cols; c++)
                    CHECK(matrix_element(group, dtype, cols, i, c) ==
                              matrix_element(matrix, dtype, cols, i, c),
                          "%s: %s row %d col %d", k->name, DTYPES[dtype], i, c);
            for (int32_t c = 0; c < cols; c++) {
                double expected = 0.5 * matrix_element(matrix, dtype, cols, 0, c) -
                                  2 * matrix_element(matrix, dtype, cols, 2, c);
                CHECK(fabs(sum[c] - expected) <= 1e-6 * (fabs(expected) + 1e-3), "%s: %s col %d",
                      k->name, DTYPES[dtype], c);
            }
            for (int32_t i = 0; i < 3; i++) free(row[i]);
            free(matrix);
            free(group);
            free(sum);
        }
}

static void overflow_is_not_hidden(problem *p) {
    float out[TOKENS * HIDDEN] = {0};
    p->x[0] = NAN;
    em_core *core = open_core(1, NULL);
    run(core, p, 0, TOKENS, out);
    em_core_close(core);
    CHECK(isnan(out[0]) && isnan(out[HIDDEN - 1]), "%s: %g", DTYPES[p->neurons.dtype], out[0]);
    CHECK(isfinite(out[HIDDEN]), "%s: of another token", DTYPES[p->neurons.dtype]);
}

static void arguments_are_checked(const problem *p) {
    em_core *core = open_core(1, NULL);
    em_neuron_rows rows = {.resident = p->rows};
    float out[TOKENS * HIDDEN] = {0};
    int64_t used;
    em_neurons bad = p->neurons;
    bad.activation = EM_RELU2 + 1;
    CHECK(em_neurons_run(core, &bad, p->bundle, &rows, p->x, 1, out, &used) == EM_INVALID, "%s",
          "an activation that is none");
    const float none[] = {-1, NAN};
    for (int32_t i = 0; i < 2; i++) {
        bad = p->neurons;
        bad.threshold = none[i];
        CHECK(em_neurons_run(core, &bad, p->bundle, &rows, p->x, 1, out, &used) == EM_INVALID,
              "threshold %g", none[i]);
    }
    bad = p->neurons;
    bad.row_parts = 4;
    CHECK(em_neurons_run(core, &bad, p->bundle, &rows, p->x, 1, out, &used) == EM_INVALID, "%s",
          "four parts");
    bad.row_parts = 1;
    bad.reduce = 0;
    bad.rank = HIDDEN + 1;
    CHECK(em_neurons_run(core, &bad, p->bundle, &rows, p->x, 1, out, &used) == EM_INVALID, "%s",
          "too high a rank");
    bad = p->neurons;
    bad.dtype = EM_Q8_0;
    bad.hidden = 40;
    CHECK(em_neurons_run(core, &bad, p->bundle, &rows, p->x, 1, out, &used) == EM_INVALID, "%s",
          "part of a block");
    em_core_close(core);
    CHECK(em_core_open(1, NULL, &core) == EM_OK, "%s", "small");
    CHECK(em_neurons_run(core, &p->neurons, p->bundle, &rows, p->x, 1, out, &used) == EM_NO_MEMORY,
          "%s", "no scratch");
    em_core_close(core);
}

static void all_of(int32_t deciding, int32_t dtype, int32_t gated) {
    static problem p;
    make_problem(&p, deciding, dtype, gated, gated ? EM_RELU2 : EM_RELU);
    it_is_right(&p, deciding >= EM_Q8_0 || dtype >= EM_Q8_0 ? 0.02 : 1e-5);
    if (deciding == dtype && dtype < EM_Q8_0) the_bytes_are_those_of_the_whole(&p);
    there_is_one_answer(&p);
    arguments_are_checked(&p);
    overflow_is_not_hidden(&p);
    free_problem(&p);
}

/* Neurons that are named by mistake add nothing; a row that holds what decides may go unused. */
static void naming_all_gives_the_bytes_of_the_exact(problem *p) {
    float exact[TOKENS * HIDDEN], same[TOKENS * HIDDEN], guessed[TOKENS * HIDDEN];
    fill_unit(exact, TOKENS * HIDDEN, 35);
    memcpy(same, exact, sizeof exact);
    memcpy(guessed, exact, sizeof exact);
    em_core *core = open_core(2, NULL);
    run(core, p, 0, TOKENS, exact);
    free(p->rows);
    make_rows(p, p->neurons.gated ? 3 : 2);
    run(core, p, 0, TOKENS, same);
    let_predict(p, EM_Q8_0, 1e9f);
    run(core, p, 0, TOKENS, guessed);
    em_core_close(core);
    CHECK(!memcmp(exact, same, sizeof exact), "%s, longer rows", DTYPES[p->neurons.dtype]);
    CHECK(!memcmp(exact, guessed, sizeof exact), "%s, gated %d", DTYPES[p->neurons.dtype],
          p->neurons.gated);
}

static void predicted(int32_t dtype, int32_t gated) {
    static problem p;
    make_problem(&p, dtype, dtype, gated, gated ? EM_RELU2 : EM_RELU);
    naming_all_gives_the_bytes_of_the_exact(&p);
    free_problem(&p);
    make_problem(&p, dtype, dtype, gated, EM_RELU);
    let_predict(&p, EM_F32, 0);
    it_is_right(&p, dtype >= EM_Q8_0 ? 0.02 : 1e-5);
    free_problem(&p);
    make_problem(&p, dtype, dtype, gated, EM_RELU);
    let_predict(&p, EM_Q8_0, 0);
    there_is_one_answer(&p);
    overflow_is_not_hidden(&p);
    free_problem(&p);
}

static int64_t used_of(const problem *p, int32_t token) {
    em_core *core = open_core(1, NULL);
    em_neuron_rows rows = {.resident = p->rows};
    float out[HIDDEN] = {0};
    int64_t used = -1;
    int32_t status =
        em_neurons_run(core, &p->neurons, p->bundle, &rows, p->x + token * HIDDEN, 1, out, &used);
    CHECK(status == EM_OK, "status %d", status);
    em_core_close(core);
    return used;
}

/* Other activations than ReLU let no neuron rest unless a threshold does. */
static void thresholded(int32_t dtype, int32_t gated, int32_t activation) {
    static problem p;
    double bound = dtype >= EM_Q8_0 ? 0.02 : 1e-5;
    make_problem(&p, dtype, dtype, gated, activation);
    it_is_right(&p, bound);
    if (dtype < EM_Q8_0) the_bytes_are_those_of_the_whole(&p);
    int64_t all = used_of(&p, 0);
    CHECK(all == INNER || activation >= EM_RELU, "%ld used", (long)all);
    p.neurons.threshold = 0.1f;
    /* Blocks round what decides, so that float64 finds others near the threshold. */
    it_is_right(&p, dtype >= EM_Q8_0 ? 0.05 : bound);
    there_is_one_answer(&p);
    int64_t some = used_of(&p, 0);
    CHECK(some > 0 && some < all, "%ld of %ld used", (long)some, (long)all);
    p.neurons.threshold = 1e30f;
    CHECK(used_of(&p, 0) == 0, "activation %d", activation);
    overflow_is_not_hidden(&p);
    free_problem(&p);
    make_problem(&p, dtype, dtype, gated, activation);
    naming_all_gives_the_bytes_of_the_exact(&p);
    p.neurons.threshold = 0.1f;
    it_is_right(&p, dtype >= EM_Q8_0 ? 0.05 : bound);
    free_problem(&p);
}

int main(void) {
    for_each_isa(rows_of_any_length);
    for (int32_t gated = 0; gated <= 1; gated++) {
        for (int32_t dtype = EM_F32; dtype <= EM_Q4_0; dtype++) all_of(dtype, dtype, gated);
        all_of(EM_BF16, EM_Q8_0, gated);
        all_of(EM_Q4_0, EM_F16, gated);
        for (int32_t dtype = EM_F32; dtype <= EM_Q4_0; dtype++) predicted(dtype, gated);
        for (int32_t activation = EM_SILU; activation <= EM_RELU2; activation++)
            thresholded(activation % 5, gated, activation);
        thresholded(EM_Q8_0, gated, EM_SILU);
    }
    return check_report();
}
