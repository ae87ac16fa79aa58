/* All kernels, once; compiled for one instruction set by -DEM_ISA=name and its compiler flags.
 *
 * Sums run in one order: a product's row is one chain over its columns (over its blocks, for block
 * formats: exact in integers within a block, then one fused multiply-add per block); other sums run
 * in 16 lanes that a fixed tree adds up. So tiles, threads and batches never change a result. */
#if defined(EM_ISA_amx)
#define _GNU_SOURCE /* syscall */
#endif
#include "kernels.h"

#if defined(EM_ISA_amx) || defined(EM_ISA_amx_emulated)
#include "simd_amx.h"
#elif defined(EM_ISA_avx512) || defined(EM_ISA_avx512vnni)
#include "simd_avx512.h"
#elif defined(EM_ISA_avx2) || defined(EM_ISA_avxvnni)
#include "simd_avx2.h"
#elif defined(EM_ISA_neon) || defined(EM_ISA_dotprod) || defined(EM_ISA_i8mm)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#include <math.h>

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)

EM_INLINE vf load_part(const float *p, int64_t n, float fill) {
    if (n >= EM_LANES) return vf_load(p);
    float lane[EM_LANES];
    for (int i = 0; i < EM_LANES; i++) lane[i] = i < n ? p[i] : fill;
    return vf_load(lane);
}

EM_INLINE void store_part(float *p, int64_t n, vf a) {
    if (n >= EM_LANES) {
        vf_store(p, a);
        return;
    }
    float lane[EM_LANES];
    vf_store(lane, a);
    for (int i = 0; i < n; i++) p[i] = lane[i];
}

#include "blocks.h"

#include "products.h"

#include "gathered.h"

/* ---- activations as blocks ------------------------------------------------------------------ */

/* x >= 0 to the 11 significant bits of an f16, to nearest even, but with the exponents of a float:
 * an f16 would overflow from 65520 and lose bits below 2^-14. */
EM_INLINE float round_as_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~UINT32_C(0x1fff);
    memcpy(&x, &bits, 4);
    return x;
}

/* llama.cpp's numbers: quants by the exact scale, which is then kept as an f16. */
static void quantize(const float *x, int32_t cols, int8_t *q, float *scale, int32_t *sum,
                     int32_t *first) {
    for (int32_t k = 0; k < cols; k += EM_BLOCK) {
        vf a = load_part(x + k, cols - k, 0);
        vf b =
            cols - k > EM_LANES ? load_part(x + k + EM_LANES, cols - k - EM_LANES, 0) : vf_set1(0);
        float amax = vf_max_lane(vf_max(vf_abs(a), vf_abs(b)));
        /* Zero for finite numbers, NaN otherwise: what overflowed must not look like a result. */
        float poison = vf_sum(vf_fma(a, vf_set1(0), vf_mul(b, vf_set1(0))));
        vf inverse = vf_set1(amax > 0 ? 127.0f / amax : 0), limit = vf_set1(127);
        vf low = vf_set1(-127);
        a = vf_round(vf_min(vf_max(vf_mul(a, inverse), low), limit));
        b = vf_round(vf_min(vf_max(vf_mul(b, inverse), low), limit));
        vi qa = vi_from_vf(a), qb = vi_from_vf(b);
        vi_store_i8(q + k, qa);
        vi_store_i8(q + k + EM_LANES, qb);
        *scale++ = round_as_f16(amax / 127.0f) + poison;
        *sum++ = vi_sum(vi_add(qa, qb));
        if (first) *first++ = vi_sum(qa);
    }
}

/* ---- element-wise ------------------------------------------------------------------------------
 */

/* e^x within 2 ulp; the argument is clamped to where the result is a normal float, NaN stays NaN.
 * Range reduction and polynomial as in Cephes' expf (S. Moshier). */
EM_INLINE vf vf_exp(vf x) {
    x = vf_min(vf_set1(88.0f), vf_max(vf_set1(-87.0f), x)); /* in this order NaN stays NaN */
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504088896341f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    vf e = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set1(1));
    return vf_mul(e, vf_pow2(n));
}

EM_INLINE vf vf_sigmoid(vf x) {
    vf e = vf_exp(vf_sub(vf_set1(0), x));
    return vf_div(vf_set1(1), vf_add(vf_set1(1), e));
}

EM_INLINE vf vf_tanh(vf x) {
    vf e = vf_exp(vf_add(x, x));
    return vf_sub(vf_set1(1), vf_div(vf_set1(2), vf_add(e, vf_set1(1))));
}

