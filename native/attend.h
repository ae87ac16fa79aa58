/* Attention over a KV cache: a part of kernels.c, after its words.
 *
 * Keys lie as weights do, 16 side by side, so that a query's scores are a product's rows; values
 * lie in rows. Each query is on its own: which others share its keys changes what is unpacked when,
 * but not one operation on it. */

/* ---- the cache --------------------------------------------------------------------------- */

static void store_f16(const float *x, int32_t n, uint16_t *out) {
    for (int32_t i = 0; i < n; i += EM_LANES) {
        uint16_t lane[EM_LANES];
        vf_store_f16(lane, load_part(x + i, n - i, 0));
        for (int64_t j = 0; j < em_min(EM_LANES, n - i); j++) out[i + j] = lane[j];
    }
}

/* A block's quants and its scale, an f16. */
static uint16_t quantize_kv(const float *x, int32_t n, int8_t *quants) {
    float scale;
    int32_t sum;
    uint16_t half;
    quantize(x, n, quants, &scale, &sum, NULL);
    store_f16(&scale, 1, &half);
    return half;
}

static void store_key(const float *x, int32_t n, int32_t dtype, void *group, int64_t key) {
    const int64_t padded = em_round_up(n, EM_LANES);
    for (int32_t i = 0; i < n; i += EM_BLOCK) {
        int32_t part = (int32_t)em_min(EM_BLOCK, n - i);
        int64_t stored = em_min(EM_BLOCK, padded - i);
        uint16_t half[EM_BLOCK] = {0};
        int8_t quants[EM_BLOCK];
        uint8_t *block = (uint8_t *)group + i / EM_BLOCK * (2 * EM_LANES);
        switch (dtype) {
        case EM_Q8_0:
            half[0] = quantize_kv(x + i, part, quants);
            memcpy(block + 2 * key, half, 2);
            block =
                (uint8_t *)group + em_round_up(n, EM_BLOCK) + i * EM_LANES; /* 1 byte a number */
            for (int64_t k = 0; k < EM_BLOCK; k++)
                block[(k / 4 * EM_LANES + key) * 4 + k % 4] = (uint8_t)(quants[k] + 128);
            break;
        case EM_F16:
            store_f16(x + i, part, half);
            for (int64_t k = 0; k < stored; k++)
                ((uint16_t *)group)[(i + k) * EM_LANES + key] = half[k];
            break;
        default:
            for (int64_t k = 0; k < stored; k++)
                ((float *)group)[(i + k) * EM_LANES + key] = k < part ? x[i + k] : 0;
        }
    }
}

static void store_value(const float *x, int32_t n, int32_t dtype, void *row) {
    int64_t stored = (int64_t)n * (dtype == EM_F32 ? 4 : 2);
    uint8_t *block = row;
    switch (dtype) {
    case EM_Q8_0:
        for (int32_t i = 0; i < n; i += EM_BLOCK, block += EM_KV_BLOCK_BYTES) {
            int32_t part = (int32_t)em_min(EM_BLOCK, n - i);
            uint16_t half = quantize_kv(x + i, part, (int8_t *)block + 2);
            memcpy(block, &half, 2);
        }
        return;
    case EM_F16: store_f16(x, n, row); break;
    default: memcpy(row, x, (size_t)stored);
    }
    memset(block + stored, 0, (size_t)(em_kv_row_bytes(dtype, n) - stored));
}

/* 16 numbers: of 16 keys, or of a value. */
EM_INLINE vf load_kv(const uint8_t *row, int64_t d, const int32_t dtype) {
    switch (dtype) {
    case EM_F32: return vf_load((const float *)row + d);
    case EM_F16: return vf_load_f16((const uint16_t *)row + d);
    default: row += d / EM_BLOCK * EM_KV_BLOCK_BYTES;
    }
    vi quants = vi_load_i8((const int8_t *)row + 2 + d % EM_BLOCK);
    return vf_mul(vf_from_vi(quants), vf_set1_f16(row));
}

/* What is read is asked for one span before, in the order of memory (bench/LOG.md); or as weights
 * are. */
EM_INLINE void expect_next(const em_kept *kept, const uint8_t *part, int64_t bytes) {
    if (em_by_two_caches) {
        prefetch(part, bytes, INT64_MAX, 0);
        return;
    }
    for (int64_t i = 0; i < bytes; i += EM_ALIGN)
        __builtin_prefetch(part + EM_SPAN_ROWS * kept->row_bytes + i);
}

