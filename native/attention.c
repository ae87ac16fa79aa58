/* Rotary embedding, the KV cache's rows, and attention over them. */
#include "core.h"

#include <math.h>
#include <string.h>

int32_t em_rope_table(const double *inv_freq, int32_t dims, int64_t position, int32_t n,
                      double scale, float *cos_out, float *sin_out) {
    if (dims < 2 || dims % 2 || position < 0 || n < 0) return EM_INVALID;
    int32_t half = dims / 2;
    for (int64_t i = 0; i < n; i++)
        for (int32_t j = 0; j < half; j++) {
            double angle = (double)(position + i) * inv_freq[j];
            cos_out[i * half + j] = (float)(cos(angle) * scale);
            sin_out[i * half + j] = (float)(sin(angle) * scale);
        }
    return EM_OK;
}

/* ---- shapes ------------------------------------------------------------------------------ */

static int32_t padded_dim(int32_t kv_dtype, int32_t head_dim) {
    return (int32_t)em_round_up(head_dim, kv_dtype == EM_Q8_0 ? EM_BLOCK : EM_LANES);
}

int64_t em_kv_row_bytes(int32_t kv_dtype, int32_t head_dim) {
    int64_t padded = padded_dim(kv_dtype, head_dim);
    switch (kv_dtype) {
    case EM_F32: return padded * 4;
    case EM_F16: return padded * 2;
    default: return padded / EM_BLOCK * EM_KV_BLOCK_BYTES;
    }
}

/* A thread's rows: queries, what they find, queries as blocks (40 of the 128 bytes that 32 floats
 * have), and the keys or values of a span. With a latent, queries are in two parts, and so are
 * these rows; what they find is as long as one of them. */
enum { THREAD_ROWS = 3 * EM_QUERIES + EM_SPAN_ROWS };

uint64_t em_attention_scratch(int32_t n_threads, int32_t head_dim) {
    /* The most that any type takes, and what a latent beside what is rotated may have more. */
    uint64_t padded = (uint64_t)padded_dim(EM_Q8_0, head_dim) + EM_BLOCK;
    return (uint64_t)n_threads * THREAD_ROWS * padded * sizeof(float);
}

static bool valid(const em_attention *a, int64_t position, int32_t n) {
    bool known = a->kv_dtype == EM_F32 || a->kv_dtype == EM_F16 || a->kv_dtype == EM_Q8_0;
    return known && a->n_heads >= 1 && a->n_kv_heads >= 1 && a->n_heads % a->n_kv_heads == 0 &&
           a->head_dim >= 2 && a->head_dim % 2 == 0 && a->rotary >= 0 && a->rotary % 2 == 0 &&
           a->rotary <= a->head_dim && a->latent >= 0 &&
           (a->latent == 0 || (a->rotary > 0 && a->rotary + a->latent == a->head_dim)) &&
           a->window >= 0 && a->scale >= 0 && a->cap >= 0 && position >= 0 && n >= 0 &&
           position + n <= a->context && a->context % EM_LANES == 0;
}

typedef struct {
    const em_kernels *kernels;
    const em_attention *a;
    em_kept key, value; /* of all heads, together */
    int32_t n;
    int64_t position;
    float *thread_rows; /* [threads, thread_floats] */
    int64_t thread_floats;
    float *q;
    const float *k, *v, *cos_table, *sin_table; /* to store */
    const float *sinks;
    float *out;
    int32_t heads, parts, tokens, tiles; /* how items share the work */
} attention_task;

static em_kept kept(int32_t kv_dtype, const void *cache, int32_t numbers) {
    return (em_kept){cache, em_kv_row_bytes(kv_dtype, numbers), padded_dim(kv_dtype, numbers)};
}

static bool prepare(attention_task *t, em_core *core, const em_attention *a, int64_t position,
                    int32_t n) {
    em_arena arena = em_core_arena(core);
    t->kernels = core->kernels;
    t->a = a;
    t->key = kept(a->kv_dtype, a->k_cache, a->latent ? a->rotary : a->head_dim);
    t->value = kept(a->kv_dtype, a->v_cache, a->latent ? a->latent : a->head_dim);
    t->position = position;
    t->n = n;
    t->thread_floats = (int64_t)(em_attention_scratch(1, a->head_dim) / sizeof(float));
    t->thread_rows =
        em_arena_take(&arena, em_attention_scratch(em_pool_threads(core->pool), a->head_dim));
    return t->thread_rows != NULL;
}

