/* Rows that each lie on their own (lanes of 1), included by kernels.c: neurons that were found
 * active, wherever they are. Made a group of 16, products take them; or they are added up, in the
 * order of a product's sum. */

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

#define INTERLEAVE(type)                                                                           \
    EM_INLINE void interleave_##type(const type *const *from, int64_t n, type *to) {               \
        for (int64_t k = 0; k < n; k++)                                                            \
            for (int i = 0; i < EM_LANES; i++) to[k * EM_LANES + i] = from[i][k];                  \
    }
INTERLEAVE(uint16_t)
INTERLEAVE(uint32_t)

EM_INLINE int64_t quants_bytes(const int dtype, int64_t cols) {
    return em_group_bytes(dtype, (int32_t)cols, 1) - em_scale_bytes(dtype, (int32_t)cols, 1);
}

static void gather_rows(const em_gathered *r, int64_t first, int32_t cols, uint8_t *to) {
    const int64_t blocks = (cols + EM_BLOCK - 1) / EM_BLOCK;
    const bool floats = r->dtype < EM_Q8_0;
    const int64_t item = r->dtype == EM_F32 ? 4 : 2;
    const int64_t scales = floats ? 0 : first / EM_BLOCK * 2;
    const int64_t quants = floats ? first * item : r->plane + quants_bytes(r->dtype, first);
    const uint8_t *row[EM_LANES];
    /* What fills a group up is some row once more: nobody looks at what comes of it. */
    for (int i = 0; i < EM_LANES; i++) row[i] = r->rows[i < r->n ? i : 0];
    const uint16_t *halves[EM_LANES];
    const uint32_t *words[EM_LANES];
    for (int i = 0; i < EM_LANES; i++)
        halves[i] = (const uint16_t *)(row[i] + (floats ? quants : scales));
    for (int i = 0; i < EM_LANES; i++) words[i] = (const uint32_t *)(row[i] + quants);
    if (r->dtype == EM_F16 || r->dtype == EM_BF16) {
        interleave_uint16_t(halves, cols, (uint16_t *)to);
        return;
    }
    int64_t n = r->dtype == EM_F32 ? cols : blocks * (r->dtype == EM_Q8_0 ? 8 : 4);
    if (r->dtype != EM_F32) interleave_uint16_t(halves, blocks, (uint16_t *)to);
    interleave_uint32_t(words, n, (uint32_t *)(to + em_scale_bytes(r->dtype, cols, EM_LANES)));
}

/* Rows that are added together: a sum is loaded and stored once for all of them. */
#define ADDED_ROWS 4

EM_INLINE void add_some(const uint8_t *const *rows, const int n_rows, const int dtype,
                        int64_t plane, int64_t first, int32_t cols, const float *weights,
                        float *sum) {
    for (int32_t c = 0; c < cols; c += EM_LANES) {
        vf s = load_part(sum + c, cols - c, 0);
        for (int i = 0; i < n_rows; i++)
            s = vf_fma(row_part(rows[i], dtype, plane, first + c, cols - c), vf_set1(weights[i]),
                       s);
        store_part(sum + c, cols - c, s);
    }
}

EM_INLINE void add_rows_as(const em_gathered *r, const int dtype, int64_t first, int32_t cols,
                           const float *weights, float *sum) {
    const int64_t at = r->plane + quants_bytes(dtype, first), bytes = quants_bytes(dtype, cols);
    int32_t i = 0;
    for (; i + ADDED_ROWS <= r->n; i += ADDED_ROWS) {
        for (int32_t j = i + ADDED_ROWS; j < r->n && j < i + 2 * ADDED_ROWS; j++)
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(r->rows[j] + at + b);
        add_some(r->rows + i, ADDED_ROWS, dtype, r->plane, first, cols, weights + i, sum);
    }
    for (; i < r->n; i++) add_some(r->rows + i, 1, dtype, r->plane, first, cols, weights + i, sum);
}

static void add_rows(const em_gathered *r, int64_t first, int32_t cols, const float *weights,
                     float *sum) {
    switch (r->dtype) {
    case EM_F32: add_rows_as(r, EM_F32, first, cols, weights, sum); break;
    case EM_F16: add_rows_as(r, EM_F16, first, cols, weights, sum); break;
    case EM_BF16: add_rows_as(r, EM_BF16, first, cols, weights, sum); break;
    case EM_Q8_0: add_rows_as(r, EM_Q8_0, first, cols, weights, sum); break;
    default: add_rows_as(r, EM_Q4_0, first, cols, weights, sum);
    }
}