/* n rows of values, or whole groups of keys (but not of EM_Q8_0), as floats in s->block. */
EM_INLINE void unpack_rows(const em_queries *s, const em_kept *kept, const uint8_t *rows, int64_t n,
                           const int32_t dtype) {
    const int64_t block_bytes = dtype == EM_F16 ? 2 * EM_BLOCK : EM_KV_BLOCK_BYTES;
    const int64_t count = n * kept->padded;
    int64_t i = 0;
    for (; i + EM_BLOCK <= count; i += EM_BLOCK, rows += block_bytes) {
        vf a = load_kv(rows, 0, dtype), b = load_kv(rows, EM_LANES, dtype);
        expect_next(kept, rows, block_bytes);
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

/* The scales of n rows of EM_Q8_0 as floats in s->block: one conversion for 16 of them. They are
 * the first that is read of rows. */
EM_INLINE void unpack_scales(const em_queries *s, const em_kept *kept, const uint8_t *rows,
                             int64_t n) {
    const int64_t count = n * (kept->padded / EM_BLOCK);
    for (int64_t i = 0; i < count; i += EM_LANES) {
        uint16_t half[EM_LANES] = {0};
        expect_next(kept, rows, em_min(EM_LANES, count - i) * EM_KV_BLOCK_BYTES);
        for (int64_t j = 0; j < em_min(EM_LANES, count - i); j++, rows += EM_KV_BLOCK_BYTES)
            memcpy(half + j, rows, sizeof *half);
        vf_store(s->block + i, vf_load_f16(half));
    }
}

/* n rows of the cache, where they are if they are of `dtype`, else unpacked to floats. */
EM_INLINE kv_rows rows_at(const em_queries *s, const em_kept *kept, int64_t key, int64_t n,
                          const int32_t dtype) {
    const uint8_t *row = kept->rows + key * kept->row_bytes;
    if (s->dtype == dtype) return (kv_rows){row, kept->row_bytes};
    if (s->dtype == EM_F16)
        unpack_rows(s, kept, row, n, EM_F16);
    else
        unpack_rows(s, kept, row, n, EM_Q8_0);
    return (kv_rows){(const uint8_t *)s->block, kept->padded * (int64_t)sizeof(float)};
}

/* 16 numbers of the j-th value of a span. */
EM_INLINE vf load_value(const em_queries *s, kv_rows v, int64_t j, int64_t d, const int32_t dtype) {
    const uint8_t *value = v.first + j * v.bytes;
    if (dtype != EM_Q8_0) return load_kv(value, d, dtype);
    const uint8_t *block = value + d / EM_BLOCK * EM_KV_BLOCK_BYTES;
    float scale = s->block[j * (s->values.padded / EM_BLOCK) + d / EM_BLOCK];
    return vf_mul(vf_from_vi(vi_load_i8((const int8_t *)block + 2 + d % EM_BLOCK)), vf_set1(scale));
}

/* Asks for what follows a value, unless its scale has been read, and that asked for. */
EM_INLINE void expect_value(const em_queries *s, kv_rows v, int64_t j, const int32_t dtype) {
    if (s->dtype == dtype && dtype != EM_Q8_0)
        expect_next(&s->values, v.first + j * v.bytes, v.bytes);
}

/* ---- scores ------------------------------------------------------------------------------ */

typedef float span_weights[EM_SPAN_ROWS];

/* p[row + r] = the scores of 16 * groups keys, for `rows` queries. */
EM_INLINE void score_floats(const em_queries *s, kv_rows k, const int32_t dtype, int64_t row,
                            const int rows, const int groups, span_weights *p) {
    const int64_t padded = s->keys.padded;
    const float *q = s->acts.x + row * padded;
    const int64_t step = dtype == EM_F16 ? 2 * EM_LANES : 4 * EM_LANES;
    vf sum[ATTENTION_TILE * ATTENTION_TILE];
    for (int i = 0; i < rows * groups; i++) sum[i] = vf_set1(0);
    for (int64_t d = 0; d < padded; d++)
        for (int g = 0; g < groups; g++) {
            const uint8_t *at = k.first + g * EM_LANES * k.bytes + d * step;
            vf keys = load_kv(at, 0, dtype);
            if (row == 0 && s->dtype == dtype)
                expect_next(&s->keys, k.first + (d * groups + g) * step, step);
            for (int r = 0; r < rows; r++)
                sum[g * rows + r] = vf_fma(keys, vf_set1(q[r * padded + d]), sum[g * rows + r]);
        }
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) vf_store(p[row + r] + g * EM_LANES, sum[g * rows + r]);
}

/* The same of EM_Q8_0: a product of the quants of keys and of queries. */
EM_INLINE void score_quants(const em_queries *s, kv_rows k, int64_t row, const int rows,
                            const int groups, span_weights *p) {
    const em_acts *a = &s->acts;
    vf sum[ATTENTION_TILE * ATTENTION_TILE];
    vi dot[ATTENTION_TILE];
    for (int i = 0; i < rows * groups; i++) sum[i] = vf_set1(0);
    for (int64_t b = 0; b < a->blocks; b++)
        for (int g = 0; g < groups; g++) {
            const uint8_t *scales = k.first + g * EM_LANES * k.bytes + b * 2 * EM_LANES;
            const uint8_t *quants =
                scales + (a->blocks - b) * 2 * EM_LANES + b * EM_LANES * EM_BLOCK;
            const int64_t at = row * a->blocks + b;
            for (int r = 0; r < rows; r++)
                dot[r] = vi_set1(-EM_Q8_BIAS * a->sum[at + r * a->blocks]);
            for (int c = 0; c < EM_BLOCK / 4; c++) {
                if (row == 0)
                    expect_next(&s->keys,
                                k.first +
                                    ((b * groups + g) * 8 + c) * (EM_LANES * EM_KV_BLOCK_BYTES / 8),
                                EM_LANES * EM_KV_BLOCK_BYTES / 8);
                for (int r = 0; r < rows; r++)
                    dot[r] = dot_chunk(EM_Q8_0, dot[r], vb_load(quants + 64 * c),
                                       a->q + (at + r * a->blocks) * EM_BLOCK + 4 * c);
            }
            vf d = vf_load_f16((const uint16_t *)scales);
            for (int r = 0; r < rows; r++) {
                vf scale = vf_mul(d, vf_set1(a->scale[at + r * a->blocks]));
                sum[g * rows + r] = vf_fma(vf_from_vi(dot[r]), scale, sum[g * rows + r]);
            }
        }
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) vf_store(p[row + r] + g * EM_LANES, sum[g * rows + r]);
}

