/* The words of kernels.c in plain C: their meaning. A vector is 16 lanes in every instruction set.
 *
 *   vf   16 floats        vi   16 int32        vb   64 bytes: 4 for each of 16 lanes
 *   Every float word rounds once, to nearest even; vf_fma rounds once for both operations. */
#include <math.h>
#include <string.h>

/* Tiles of several tokens, and of queries and keys: what registers hold. */
#define FLOAT_TOKENS 1
#define BLOCK_TILE_GROUPS 1
#define BLOCK_TOKENS 1
#define ATTENTION_TILE 1
#define PEAK_TOKENS 1
#define EM_Q8_BIAS 0 /* what vi_dot_wide leaves in: sum of w*a for w in 0..255 would be 128 */

typedef struct {
    float v[16];
} vf;
typedef struct {
    int32_t v[16];
} vi;
typedef struct {
    uint8_t v[64];
} vb;

#define EACH for (int i = 0; i < 16; i++)
#define EACH_BYTE for (int i = 0; i < 64; i++)

EM_INLINE vf vf_set1(float x) {
    vf r;
    EACH r.v[i] = x;
    return r;
}
EM_INLINE vf vf_load(const float *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
EM_INLINE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
EM_INLINE vf vf_add(vf a, vf b) {
    EACH a.v[i] += b.v[i];
    return a;
}
EM_INLINE vf vf_sub(vf a, vf b) {
    EACH a.v[i] -= b.v[i];
    return a;
}
EM_INLINE vf vf_mul(vf a, vf b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
EM_INLINE vf vf_div(vf a, vf b) {
    EACH a.v[i] /= b.v[i];
    return a;
}
EM_INLINE vf vf_fma(vf a, vf b, vf c) {
    EACH a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return a;
}
/* If a lane of a is NaN, these give b's. */
EM_INLINE vf vf_max(vf a, vf b) {
    EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
EM_INLINE vf vf_min(vf a, vf b) {
    EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
EM_INLINE vf vf_abs(vf a) {
    EACH a.v[i] = fabsf(a.v[i]);
    return a;
}
EM_INLINE vf vf_round(vf a) {
    EACH a.v[i] = rintf(a.v[i]);
    return a;
}

EM_INLINE vi vi_set1(int32_t x) {
    vi r;
    EACH r.v[i] = x;
    return r;
}
EM_INLINE vi vi_add(vi a, vi b) {
    EACH a.v[i] += b.v[i];
    return a;
}
EM_INLINE vf vf_from_vi(vi a) {
    vf r;
    EACH r.v[i] = (float)a.v[i];
    return r;
}
/* Lanes hold whole numbers within int32. */
EM_INLINE vi vi_from_vf(vf a) {
    vi r;
    EACH r.v[i] = (int32_t)a.v[i];
    return r;
}
EM_INLINE vi vi_load(const void *p) {
    vi r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
/* Bits of each lane, moved down by `shift`; and all bits moved up. */
EM_INLINE vi vi_bits(vi a, int shift, int32_t mask) {
    EACH a.v[i] = a.v[i] >> shift & mask;
    return a;
}
EM_INLINE vi vi_shift_up(vi a, int shift) {
    EACH a.v[i] = (int32_t)((uint32_t)a.v[i] << shift);
    return a;
}
EM_INLINE vf vf_of_bits(vi a) {
    vf r;
    memcpy(r.v, a.v, sizeof r.v);
    return r;
}
EM_INLINE vi vi_load_u8(const uint8_t *p) {
    vi r;
    EACH r.v[i] = p[i];
    return r;
}
EM_INLINE vi vi_load_u16(const uint16_t *p) {
    vi r;
    EACH r.v[i] = p[i];
    return r;
}
EM_INLINE vi vi_load_i8(const int8_t *p) {
    vi r;
    EACH r.v[i] = p[i];
    return r;
}
EM_INLINE void vi_store_i8(int8_t *p, vi a) { EACH p[i] = (int8_t)a.v[i]; }
EM_INLINE int32_t vi_sum(vi a) {
    int32_t s = 0;
    EACH s += a.v[i];
    return s;
}
/* 2^n for whole n in -126..127 */
EM_INLINE vf vf_pow2(vf n) {
    EACH {
        uint32_t bits = n.v[i] == n.v[i] ? (uint32_t)((int32_t)n.v[i] + 127) << 23 : 0;
        memcpy(&n.v[i], &bits, 4);
    }
    return n;
}

static inline float em_float_of_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023,
             bits;
    if (exponent == 0) {
        float value = (float)fraction * 0x1p-24f;
        memcpy(&bits, &value, 4);
    } else {
        bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
        if (exponent == 31 && fraction) bits |= 1u << 22; /* the hardware quiets NaNs */
    }
    bits |= sign;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline uint16_t em_f16_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds past 65504 */
    if (bits < 0x38800000) {                                  /* a subnormal half, or zero */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return (uint16_t)(sign | (uint16_t)rintf(magnitude * 0x1p24f));
    }
    uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | (uint16_t)((rounded - (112u << 23)) >> 13));
}

EM_INLINE vf vf_load_f16(const uint16_t *p) {
    vf r;
    EACH r.v[i] = em_float_of_f16(p[i]);
    return r;
}
/* Every lane of the f16 at p. */
EM_INLINE vf vf_set1_f16(const uint8_t *p) {
    return vf_set1(em_float_of_f16((uint16_t)(p[0] | p[1] << 8)));
}
EM_INLINE void vf_store_f16(uint16_t *p, vf a) { EACH p[i] = em_f16_of_float(a.v[i]); }
EM_INLINE vf vf_load_bf16(const uint16_t *p) {
    vf r;
    EACH {
        uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}

/* Fixed trees: lane i with i+8, then i+4, i+2, i+1. */
EM_INLINE float vf_sum(vf a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
    return a.v[0];
}
EM_INLINE float vf_max_lane(vf a) {
    for (int i = 1; i < 16; i++) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
    return a.v[0];
}

EM_INLINE vb vb_load(const uint8_t *p) {
    vb r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
/* Bits of each byte, moved down by `shift` (up where it is negative); those of `mask` must have
 * been in the same byte. */
EM_INLINE vb vb_bits(vb a, const int shift, const int mask) {
    EACH_BYTE a.v[i] = (uint8_t)((shift < 0 ? a.v[i] << -shift : a.v[i] >> shift) & mask);
    return a;
}
EM_INLINE vb vb_or(vb a, vb b) {
    EACH_BYTE a.v[i] |= b.v[i];
    return a;
}
/* table[a], for bytes below 16. */
EM_INLINE vb vb_lookup(vb a, const uint8_t *table) {
    EACH_BYTE a.v[i] = table[a.v[i]];
    return a;
}
/* acc[i] += sum over j < 4 of w[4i + j] * a[j], for bytes of w up to 128 */
EM_INLINE vi vi_dot(vi acc, vb w, const int8_t *a) {
    EACH for (int j = 0; j < 4; j++) acc.v[i] += w.v[4 * i + j] * a[j];
    return acc;
}
/* acc[i] += sum over j < 4 of (w[4i + j] - 128 + EM_Q8_BIAS) * a[j] */
EM_INLINE vi vi_dot_wide(vi acc, vb w, const int8_t *a) {
    EACH for (int j = 0; j < 4; j++) acc.v[i] += ((int32_t)w.v[4 * i + j] - 128) * a[j];
    return acc;
}
#undef EACH
#undef EACH_BYTE
