/* FFNs whose neurons lie apart: which are active is computed, and the others are neither read nor
 * multiplied. What they would add is zero, so that the sums are those of all neurons, in their
 * order. Or those with little activation count as resting too (arXiv 2404.08763), or a predictor
 * names those that may be active (arXiv 2312.11514, section 3.1): then what they add is missing. No
 * matrix is multiplied by whole where they are named. */
#include "core.h"
#include "rows.h"

#include <math.h>
#include <string.h>

/* Columns of `out` that are summed together. */
enum { COLUMNS = 256 };

typedef struct {
    const em_kernels *kernels;
    const em_neurons *is;
    const uint8_t *bundle;
    em_acts x;
    int32_t n_tokens;
    float *reduced;       /* [n_tokens, rank] of a predictor */
    float *h;             /* [n_tokens, intermediate]: of active neurons, once they are found */
    int32_t *active;      /* their ids, ascending */
    int32_t *counts;      /* of each chunk */
    int64_t first_chunk;  /* of those that are looked at now */
    const uint8_t **rows; /* [active] */
    int32_t first, n;     /* the active ones of this round */
    int64_t plane;        /* bytes of a row's scales */
    uint8_t *own;         /* [n_threads, own_bytes] */
    float *y;             /* [n_tokens, hidden] */
    float *out;
} neurons_task;

static int64_t chunks_of(const em_neurons *f) {
    return (f->intermediate + EM_NEURON_CHUNK - 1) / EM_NEURON_CHUNK;
}

/* Of what a thread has for itself (own_scratch). */
static uint64_t own_bytes(int32_t n_tokens, int32_t hidden, int32_t intermediate) {
    uint64_t group = (uint64_t)em_group_bytes(EM_F32, hidden, EM_LANES), n = (uint64_t)n_tokens;
    uint64_t width = (uint64_t)intermediate;
    return em_arena_cost(group) + em_arena_cost(n * EM_LANES * 4) + em_arena_cost(n * 4) +
           em_arena_cost(width * sizeof(void *)) + em_arena_cost(width * 4);
}

uint64_t em_neurons_scratch(int32_t n_threads, int32_t n_tokens, int32_t hidden,
                            int32_t intermediate, int32_t rank) {
    uint64_t n = (uint64_t)n_tokens, width = (uint64_t)intermediate;
    return (uint64_t)n_threads * own_bytes(n_tokens, hidden, intermediate) +
           em_acts_bytes(n_tokens, hidden) + em_arena_cost(n * width * 4) +
           em_arena_cost(n * (uint64_t)rank * 4) + em_arena_cost(n * (uint64_t)hidden * 4) +
           em_arena_cost(width * 4) + em_arena_cost(width * sizeof(void *)) +
           em_arena_cost((width / EM_NEURON_CHUNK + 1) * 4);
}

static bool predicts(const em_neurons *f) { return f->reduce >= 0; }

static const float *vector_at(const neurons_task *t, int64_t offset) {
    return offset < 0 ? NULL : (const float *)(t->bundle + offset);
}

static void note_taking(em_core *core, int64_t all_ns, int64_t waited_ns) {
    core->times.stall_ns += waited_ns;
    core->times.taking_ns += all_ns - waited_ns;
    core->aside_ns += all_ns;
}

/* ---- which neurons are active --------------------------------------------------------------- */

/* h = activation(h), or 0 where that is no more than the threshold. Lets NaN pass. */
static void activate(const neurons_task *t, float *h, int64_t n) {
    float threshold = t->is->threshold;
    t->kernels->gate(h, NULL, (int32_t)n, t->is->activation);
    for (int64_t j = 0; j < n; j++) h[j] = fabsf(h[j]) <= threshold ? 0 : h[j];
}