#define SCORE(row, rows, groups)                                                                   \
    do {                                                                                           \
        if (dtype == EM_Q8_0)                                                                      \
            score_quants(s, k, row, rows, groups, p);                                              \
        else                                                                                       \
            score_floats(s, k, dtype, row, rows, groups, p);                                       \
    } while (0)

EM_INLINE void score_groups(const em_queries *s, kv_rows k, const int32_t dtype, const int groups,
                            span_weights *p) {
    int64_t row = 0;
    for (; row + ATTENTION_TILE <= s->n_rows; row += ATTENTION_TILE)
        SCORE(row, ATTENTION_TILE, groups);
    for (; row < s->n_rows; row++) SCORE(row, 1, groups);
}

/* Scores of all queries for n keys, and for those that fill up their last group. */
EM_INLINE void score_span(const em_queries *s, int64_t key, int64_t n, const int32_t dtype,
                          span_weights *p) {
    kv_rows k = rows_at(s, &s->keys, key, em_round_up(n, EM_LANES), dtype);
    const int64_t many = ATTENTION_TILE * EM_LANES;
    int64_t j = 0;
    for (; j + many <= n; j += many, k.first += many * k.bytes)
        score_groups(s, k, dtype, ATTENTION_TILE, (span_weights *)(p[0] + j));
    for (; j < n; j += EM_LANES, k.first += EM_LANES * k.bytes)
        score_groups(s, k, dtype, 1, (span_weights *)(p[0] + j));
}

/* p[row + r][j + k] += what queries and values have in common: of a latent, keys end with it. */
EM_INLINE void score_latents(const em_queries *s, kv_rows v, const int32_t dtype, int64_t row,
                             const int rows, int64_t j, const int keys, span_weights *p) {
    const int64_t padded = s->values.padded;
    const float *q = s->latents + row * padded;
    vf sum[ATTENTION_TILE * ATTENTION_TILE];
    for (int i = 0; i < rows * keys; i++) sum[i] = vf_set1(0);
    for (int64_t d = 0; d < padded; d += EM_LANES)
        for (int k = 0; k < keys; k++) {
            if (row == 0 && d == 0) expect_value(s, v, j + k, dtype);
            vf vk = load_value(s, v, j + k, d, dtype);
            for (int r = 0; r < rows; r++)
                sum[k * rows + r] = vf_fma(vk, vf_load(q + r * padded + d), sum[k * rows + r]);
        }
    for (int k = 0; k < keys; k++)
        for (int r = 0; r < rows; r++) p[row + r][j + k] += vf_sum(sum[k * rows + r]);
}

