/* Attention over the rows of a KV cache: a part of kernels.c, after its words.
 *
 * Each query is on its own: which others share its keys changes what is unpacked when, but not one
 * operation on it. Keys and values become floats first, a block of 16 at a time. */

/* ---- rows of the cache ------------------------------------------------------------------- */

static void store_f16(const float *x, int32_t n, uint16_t *out) {
    for (int32_t i = 0; i < n; i += EM_LANES) {
        uint16_t lane[EM_LANES];
        vf_store_f16(lane, load_part(x + i, n - i, 0));
        for (int64_t j = 0; j < em_min(EM_LANES, n - i); j++) out[i + j] = lane[j];
    }
}

/* Blocks of an f16 scale and 32 quants, those of `quantize`; zeros beyond n. */
static void store_q8(const float *x, int32_t n, uint8_t *row) {
    for (int32_t i = 0; i < n; i += EM_BLOCK, row += EM_KV_BLOCK_BYTES) {
        float scale;
        int32_t sum;
        uint16_t half;
        quantize(x + i, (int32_t)em_min(EM_BLOCK, n - i), (int8_t *)row + 2, &scale, &sum);
        store_f16(&scale, 1, &half);
        memcpy(row, &half, 2);
    }
}

static void store_kv(const float *x, int32_t n, int32_t dtype, void *row) {
    int64_t stored = (int64_t)n * (dtype == EM_F32 ? 4 : 2);
    switch (dtype) {
    case EM_Q8_0: store_q8(x, n, row); return;
    case EM_F16: store_f16(x, n, row); break;
    default: memcpy(row, x, (size_t)stored);
    }
    memset((uint8_t *)row + stored, 0, (size_t)(em_kv_row_bytes(dtype, n) - stored));
}

/* 16 numbers of a row. */
EM_INLINE vf load_kv(const uint8_t *row, int64_t d, const int32_t dtype) {
    switch (dtype) {
    case EM_F32: return vf_load((const float *)row + d);
    case EM_F16: return vf_load_f16((const uint16_t *)row + d);
    default: row += d / EM_BLOCK * EM_KV_BLOCK_BYTES;
    }
    vi quants = vi_load_i8((const int8_t *)row + 2 + d % EM_BLOCK);
    return vf_mul(vf_from_vi(quants), vf_set1_f16(row));
}

/* n rows of the cache as floats [n, padded], in s->block. */
EM_INLINE void unpack_rows(const em_queries *s, const uint8_t *rows, int64_t n,
                           const int32_t dtype) {
    const int64_t block_bytes = dtype == EM_F16 ? 2 * EM_BLOCK : EM_KV_BLOCK_BYTES;
    const int64_t count = n * s->padded;
    int64_t i = 0;
    for (; i + EM_BLOCK <= count; i += EM_BLOCK, rows += block_bytes) {
        vf a = load_kv(rows, 0, dtype), b = load_kv(rows, EM_LANES, dtype);
        vf_store(s->block + i, a);
        vf_store(s->block + i + EM_LANES, b);
    }
    if (i < count) vf_store(s->block + i, load_kv(rows, 0, dtype));
}

/* Rows as the loops below read them. */
typedef struct {
    const uint8_t *first;
    int64_t bytes; /* from one to the next */
} kv_rows;

/* Rows that will be read soon; whether there are any does not matter. */
EM_INLINE void expect_rows(const em_queries *s, const uint8_t *cache, int64_t key) {
    const uint8_t *row = cache + key * s->row_bytes;
    for (int64_t i = 0; i < EM_LANES * s->row_bytes; i += EM_ALIGN) __builtin_prefetch(row + i);
}

/* n rows of the cache, where they are if they are of `dtype`, else unpacked to floats. */
EM_INLINE kv_rows rows_at(const em_queries *s, const uint8_t *cache, int64_t key, int64_t n,
                          const int32_t dtype) {
    const uint8_t *row = cache + key * s->row_bytes;
    if (s->dtype == dtype) return (kv_rows){row, s->row_bytes};
    if (s->dtype == EM_F16)
        unpack_rows(s, row, n, EM_F16);
    else
        unpack_rows(s, row, n, EM_Q8_0);
    return (kv_rows){(const uint8_t *)s->block, s->padded * (int64_t)sizeof(float)};
}

/* ---- attention --------------------------------------------------------------------------- */