static float *rows_of(const attention_task *t, int32_t thread) {
    return t->thread_rows + thread * t->thread_floats;
}

/* ---- storing ----------------------------------------------------------------------------- */

static void store_token(void *arg, int64_t token, int32_t thread) {
    const attention_task *t = arg;
    const em_attention *a = t->a;
    int32_t dim = a->head_dim, turns = a->rotary ? a->rotary : dim;
    int32_t k_dim = a->latent ? turns : dim, v_dim = a->latent ? a->latent : dim;
    const float *c = t->cos_table + token * (turns / 2), *s = t->sin_table + token * (turns / 2);
    float *rotated = rows_of(t, thread);
    for (int64_t head = 0; head < a->n_heads; head++) {
        float *q = t->q + (token * a->n_heads + head) * dim;
        t->kernels->rotate(q, c, s, turns, q);
    }
    for (int64_t head = 0; head < a->n_kv_heads; head++) {
        int64_t row = token * a->n_kv_heads + head, key = (t->position + token) % EM_LANES;
        int64_t at = head * a->context + t->position + token, group = at - key;
        const float *k = t->k + row * k_dim, *v = t->v + row * v_dim;
        t->kernels->rotate(k, c, s, turns, rotated);
        memcpy(rotated + turns, k + turns, (size_t)(k_dim - turns) * sizeof *rotated);
        t->kernels->store_key(rotated, k_dim, a->kv_dtype,
                              (uint8_t *)a->k_cache + group * t->key.row_bytes, key);
        t->kernels->store_value(v, v_dim, a->kv_dtype,
                                (uint8_t *)a->v_cache + at * t->value.row_bytes);
    }
}

int32_t em_attention_store(em_core *core, const em_attention *a, float *q, const float *k,
                           const float *v, const float *cos_table, const float *sin_table,
                           int64_t position, int32_t n) {
    if (!valid(a, position, n)) return EM_INVALID;
    attention_task task = {.q = q, .k = k, .v = v, .cos_table = cos_table, .sin_table = sin_table};
    if (!prepare(&task, core, a, position, n)) return EM_NO_MEMORY;
    int64_t floats = (int64_t)n * (a->n_heads + 2 * a->n_kv_heads) * a->head_dim;
    em_core_run(core, store_token, &task, n, floats * 4);
    return EM_OK;
}

/* ---- attending --------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Items take the query heads of one key/value head together, for several tokens: they read its keys
 * once. Where that makes few items, they take fewer tokens, then parts of the heads, until threads
 * find equal shares. */
static int64_t share(attention_task *t, int32_t threads) {
    int64_t group = t->a->n_heads / t->a->n_kv_heads, enough = threads > 1 ? 4 * threads : 1;
    int64_t heads = ceil_div(group, ceil_div(group, EM_QUERIES));
    int64_t tokens = em_min(t->n, EM_QUERIES / heads), items;
    for (;;) {
        t->heads = (int32_t)heads;
        t->parts = (int32_t)ceil_div(group, heads);
        t->tokens = (int32_t)tokens;
        t->tiles = (int32_t)ceil_div(t->n, tokens);
        items = (int64_t)t->a->n_kv_heads * t->tiles * t->parts;
        if (items >= enough || heads * tokens == 1) return items;
        if (tokens == 1 && items % threads == 0) return items;
        if (tokens > 1)
            tokens = (tokens + 1) / 2;
        else
            heads = em_min(heads - 1, ceil_div(group, t->parts + 1));
    }
}

static int64_t first_key(const attention_task *t, int64_t token) {
    int64_t end = t->position + token + 1;
    return t->a->window > 0 ? em_max(0, end - t->a->window) : 0;
}

