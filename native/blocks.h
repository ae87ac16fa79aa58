/* What block formats are made of (FORMAT.md), included by kernels.c: for products, where `dtype` is
 * a constant and all of this folds away, and for rows of tables. */

/* How the scale of 32 or 16 columns follows from its block's. */
enum {
    SCALES_F16,    /* it is the block's, an f16; so is the minimum */
    SCALES_POWER,  /* it is the block's, an exponent */
    SCALES_6_BITS, /* times a whole number of 6 bits, of which others have the minimum */
    SCALES_6_BITS_SIGNED,
    SCALES_6_BITS_SPLIT, /* of which the block's scale is followed by the high bits */
    SCALES_8_BITS,
    SCALES_4_BITS /* and the minimum 4 bits */
};

typedef struct {
    int8_t scales, scale_bytes;
    bool minima;
    int8_t steps;      /* of 32 columns in a block */
    int8_t parts;      /* of a step, each of which has its own scale: 1, or 2 of 16 columns */
    int8_t header;     /* words of scales before the quants */
    int8_t low, high;  /* bits of the planes that a quant is made of; high may be 0 */
    uint8_t offset;    /* what is subtracted from a quant */
    uint8_t table[16]; /* what is found for it first, if not all zero */
} block_form;

#define NEAR_NORMAL {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}
#define E2M1 {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}

static const block_form FORMS[EM_DTYPES] = {
    [EM_Q8_0] = {SCALES_F16, 2, false, 1, 1, 0, 8, 0, 128, {0}},
    [EM_Q4_0] = {SCALES_F16, 2, false, 1, 1, 0, 4, 0, 8, {0}},
    [EM_Q4_1] = {SCALES_F16, 4, true, 1, 1, 0, 4, 0, 0, {0}},
    [EM_Q5_0] = {SCALES_F16, 2, false, 1, 1, 0, 4, 1, 16, {0}},
    [EM_Q5_1] = {SCALES_F16, 4, true, 1, 1, 0, 4, 1, 0, {0}},
    [EM_Q2_K] = {SCALES_4_BITS, 4, true, 8, 2, 4, 2, 0, 0, {0}},
    [EM_Q3_K] = {SCALES_6_BITS_SIGNED, 2, false, 8, 2, 3, 2, 1, 4, {0}},
    [EM_Q4_K] = {SCALES_6_BITS, 4, true, 8, 1, 3, 4, 0, 0, {0}},
    [EM_Q5_K] = {SCALES_6_BITS, 4, true, 8, 1, 3, 4, 1, 0, {0}},
    [EM_Q6_K] = {SCALES_8_BITS, 2, false, 8, 2, 4, 4, 2, 32, {0}},
    [EM_IQ4_NL] = {SCALES_F16, 2, false, 1, 1, 0, 4, 0, 128, NEAR_NORMAL},
    [EM_IQ4_XS] = {SCALES_6_BITS_SPLIT, 4, false, 8, 1, 1, 4, 0, 128, NEAR_NORMAL},
    [EM_MXFP4] = {SCALES_POWER, 1, false, 1, 1, 0, 4, 0, 12, E2M1},
};

/* Words of 4 bytes a row: of 32 columns' quants, and of a block. */
EM_INLINE int64_t step_words(const int dtype) { return FORMS[dtype].low + FORMS[dtype].high; }
EM_INLINE int64_t block_words(const int dtype) {
    return FORMS[dtype].header + FORMS[dtype].steps * step_words(dtype);
}
EM_INLINE bool has_table(const int dtype) { return FORMS[dtype].table[0] != 0; }
EM_INLINE bool is_wide(const int dtype) { return FORMS[dtype].offset == 128; }

/* Chunk c of a step whose quants are at w: 4 columns of 16 rows. */
EM_INLINE vb quants(const int dtype, const uint8_t *w, const int c) {
    const int low = FORMS[dtype].low, high = FORMS[dtype].high;
    vb q = vb_load(w + 64 * (c % low));
    if (low < 8) q = vb_bits(q, c / low * low, (1 << low) - 1);
    if (high) {
        vb more = vb_load(w + 64 * (low + c % high));
        q = vb_or(q, vb_bits(more, c / high * high - low, ((1 << high) - 1) << low));
    }
    return has_table(dtype) ? vb_lookup(q, FORMS[dtype].table) : q;
}

/* Number `s` of those of 6 bits of which two words, `low` and `high`, have 4 and 2. */
EM_INLINE vi six_bits(vi low, vi high, int s, int first_high) {
    vi top = vi_bits(high, first_high + 2 * s, 3);
    return vi_add(vi_bits(low, 4 * s, 15), vi_shift_up(top, 4));
}

/* 2^(e - 128), also where that is below the normal floats (ggml's e8m0_to_fp32_half). */
EM_INLINE vf power(vi e) {
    vf normal = vf_of_bits(vi_shift_up(vi_add(e, vi_set1(-1)), 23));
    vf small = vf_of_bits(vi_shift_up(vi_add(e, vi_set1(1)), 21)); /* for e < 2; else smaller */
    return vf_max(normal, small);
}

/* Of 16 rows: what a quant of part `part` of step `s` is multiplied by. `d` is the block's place
 * among the scales, `w` that among the quants. Exact in a float, as is the product. */