static void find_active(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    neurons_task *t = arg;
    int64_t chunk = t->first_chunk + item, width = t->is->intermediate, found = 0;
    int64_t first = chunk * EM_NEURON_CHUNK, n = em_min(EM_NEURON_CHUNK, width - first);
    bool active[EM_NEURON_CHUNK] = {false};
    for (int64_t i = 0; i < t->n_tokens; i++) {
        float *h = t->h + i * width + first;
        /* What is predicted has 1 until its row tells. All comparisons let NaN pass. */
        if (predicts(t->is))
            for (int64_t j = 0; j < n; j++) h[j] = !(h[j] <= 0);
        else
            activate(t, h, n);
        for (int64_t j = 0; j < n; j++) active[j] |= h[j] != 0;
    }
    for (int64_t j = 0; j < n; j++) {
        t->active[first + found] = (int32_t)(first + j);
        found += active[j];
    }
    t->counts[chunk] = (int32_t)found;
}

/* Moves what is active of a token to the front. */
static void gather_token(void *arg, int64_t token, int32_t thread) {
    (void)thread;
    neurons_task *t = arg;
    float *h = t->h + token * t->is->intermediate;
    for (int32_t i = 0; i < t->n; i++) h[i] = h[t->active[i]];
}

/* What a predictor scores neurons by. */
static int32_t reduce(em_core *core, const neurons_task *t) {
    const em_neurons *f = t->is;
    const em_linear reducing = {.weights = t->bundle + f->reduce,
                                .out = t->reduced,
                                .out_stride = f->rank,
                                .dtype = f->predictor_dtype,
                                .rows = f->rank,
                                .cols = f->hidden};
    return em_linears(core, &reducing, 1, t->x.x, t->n_tokens);
}

/* Decides about the neurons of chunks [first, end): `n` grows by those that are active. */
static int32_t decide_chunks(em_core *core, neurons_task *t, int64_t first, int64_t end) {
    const em_neurons *f = t->is;
    bool guess = predicts(f);
    int64_t row = first * EM_NEURON_CHUNK,
            rows = em_min(end * EM_NEURON_CHUNK, f->intermediate) - row;
    int32_t dtype = guess ? f->predictor_dtype : f->deciding_dtype;
    int32_t cols = guess ? f->rank : f->hidden;
    const float *bias = vector_at(t, guess ? f->score_bias : f->deciding_bias);
    const em_linear deciding = {.weights = t->bundle + (guess ? f->score : f->deciding) +
                                           row / EM_LANES * em_group_bytes(dtype, cols, EM_LANES),
                                .bias = bias ? bias + row : NULL,
                                .out = t->h + row,
                                .out_stride = f->intermediate,
                                .dtype = dtype,
                                .rows = (int32_t)rows,
                                .cols = cols};
    int32_t status = em_linears(core, &deciding, 1, guess ? t->reduced : t->x.x, t->n_tokens);
    if (status != EM_OK) return status;
    t->first_chunk = first;
    em_core_run(core, find_active, t, end - first, rows * t->n_tokens * 8);
    for (int64_t c = first; c < end; c++) {
        memmove(t->active + t->n, t->active + c * EM_NEURON_CHUNK, (size_t)t->counts[c] * 4);
        t->n += t->counts[c];
    }
    return EM_OK;
}

/* Finds what is active, and starts reading it as far as there is room: `*wanted` of them. */
static int32_t decide(em_core *core, neurons_task *t, const em_neuron_rows *from, int32_t *wanted) {
    int64_t chunks = chunks_of(t->is), parts = from->rows ? em_min(EM_NEURON_PARTS, chunks) : 1;
    int32_t room = from->rows ? em_rows_room(from->rows, from->set) : 0;
    /* Where a turn before had more than there is room for, this one will too. */
    bool fits = from->rows && !em_rows_crowded(from->rows, from->set);
    int32_t status = predicts(t->is) ? reduce(core, t) : EM_OK;
    if (status != EM_OK) return status;
    for (int64_t p = 0; p < parts; p++) {
        int32_t before = t->n;
        status = decide_chunks(core, t, p * chunks / parts, (p + 1) * chunks / parts);
        if (status != EM_OK) return status;
        fits = fits && t->n <= room;
        if (!fits || t->n == before) continue;
        int64_t started = em_now_ns(), waited = 0;
        em_rows_want(from->rows, t->active + before, t->n - before, &waited);
        *wanted = t->n;
        note_taking(core, em_now_ns() - started, waited);
    }
    if (from->rows) em_rows_crowd(from->rows, from->set, t->n > room);
    em_core_run(core, gather_token, t, t->n_tokens, (int64_t)t->n * t->n_tokens * 4);
    return EM_OK;
}

