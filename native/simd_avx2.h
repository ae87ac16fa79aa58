/* The words of kernels.c for AVX2 with FMA and F16C, with AVX-VNNI where the table says so.
 * A vector is two registers of eight lanes. */
#include <immintrin.h>
#include <string.h>

/* Tiles of several tokens, and of queries and keys: what registers hold. */
#define FLOAT_TOKENS 4
#define BLOCK_TILE_GROUPS 1
#define BLOCK_TOKENS 4
#define ATTENTION_TILE 2
#define PEAK_TOKENS 2

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi, vb;

#define BOTH(op, x, y) {op((x).a, (y).a), op((x).b, (y).b)}

EM_INLINE vf vf_set1(float x) {
    __m256 r = _mm256_set1_ps(x);
    return (vf){r, r};
}
EM_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EM_INLINE void vf_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
EM_INLINE vf vf_add(vf x, vf y) { return (vf)BOTH(_mm256_add_ps, x, y); }
EM_INLINE vf vf_sub(vf x, vf y) { return (vf)BOTH(_mm256_sub_ps, x, y); }
EM_INLINE vf vf_mul(vf x, vf y) { return (vf)BOTH(_mm256_mul_ps, x, y); }
EM_INLINE vf vf_div(vf x, vf y) { return (vf)BOTH(_mm256_div_ps, x, y); }
EM_INLINE vf vf_max(vf x, vf y) { return (vf)BOTH(_mm256_max_ps, x, y); }
EM_INLINE vf vf_min(vf x, vf y) { return (vf)BOTH(_mm256_min_ps, x, y); }
EM_INLINE vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
EM_INLINE vf vf_abs(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
EM_INLINE vf vf_round(vf x) {
    return (vf){_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)};
}

EM_INLINE vi vi_set1(int32_t x) {
    __m256i r = _mm256_set1_epi32(x);
    return (vi){r, r};
}
EM_INLINE vi vi_add(vi x, vi y) {
    return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
EM_INLINE vf vf_from_vi(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
EM_INLINE vi vi_from_vf(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
EM_INLINE vi vi_load(const void *p) {
    return (vi){_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
EM_INLINE vi vi_bits(vi x, int shift, int32_t mask) {
    __m128i count = _mm_cvtsi32_si128(shift);
    __m256i bits = _mm256_set1_epi32(mask);
    return (vi){_mm256_and_si256(_mm256_srl_epi32(x.a, count), bits),
                _mm256_and_si256(_mm256_srl_epi32(x.b, count), bits)};
}
EM_INLINE vi vi_shift_up(vi x, int shift) {
    __m128i count = _mm_cvtsi32_si128(shift);
    return (vi){_mm256_sll_epi32(x.a, count), _mm256_sll_epi32(x.b, count)};
}
EM_INLINE vf vf_of_bits(vi x) { return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
EM_INLINE vi vi_load_u16(const uint16_t *p) {
    return (vi){_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 1))};
}
EM_INLINE vi vi_load_i8(const int8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
EM_INLINE vi vi_load_u8(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
EM_INLINE void vi_store_i8(int8_t *p, vi x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
EM_INLINE int32_t vi_sum(vi x) {
    __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
EM_INLINE __m256 pow2_half(__m256 n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
EM_INLINE vf vf_pow2(vf n) { return (vf){pow2_half(n.a), pow2_half(n.b)}; }

EM_INLINE vf vf_load_f16(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
EM_INLINE vf vf_set1_f16(const uint8_t *p) {
    int16_t half;
    memcpy(&half, p, 2);
    __m256 r = _mm256_cvtph_ps(_mm_set1_epi16(half));
    return (vf){r, r};
}
EM_INLINE void vf_store_f16(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
EM_INLINE __m256 bf16_half(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
EM_INLINE vf vf_load_bf16(const uint16_t *p) { return (vf){bf16_half(p), bf16_half(p + 8)}; }

EM_INLINE float vf_sum(vf x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
EM_INLINE float vf_max_lane(vf x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

EM_INLINE __m256i broadcast4(const int8_t *a) {
    int32_t word;
    memcpy(&word, a, 4);
    return _mm256_set1_epi32(word);
}
EM_INLINE vb vb_load(const uint8_t *p) { return vi_load(p); }
EM_INLINE __m256i byte_bits(__m256i x, const int shift, const int mask) {
    if (shift > 0) x = _mm256_srli_epi16(x, shift);
    if (shift < 0) x = _mm256_slli_epi16(x, -shift);
    return _mm256_and_si256(x, _mm256_set1_epi8((char)mask));
}
EM_INLINE vb vb_bits(vb x, const int shift, const int mask) {
    return (vb){byte_bits(x.a, shift, mask), byte_bits(x.b, shift, mask)};
}
EM_INLINE vb vb_or(vb x, vb y) { return (vb)BOTH(_mm256_or_si256, x, y); }
EM_INLINE vb vb_lookup(vb x, const uint8_t *table) {
    __m256i few = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vb){_mm256_shuffle_epi8(few, x.a), _mm256_shuffle_epi8(few, x.b)};
}

#if defined(__AVXVNNI__)
#define EM_Q8_BIAS 128
EM_INLINE __m256i dot_u8(__m256i acc, __m256i w, __m256i a) {
    return _mm256_dpbusd_avx_epi32(acc, w, a);
}
EM_INLINE __m256i dot_w8(__m256i acc, __m256i w, __m256i a) { return dot_u8(acc, w, a); }
#else
/* Pairs of |w - 128| * a reach 2 * 128 * 127, which int16 just holds; w * a would not fit. */
#define EM_Q8_BIAS 0
EM_INLINE __m256i dot_u8(__m256i acc, __m256i w, __m256i a) {
    __m256i pairs = _mm256_maddubs_epi16(w, a);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
EM_INLINE __m256i dot_w8(__m256i acc, __m256i w, __m256i a) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return dot_u8(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}
#endif

EM_INLINE vi vi_dot(vi acc, vb w, const int8_t *a) {
    __m256i x = broadcast4(a);
    return (vi){dot_u8(acc.a, w.a, x), dot_u8(acc.b, w.b, x)};
}
EM_INLINE vi vi_dot_wide(vi acc, vb w, const int8_t *a) {
    __m256i x = broadcast4(a);
    return (vi){dot_w8(acc.a, w.a, x), dot_w8(acc.b, w.b, x)};
}