/* Tokens [token, token + n) see keys from the same one on. */
static void attend_heads(const attention_task *t, int32_t thread, int64_t kv_head, int64_t head,
                         int32_t heads, int64_t token, int64_t n) {
    const em_attention *a = t->a;
    const int32_t padded = t->key.padded, v_padded = t->value.padded;
    const int32_t k_dim = a->latent ? a->rotary : a->head_dim;
    const int32_t v_dim = a->latent ? a->latent : a->head_dim;
    float *q = rows_of(t, thread), *out = q + EM_QUERIES * padded;
    float *latents = out + EM_QUERIES * v_padded;
    float *scale = a->latent ? latents + EM_QUERIES * v_padded : latents;
    em_acts acts = {.x = q, .cols = padded, .blocks = padded / EM_BLOCK, .scale = scale};
    int32_t *sum = (int32_t *)(scale + EM_QUERIES * acts.blocks);
    int8_t *quants = (int8_t *)(sum + EM_QUERIES * acts.blocks);
    acts.sum = sum;
    acts.q = quants;
    em_queries queries = {
        .acts = acts,
        .keys = t->key,
        .values = t->value,
        .begin = first_key(t, token),
        .end = t->position + token + 1,
        .n_rows = (int32_t)n * heads,
        .heads = heads,
        .dtype = a->kv_dtype,
        .cap = a->cap,
        .sinks = t->sinks ? t->sinks + head : NULL,
        .latents = a->latent ? latents : NULL,
        .block = scale + EM_QUERIES * padded,
        .out = out,
    };
    queries.keys.rows += kv_head * a->context * t->key.row_bytes;
    queries.values.rows += kv_head * a->context * t->value.row_bytes;
    const float shrink = a->scale > 0 ? a->scale : 1.0f / sqrtf((float)a->head_dim);
    for (int64_t r = 0; r < queries.n_rows; r++) {
        int64_t row = (token + r / heads) * a->n_heads + head + r % heads;
        const float *from = t->q + row * a->head_dim;
        for (int32_t d = 0; d < padded; d++) q[r * padded + d] = d < k_dim ? from[d] * shrink : 0;
        for (int32_t d = 0; a->latent && d < v_padded; d++)
            latents[r * v_padded + d] = d < v_dim ? from[k_dim + d] * shrink : 0;
        int64_t at = r * acts.blocks;
        if (a->kv_dtype == EM_Q8_0)
            t->kernels->quantize(q + r * padded, padded, quants + at * EM_BLOCK, scale + at,
                                 sum + at, NULL);
    }
    t->kernels->attend(&queries);
    for (int64_t r = 0; r < queries.n_rows; r++) {
        int64_t row = (token + r / heads) * a->n_heads + head + r % heads;
        memcpy(t->out + row * a->head_dim, out + r * v_padded, (size_t)v_dim * sizeof *out);
    }
}

static void attend_item(void *arg, int64_t item, int32_t thread) {
    const attention_task *t = arg;
    int64_t part = item % t->parts, tile = item / t->parts % t->tiles;
    int64_t kv_head = item / t->parts / t->tiles, group = t->a->n_heads / t->a->n_kv_heads;
    int64_t head = part * t->heads, heads = em_min(t->heads, group - head);
    int64_t token = tile * t->tokens, stop = em_min(t->n, token + t->tokens);
    for (int64_t next; token < stop; token = next) {
        for (next = token + 1; next < stop && first_key(t, next) == first_key(t, token);) next++;
        attend_heads(t, thread, kv_head, kv_head * group + head, (int32_t)heads, token,
                     next - token);
    }
}

int32_t em_attention_run(em_core *core, const em_attention *a, const float *sinks, const float *q,
                         int64_t position, int32_t n, float *out) {
    if (!valid(a, position, n)) return EM_INVALID;
    attention_task task = {.q = (float *)q, .sinks = sinks, .out = out};
    if (!prepare(&task, core, a, position, n)) return EM_NO_MEMORY;
    if (n == 0) return EM_OK;
    int64_t keys = a->window > 0 ? em_min(a->window, position + n) : position + n;
    int64_t items = share(&task, em_pool_threads(core->pool));
    em_core_run(core, attend_item, &task, items, (int64_t)n * a->n_heads * keys * a->head_dim * 2);
    return EM_OK;
}