/* ---- their rows ------------------------------------------------------------------------------ */

/* What a thread has for itself: a group of rows, what they make, and of which tokens; or a token's
 * rows and their weights. */
typedef struct {
    uint8_t *group;
    float *made;          /* [n_tokens, EM_LANES] */
    int32_t *tokens;      /* [n_tokens] */
    const uint8_t **rows; /* [intermediate] */
    float *weights;       /* [intermediate] */
} own_scratch;

static own_scratch scratch_of(const neurons_task *t, int32_t thread) {
    uint64_t n = (uint64_t)t->n_tokens, width = (uint64_t)t->is->intermediate;
    uint64_t size = own_bytes(t->n_tokens, t->is->hidden, t->is->intermediate);
    em_arena arena = {t->own + (uint64_t)thread * size, 0, size};
    own_scratch own;
    own.group = em_arena_take(&arena, (uint64_t)em_group_bytes(EM_F32, t->is->hidden, EM_LANES));
    own.made = em_arena_take(&arena, n * EM_LANES * 4);
    own.tokens = em_arena_take(&arena, n * 4);
    own.rows = em_arena_take(&arena, width * sizeof *own.rows);
    own.weights = em_arena_take(&arena, width * 4);
    return own;
}

static em_gathered gathered(const neurons_task *t, int32_t first, int32_t n) {
    return (em_gathered){t->rows + first, n, t->is->dtype, t->plane};
}

/* What n neurons from `first` on, up to 16, make of each token that takes one of them: products
 * with columns [at, at + hidden) of their rows. Gives how many tokens. */
static int32_t multiply_rows(const neurons_task *t, const own_scratch *own, int64_t first,
                             int32_t n, int64_t at, const float *bias) {
    int64_t width = t->is->intermediate;
    em_gathered rows = gathered(t, (int32_t)(first - t->first), n);
    float biases[EM_LANES];
    int32_t taken = 0;
    for (int32_t j = 0; bias && j < n; j++) biases[j] = bias[t->active[first + j]];
    for (int32_t i = 0; i < t->n_tokens; i++) {
        bool any = false;
        for (int32_t j = 0; j < n; j++) any |= t->h[i * width + first + j] != 0;
        own->tokens[taken] = i;
        taken += any;
    }
    em_acts x = t->x;
    x.rows = own->tokens;
    em_out made = {own->made, bias ? biases : NULL, EM_LANES, n, 0};
    t->kernels->gather_rows(&rows, at, t->is->hidden, own->group);
    t->kernels->product[t->is->dtype](own->group, 0, 1, &x, taken, &made);
    return taken;
}

/* h = activation(decide(x)) of what was predicted, and where there is a gate h *= up(x). */
static void multiply_group(void *arg, int64_t item, int32_t thread) {
    neurons_task *t = arg;
    const em_neurons *f = t->is;
    int64_t first = t->first + item * EM_LANES;
    int32_t n = (int32_t)em_min(EM_LANES, t->first + t->n - first);
    own_scratch own = scratch_of(t, thread);
    if (predicts(f)) {
        int32_t taken = multiply_rows(t, &own, first, n, 0, vector_at(t, f->deciding_bias));
        for (int32_t i = 0; i < taken; i++) {
            float *h = t->h + (int64_t)own.tokens[i] * f->intermediate + first;
            float *made = own.made + i * EM_LANES;
            activate(t, made, n);
            for (int32_t j = 0; j < n; j++) h[j] = h[j] != 0 ? made[j] : 0;
        }
    }
    if (!f->gated) return;
    int64_t up = (int64_t)(f->row_parts - 2) * f->hidden;
    int32_t taken = multiply_rows(t, &own, first, n, up, vector_at(t, f->up_bias));
    for (int32_t i = 0; i < taken; i++) {
        float *h = t->h + (int64_t)own.tokens[i] * f->intermediate + first;
        for (int32_t j = 0; j < n; j++) h[j] = h[j] != 0 ? h[j] * own.made[i * EM_LANES + j] : 0;
    }
}