EM_INLINE vf block_scale(const int dtype, const uint8_t *d, const uint8_t *w, int s, int part) {
    if (FORMS[dtype].scales == SCALES_POWER) return power(vi_load_u8(d));
    vf scale = vf_load_f16((const uint16_t *)d);
    vi by, high;
    switch (FORMS[dtype].scales) {
    case SCALES_6_BITS: by = six_bits(vi_load(w), vi_load(w + 128), s, 0); break;
    case SCALES_6_BITS_SIGNED:
        by = six_bits(vi_load(w + 64 * part), vi_load(w + 128), s, 16 * part);
        by = vi_add(by, vi_set1(-32));
        break;
    case SCALES_6_BITS_SPLIT:
        high = vi_load_u16((const uint16_t *)d + EM_LANES);
        by = vi_add(six_bits(vi_load(w), high, s, 0), vi_set1(-32));
        break;
    case SCALES_8_BITS:
        by = vi_bits(vi_load(w + 64 * (s / 2)), s % 2 * 16 + 8 * part, 255);
        by = vi_add(by, vi_set1(-128));
        break;
    case SCALES_4_BITS: by = vi_bits(vi_load(w + 64 * (s / 2)), s % 2 * 16 + 8 * part, 15); break;
    default: return scale;
    }
    return vf_mul(scale, vf_from_vi(by));
}

/* What is added to such products. */
EM_INLINE vf block_minimum(const int dtype, const uint8_t *d, const uint8_t *w, int s, int part) {
    vf minimum = vf_load_f16((const uint16_t *)d + EM_LANES);
    vi by;
    switch (FORMS[dtype].scales) {
    case SCALES_6_BITS: by = six_bits(vi_load(w + 64), vi_load(w + 128), s, 16); break;
    case SCALES_4_BITS:
        by = vi_bits(vi_load(w + 64 * (s / 2)), s % 2 * 16 + 8 * part + 4, 15);
        break;
    default: return minimum;
    }
    return vf_mul(vf_mul(minimum, vf_set1(-1)), vf_from_vi(by));
}

/* ---- one row ------------------------------------------------------------------------------- */

/* Quant of column k of a step whose words of one row are given. */
EM_INLINE int quant(const int dtype, const uint8_t (*words)[4], int k) {
    const int low = FORMS[dtype].low, high = FORMS[dtype].high, c = k / 4;
    int q = words[c % low][k % 4] >> c / low * low & ((1 << low) - 1);
    if (high) q |= (words[low + c % high][k % 4] >> c / high * high & ((1 << high) - 1)) << low;
    return (has_table(dtype) ? FORMS[dtype].table[q] : q) - FORMS[dtype].offset;
}

enum { MOST_HEADER = 4, MOST_WORDS = 52 };

/* One row's block: its scales as they are for 16 rows, each that one, and its words. */
typedef struct {
    _Alignas(64) uint8_t scales[4 * EM_LANES], header[MOST_HEADER][EM_LANES][4];
    uint8_t words[MOST_WORDS][4];
} row_block;

static void take_block(row_block *to, int32_t dtype, const uint8_t *d, const uint8_t *w,
                       int32_t lanes, int64_t lane) {
    const int each = em_min(FORMS[dtype].scale_bytes, 2), n = FORMS[dtype].scale_bytes / each;
    for (int i = 0; i < n * EM_LANES; i++)
        memcpy(to->scales + i * each, d + (i / EM_LANES * lanes + lane) * each, (size_t)each);
    for (int i = 0; i < block_words(dtype); i++)
        memcpy(to->words[i], w + (i * lanes + lane) * 4, 4);
    for (int i = 0; i < FORMS[dtype].header * EM_LANES; i++)
        memcpy(to->header[i / EM_LANES][i % EM_LANES], to->words[i / EM_LANES], 4);
}

/* The first `cols` values of a row of blocks: quant · scale, and the minimum added in one rounding;
 * as ggml's dequantize_row functions. */
static void unpack_blocks(const uint8_t *group, int32_t dtype, int32_t lanes, int32_t cols,
                          int64_t lane, float *out) {
    const block_form *f = &FORMS[dtype];
    const uint8_t *w = group + em_scale_bytes(dtype, cols, lanes);
    const int width = EM_BLOCK / f->parts;
    row_block block;
    float scale[EM_LANES], minimum[EM_LANES] = {0};
    for (int32_t k = 0, part = 0; k < cols; part++) {
        const int s = part / f->parts % f->steps, within = part % f->parts;
        if (s == 0 && within == 0) {
            int64_t b = part / f->parts / f->steps;
            take_block(&block, dtype, group + b * f->scale_bytes * lanes,
                       w + b * block_words(dtype) * 4 * lanes, lanes, lane);
        }
        const uint8_t *header = block.header[0][0];
        vf_store(scale, block_scale(dtype, block.scales, header, s, within));
        if (f->minima) vf_store(minimum, block_minimum(dtype, block.scales, header, s, within));
        const uint8_t (*words)[4] = block.words + f->header + s * step_words(dtype);
        for (int i = within * width; i < (within + 1) * width && k < cols; i++, k++) {
            float value = scale[0] * (float)quant(dtype, words, i);
            out[k] = f->minima ? value + minimum[0] : value;
        }
    }
}
