/* The words of kernels.c for NEON on aarch64, with the extensions for dot products, and for
 * products of 8-bit matrices, where the table says so. A vector is four registers of four lanes. */
#include <arm_neon.h>
#include <string.h>

/* Tiles of several tokens, and of queries and keys: what registers hold. */
#define FLOAT_TOKENS 4
#define BLOCK_TILE_GROUPS 1
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define BLOCK_TOKENS 4 /* in pairs, which share what is unpacked */
#define EM_Q8_BIAS 128
#else
#define BLOCK_TOKENS 2
#define EM_Q8_BIAS 0
#endif
#define ATTENTION_TILE 2
#define PEAK_TOKENS 2

typedef struct {
    float32x4_t v[4];
} vf;
typedef struct {
    int32x4_t v[4];
} vi;
typedef struct {
    uint8x16_t v[4];
} vb;

#define EACH for (int i = 0; i < 4; i++)

EM_INLINE vf vf_set1(float x) {
    vf r;
    EACH r.v[i] = vdupq_n_f32(x);
    return r;
}
EM_INLINE vf vf_load(const float *p) {
    vf r;
    EACH r.v[i] = vld1q_f32(p + 4 * i);
    return r;
}
EM_INLINE void vf_store(float *p, vf a) { EACH vst1q_f32(p + 4 * i, a.v[i]); }
EM_INLINE vf vf_add(vf a, vf b) {
    EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_sub(vf a, vf b) {
    EACH a.v[i] = vsubq_f32(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_mul(vf a, vf b) {
    EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_div(vf a, vf b) {
    EACH a.v[i] = vdivq_f32(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_fma(vf a, vf b, vf c) {
    EACH a.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_max(vf a, vf b) {
    EACH a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_min(vf a, vf b) {
    EACH a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_abs(vf a) {
    EACH a.v[i] = vabsq_f32(a.v[i]);
    return a;
}
EM_INLINE vf vf_round(vf a) {
    EACH a.v[i] = vrndnq_f32(a.v[i]);
    return a;
}

EM_INLINE vi vi_set1(int32_t x) {
    vi r;
    EACH r.v[i] = vdupq_n_s32(x);
    return r;
}
EM_INLINE vi vi_add(vi a, vi b) {
    EACH a.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vf vf_from_vi(vi a) {
    vf r;
    EACH r.v[i] = vcvtq_f32_s32(a.v[i]);
    return r;
}
EM_INLINE vi vi_from_vf(vf a) {
    vi r;
    EACH r.v[i] = vcvtnq_s32_f32(a.v[i]);
    return r;
}
EM_INLINE vi vi_load(const void *p) {
    vi r;
    EACH r.v[i] = vld1q_s32((const int32_t *)p + 4 * i);
    return r;
}
EM_INLINE vi vi_bits(vi a, int shift, int32_t mask) {
    EACH a.v[i] = vandq_s32(vshlq_s32(a.v[i], vdupq_n_s32(-shift)), vdupq_n_s32(mask));
    return a;
}
EM_INLINE vi vi_shift_up(vi a, int shift) {
    EACH a.v[i] = vshlq_s32(a.v[i], vdupq_n_s32(shift));
    return a;
}
EM_INLINE vf vf_of_bits(vi a) {
    vf r;
    EACH r.v[i] = vreinterpretq_f32_s32(a.v[i]);
    return r;
}
EM_INLINE vi vi_load_u16(const uint16_t *p) {
    vi r;
    EACH r.v[i] = vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p + 4 * i)));
    return r;
}
EM_INLINE vi vi_load_u8(const uint8_t *p) {
    uint8x16_t bytes = vld1q_u8(p);
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
EM_INLINE vi vi_load_i8(const int8_t *p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
EM_INLINE void vi_store_i8(int8_t *p, vi a) {
    int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
EM_INLINE int32_t vi_sum(vi a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
EM_INLINE vf vf_pow2(vf n) {
    EACH {
        int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
        n.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
    }
    return n;
}

EM_INLINE vf vf_load_f16(const uint16_t *p) {
    vf r;
    EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}
EM_INLINE vf vf_set1_f16(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    vf r;
    EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
    return r;
}
EM_INLINE void vf_store_f16(uint16_t *p, vf a) {
    EACH vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
EM_INLINE vf vf_load_bf16(const uint16_t *p) {
    vf r;
    EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}

EM_INLINE float vf_sum(vf a) {
    float32x4_t s = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
EM_INLINE float vf_max_lane(vf a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}

EM_INLINE vb vb_load(const uint8_t *p) {
    vb r;
    EACH r.v[i] = vld1q_u8(p + 16 * i);
    return r;
}
EM_INLINE vb vb_bits(vb a, const int shift, const int mask) {
    EACH {
        if (shift) a.v[i] = vshlq_u8(a.v[i], vdupq_n_s8((int8_t)-shift));
        a.v[i] = vandq_u8(a.v[i], vdupq_n_u8((uint8_t)mask));
    }
    return a;
}
EM_INLINE vb vb_or(vb a, vb b) {
    EACH a.v[i] = vorrq_u8(a.v[i], b.v[i]);
    return a;
}
EM_INLINE vb vb_lookup(vb a, const uint8_t *table) {
    uint8x16_t few = vld1q_u8(table);
    EACH a.v[i] = vqtbl1q_u8(few, a.v[i]);
    return a;
}

EM_INLINE int8x16_t broadcast4(const int8_t *a) {
    int32_t word;
    memcpy(&word, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

/* acc[i] += sum over j < 4 of w[4i + j] * a[4i + j] */
EM_INLINE int32x4_t dot4(int32x4_t acc, int8x16_t w, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, w, a);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)));
    int32x4_t high = vpaddlq_s16(vmull_high_s8(w, a));
    return vaddq_s32(acc, vpaddq_s32(low, high));
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
EM_INLINE int32x4_t dot_u8(int32x4_t acc, uint8x16_t w, int8x16_t a) {
    return vusdotq_s32(acc, w, a);
}
EM_INLINE uint8x16_t wide_quants(uint8x16_t w) { return w; }
#else
EM_INLINE int32x4_t dot_u8(int32x4_t acc, uint8x16_t w, int8x16_t a) {
    return dot4(acc, vreinterpretq_s8_u8(w), a);
}
EM_INLINE uint8x16_t wide_quants(uint8x16_t w) { return veorq_u8(w, vdupq_n_u8(0x80)); }
#endif

EM_INLINE vi vi_dot(vi acc, vb w, const int8_t *a) {
    int8x16_t x = broadcast4(a);
    EACH acc.v[i] = dot_u8(acc.v[i], w.v[i], x);
    return acc;
}
EM_INLINE vi vi_dot_wide(vi acc, vb w, const int8_t *a) {
    int8x16_t x = broadcast4(a);
    EACH acc.v[i] = dot_u8(acc.v[i], wide_quants(w.v[i]), x);
    return acc;
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define EM_PAIRS 1

/* Sums of two tokens: registers hold [row, token], two of each. */
typedef struct {
    int32x4_t v[8];
} pair_sums;

/* Adds 8 columns of 16 rows, of which two chunks hold 4 each, times 8 numbers of both tokens. */
EM_INLINE pair_sums pair_add(pair_sums s, vb first, vb second, const int8_t *a, const int8_t *b) {
    int8x16_t x = vcombine_s8(vld1_s8(a), vld1_s8(b));
    EACH {
        uint32x4_t left = vreinterpretq_u32_u8(first.v[i]);
        uint32x4_t right = vreinterpretq_u32_u8(second.v[i]);
        uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(left, right));
        uint8x16_t high = vreinterpretq_u8_u32(vzip2q_u32(left, right));
        s.v[2 * i] = vusmmlaq_s32(s.v[2 * i], low, x);
        s.v[2 * i + 1] = vusmmlaq_s32(s.v[2 * i + 1], high, x);
    }
    return s;
}

EM_INLINE void pair_end(pair_sums s, vi *of_a, vi *of_b) {
    EACH {
        of_a->v[i] = vaddq_s32(of_a->v[i], vuzp1q_s32(s.v[2 * i], s.v[2 * i + 1]));
        of_b->v[i] = vaddq_s32(of_b->v[i], vuzp2q_s32(s.v[2 * i], s.v[2 * i + 1]));
    }
}
#endif
#undef EACH