static int64_t down_at(const em_neurons *f) { return (int64_t)(f->row_parts - 1) * f->hidden; }

/* y += down(h) of one token, in so many columns that each thread has some. */
static void add_columns(void *arg, int64_t part, int32_t thread) {
    (void)thread;
    const neurons_task *t = arg;
    int64_t hidden = t->is->hidden, first = part * COLUMNS;
    em_gathered rows = gathered(t, 0, t->n);
    t->kernels->add_rows(&rows, down_at(t->is) + first, (int32_t)em_min(COLUMNS, hidden - first),
                         t->h + t->first, t->y + first);
}

/* y += down(h), where there are many tokens, of which each takes some of the rows. */
static void add_down(void *arg, int64_t token, int32_t thread) {
    const neurons_task *t = arg;
    const float *h = t->h + token * t->is->intermediate + t->first;
    own_scratch own = scratch_of(t, thread);
    em_gathered rows = {own.rows, 0, t->is->dtype, t->plane};
    for (int32_t i = 0; i < t->n; i++) {
        own.rows[rows.n] = t->rows[i];
        own.weights[rows.n] = h[i];
        rows.n += h[i] != 0; /* true of NaN */
    }
    t->kernels->add_rows(&rows, down_at(t->is), t->is->hidden, own.weights,
                         t->y + token * t->is->hidden);
}

static void add_token(void *arg, int64_t token, int32_t thread) {
    (void)thread;
    const neurons_task *t = arg;
    const float *bias = vector_at(t, t->is->down_bias);
    int32_t hidden = t->is->hidden;
    float *y = t->y + token * hidden;
    if (bias) t->kernels->axpy(y, 1, bias, hidden);
    t->kernels->axpy(t->out + token * hidden, 1, y, hidden);
}

/* `wanted`: these rows were asked for already. */
static int32_t take_rows(em_core *core, neurons_task *t, const em_neuron_rows *from, bool wanted) {
    const int32_t *ids = t->active + t->first;
    int64_t row_bytes = em_neuron_bytes(t->is), waited = 0, started = em_now_ns();
    if (!from->rows) {
        for (int32_t i = 0; i < t->n; i++)
            t->rows[i] = (const uint8_t *)from->resident +
                         (from->places ? (int64_t)from->places[ids[i]] : ids[i]) * row_bytes;
        return EM_OK;
    }
    int32_t status = wanted ? em_rows_finish(from->rows, ids, t->n, t->rows, &waited)
                            : em_rows_take(from->rows, from->set, ids, t->n, t->rows, &waited);
    note_taking(core, em_now_ns() - started, waited);
    return status;
}

/* What a turn cannot have at once it takes in rounds. Rows that are there stay all the while, and
 * the others go through what room is left: else each round would throw out what the next ones, and
 * those of the next turn, want. */
static int32_t next_round(neurons_task *t, const em_neuron_rows *from, int32_t active,
                          int32_t wanted) {
    const int32_t *ids = t->active + t->first;
    int32_t left = active - t->first;
    if (!from->rows) return left;
    if (t->first < wanted) return wanted;
    if (t->first == wanted) em_rows_keep(from->rows, from->set, ids, left);
    return em_rows_fit(from->rows, from->set, ids, left);
}

/* At first with the `wanted` ones of the active neurons, which are on their way. */
static int32_t run_rounds(em_core *core, neurons_task *t, const em_neuron_rows *from,
                          int32_t active, int32_t wanted) {
    int64_t hidden = t->is->hidden, parts = (hidden + COLUMNS - 1) / COLUMNS;
    int32_t status = EM_OK;
    for (t->first = 0; t->first < active && status == EM_OK; t->first += t->n) {
        t->n = next_round(t, from, active, wanted);
        status = take_rows(core, t, from, t->first < wanted);
        if (status != EM_OK) break;
        int64_t work = t->n * hidden * t->n_tokens;
        if (t->is->gated || predicts(t->is))
            em_core_run(core, multiply_group, t, (t->n + EM_LANES - 1) / EM_LANES, work);
        if (t->n_tokens == 1)
            em_core_run(core, add_columns, t, parts, work);
        else
            em_core_run(core, add_down, t, t->n_tokens, work);
    }
    if (from->rows && active > wanted) em_rows_keep(from->rows, from->set, NULL, 0);
    return status;
}