EM_INLINE void score_latents_of(const em_queries *s, kv_rows v, const int32_t dtype, int64_t row,
                                const int rows, int64_t n, span_weights *p) {
    int64_t j = 0;
    for (; j + ATTENTION_TILE <= n; j += ATTENTION_TILE)
        score_latents(s, v, dtype, row, rows, j, ATTENTION_TILE, p);
    for (; j < n; j++) score_latents(s, v, dtype, row, rows, j, 1, p);
}

EM_INLINE void score_values(const em_queries *s, kv_rows v, const int32_t dtype, int64_t n,
                            span_weights *p) {
    int64_t row = 0;
    for (; row + ATTENTION_TILE <= s->n_rows; row += ATTENTION_TILE)
        score_latents_of(s, v, dtype, row, ATTENTION_TILE, n, p);
    for (; row < s->n_rows; row++) score_latents_of(s, v, dtype, row, 1, n, p);
}

/* ---- weights and values ------------------------------------------------------------------ */

/* What queries have found so far. */
typedef struct {
    float top[EM_QUERIES];    /* the highest score */
    float total[EM_QUERIES];  /* of the weights, relative to it */
    float shrink[EM_QUERIES]; /* by how much the last span made all before it less */
} attended;

/* Scores of keys [begin, end) to weights, relative to the highest score so far. */
EM_INLINE void weigh(float *p, int64_t begin, int64_t end, float limit, attended *a, int r) {
    const int64_t stop = em_round_up(end, EM_LANES);
    for (int64_t j = 0; limit > 0 && j < stop; j += EM_LANES)
        vf_store(p + j, vf_cap(vf_load(p + j), limit));
    for (int64_t j = 0; j < begin; j++) p[j] = -INFINITY;
    for (int64_t j = end; j < stop; j++) p[j] = -INFINITY;
    vf high = vf_load(p), sum = vf_set1(0);
    for (int64_t j = EM_LANES; j < stop; j += EM_LANES) high = vf_max(vf_load(p + j), high);
    float top = vf_max_lane(high), lane[EM_LANES] = {1}; /* e^0 */
    if (top > a->top[r]) {
        vf_store(lane, vf_exp(vf_set1(a->top[r] - top)));
        a->top[r] = top;
    }
    for (int64_t j = 0; j < stop; j += EM_LANES)
        vf_store(p + j, vf_exp(vf_sub(vf_load(p + j), vf_set1(a->top[r]))));
    for (int64_t j = 0; j < begin; j++) p[j] = 0;
    for (int64_t j = end; j < stop; j++) p[j] = 0;
    for (int64_t j = 0; j < stop; j += EM_LANES) sum = vf_add(sum, vf_load(p + j));
    a->total[r] = a->total[r] * lane[0] + vf_sum(sum);
    a->shrink[r] = lane[0];
}

/* Registers hold the sums of ATTENTION_TILE queries and as many chunks of values; or twice as many
 * of one query. */
#define ACROSS(rows) ((rows) == 1 ? 2 * ATTENTION_TILE : ATTENTION_TILE)

/* out[row + r] = out[row + r] * shrink[row + r] + values [begin, end) by their weights p[row + r],
 * in `chunks` of 16 from d. */