/* erf within 1.5e-7 absolute: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26. */
EM_INLINE vf vf_erf(vf x) {
    vf z = vf_abs(x), one = vf_set1(1);
    vf t = vf_div(one, vf_fma(vf_set1(0.3275911f), z, one));
    vf p = vf_set1(1.061405429f);
    p = vf_fma(p, t, vf_set1(-1.453152027f));
    p = vf_fma(p, t, vf_set1(1.421413741f));
    p = vf_fma(p, t, vf_set1(-0.284496736f));
    p = vf_fma(p, t, vf_set1(0.254829592f));
    vf e = vf_exp(vf_sub(vf_set1(0), vf_mul(z, z)));
    vf magnitude = vf_sub(one, vf_mul(vf_mul(p, t), e));
    vf sign = vf_min(vf_max(vf_mul(x, vf_set1(1e38f)), vf_set1(-1)), one);
    return vf_mul(sign, magnitude);
}

EM_INLINE vf activate(vf x, int32_t activation) {
    vf half = vf_set1(0.5f), one = vf_set1(1), positive;
    switch (activation) {
    case EM_SILU: return vf_mul(x, vf_sigmoid(x));
    case EM_GELU:
        return vf_mul(vf_mul(half, x), vf_add(one, vf_erf(vf_mul(x, vf_set1(0.70710678f)))));
    case EM_GELU_TANH: {
        vf cube = vf_mul(vf_mul(x, x), x);
        vf inner = vf_mul(vf_set1(0.79788456f), vf_fma(vf_set1(0.044715f), cube, x));
        return vf_mul(vf_mul(half, x), vf_add(one, vf_tanh(inner)));
    }
    case EM_CLAMPED_SWIGLU: /* fall through */
    case EM_GELU_QUICK: return vf_mul(x, vf_sigmoid(vf_mul(vf_set1(1.702f), x)));
    default:
        positive = vf_max(vf_set1(0), x); /* in this order NaN stays NaN */
        return activation == EM_RELU2 ? vf_mul(positive, positive) : positive;
    }
}

static void gate(float *g, const float *up, int32_t n, int32_t activation) {
    const vf limit = vf_set1(7), minus_limit = vf_set1(-7);
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = load_part(g + i, n - i, 0), b = up ? load_part(up + i, n - i, 0) : vf_set1(1);
        if (activation == EM_CLAMPED_SWIGLU) {
            a = vf_min(limit, a); /* in this order NaN stays NaN */
            b = vf_add(vf_min(limit, vf_max(minus_limit, b)), vf_set1(1));
        }
        a = activate(a, activation);
        store_part(g + i, n - i, up ? vf_mul(a, b) : a);
    }
}

static void sigmoid(float *x, int32_t n) {
    for (int32_t i = 0; i < n; i += EM_LANES)
        store_part(x + i, n - i, vf_sigmoid(load_part(x + i, n - i, 0)));
}

EM_INLINE vf vf_cap(vf x, float limit) {
    return vf_mul(vf_set1(limit), vf_tanh(vf_mul(x, vf_set1(1 / limit))));
}

static void cap(float *x, int32_t n, float limit) {
    for (int32_t i = 0; i < n; i += EM_LANES)
        store_part(x + i, n - i, vf_cap(load_part(x + i, n - i, 0), limit));
}

static void scale(float *x, int32_t n, float factor) {
    for (int32_t i = 0; i < n; i += EM_LANES)
        store_part(x + i, n - i, vf_mul(load_part(x + i, n - i, 0), vf_set1(factor)));
}

static void softmax(float *x, int32_t n) {
    vf top = vf_set1(-INFINITY), sum = vf_set1(0);
    for (int32_t i = 0; i < n; i += EM_LANES) top = vf_max(load_part(x + i, n - i, -INFINITY), top);
    top = vf_set1(vf_max_lane(top));
    for (int32_t i = 0; i < n; i += EM_LANES) {
        store_part(x + i, n - i, vf_exp(vf_sub(load_part(x + i, n - i, 0), top)));
        sum = vf_add(sum, load_part(x + i, n - i, 0));
    }
    vf total = vf_set1(vf_sum(sum));
    for (int32_t i = 0; i < n; i += EM_LANES)
        store_part(x + i, n - i, vf_div(load_part(x + i, n - i, 0), total));
}

