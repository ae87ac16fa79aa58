/* Rotary embedding, the KV cache's rows, and attention over them. */
#include "core.h"

#include <math.h>

int32_t em_rope_table(const double *inv_freq, int32_t head_dim, int64_t position, int32_t n,
                      double scale, float *cos_out, float *sin_out) {
    if (head_dim < 2 || head_dim % 2 || position < 0 || n < 0) return EM_INVALID;
    int32_t half = head_dim / 2;
    for (int64_t i = 0; i < n; i++)
        for (int32_t j = 0; j < half; j++) {
            double angle = (double)(position + i) * inv_freq[j];
            cos_out[i * half + j] = (float)(cos(angle) * scale);
            sin_out[i * half + j] = (float)(sin(angle) * scale);
        }
    return EM_OK;
}

static int32_t padded_dim(const em_attention *a) {
    return (int32_t)em_round_up(a->head_dim, EM_LANES);
}

static bool valid(const em_attention *a, int64_t position, int32_t n) {
    return a->n_heads >= 1 && a->n_kv_heads >= 1 && a->n_heads % a->n_kv_heads == 0 &&
           a->head_dim >= 2 && a->head_dim % 2 == 0 && a->window >= 0 && position >= 0 && n >= 0 &&
           position + n <= a->context;
}

typedef struct {
    const em_kernels *kernels;
    const em_attention *a;
    float *q;
    const float *k, *v, *cos_table, *sin_table;
    int64_t position;
    float *out;
    float *thread_rows; /* [threads, 2, padded] */
} attention_task;

/* The cache's row of one key, as f16, zero beyond head_dim. */
static void store_row(const em_kernels *kernels, const float *x, int32_t dim, int32_t padded,
                      uint16_t *row) {
    kernels->store_f16(x, dim, row);
    for (int32_t d = dim; d < padded; d++) row[d] = 0;
}

static void store_token(void *arg, int64_t token, int32_t thread) {
    const attention_task *t = arg;
    const em_attention *a = t->a;
    int32_t dim = a->head_dim, padded = padded_dim(a);
    const float *c = t->cos_table + token * (dim / 2), *s = t->sin_table + token * (dim / 2);
    float *rotated = t->thread_rows + (int64_t)thread * 2 * padded;
    for (int64_t head = 0; head < a->n_heads; head++) {
        float *q = t->q + (token * a->n_heads + head) * dim;
        t->kernels->rotate(q, c, s, dim, q);
    }
    for (int64_t head = 0; head < a->n_kv_heads; head++) {
        int64_t from = (token * a->n_kv_heads + head) * dim;
        int64_t to = (head * a->context + t->position + token) * padded;
        t->kernels->rotate(t->k + from, c, s, dim, rotated);
        store_row(t->kernels, rotated, dim, padded, a->k_cache + to);
        store_row(t->kernels, t->v + from, dim, padded, a->v_cache + to);
    }
}

static float *take_thread_rows(em_core *core, const em_attention *a) {
    em_arena arena = em_core_arena(core);
    uint64_t rows = 2 * (uint64_t)em_pool_threads(core->pool);
    return em_arena_take(&arena, rows * (uint64_t)padded_dim(a) * sizeof(float));
}

int32_t em_attention_store(em_core *core, const em_attention *a, float *q, const float *k,
                           const float *v, const float *cos_table, const float *sin_table,
                           int64_t position, int32_t n) {
    if (!valid(a, position, n)) return EM_INVALID;
    attention_task task = {core->kernels, a,         q,        k,    v,
                           cos_table,     sin_table, position, NULL, take_thread_rows(core, a)};
    if (!task.thread_rows) return EM_NO_MEMORY;
    int64_t floats = (int64_t)n * (a->n_heads + 2 * a->n_kv_heads) * a->head_dim;
    em_core_run(core, store_token, &task, n, floats * 4);
    return EM_OK;
}

static void attend_item(void *arg, int64_t item, int32_t thread) {
    const attention_task *t = arg;
    const em_attention *a = t->a;
    int32_t dim = a->head_dim, padded = padded_dim(a);
    int64_t token = item / a->n_heads, head = item % a->n_heads;
    int64_t kv_head = head / (a->n_heads / a->n_kv_heads);
    int64_t end = t->position + token + 1;
    int64_t begin = a->window > 0 ? em_max(0, end - a->window) : 0;
    float *q = t->thread_rows + (int64_t)thread * 2 * padded, *result = q + padded;
    float scale = 1.0f / sqrtf((float)dim);
    for (int32_t d = 0; d < padded; d++) q[d] = d < dim ? t->q[item * dim + d] * scale : 0;
    int64_t cache = kv_head * a->context * padded;
    t->kernels->attend(q, a->k_cache + cache, a->v_cache + cache, begin, end, padded, result);
    for (int32_t d = 0; d < dim; d++) t->out[item * dim + d] = result[d];
}

int32_t em_attention_run(em_core *core, const em_attention *a, const float *q, int64_t position,
                         int32_t n, float *out) {
    if (!valid(a, position, n)) return EM_INVALID;
    attention_task task = {core->kernels, a,    (float *)q, NULL, NULL,
                           NULL,          NULL, position,   out,  take_thread_rows(core, a)};
    if (!task.thread_rows) return EM_NO_MEMORY;
    int64_t keys = a->window > 0 ? em_min(a->window, position + n) : position + n;
    int64_t items = (int64_t)n * a->n_heads;
    em_core_run(core, attend_item, &task, items, items * keys * a->head_dim * 2);
    return EM_OK;
}