/* Registers hold the sums of ATTENTION_TILE queries and as many keys, or chunks of values; or twice
 * as many of one query. */
#define ACROSS(rows) ((rows) == 1 ? 2 * ATTENTION_TILE : ATTENTION_TILE)

/* sum[16 r + j] = the lanes of query r times key j, not yet added up. */
EM_INLINE void dot_tile(const float *q, kv_rows k, int64_t padded, const int32_t dtype,
                        const int rows, const int keys, vf *sum) {
    vf lanes[2 * ATTENTION_TILE * ATTENTION_TILE];
    for (int i = 0; i < rows * keys; i++) lanes[i] = vf_set1(0);
    for (int64_t d = 0; d < padded; d += EM_LANES)
        for (int j = 0; j < keys; j++) {
            vf kj = load_kv(k.first + j * k.bytes, d, dtype);
            for (int r = 0; r < rows; r++)
                lanes[r * keys + j] = vf_fma(vf_load(q + r * padded + d), kj, lanes[r * keys + j]);
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++) sum[r * EM_LANES + j] = lanes[r * keys + j];
}

EM_INLINE kv_rows rows_from(kv_rows rows, int64_t j) {
    return (kv_rows){rows.first + j * rows.bytes, rows.bytes};
}

/* p[r] = the scores of query r for n keys; lanes beyond them are -inf. */
EM_INLINE void score_tile(const float *q, kv_rows k, int64_t padded, int64_t n, const int32_t dtype,
                          const int rows, float (*p)[EM_LANES]) {
    vf sum[ATTENTION_TILE * EM_LANES];
    int64_t j = 0;
    for (; j + ACROSS(rows) <= n; j += ACROSS(rows))
        dot_tile(q, rows_from(k, j), padded, dtype, rows, ACROSS(rows), sum + j);
    for (; j < n; j++) dot_tile(q, rows_from(k, j), padded, dtype, rows, 1, sum + j);
    for (; j < EM_LANES; j++)
        for (int r = 0; r < rows; r++) sum[r * EM_LANES + j] = vf_set1(-INFINITY);
    for (int r = 0; r < rows; r++) vf_store(p[r], vf_sums(sum + r * EM_LANES));
}

/* Scores of n keys to weights, relative to the highest score so far. Returns by how much all that
 * came before shrinks. */
EM_INLINE float weigh(float *p, int64_t n, float *top, float *total) {
    vf score = vf_load(p);
    float block_top = vf_max_lane(score), lane[EM_LANES] = {1}; /* e^0 */
    if (block_top > *top) {
        vf_store(lane, vf_exp(vf_set1(*top - block_top)));
        *top = block_top;
    }
    vf_store(p, vf_exp(vf_sub(score, vf_set1(*top))));
    for (int64_t j = n; j < EM_LANES; j++) p[j] = 0;
    *total = *total * lane[0] + vf_sum(vf_load(p));
    return lane[0];
}

