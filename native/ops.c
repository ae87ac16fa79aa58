/* Operations over a core: arguments are checked here, then the pool runs kernels. */
#include "core.h"
#include "stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the core ---------------------------------------------------------------------------- */

int32_t em_core_open(int32_t n_threads, const char *isa, em_core **out) {
    int32_t status;
    const em_kernels *kernels = em_kernels_pick(isa, &status);
    if (!kernels) return status;
    em_core *core = calloc(1, sizeof *core);
    if (!core) return EM_NO_MEMORY;
    core->kernels = kernels;
    status = em_pool_open(n_threads, &core->pool);
    if (status != EM_OK) {
        free(core);
        return status;
    }
    *out = core;
    return EM_OK;
}

void em_core_close(em_core *core) {
    if (!core) return;
    em_pool_close(core->pool);
    free(core->scratch);
    free(core);
}

const char *em_core_isa(const em_core *core) { return core->kernels->name; }

int32_t em_core_reserve(em_core *core, uint64_t bytes) {
    if (bytes <= core->scratch_bytes) return EM_OK;
    if (bytes > UINT64_MAX / 2) return EM_NO_MEMORY;
    uint8_t *grown = aligned_alloc(EM_ALIGN, em_arena_cost(bytes));
    if (!grown) return EM_NO_MEMORY;
    free(core->scratch);
    core->scratch = grown;
    core->scratch_bytes = em_arena_cost(bytes);
    return EM_OK;
}

void em_core_trim(em_core *core, uint64_t bytes) {
    if (bytes < core->scratch_bytes)
        em_pages_drop(core->scratch + bytes, core->scratch_bytes - bytes);
}

em_core_times em_core_clocks(const em_core *core) { return core->times; }

/* Some microseconds of one thread's work, about what it takes to share it with another. */
#define WORTH_SHARING 100000

void em_core_run(em_core *core, em_task *task, void *arg, int64_t n_items, int64_t work) {
    if (work >= WORTH_SHARING)
        em_pool_run(core->pool, task, arg, n_items);
    else
        for (int64_t item = 0; item < n_items; item++) task(arg, item, 0);
}

/* ---- store matrices ---------------------------------------------------------------------- */

/* Columns of a block; of one row's block the bytes of its scales, and of all else (dtypes.py). */
static const struct {
    int16_t cols, scales, quants;
} FORMATS[EM_DTYPES] = {
    [EM_F32] = {1, 0, 4},      [EM_F16] = {1, 0, 2},      [EM_BF16] = {1, 0, 2},
    [EM_Q8_0] = {32, 2, 32},   [EM_Q4_0] = {32, 2, 16},   [EM_Q4_1] = {32, 4, 16},
    [EM_Q5_0] = {32, 2, 20},   [EM_Q5_1] = {32, 4, 20},   [EM_Q2_K] = {256, 4, 80},
    [EM_Q3_K] = {256, 2, 108}, [EM_Q4_K] = {256, 4, 140}, [EM_Q5_K] = {256, 4, 172},
    [EM_Q6_K] = {256, 2, 208}, [EM_IQ4_NL] = {32, 2, 16}, [EM_IQ4_XS] = {256, 4, 132},
    [EM_MXFP4] = {32, 1, 16},
};

static int64_t plane_bytes(int32_t dtype, int32_t cols, int32_t lanes, int64_t of_block) {
    int64_t blocks = (cols + FORMATS[dtype].cols - 1) / FORMATS[dtype].cols;
    return em_round_up(blocks * of_block * lanes, 4LL * lanes);
}

int64_t em_scale_bytes(int32_t dtype, int32_t cols, int32_t lanes) {
    return plane_bytes(dtype, cols, lanes, FORMATS[dtype].scales);
}

int64_t em_group_bytes(int32_t dtype, int32_t cols, int32_t lanes) {
    return em_scale_bytes(dtype, cols, lanes) +
           plane_bytes(dtype, cols, lanes, FORMATS[dtype].quants);
}