static int32_t write_down(em_core *core, const neurons_task *t, const em_neuron_rows *from,
                          int32_t active) {
    if (!from->rows) return EM_OK;
    int64_t started = em_now_ns();
    int32_t status = em_rows_write_down(from->rows, from->set, t->active, active, t->n_tokens);
    note_taking(core, em_now_ns() - started, 0);
    return status;
}

static bool valid(const em_neurons *f) {
    bool whole = !em_dtype_is_block(f->dtype) || f->hidden % EM_BLOCK == 0;
    int32_t most = f->gated ? 3 : 2, least = predicts(f) ? most : most - 1;
    bool decided = predicts(f)
                       ? f->score >= 0 && f->score_bias >= 0 && f->rank >= 1 &&
                             f->rank <= f->hidden && em_dtype_fits(f->predictor_dtype, f->rank)
                       : f->deciding >= 0 && em_dtype_fits(f->deciding_dtype, f->hidden);
    return f->hidden >= 1 && f->intermediate >= 1 && em_dtype_gathers(f->dtype) && whole &&
           decided && f->row_parts >= least && f->row_parts <= most && f->activation >= EM_SILU &&
           f->activation <= EM_RELU2 && f->threshold >= 0;
}

int32_t em_neurons_run(em_core *core, const em_neurons *f, const void *bundle,
                       const em_neuron_rows *rows, const float *x, int32_t n_tokens, float *out,
                       int64_t *used) {
    if (!valid(f) || n_tokens < 0) return EM_INVALID;
    if (n_tokens == 0) return EM_OK;
    uint64_t n = (uint64_t)n_tokens, width = (uint64_t)f->intermediate;
    neurons_task t = {.kernels = core->kernels,
                      .is = f,
                      .bundle = bundle,
                      .n_tokens = n_tokens,
                      .out = out,
                      .plane = em_scale_bytes(f->dtype, f->row_parts * f->hidden, 1)};
    t.x = (em_acts){.x = x, .cols = f->hidden, .blocks = (f->hidden + EM_BLOCK - 1) / EM_BLOCK};
    em_arena arena = em_core_arena(core);
    bool fits = em_acts_take(&arena, &t.x, n_tokens); /* first, as em_linears does below */
    t.h = em_arena_take(&arena, n * width * 4);
    t.reduced = em_arena_take(&arena, predicts(f) ? n * (uint64_t)f->rank * 4 : 0);
    t.y = em_arena_take(&arena, n * (uint64_t)f->hidden * 4);
    t.active = em_arena_take(&arena, width * 4);
    t.rows = em_arena_take(&arena, width * sizeof *t.rows);
    t.counts = em_arena_take(&arena, (width / EM_NEURON_CHUNK + 1) * 4);
    t.own = em_arena_take(&arena, (uint64_t)em_pool_threads(core->pool) *
                                      own_bytes(n_tokens, f->hidden, f->intermediate));
    if (!fits || !t.own || !t.reduced || !t.h || !t.y || !t.active || !t.rows || !t.counts)
        return EM_NO_MEMORY;

    memset(t.y, 0, n * (uint64_t)f->hidden * 4);
    int32_t wanted = 0, status = rows->rows ? em_rows_begin(rows->rows, rows->set) : EM_OK;
    if (status == EM_OK) status = decide(core, &t, rows, &wanted);
    if (status != EM_OK) {
        int64_t waited = 0;
        if (wanted > 0) em_rows_finish(rows->rows, NULL, 0, NULL, &waited);
        return status;
    }
    int32_t active = t.n;
    if ((f->gated || predicts(f)) && em_dtype_is_block(f->dtype))
        em_acts_quantize(core, &t.x, NULL, n_tokens);
    status = run_rounds(core, &t, rows, active, wanted);
    if (status == EM_OK) status = write_down(core, &t, rows, active);
    if (status != EM_OK) return status;
    em_core_run(core, add_token, &t, n_tokens, (int64_t)n_tokens * f->hidden * 2);
    *used = active;
    return EM_OK;
}
