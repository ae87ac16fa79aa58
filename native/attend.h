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

/* n rows of the cache as floats [n, padded]: in s->block, or where they are. */
EM_INLINE const float *unpack_rows(const em_queries *s, const uint8_t *rows, int64_t first,
                                   int64_t n) {
    const uint8_t *row = rows + first * s->row_bytes;
    int64_t count = n * s->padded;
    switch (s->dtype) {
    case EM_F32: return (const float *)row;
    case EM_F16:
        for (int64_t i = 0; i < count; i += EM_LANES)
            vf_store(s->block + i, vf_load_f16((const uint16_t *)row + i));
        break;
    default:
        for (int64_t i = 0; i < count; i += EM_BLOCK, row += EM_KV_BLOCK_BYTES) {
            vf scale = vf_set1_f16(row);
            const int8_t *q = (const int8_t *)row + 2;
            vf_store(s->block + i, vf_mul(vf_from_vi(vi_load_i8(q)), scale));
            vf_store(s->block + i + EM_LANES, vf_mul(vf_from_vi(vi_load_i8(q + EM_LANES)), scale));
        }
    }
    return s->block;
}

/* ---- attention --------------------------------------------------------------------------- */

/* Registers hold the sums of EM_TILE queries and as many keys, or chunks of values; or twice as
 * many of one query. */
#define ACROSS(rows) ((rows) == 1 ? 2 * EM_TILE : EM_TILE)

/* sum[16 r + j] = the lanes of query r times key j, not yet added up. */
EM_INLINE void dot_tile(const float *q, const float *k, int64_t padded, const int rows,
                        const int keys, vf *sum) {
    vf lanes[2 * EM_TILE * EM_TILE];
    for (int i = 0; i < rows * keys; i++) lanes[i] = vf_set1(0);
    for (int64_t d = 0; d < padded; d += EM_LANES)
        for (int j = 0; j < keys; j++) {
            vf kj = vf_load(k + j * padded + d);
            for (int r = 0; r < rows; r++)
                lanes[r * keys + j] = vf_fma(vf_load(q + r * padded + d), kj, lanes[r * keys + j]);
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++) sum[r * EM_LANES + j] = lanes[r * keys + j];
}

/* p[r] = the scores of query r for n keys; lanes beyond them are -inf. */
EM_INLINE void score_tile(const float *q, const float *k, int64_t padded, int64_t n, const int rows,
                          float (*p)[EM_LANES]) {
    vf sum[EM_TILE * EM_LANES];
    int64_t j = 0;
    for (; j + ACROSS(rows) <= n; j += ACROSS(rows))
        dot_tile(q, k + j * padded, padded, rows, ACROSS(rows), sum + j);
    for (; j < n; j++) dot_tile(q, k + j * padded, padded, rows, 1, sum + j);
    for (; j < EM_LANES; j++)
        for (int r = 0; r < rows; r++) sum[r * EM_LANES + j] = vf_set1(-INFINITY);
    for (int r = 0; r < rows; r++) vf_store(p[r], vf_sums(sum + r * EM_LANES));
}

/* Scores of n keys to weights, relative to the highest score so far. Returns by how much all that
 * came before shrinks. */
EM_INLINE float weigh(float *p, int64_t n, float *top, float *total) {
    vf score = vf_load(p);
    float block_top = vf_max_lane(score), new_top = block_top > *top ? block_top : *top;
    vf_store(p, vf_exp(vf_sub(score, vf_set1(new_top))));
    for (int64_t j = n; j < EM_LANES; j++) p[j] = 0;
    float lane[EM_LANES];
    vf_store(lane, vf_exp(vf_set1(*top - new_top)));
    *total = *total * lane[0] + vf_sum(vf_load(p));
    *top = new_top;
    return lane[0];
}

/* out[r] = out[r] * shrink[r] + the n values by their weights p[r], in `chunks` of 16. */
EM_INLINE void mix_tile(float (*p)[EM_LANES], const float *shrink, const float *v, int64_t padded,
                        int64_t n, const int rows, const int chunks, float *out) {
    vf sum[2 * EM_TILE * EM_TILE];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            sum[r * chunks + c] =
                vf_mul(vf_load(out + r * padded + c * EM_LANES), vf_set1(shrink[r]));
    for (int64_t j = 0; j < n; j++)
        for (int c = 0; c < chunks; c++) {
            vf vj = vf_load(v + j * padded + c * EM_LANES);
            for (int r = 0; r < rows; r++)
                sum[r * chunks + c] = vf_fma(vf_set1(p[r][j]), vj, sum[r * chunks + c]);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            vf_store(out + r * padded + c * EM_LANES, sum[r * chunks + c]);
}

EM_INLINE void mix_rows(float (*p)[EM_LANES], const float *shrink, const float *v, int64_t padded,
                        int64_t n, const int rows, float *out) {
    int64_t d = 0, step = ACROSS(rows) * EM_LANES;
    for (; d + step <= padded; d += step)
        mix_tile(p, shrink, v + d, padded, n, rows, ACROSS(rows), out + d);
    for (; d < padded; d += EM_LANES) mix_tile(p, shrink, v + d, padded, n, rows, 1, out + d);
}

/* How many of the 16 keys from `key` on query r sees. */
EM_INLINE int64_t seen(const em_queries *s, int64_t key, int r) {
    return em_max(0, em_min(EM_LANES, s->end + r / s->heads - key));
}

/* Calls TILE(r, rows, n) for queries r... that see the same n keys, as many at once as it may. */
#define FOR_QUERIES(TILE)                                                                          \
    for (int r = 0; r < s->n_rows;) {                                                              \
        int64_t n = seen(s, key, r);                                                               \
        if (r + EM_TILE <= s->n_rows && seen(s, key, r + EM_TILE - 1) == n) {                      \
            if (n > 0) TILE(r, EM_TILE, n);                                                        \
            r += EM_TILE;                                                                          \
        } else {                                                                                   \
            if (n > 0) TILE(r, 1, n);                                                              \
            r++;                                                                                   \
        }                                                                                          \
    }

#define SCORE(r, rows, n)                                                                          \
    do {                                                                                           \
        score_tile(s->q + (r) * padded, k, padded, n, rows, p + (r));                              \
        for (int i = (r); i < (r) + (rows); i++) shrink[i] = weigh(p[i], n, top + i, total + i);   \
    } while (0)
#define MIX(r, rows, n) mix_rows(p + (r), shrink + (r), v, padded, n, rows, s->out + (r) * padded)

/* Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over blocks of 16 keys. */
static void attend(const em_queries *s) {
    float p[EM_QUERIES][EM_LANES], top[EM_QUERIES], total[EM_QUERIES], shrink[EM_QUERIES];
    const int64_t padded = s->padded, last = s->end + (s->n_rows - 1) / s->heads;
    for (int r = 0; r < s->n_rows; r++) {
        top[r] = -INFINITY;
        total[r] = 0;
    }
    memset(s->out, 0, (size_t)(s->n_rows * padded) * sizeof(float));
    for (int64_t key = s->begin; key < last; key += EM_LANES) {
        const float *k = unpack_rows(s, s->keys, key, em_min(EM_LANES, last - key));
        FOR_QUERIES(SCORE)
        const float *v = unpack_rows(s, s->values, key, em_min(EM_LANES, last - key));
        FOR_QUERIES(MIX)
    }
    for (int r = 0; r < s->n_rows; r++)
        for (float *out = s->out + r * padded; out < s->out + (r + 1) * padded; out += EM_LANES)
            vf_store(out, vf_div(vf_load(out), vf_set1(total[r])));
}