bool em_dtype_fits(int32_t dtype, int32_t cols) {
    if (dtype < 0 || dtype >= EM_DTYPES || cols < 1) return false;
    return FORMATS[dtype].cols <= EM_BLOCK || cols % FORMATS[dtype].cols == 0;
}

/* ---- products ---------------------------------------------------------------------------- */

int64_t em_chunk_groups(const em_core *core, int64_t groups) {
    int64_t threads = em_pool_threads(core->pool);
    return threads == 1 ? em_max(groups, 1) : em_max(1, groups / (threads * 8));
}

uint64_t em_acts_bytes(int64_t n, int32_t cols) {
    uint64_t blocks = (uint64_t)n * (uint64_t)((cols + EM_BLOCK - 1) / EM_BLOCK);
    return em_arena_cost(blocks * EM_BLOCK) + 3 * em_arena_cost(blocks * 4);
}

em_acts em_acts_from(em_acts acts, int64_t row) {
    if (acts.x) acts.x += row * em_acts_stride(&acts);
    if (!acts.q) return acts;
    acts.q += row * acts.blocks * EM_BLOCK;
    acts.scale += row * acts.blocks;
    acts.sum += row * acts.blocks;
    acts.first += row * acts.blocks;
    return acts;
}

bool em_acts_take(em_arena *arena, em_acts *acts, int64_t n) {
    uint64_t blocks = (uint64_t)n * (uint64_t)acts->blocks;
    acts->q = em_arena_take(arena, blocks * EM_BLOCK);
    acts->scale = em_arena_take(arena, blocks * 4);
    acts->sum = em_arena_take(arena, blocks * 4);
    acts->first = em_arena_take(arena, blocks * 4);
    return acts->q && acts->scale && acts->sum && acts->first;
}

typedef struct {
    const em_kernels *kernels;
    const em_acts *acts;
    const int32_t *rows;
} quantize_task;

static void quantize_row(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    quantize_task *task = arg;
    const em_acts *a = task->acts;
    int64_t row = task->rows ? task->rows[item] : item, at = row * a->blocks;
    task->kernels->quantize(a->x + row * em_acts_stride(a), a->cols, (int8_t *)a->q + at * EM_BLOCK,
                            (float *)a->scale + at, (int32_t *)a->sum + at,
                            a->first ? (int32_t *)a->first + at : NULL);
}

void em_acts_quantize(em_core *core, const em_acts *acts, const int32_t *rows, int64_t n) {
    quantize_task task = {core->kernels, acts, rows};
    em_core_run(core, quantize_row, &task, n, n * acts->cols * 4);
}

uint64_t em_linear_scratch(int32_t n_tokens, int32_t cols) { return em_acts_bytes(n_tokens, cols); }

typedef struct {
    const em_kernels *kernels;
    const em_linear *linears;
    int32_t n_linears, n_tokens;
    int64_t chunk; /* groups an item takes */
    const em_acts *acts;
} linears_task;

static int64_t groups_of(const em_linear *l) { return (l->rows + EM_LANES - 1) / EM_LANES; }

static void linear_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const linears_task *task = arg;
    const em_linear *l = task->linears;
    for (;; l++) {
        int64_t items = (groups_of(l) + task->chunk - 1) / task->chunk;
        if (item < items) break;
        item -= items;
    }
    int64_t first = item * task->chunk, n = em_min(task->chunk, groups_of(l) - first);
    em_out out = {l->out, l->bias, l->out_stride, l->rows, l->accumulate};
    task->kernels->product[l->dtype](l->weights, (int32_t)first, (int32_t)n, task->acts,
                                     task->n_tokens, &out);
}