static void rms_norm(const float *x, const float *weight, float eps, int32_t n, float *out) {
    vf squares = vf_set1(0);
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = load_part(x + i, n - i, 0);
        squares = vf_fma(a, a, squares);
    }
    vf inverse = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = vf_mul(load_part(x + i, n - i, 0), inverse);
        store_part(out + i, n - i, vf_mul(a, load_part(weight + i, n - i, 0)));
    }
}

static void layer_norm(const float *x, const float *weight, const float *bias, float eps, int32_t n,
                       float *out) {
    vf sum = vf_set1(0), squares = vf_set1(0);
    for (int32_t i = 0; i < n; i += EM_LANES) sum = vf_add(sum, load_part(x + i, n - i, 0));
    float mean = vf_sum(sum) / (float)n;
    vf middle = vf_set1(mean);
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = vf_sub(load_part(x + i, n - i, mean), middle);
        squares = vf_fma(a, a, squares);
    }
    vf inverse = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = vf_mul(vf_sub(load_part(x + i, n - i, 0), middle), inverse);
        vf w = load_part(weight + i, n - i, 0);
        store_part(out + i, n - i, vf_fma(a, w, load_part(bias + i, n - i, 0)));
    }
}

static void axpy(float *out, float weight, const float *x, int32_t n) {
    vf w = vf_set1(weight);
    for (int32_t i = 0; i < n; i += EM_LANES) {
        vf a = vf_fma(w, load_part(x + i, n - i, 0), load_part(out + i, n - i, 0));
        store_part(out + i, n - i, a);
    }
}

/* ---- attention --------------------------------------------------------------------------- */

static void rotate(const float *x, const float *cos_t, const float *sin_t, int32_t n, float *out) {
    int32_t half = n / 2;
    for (int32_t i = 0; i < half; i += EM_LANES) {
        int64_t left = half - i;
        vf a = load_part(x + i, left, 0), b = load_part(x + half + i, left, 0);
        vf c = load_part(cos_t + i, left, 0), s = load_part(sin_t + i, left, 0);
        vf minus_b = vf_sub(vf_set1(0), b);
        store_part(out + i, left, vf_fma(minus_b, s, vf_mul(a, c)));
        store_part(out + half + i, left, vf_fma(a, s, vf_mul(b, c)));
    }
}

#include "attend.h"

/* ---- tables and memory ------------------------------------------------------------------- */

EM_INLINE float load_f16(const uint8_t *p) {
    uint16_t lane[EM_LANES] = {(uint16_t)(p[0] | p[1] << 8)};
    float value[EM_LANES];
    vf_store(value, vf_load_f16(lane));
    return value[0];
}

static void unpack_row(const uint8_t *data, int32_t dtype, int32_t lanes, int32_t cols, int64_t row,
                       float *out) {
    const uint8_t *group = data + row / lanes * em_group_bytes(dtype, cols, lanes);
    int64_t lane = row % lanes;
    if (em_dtype_is_block(dtype)) {
        unpack_blocks(group, dtype, lanes, cols, lane, out);
        return;
    }
    for (int32_t k = 0; k < cols; k++) {
        int64_t at = (int64_t)k * lanes + lane;
        switch (dtype) {
        case EM_F32: out[k] = ((const float *)group)[at]; break;
        case EM_F16: out[k] = load_f16(group + 2 * at); break;
        default: {
            uint16_t bits[EM_LANES] = {((const uint16_t *)group)[at]};
            float value[EM_LANES];
            vf_store(value, vf_load_bf16(bits));
            out[k] = value[0];
        }
        }
    }
}

static uint64_t read_bytes(const uint8_t *data, uint64_t bytes) {
    const uint64_t *word = (const uint64_t *)data;
    uint64_t sum[32] = {0};
    for (uint64_t i = 0; i + 32 <= bytes / 8; i += 32)
        for (int j = 0; j < 32; j++) sum[j] += word[i + j];
    for (int j = 1; j < 32; j++) sum[0] += sum[j];
    return sum[0];
}

/* ---- the pace of multiply-adds --------------------------------------------------------------- */

/* Times PEAK_TOKENS: as many chains as registers hold. */
#define PEAK_VECTORS 3
#define PEAK_ROUNDS 8192

/* Multiply-adds as products do them, on operands that stay in the first cache. The asm says that
 * operands may be others in each round: without it the compiler would compute once what does not
 * change. A round takes each chain `turns` times, with other activations each, since compilers copy
 * all chains between rounds. */
