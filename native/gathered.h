/* Sums over rows that each lie on their own (lanes of 1), included by kernels.c: neurons that were
 * found active, wherever they are. The order of sums is that of products (products.h). */

/* 16 weights of a row from column `at` on, a multiple of 16; zeros from the n-th on. */
EM_INLINE vf row_part(const uint8_t *row, const int dtype, int64_t plane, int64_t at, int64_t n) {
    if (dtype == EM_F32) return load_part((const float *)row + at, n, 0);
    if (dtype == EM_F16 || dtype == EM_BF16) {
        const uint16_t *p = (const uint16_t *)row + at;
        uint16_t some[EM_LANES] = {0};
        if (n < EM_LANES) p = memcpy(some, p, (size_t)n * sizeof *p);
        return dtype == EM_F16 ? vf_load_f16(p) : vf_load_bf16(p);
    }
    const uint8_t *quants = row + plane + at / EM_BLOCK * (dtype == EM_Q8_0 ? 32 : 16);
    vf d = vf_set1_f16(row + at / EM_BLOCK * 2);
    if (dtype == EM_Q8_0) {
        vf q = vf_from_vi(vi_load_u8(quants + at % EM_BLOCK));
        return vf_mul(d, vf_sub(q, vf_set1(128)));
    }
    /* Of a byte 16 h + l, h is what (byte - 7.5) / 16 is nearest to. */
    vf both = vf_from_vi(vi_load_u8(quants));
    vf high = vf_round(vf_mul(vf_sub(both, vf_set1(7.5f)), vf_set1(0.0625f)));
    vf q = at % EM_BLOCK ? high : vf_fma(high, vf_set1(-16), both);
    return vf_mul(d, vf_sub(q, vf_set1(8)));
}

EM_INLINE void dot_rows_float(const em_gathered *r, const int dtype, const em_acts *a,
                              int64_t token, float *out) {
    const float *x = a->x + token * a->cols;
    _Alignas(64) float tile[EM_LANES * EM_LANES] = {0}, lane[EM_LANES];
    vf sum = vf_set1(0);
    for (int64_t k = 0; k < a->cols; k += EM_LANES) {
        int64_t n = em_min(EM_LANES, a->cols - k);
        for (int32_t i = 0; i < r->n; i++) {
            vf_store(lane, row_part(r->rows[i], dtype, r->plane, k, n));
            for (int c = 0; c < EM_LANES; c++) tile[c * EM_LANES + i] = lane[c];
        }
        for (int64_t c = 0; c < n; c++)
            sum = vf_fma(vf_load(tile + c * EM_LANES), vf_set1(x[k + c]), sum);
    }
    vf_store(out, sum);
}

/* Integers this small are exact as floats. */
EM_INLINE float dot_block(const uint8_t *row, const int dtype, int64_t plane, int64_t block,
                          const int8_t *q) {
    vf a = vf_from_vi(vi_load_i8(q)), b = vf_from_vi(vi_load_i8(q + EM_LANES));
    if (dtype == EM_Q8_0) {
        const uint8_t *w = row + plane + block * 32;
        vf zero = vf_set1(128);
        vf first = vf_sub(vf_from_vi(vi_load_u8(w)), zero);
        vf second = vf_sub(vf_from_vi(vi_load_u8(w + EM_LANES)), zero);
        return vf_sum(vf_fma(first, a, vf_mul(second, b)));
    }
    vf both = vf_from_vi(vi_load_u8(row + plane + block * 16));
    vf high = vf_round(vf_mul(vf_sub(both, vf_set1(7.5f)), vf_set1(0.0625f)));
    vf low = vf_fma(high, vf_set1(-16), both), zero = vf_set1(8);
    return vf_sum(vf_fma(vf_sub(low, zero), a, vf_mul(vf_sub(high, zero), b)));
}