int32_t em_linears(em_core *core, const em_linear *linears, int32_t n_linears, const float *x,
                   int32_t n_tokens) {
    if (n_linears < 1 || n_tokens < 0) return EM_INVALID;
    int32_t cols = linears[0].cols;
    int64_t groups = 0, items = 0;
    bool blocks = false;
    for (int32_t i = 0; i < n_linears; i++) {
        const em_linear *l = &linears[i];
        if (l->cols != cols || l->rows < 1 || !em_dtype_fits(l->dtype, l->cols)) return EM_INVALID;
        blocks |= em_dtype_is_block(l->dtype);
        groups += groups_of(l);
    }
    em_acts acts = {.x = x, .cols = cols, .blocks = (cols + EM_BLOCK - 1) / EM_BLOCK};
    em_arena arena = em_core_arena(core);
    if (blocks && !em_acts_take(&arena, &acts, n_tokens)) return EM_NO_MEMORY;
    if (n_tokens == 0) return EM_OK;
    if (blocks) em_acts_quantize(core, &acts, NULL, n_tokens);
    linears_task task = {core->kernels, linears, n_linears, n_tokens, em_chunk_groups(core, groups),
                         &acts};
    for (int32_t i = 0; i < n_linears; i++)
        items += (groups_of(&linears[i]) + task.chunk - 1) / task.chunk;
    em_core_run(core, linear_item, &task, items, groups * EM_LANES * cols * n_tokens);
    return EM_OK;
}

/* ---- norms, tables, small things --------------------------------------------------------- */

typedef struct {
    const em_kernels *kernels;
    const float *x, *weight, *bias;
    float eps;
    int32_t n_cols;
    float *out;
} norm_task;

static void norm_row(void *arg, int64_t row, int32_t thread) {
    (void)thread;
    const norm_task *t = arg;
    int64_t at = row * t->n_cols;
    if (t->bias)
        t->kernels->layer_norm(t->x + at, t->weight, t->bias, t->eps, t->n_cols, t->out + at);
    else
        t->kernels->rms_norm(t->x + at, t->weight, t->eps, t->n_cols, t->out + at);
}

int32_t em_norm(em_core *core, const float *x, const float *weight, const float *bias, float eps,
                int32_t n_rows, int32_t n_cols, float *out) {
    if (n_rows < 0 || n_cols < 1) return EM_INVALID;
    norm_task task = {core->kernels, x, weight, bias, eps, n_cols, out};
    em_core_run(core, norm_row, &task, n_rows, (int64_t)n_rows * n_cols * 2);
    return EM_OK;
}

int32_t em_embed(em_core *core, const uint64_t *addresses, int32_t rows_per_bundle, int32_t dtype,
                 int32_t lanes, int32_t cols, const int32_t *ids, int32_t n, float *out) {
    if (rows_per_bundle < 1 || !em_dtype_fits(dtype, cols) || (lanes != 1 && lanes != EM_LANES) ||
        cols < 1 || n < 0)
        return EM_INVALID;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0) return EM_INVALID;
    for (int32_t i = 0; i < n; i++) {
        const uint8_t *bundle = (const uint8_t *)(uintptr_t)addresses[ids[i] / rows_per_bundle];
        if (!bundle) continue;
        core->kernels->unpack_row(bundle, dtype, lanes, cols, ids[i] % rows_per_bundle,
                                  out + (int64_t)i * cols);
    }
    return EM_OK;
}

int32_t em_clamp(float *x, int64_t n, float limit) {
    if (n < 0 || !(limit >= 0)) return EM_INVALID;
    for (int64_t i = 0; i < n; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
    return EM_OK;
}

/* ---- elements, whole runs of them ---- */

typedef struct {
    const em_kernels *kernels;
    float *x;
    const float *y;
    int64_t n;
    float limit, factor;
} elements_task;

#define ELEMENTS 4096 /* an item takes */

static int32_t elements_left(const elements_task *t, int64_t item) {
    return (int32_t)em_min(ELEMENTS, t->n - item * ELEMENTS);
}

static void scale_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const elements_task *t = arg;
    t->kernels->scale(t->x + item * ELEMENTS, elements_left(t, item), t->factor);
}