#define PEAK(name, turns, vector, zero, as_float, step)                                            \
    static int64_t name(const float *w, const float *x, float *result) {                           \
        vector sum[PEAK_VECTORS * PEAK_TOKENS];                                                    \
        vf total = vf_set1(0);                                                                     \
        for (int c = 0; c < PEAK_VECTORS * PEAK_TOKENS; c++) sum[c] = zero;                        \
        for (int round = 0; round < PEAK_ROUNDS; round++) {                                        \
            __asm__ volatile("" : "+r"(w), "+r"(x));                                               \
            for (int t = 0; t < (turns) * PEAK_TOKENS; t++)                                        \
                for (int i = 0; i < PEAK_VECTORS; i++) {                                           \
                    const float *wi = w + i * EM_LANES, *xt = x + 2 * t;                           \
                    vector acc = sum[i * PEAK_TOKENS + t % PEAK_TOKENS];                           \
                    sum[i * PEAK_TOKENS + t % PEAK_TOKENS] = step;                                 \
                }                                                                                  \
        }                                                                                          \
        for (int c = 0; c < PEAK_VECTORS * PEAK_TOKENS; c++)                                       \
            total = vf_add(total, as_float(sum[c]));                                               \
        *result = vf_sum(total);                                                                   \
        return (int64_t)PEAK_ROUNDS * PEAK_VECTORS * (turns) * PEAK_TOKENS * EM_LANES;             \
    }
PEAK(peak_float, 4, vf, vf_set1(0), /* it is one */, vf_fma(vf_load(wi), vf_set1(*xt), acc))
PEAK(peak_q8, 2, vi, vi_set1(0), vf_from_vi,
     vi_dot_wide(acc, vb_load((const uint8_t *)wi), (const int8_t *)xt))
PEAK(peak_q4, 2, vi, vi_set1(0), vf_from_vi,
     vi_dot(vi_dot(acc, quants(EM_Q4_1, (const uint8_t *)wi, 0), (const int8_t *)xt),
            quants(EM_Q4_1, (const uint8_t *)wi, 4), (const int8_t *)(xt + 1)))

static int64_t peak(int32_t dtype, float *sum) {
    float w[PEAK_VECTORS * EM_LANES], x[2 * 4 * PEAK_TOKENS];
#ifdef EM_TILE_TOKENS
    if (em_dtype_is_block(dtype)) return tiles_peak(sum);
#endif
    if (em_dtype_is_block(dtype)) {
        memset(w, 129, sizeof w); /* small: nothing overflows in all rounds */
        memset(x, 1, sizeof x);
        return dtype == EM_Q8_0 ? 4 * peak_q8(w, x, sum) : 8 * peak_q4(w, x, sum);
    }
    for (size_t i = 0; i < sizeof w / sizeof *w; i++) w[i] = 1;
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = 1;
    return peak_float(w, x, sum);
}

const em_kernels JOIN(em_kernels_, EM_ISA) = {
    .name = TEXT(EM_ISA),
    .product =
        {
            [EM_F32] = product_f32,
            [EM_F16] = product_f16,
            [EM_BF16] = product_bf16,
            [EM_Q8_0] = product_q8_0,
            [EM_Q4_0] = product_q4_0,
            [EM_Q4_1] = product_q4_1,
            [EM_Q5_0] = product_q5_0,
            [EM_Q5_1] = product_q5_1,
            [EM_Q2_K] = product_q2_k,
            [EM_Q3_K] = product_q3_k,
            [EM_Q4_K] = product_q4_k,
            [EM_Q5_K] = product_q5_k,
            [EM_Q6_K] = product_q6_k,
            [EM_IQ4_NL] = product_iq4_nl,
            [EM_IQ4_XS] = product_iq4_xs,
            [EM_MXFP4] = product_mxfp4,
        },
    .gather_rows = gather_rows,
    .add_rows = add_rows,
    .quantize = quantize,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .gate = gate,
    .softmax = softmax,
    .sigmoid = sigmoid,
    .cap = cap,
    .scale = scale,
    .axpy = axpy,
    .rotate = rotate,
    .store_f16 = store_f16,
    .store_key = store_key,
    .store_value = store_value,
    .attend = attend,
    .unpack_row = unpack_row,
    .read_bytes = read_bytes,
    .peak = peak,
#ifdef EM_PREPARE
    .prepare = EM_PREPARE,
#endif
};