EM_INLINE void dot_rows_block(const em_gathered *r, const int dtype, const em_acts *a,
                              int64_t token, float *out) {
    _Alignas(64) float dots[EM_LANES] = {0};
    _Alignas(64) uint16_t scales[EM_LANES] = {0};
    vf sum = vf_set1(0);
    for (int64_t b = 0; b < a->blocks; b++) {
        const int8_t *q = a->q + (token * a->blocks + b) * EM_BLOCK;
        for (int32_t i = 0; i < r->n; i++) {
            memcpy(&scales[i], r->rows[i] + 2 * b, sizeof scales[i]);
            dots[i] = dot_block(r->rows[i], dtype, r->plane, b, q);
        }
        vf scale = vf_mul(vf_load_f16(scales), vf_set1(a->scale[token * a->blocks + b]));
        sum = vf_fma(vf_load(dots), scale, sum);
    }
    vf_store(out, sum);
}

static void dot_rows(const em_gathered *r, const em_acts *a, int64_t token, float *out) {
    switch (r->dtype) {
    case EM_F32: dot_rows_float(r, EM_F32, a, token, out); break;
    case EM_F16: dot_rows_float(r, EM_F16, a, token, out); break;
    case EM_BF16: dot_rows_float(r, EM_BF16, a, token, out); break;
    case EM_Q8_0: dot_rows_block(r, EM_Q8_0, a, token, out); break;
    default: dot_rows_block(r, EM_Q4_0, a, token, out);
    }
}

#define ADDED_TOKENS 64

EM_INLINE void add_row(const uint8_t *row, const int dtype, int64_t plane, int64_t first,
                       int32_t cols, const float *weight, const int32_t *tokens, int32_t n_tokens,
                       float *out, int64_t stride) {
    for (int32_t c = 0; c < cols; c += EM_LANES) {
        vf w = row_part(row, dtype, plane, first + c, cols - c);
        for (int32_t t = 0; t < n_tokens; t++) {
            float *p = out + tokens[t] * stride + c;
            vf sum = vf_fma(w, vf_set1(weight[t]), load_part(p, cols - c, 0));
            store_part(p, cols - c, sum);
        }
    }
}

EM_INLINE int64_t quants_bytes(const int dtype, int64_t cols) {
    return em_group_bytes(dtype, (int32_t)cols, 1) - em_scale_bytes(dtype, (int32_t)cols, 1);
}

/* Rows go one after another, each to all tokens that take it. */
EM_INLINE void add_rows_as(const em_gathered *r, const int dtype, int64_t first, int32_t cols,
                           const float *weights, int64_t weights_stride, int32_t n_tokens,
                           float *out, int64_t stride) {
    const int64_t at = r->plane + quants_bytes(dtype, first);
    const int64_t bytes = quants_bytes(dtype, cols);
    int32_t tokens[ADDED_TOKENS];
    float weight[ADDED_TOKENS];
    for (int32_t from = 0; from < n_tokens; from += ADDED_TOKENS) {
        int32_t end = (int32_t)em_min(n_tokens, from + ADDED_TOKENS);
        for (int32_t i = 0; i < r->n; i++) {
            const uint8_t *next = r->rows[em_min(i + 2, r->n - 1)] + at;
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
            int32_t taken = 0;
            for (int32_t t = from; t < end; t++) {
                float w = weights[t * weights_stride + i];
                tokens[taken] = t;
                weight[taken] = w;
                taken += w != 0; /* true of NaN */
            }
            add_row(r->rows[i], dtype, r->plane, first, cols, weight, tokens, taken, out, stride);
        }
    }
}

static void add_rows(const em_gathered *r, int64_t first, int32_t cols, const float *weights,
                     int64_t weights_stride, int32_t n_tokens, float *out, int64_t stride) {
#define ADD_ROWS(dtype)                                                                            \
    add_rows_as(r, dtype, first, cols, weights, weights_stride, n_tokens, out, stride)
    switch (r->dtype) {
    case EM_F32: ADD_ROWS(EM_F32); break;
    case EM_F16: ADD_ROWS(EM_F16); break;
    case EM_BF16: ADD_ROWS(EM_BF16); break;
    case EM_Q8_0: ADD_ROWS(EM_Q8_0); break;
    default: ADD_ROWS(EM_Q4_0);
    }
#undef ADD_ROWS
}