static void cap_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const elements_task *t = arg;
    t->kernels->cap(t->x + item * ELEMENTS, elements_left(t, item), t->limit);
}

static void add_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const elements_task *t = arg;
    int64_t at = item * ELEMENTS;
    t->kernels->axpy(t->x + at, t->factor, t->y + at, elements_left(t, item));
}

static void run_elements(em_core *core, em_task *task, elements_task *t, int64_t cost) {
    t->kernels = core->kernels;
    em_core_run(core, task, t, (t->n + ELEMENTS - 1) / ELEMENTS, t->n * cost);
}

int32_t em_scale(em_core *core, float *x, int64_t n, float factor) {
    if (n < 0) return EM_INVALID;
    run_elements(core, scale_item, &(elements_task){.x = x, .n = n, .factor = factor}, 1);
    return EM_OK;
}

int32_t em_cap(em_core *core, float *x, int64_t n, float limit) {
    if (n < 0 || !(limit > 0)) return EM_INVALID;
    run_elements(core, cap_item, &(elements_task){.x = x, .n = n, .limit = limit}, 8);
    return EM_OK;
}

int32_t em_add(em_core *core, float *out, const float *x, int64_t n, float factor) {
    if (n < 0) return EM_INVALID;
    run_elements(core, add_item, &(elements_task){.x = out, .y = x, .n = n, .factor = factor}, 2);
    return EM_OK;
}

int32_t em_sigmoid(em_core *core, float *x, int32_t n) {
    if (n < 0) return EM_INVALID;
    core->kernels->sigmoid(x, n);
    return EM_OK;
}

typedef struct {
    const em_kernels *kernels;
    float *x;
    int32_t n_cols;
} softmax_task;

static void softmax_row(void *arg, int64_t row, int32_t thread) {
    (void)thread;
    const softmax_task *t = arg;
    t->kernels->softmax(t->x + row * t->n_cols, t->n_cols);
}

int32_t em_softmax(em_core *core, float *x, int32_t n_rows, int32_t n_cols) {
    if (n_rows < 0 || n_cols < 1) return EM_INVALID;
    softmax_task task = {core->kernels, x, n_cols};
    em_core_run(core, softmax_row, &task, n_rows, (int64_t)n_rows * n_cols * 8);
    return EM_OK;
}

int32_t em_quantize(em_core *core, const float *x, int32_t n_rows, int32_t n_cols, int8_t *q,
                    float *scale, int32_t *sum) {
    if (n_rows < 0 || n_cols < 1) return EM_INVALID;
    em_acts acts = {.x = x, .q = q, .scale = scale, .sum = sum, .cols = n_cols};
    acts.blocks = (n_cols + EM_BLOCK - 1) / EM_BLOCK;
    em_acts_quantize(core, &acts, NULL, n_rows);
    return EM_OK;
}

/* ---- what bounds products ---------------------------------------------------------------- */

typedef struct {
    const em_kernels *kernels;
    const uint8_t *data;
    uint64_t bytes;
    uint64_t sum;
} read_task;

#define READ_CHUNK (1u << 20)

static void read_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    read_task *t = arg;
    uint64_t from = (uint64_t)item * READ_CHUNK;
    uint64_t n = (uint64_t)em_min(READ_CHUNK, (int64_t)(t->bytes - from));
    __atomic_fetch_add(&t->sum, t->kernels->read_bytes(t->data + from, n), __ATOMIC_RELAXED);
}

uint64_t em_read_bytes(em_core *core, const void *data, uint64_t bytes) {
    read_task task = {core->kernels, data, bytes, 0};
    em_pool_run(core->pool, read_item, &task, (int64_t)((bytes + READ_CHUNK - 1) / READ_CHUNK));
    return task.sum;
}