/* out[r] = out[r] * shrink[r] + the n values by their weights p[r], in `chunks` of 16 from d. */
EM_INLINE void mix_tile(float (*p)[EM_LANES], const float *shrink, kv_rows v, int64_t padded,
                        int64_t n, const int32_t dtype, const int rows, const int chunks, int64_t d,
                        float *out) {
    vf sum[2 * ATTENTION_TILE * ATTENTION_TILE];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            sum[r * chunks + c] =
                vf_mul(vf_load(out + r * padded + d + c * EM_LANES), vf_set1(shrink[r]));
    for (int64_t j = 0; j < n; j++)
        for (int c = 0; c < chunks; c++) {
            vf vj = load_kv(v.first + j * v.bytes, d + c * EM_LANES, dtype);
            for (int r = 0; r < rows; r++)
                sum[r * chunks + c] = vf_fma(vf_set1(p[r][j]), vj, sum[r * chunks + c]);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            vf_store(out + r * padded + d + c * EM_LANES, sum[r * chunks + c]);
}

EM_INLINE void mix_rows(float (*p)[EM_LANES], const float *shrink, kv_rows v, int64_t padded,
                        int64_t n, const int32_t dtype, const int rows, float *out) {
    const int64_t many = ACROSS(rows) * EM_LANES, some = ATTENTION_TILE * EM_LANES;
    int64_t d = 0;
    for (; d + many <= padded; d += many)
        mix_tile(p, shrink, v, padded, n, dtype, rows, ACROSS(rows), d, out);
    for (; d + some <= padded; d += some)
        mix_tile(p, shrink, v, padded, n, dtype, rows, ATTENTION_TILE, d, out);
    for (; d < padded; d += EM_LANES) mix_tile(p, shrink, v, padded, n, dtype, rows, 1, d, out);
}

/* How many of the 16 keys from `key` on query r sees. */
EM_INLINE int64_t seen(const em_queries *s, int64_t key, int r) {
    return em_max(0, em_min(EM_LANES, s->end + r / s->heads - key));
}

/* Calls TILE(r, rows, n) for queries r... that see the same n keys, as many at once as it may. */
#define FOR_QUERIES(TILE)                                                                          \
    for (int r = 0; r < s->n_rows;) {                                                              \
        int64_t n = seen(s, key, r);                                                               \
        if (r + ATTENTION_TILE <= s->n_rows && seen(s, key, r + ATTENTION_TILE - 1) == n) {        \
            if (n > 0) TILE(r, ATTENTION_TILE, n);                                                 \
            r += ATTENTION_TILE;                                                                   \
        } else {                                                                                   \
            if (n > 0) TILE(r, 1, n);                                                              \
            r++;                                                                                   \
        }                                                                                          \
    }

#define SCORE(r, rows, n) score_tile(s->q + (r) * s->padded, k, s->padded, n, dtype, rows, p + (r))
#define MIX(r, rows, n)                                                                            \
    mix_rows(p + (r), shrink + (r), v, s->padded, n, dtype, rows, s->out + (r) * s->padded)

/* Blocks that are scored, and weighed, before their values are mixed: a single query's would wait
 * for each other. */
#define SPAN 4

EM_INLINE void score_block(const em_queries *s, int64_t key, int64_t last, const int32_t dtype,
                           float (*p)[EM_LANES]) {
    kv_rows k = rows_at(s, s->keys, key, em_min(EM_LANES, last - key), dtype);
    expect_rows(s, s->values, key);
    FOR_QUERIES(SCORE)
}

EM_INLINE void mix_block(const em_queries *s, int64_t key, int64_t last, const int32_t dtype,
                         float (*p)[EM_LANES], const float *shrink) {
    kv_rows v = rows_at(s, s->values, key, em_min(EM_LANES, last - key), dtype);
    expect_rows(s, s->keys, key + SPAN * EM_LANES);
    FOR_QUERIES(MIX)
}

/* Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over blocks of 16 keys. */
EM_INLINE void attend_as(const em_queries *s, const int32_t dtype) {
    float p[SPAN][EM_QUERIES][EM_LANES], shrink[SPAN][EM_QUERIES];
    float top[EM_QUERIES], total[EM_QUERIES];
    const int64_t last = s->end + (s->n_rows - 1) / s->heads;
    for (int r = 0; r < s->n_rows; r++) {
        top[r] = -INFINITY;
        total[r] = 0;
    }
    memset(s->out, 0, (size_t)(s->n_rows * s->padded) * sizeof(float));
    for (int64_t first = s->begin; first < last; first += SPAN * EM_LANES) {
        const int64_t blocks = em_min(SPAN, (last - first + EM_LANES - 1) / EM_LANES);
        for (int64_t b = 0; b < blocks; b++)
            score_block(s, first + b * EM_LANES, last, dtype, p[b]);
        for (int64_t b = 0; b < blocks; b++)
            for (int r = 0; r < s->n_rows; r++) {
                int64_t n = seen(s, first + b * EM_LANES, r);
                if (n > 0) shrink[b][r] = weigh(p[b][r], n, top + r, total + r);
            }
        for (int64_t b = 0; b < blocks; b++)
            mix_block(s, first + b * EM_LANES, last, dtype, p[b], shrink[b]);
    }
    for (int r = 0; r < s->n_rows; r++)
        for (int64_t d = 0; d < s->padded; d += EM_LANES) {
            float *out = s->out + r * s->padded + d;
            vf_store(out, vf_div(vf_load(out), vf_set1(total[r])));
        }
}

/* Few queries read keys and values as they are kept; more have them unpacked once. */
static void attend(const em_queries *s) {
    int32_t dtype = s->n_rows <= ATTENTION_TILE ? s->dtype : EM_F32;
    switch (dtype) {
    case EM_F16: attend_as(s, EM_F16); break;
    case EM_Q8_0: attend_as(s, EM_Q8_0); break;
    default: attend_as(s, EM_F32);
    }
}