EM_INLINE void mix_tile(const em_queries *s, kv_rows v, const int32_t dtype, span_weights *p,
                        const float *shrink, int64_t begin, int64_t end, int64_t row,
                        const int rows, const int chunks, int64_t d) {
    vf sum[2 * ATTENTION_TILE * ATTENTION_TILE];
    const int64_t padded = s->values.padded;
    float *out = s->out + row * padded + d;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            sum[r * chunks + c] =
                vf_mul(vf_load(out + r * padded + c * EM_LANES), vf_set1(shrink[row + r]));
    for (int64_t j = begin; j < end; j++) {
        if (row == 0 && d == 0) expect_value(s, v, j, dtype);
        for (int c = 0; c < chunks; c++) {
            vf vj = load_value(s, v, j, d + c * EM_LANES, dtype);
            for (int r = 0; r < rows; r++)
                sum[r * chunks + c] = vf_fma(vf_set1(p[row + r][j]), vj, sum[r * chunks + c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++)
            vf_store(out + r * padded + c * EM_LANES, sum[r * chunks + c]);
}

#define MIX(chunks) mix_tile(s, v, dtype, p, shrink, begin, end, row, rows, chunks, d)

EM_INLINE void mix_rows(const em_queries *s, kv_rows v, const int32_t dtype, span_weights *p,
                        const float *shrink, int64_t begin, int64_t end, int64_t row,
                        const int rows) {
    const int64_t many = ACROSS(rows) * EM_LANES, some = ATTENTION_TILE * EM_LANES;
    const int64_t padded = s->values.padded;
    int64_t d = 0;
    for (; d + many <= padded; d += many) MIX(ACROSS(rows));
    for (; d + some <= padded; d += some) MIX(ATTENTION_TILE);
    for (; d < padded; d += EM_LANES) MIX(1);
}

/* Queries that see the same values, [begin, end[r]) of v, are mixed together. */
EM_INLINE void mix_span(const em_queries *s, kv_rows v, const int32_t dtype, span_weights *p,
                        const float *shrink, int64_t begin, const int64_t *end) {
    for (int64_t row = 0; row < s->n_rows;) {
        bool many = row + ATTENTION_TILE <= s->n_rows && end[row + ATTENTION_TILE - 1] == end[row];
        if (end[row] > 0 && many)
            mix_rows(s, v, dtype, p, shrink, begin, end[row], row, ATTENTION_TILE);
        else if (end[row] > 0)
            mix_rows(s, v, dtype, p, shrink, begin, end[row], row, 1);
        row += many ? ATTENTION_TILE : 1;
    }
}

/* Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over spans of EM_SPAN_ROWS keys, read
 * as `key_dtype`, values as `dtype`. */
EM_INLINE void attend_as(const em_queries *s, const int32_t key_dtype, const int32_t dtype) {
    span_weights p[EM_QUERIES];
    attended a = {.total = {0}};
    const int64_t last = s->end + (s->n_rows - 1) / s->heads, padded = s->values.padded;
    for (int r = 0; r < s->n_rows; r++) { /* a sink is the first score, whose value is zero */
        a.top[r] = s->sinks ? s->sinks[r % s->heads] : -INFINITY;
        a.total[r] = s->sinks ? 1 : 0;
    }
    memset(s->out, 0, (size_t)(s->n_rows * padded) * sizeof(float));
    for (int64_t key = s->begin / EM_LANES * EM_LANES; key < last; key += EM_SPAN_ROWS) {
        const int64_t n = em_min(EM_SPAN_ROWS, last - key), begin = em_max(0, s->begin - key);
        int64_t end[EM_QUERIES];
        score_span(s, key, n, key_dtype, p);
        kv_rows v = rows_at(s, &s->values, key, n, dtype);
        if (dtype == EM_Q8_0) unpack_scales(s, &s->values, v.first, n);
        if (s->latents) score_values(s, v, dtype, n, p);
        for (int r = 0; r < s->n_rows; r++) {
            end[r] = em_min(n, s->end + r / s->heads - key);
            if (end[r] > 0) weigh(p[r], begin, end[r], s->cap, &a, r);
        }
        mix_span(s, v, dtype, p, a.shrink, begin, end);
    }
    for (int r = 0; r < s->n_rows; r++)
        for (int64_t d = 0; d < padded; d += EM_LANES) {
            float *out = s->out + r * padded + d;
            vf_store(out, vf_div(vf_load(out), vf_set1(a.total[r])));
        }
}

/* Few queries read floats and values as they are kept; more have them unpacked once. */
static void attend(const em_queries *s) {
    bool few = s->n_rows <= 2 * ATTENTION_TILE;
    switch (s->dtype) {
    case EM_F16: few ? attend_as(s, EM_F16, EM_F16) : attend_as(s, EM_F32, EM_F32); break;
    case EM_Q8_0: few ? attend_as(s, EM_Q8_0, EM_Q8_0) : attend_as(s, EM_Q8_0, EM_F32); break;
    default: attend_as(s, EM_F32, EM_F32);
    }
}