typedef struct {
    const em_kernels *kernels;
    int32_t dtype;
    int64_t done;
} peak_task;

static void peak_item(void *arg, int64_t item, int32_t thread) {
    (void)item, (void)thread;
    peak_task *t = arg;
    float sum;
    __atomic_fetch_add(&t->done, t->kernels->peak(t->dtype, &sum), __ATOMIC_RELAXED);
}

int64_t em_peak(em_core *core, int32_t dtype, int32_t items) {
    if (!em_dtype_fits(dtype, 256) || items < 0) return -1;
    peak_task task = {core->kernels, dtype, 0};
    em_pool_run(core->pool, peak_item, &task, items);
    return task.done;
}

/* ---- operations in a row ----------------------------------------------------------------- */

static int32_t route(em_core *core, const em_route_op *r, int32_t n) {
    *r->n_chosen =
        em_route(core, &r->router, r->logits, n, r->experts, r->first, r->tokens, r->weights);
    return *r->n_chosen < 0 ? EM_INVALID : EM_OK;
}

static int32_t attend(em_core *core, const em_attend_op *o, const em_attention *a, int64_t position,
                      int32_t n) {
    if (!a) return EM_INVALID;
    int32_t status =
        em_attention_store(core, a, o->q, o->k, o->v, o->cos_table, o->sin_table, position, n);
    return status != EM_OK ? status
                           : em_attention_run(core, a, o->sinks, o->q, position, n, o->out);
}

static int32_t run_op(em_core *core, const em_op *op, const em_attention *attention,
                      int64_t position, int32_t n) {
    const em_norm_op *norm = &op->norm;
    const em_elements_op *e = &op->elements;
    switch (op->kind) {
    case EM_OP_NORM:
        return em_norm(core, norm->x, norm->weight, norm->bias, norm->eps, n * norm->rows,
                       norm->cols, norm->out);
    case EM_OP_LINEARS:
        return em_linears(core, op->linears.items, op->linears.n_items, op->linears.x, n);
    case EM_OP_HEADS: return em_heads_run(core, &op->heads, n);
    case EM_OP_CLAMP: return em_clamp(e->x, (int64_t)n * e->cols, e->limit);
    case EM_OP_ATTEND: return attend(core, &op->attend, attention, position, n);
    case EM_OP_ROUTE: return route(core, &op->route, n);
    case EM_OP_SIGMOID: return em_sigmoid(core, e->x, n * e->cols);
    case EM_OP_SCALE: return em_scale(core, e->x, (int64_t)n * e->cols, e->factor);
    case EM_OP_CAP: return em_cap(core, e->x, (int64_t)n * e->cols, e->limit);
    case EM_OP_ADD: return em_add(core, e->x, e->y, (int64_t)n * e->cols, e->factor);
    case EM_OP_CLEAR: memset(e->x, 0, (size_t)n * (size_t)e->cols * sizeof *e->x); return EM_OK;
    case EM_OP_FFN: return em_stream_ffn(core, &op->ffn, n);
    case EM_OP_GATHER: return em_stream_gather(core, &op->gather, n);
    case EM_OP_TABLE: return em_stream_table(core, &op->table, n);
    case EM_OP_NEURONS: return em_stream_neurons(core, &op->neurons, n);
    default: return EM_INVALID;
    }
}

int32_t em_ops_run(em_core *core, em_op *ops, int32_t n_ops, const em_attention *attention,
                   int64_t position, int32_t n_tokens, int32_t *failed) {
    int64_t now = em_now_ns();
    for (int32_t i = 0; i < n_ops; i++) {
        int64_t started = now, aside = core->aside_ns;
        int32_t status = run_op(core, &ops[i], attention, position, n_tokens);
        now = em_now_ns();
        ops[i].spent_ns += now - started - (core->aside_ns - aside);
        if (status == EM_OK) continue;
        *failed = i;
        return status;
    }
    return EM_OK;
}
