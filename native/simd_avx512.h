/* The words of kernels.c for AVX-512 (F, BW, VL, DQ), with VNNI where the table says so. */
#include <immintrin.h>
#include <string.h>

/* Tiles of several tokens: as many sums as registers hold, and enough
 * to hide a chain of adds; of queries and keys. */
#define FLOAT_TOKENS 8
#define BLOCK_TILE_GROUPS 2
#define BLOCK_TOKENS 4
#define ATTENTION_TILE 4
#define PEAK_TOKENS 4

typedef __m512 vf;
typedef __m512i vi, vb;

EM_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
EM_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
EM_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
EM_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
EM_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
EM_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
EM_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
EM_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
EM_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
EM_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
EM_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
EM_INLINE vf vf_round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

EM_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
EM_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
EM_INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
EM_INLINE vi vi_from_vf(vf a) { return _mm512_cvtps_epi32(a); }
EM_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
EM_INLINE vi vi_bits(vi a, int shift, int32_t mask) {
    return _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask));
}
EM_INLINE vi vi_shift_up(vi a, int shift) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(shift)); }
EM_INLINE vf vf_of_bits(vi a) { return _mm512_castsi512_ps(a); }
EM_INLINE vi vi_load_u16(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
EM_INLINE vi vi_load_i8(const int8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
EM_INLINE vi vi_load_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
EM_INLINE void vi_store_i8(int8_t *p, vi a) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a));
}
EM_INLINE int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
EM_INLINE vf vf_pow2(vf n) {
    vi biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

EM_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
EM_INLINE vf vf_set1_f16(const uint8_t *p) {
    int16_t half;
    memcpy(&half, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(half));
}
EM_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
EM_INLINE vf vf_load_bf16(const uint16_t *p) {
    vi wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

EM_INLINE float vf_sum(vf a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
EM_INLINE float vf_max_lane(vf a) { return _mm512_reduce_max_ps(a); }

typedef uint16_t halves512 __attribute__((vector_size(64)));

EM_INLINE vb vb_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
EM_INLINE vb vb_bits(vb a, const int shift, const int mask) {
    if (shift > 0) a = (vb)((halves512)a >> shift);
    if (shift < 0) a = (vb)((halves512)a << -shift);
    return _mm512_and_si512(a, _mm512_set1_epi8((char)mask));
}
EM_INLINE vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
EM_INLINE vb vb_lookup(vb a, const uint8_t *table) {
    __m128i few = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(few), a);
}

EM_INLINE vi broadcast4(const int8_t *a) {
    int32_t word;
    memcpy(&word, a, 4);
    return _mm512_set1_epi32(word);
}

#if defined(__AVX512VNNI__)
#define EM_Q8_BIAS 128
EM_INLINE vi vi_dot(vi acc, vb w, const int8_t *a) {
    return _mm512_dpbusd_epi32(acc, w, broadcast4(a));
}
EM_INLINE vi vi_dot_wide(vi acc, vb w, const int8_t *a) { return vi_dot(acc, w, a); }
#else
/* Pairs of |w - 128| * a reach 2 * 128 * 127, which int16 just holds; w * a would not fit. */
#define EM_Q8_BIAS 0
EM_INLINE vi dot_u8(vi acc, vi w, vi a) {
    vi pairs = _mm512_maddubs_epi16(w, a);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
EM_INLINE vi vi_dot(vi acc, vb w, const int8_t *a) { return dot_u8(acc, w, broadcast4(a)); }
EM_INLINE vi vi_dot_wide(vi acc, vb w, const int8_t *a) {
    w = _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80));
    __mmask64 negative = _mm512_movepi8_mask(w);
    vi x = broadcast4(a);
    vi signed_x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
    return dot_u8(acc, _mm512_abs_epi8(w), signed_x);
}
#endif
