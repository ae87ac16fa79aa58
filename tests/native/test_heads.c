/* Products in which each head has rows of its own: against doubles, and the same bytes on every
 * instruction set, however many threads share them. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 9 };

typedef struct {
    int32_t heads, rows, cols, taken, x_more,
        out_more; /* more: beyond what is needed, to the next */
} shape;

static const shape SHAPES[] = {
    {1, 16, 32, 0, 0, 0},
    {3, 48, 256, 8, 0, 5},
    {16, 32, 512, 0, 7, 0},
    {5, 64, 96, 10, 3, 1},
};
enum { N_SHAPES = sizeof SHAPES / sizeof *SHAPES };

typedef struct {
    em_heads h;
    uint8_t *weights;
    float *x, *out;
    size_t out_bytes;
} problem;

static problem make_problem(const shape *s, int32_t dtype) {
    int32_t cols = fitting(dtype, s->cols);
    problem p = {.weights = random_matrix(dtype, s->heads * s->rows, cols, 3)};
    p.h = (em_heads){.weights = p.weights,
                     .dtype = dtype,
                     .n_heads = s->heads,
                     .rows = s->rows,
                     .cols = cols,
                     .taken = s->taken,
                     .x_stride = s->taken + cols + s->x_more,
                     .out_stride = s->taken + s->rows + s->out_more};
    int64_t last = (int64_t)TOKENS * s->heads - 1;
    int64_t n_x = last * p.h.x_stride + s->taken + cols;
    int64_t n_out = last * p.h.out_stride + s->taken + s->rows;
    p.out_bytes = (size_t)n_out * 4;
    p.h.x = p.x = exact((size_t)n_x * 4);
    p.h.out = p.out = exact(p.out_bytes);
    fill_unit(p.x, n_x, 4);
    return p;
}

static void free_problem(problem *p) {
    free(p->weights);
    free(p->x);
    free(p->out);
}

static void run(problem *p, const char *isa, int32_t threads) {
    em_core *core;
    CHECK(em_core_open(threads, isa, &core) == EM_OK, "%s does not open", isa);
    CHECK(em_core_reserve(core, em_heads_scratch(TOKENS, p->h.n_heads, p->h.cols)) == EM_OK, "%s",
          isa);
    memset(p->out, 0xfe, p->out_bytes);
    int32_t status = em_heads_run(core, &p->h, TOKENS);
    CHECK(status == EM_OK, "status %d", status);
    em_core_close(core);
}

static void it_is_right(const problem *p) {
    const em_heads *h = &p->h;
    double bound = em_dtype_is_block(h->dtype) ? 0.02 : 1e-5, worst = 0, taken = 0;
    for (int32_t i = 0; i < TOKENS * h->n_heads; i++) {
        const float *x = p->x + (int64_t)i * h->x_stride, *y = p->out + (int64_t)i * h->out_stride;
        for (int32_t d = 0; d < h->taken; d++) taken = fmax(taken, fabs((double)y[d] - x[d]));
        for (int32_t r = 0; r < h->rows; r++) {
            double sum = 0, size = 1e-9;
            for (int32_t c = 0; c < h->cols; c++) {
                int32_t row = i % h->n_heads * h->rows + r;
                sum += matrix_element(p->weights, h->dtype, h->cols, row, c) * x[h->taken + c];
                size += matrix_size(p->weights, h->dtype, h->cols, row, c) * fabs(x[h->taken + c]);
            }
            worst = fmax(worst, fabs(y[h->taken + r] - sum) / size);
        }
    }
    CHECK(worst <= bound, "%s: %g of the sum of magnitudes", DTYPES[h->dtype], worst);
    CHECK(taken == 0, "%s: what is taken over differs by %g", DTYPES[h->dtype], taken);
}

static void there_is_one_answer(problem *p) {
    float *plain = exact(p->out_bytes);
    run(p, "scalar", 1);
    it_is_right(p);
    memcpy(plain, p->out, p->out_bytes);
    for (int32_t i = 0; em_isa_name(i); i++)
        for (int32_t threads = 1; em_isa_runs(i) && threads <= 3; threads++) {
            if (!is_chosen(i + threads)) continue;
            run(p, em_isa_name(i), threads);
            CHECK(!memcmp(plain, p->out, p->out_bytes), "%s, %d threads, %s", em_isa_name(i),
                  threads, DTYPES[p->h.dtype]);
        }
    free(plain);
}

static void arguments_are_checked(problem *p) {
    em_core *core;
    CHECK(em_core_open(1, NULL, &core) == EM_OK, "%s", "opens");
    em_heads bad[5];
    for (int32_t i = 0; i < 5; i++) bad[i] = p->h;
    bad[0].rows -= 1;
    bad[1].x_stride -= 1 + bad[1].x_stride - bad[1].taken - bad[1].cols;
    bad[2].out_stride = bad[2].taken + bad[2].rows - 1;
    bad[3].n_heads = 0;
    bad[4].taken = -1;
    for (int32_t i = 0; i < 5; i++)
        CHECK(em_heads_run(core, &bad[i], 1) == EM_INVALID, "bad argument %d", i);
    if (em_dtype_is_block(p->h.dtype))
        CHECK(em_heads_run(core, &p->h, TOKENS) == EM_NO_MEMORY, "%s", "no scratch");
    em_core_close(core);
}

int main(void) {
    for (int32_t dtype = EM_F32; dtype < EM_DTYPES; dtype++)
        for (int32_t s = 0; s < N_SHAPES; s++) {
            problem p = make_problem(&SHAPES[s], dtype);
            there_is_one_answer(&p);
            arguments_are_checked(&p);
            free_problem(&p);
        }
    return check_report();
}
