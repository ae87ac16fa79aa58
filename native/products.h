/* Products of store matrices and activations, included by kernels.c: rows lie in groups of 16, and
 * a group's rows are the lanes of one register. */

EM_INLINE void finish(vf sum, const em_out *o, int64_t token, int64_t row) {
    float *p = o->out + token * o->stride + row;
    int64_t n = o->rows - row;
    if (o->bias) sum = vf_add(sum, load_part(o->bias + row, n, 0));
    if (o->accumulate) sum = vf_add(load_part(p, n, 0), sum);
    store_part(p, n, sum);
}

EM_INLINE int64_t act_row(const em_acts *a, int64_t token) {
    return a->rows ? a->rows[token] : token;
}

/* Calls TILE(group, n_groups, token, n_tokens) for tokens FROM and on, so that both counts are
 * compile-time constants: for one token ONE groups at a time, for more MANY groups and up to TOKENS
 * tokens. */
#define FOR_TILES(TILE, FROM, ONE, MANY, TOKENS)                                                   \
    do {                                                                                           \
        int32_t g = first_group, end = first_group + n_groups;                                     \
        if (n_tokens - (FROM) == 1)                                                                \
            for (; g + (ONE) <= end; g += (ONE)) TILE(g, ONE, FROM, 1);                            \
        for (; g + (MANY) <= end; g += (MANY)) FOR_TOKENS(TILE, FROM, g, MANY, TOKENS);            \
        for (; g < end; g++) FOR_TOKENS(TILE, FROM, g, 1, TOKENS);                                 \
    } while (0)

#define FOR_TOKENS(TILE, FROM, GROUP, GROUPS, TOKENS)                                              \
    do {                                                                                           \
        int32_t t = FROM;                                                                          \
        for (; t + (TOKENS) <= n_tokens; t += (TOKENS)) TILE(GROUP, GROUPS, t, TOKENS);            \
        for (; (TOKENS) > 4 && t + 4 <= n_tokens; t += 4) TILE(GROUP, GROUPS, t, 4);               \
        for (; (TOKENS) > 3 && t + 3 == n_tokens; t += 3) TILE(GROUP, GROUPS, t, 3);               \
        for (; (TOKENS) > 2 && t + 2 <= n_tokens; t += 2) TILE(GROUP, GROUPS, t, 2);               \
        for (; t < n_tokens; t++) TILE(GROUP, GROUPS, t, 1);                                       \
    } while (0)

/* Chains of fused multiply-adds wait 4 cycles for each other: for one token, run several groups.
 * A block's chain is one of integers, so its groups go one by one, in the order of memory. */
#define FLOAT_GROUPS 2
#define FLOAT_SUMS (FLOAT_GROUPS > FLOAT_TOKENS ? FLOAT_GROUPS : FLOAT_TOKENS)
#define BLOCK_GROUPS 1

/* For few tokens memory is the limit, and processors' own prefetchers stop at each page: ask for
 * what lies this far ahead, in the order of memory, which pays more than the order of use
 * (bench/LOG.md). Where it lies beyond a group, it is that after all groups of the tile. */
#define PREFETCH_BYTES 4096

/* Where em_by_two_caches, it is asked for twice: into the second cache, and from there into the
 * first. */
#define PREFETCH_L2_BYTES 8192
#define PREFETCH_L1_BYTES 2048

/* What lies `left` bytes or more ahead lies beyond a group, and `past` it there. */
EM_INLINE void prefetch(const void *p, int64_t bytes, int64_t left, int64_t past) {
    const int64_t near = em_by_two_caches ? PREFETCH_L1_BYTES : PREFETCH_BYTES;
    const uint8_t *at = (const uint8_t *)p + near + (near < left ? 0 : past);
    const uint8_t *far = (const uint8_t *)p + PREFETCH_L2_BYTES;
    if (PREFETCH_L2_BYTES >= left) far += past;
    for (int64_t i = 0; i < bytes; i += 64) {
        if (em_by_two_caches) __builtin_prefetch(far + i, 0, 2);
        __builtin_prefetch(at + i);
    }
}

#define FLOAT_PRODUCT(name, dtype, type, load)                                                     \
    EM_INLINE void name##_tile(const uint8_t *weights, const em_acts *a, const em_out *o,          \
                               int64_t group, const int groups, int64_t token, const int tokens) { \
        vf sum[FLOAT_SUMS];                                                                        \
        const float *x[FLOAT_TOKENS];                                                              \
        const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES) / (int64_t)sizeof(type);     \
        const type *w = (const type *)weights + group * next;                                      \
        for (int t = 0; t < tokens; t++) x[t] = a->x + act_row(a, token + t) * em_acts_stride(a);  \
        for (int i = 0; i < groups * tokens; i++) sum[i] = vf_set1(0);                             \
        for (int64_t k = 0; k < a->cols; k++) {                                                    \
            const int64_t left = (a->cols - k) * EM_LANES * (int64_t)sizeof(type);                 \
            for (int g = 0; g < groups; g++) {                                                     \
                const type *at = w + g * next + k * EM_LANES;                                      \
                if (token == 0)                                                                    \
                    prefetch(at, EM_LANES * sizeof(type), left,                                    \
                             (groups - 1) * next * sizeof(type));                                  \
                vf wk = load(at);                                                                  \
                for (int t = 0; t < tokens; t++)                                                   \
                    sum[g * tokens + t] = vf_fma(wk, vf_set1(x[t][k]), sum[g * tokens + t]);       \
            }                                                                                      \
        }                                                                                          \
        for (int g = 0; g < groups; g++)                                                           \
            for (int t = 0; t < tokens; t++)                                                       \
                finish(sum[g * tokens + t], o, token + t, (group + g) * EM_LANES);                 \
    }                                                                                              \
    static void name(const uint8_t *weights, int32_t first_group, int32_t n_groups,                \
                     const em_acts *a, int32_t n_tokens, const em_out *o) {                        \
        FOR_TILES(name##_CALL, 0, FLOAT_GROUPS, 1, FLOAT_TOKENS);                                  \
    }

#define product_f32_CALL(g, ng, t, nt) product_f32_tile(weights, a, o, g, ng, t, nt)
#define product_f16_CALL(g, ng, t, nt) product_f16_tile(weights, a, o, g, ng, t, nt)
#define product_bf16_CALL(g, ng, t, nt) product_bf16_tile(weights, a, o, g, ng, t, nt)
FLOAT_PRODUCT(product_f32, EM_F32, float, vf_load)
FLOAT_PRODUCT(product_f16, EM_F16, uint16_t, vf_load_f16)
FLOAT_PRODUCT(product_bf16, EM_BF16, uint16_t, vf_load_bf16)

/* What is left in an instruction's sum of a step for each activation. */
EM_INLINE int32_t bias_of(const int dtype) {
    return is_wide(dtype) ? EM_Q8_BIAS : FORMS[dtype].offset;
}

EM_INLINE vi dot_chunk(const int dtype, vi dot, vb w, const int8_t *q) {
    return is_wide(dtype) ? vi_dot_wide(dot, w, q) : vi_dot(dot, w, q);
}

/* The sum of token row `row`'s quants of a part of block `b`. */
EM_INLINE int32_t part_sum(const em_acts *a, int64_t at, const int parts, int part) {
    if (parts == 1) return a->sum[at];
    return part ? a->sum[at] - a->first[at] : a->first[at];
}

#ifdef EM_PAIRS
/* Where instructions multiply matrices, a step is multiplied by two tokens' at once. */
EM_INLINE void dot_pair(const int dtype, const uint8_t *w, int begin, int end, const int8_t *a,
                        const int8_t *b, vi *of_a, vi *of_b) {
    pair_sums s = {{{0}}};
    for (int c = begin; c < end; c += 2)
        s = pair_add(s, quants(dtype, w, c), quants(dtype, w, c + 1), a + 4 * c, b + 4 * c);
    pair_end(s, of_a, of_b);
}
#else
#define EM_PAIRS 0
#define dot_pair(dtype, w, begin, end, a, b, of_a, of_b) (void)(w)
#endif

/* dot[g * tokens + t] += a part of a step of group g, whose first lies at w, times token t's.
 * Chunks go outside and tokens inside: a chunk is unpacked once, and what it is multiplied by is
 * spread over a register once for all groups. */
EM_INLINE void dot_part(const int dtype, const uint8_t *w, int64_t next, const int groups, int part,
                        const int8_t *const *q, const int tokens, vi *dot) {
    const int chunks = EM_BLOCK / 4 / FORMS[dtype].parts, begin = part * chunks;
    const int paired = EM_PAIRS ? tokens / 2 * 2 : 0;
    for (int t = 0; t < paired; t += 2)
        for (int g = 0; g < groups; g++)
            dot_pair(dtype, w + g * next, begin, begin + chunks, q[t], q[t + 1],
                     &dot[g * tokens + t], &dot[g * tokens + t + 1]);
    for (int c = begin; paired < tokens && c < begin + chunks; c++)
        for (int g = 0; g < groups; g++) {
            vb chunk = quants(dtype, w + g * next, c);
            for (int t = paired; t < tokens; t++)
                dot[g * tokens + t] = dot_chunk(dtype, dot[g * tokens + t], chunk, q[t] + 4 * c);
        }
}

/* sum[t] += what a part of a step gives; `at` are the blocks of the tokens' activations. */
EM_INLINE void add_part(const int dtype, const em_acts *a, const int64_t *at, const int tokens,
                        const uint8_t *d, const uint8_t *w, int s, int part, const vi *dot,
                        vf *sum) {
    vf scale = block_scale(dtype, d, w, s, part);
    for (int t = 0; t < tokens; t++)
        sum[t] = vf_fma(vf_from_vi(dot[t]), vf_mul(scale, vf_set1(a->scale[at[t]])), sum[t]);
    if (!FORMS[dtype].minima) return;
    vf minimum = block_minimum(dtype, d, w, s, part);
    for (int t = 0; t < tokens; t++) {
        float x = a->scale[at[t]] * (float)part_sum(a, at[t], FORMS[dtype].parts, part);
        sum[t] = vf_fma(minimum, vf_set1(x), sum[t]);
    }
}

EM_INLINE void block_tile(const int dtype, const uint8_t *weights, const em_acts *a,
                          const em_out *o, int64_t group, const int groups, int64_t token,
                          const int tokens) {
    const block_form *f = &FORMS[dtype];
    const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES);
    const int64_t plane = em_scale_bytes(dtype, a->cols, EM_LANES);
    const int64_t words_bytes = block_words(dtype) * 4 * EM_LANES;
    const int64_t step_bytes = (words_bytes + f->scale_bytes * EM_LANES) / f->steps;
    const uint8_t *d = weights + group * next, *w = d + plane, *ahead = w;
    vf sum[BLOCK_TILE_GROUPS * BLOCK_TOKENS];
    vi dot[BLOCK_TILE_GROUPS * BLOCK_TOKENS];
    int64_t at[BLOCK_TOKENS];
    for (int t = 0; t < tokens; t++) at[t] = act_row(a, token + t) * a->blocks;
    for (int i = 0; i < groups * tokens; i++) sum[i] = vf_set1(0);
    for (int64_t b = 0; b < a->blocks; b += f->steps) {
        for (int s = 0; s < f->steps; s++) {
            const uint8_t *step = w + (f->header + s * step_words(dtype)) * 4 * EM_LANES;
            const int64_t left = weights + (group + 1) * next - ahead;
            const int8_t *q[BLOCK_TOKENS];
            for (int g = 0; token == 0 && g < groups; g++)
                prefetch(ahead + g * next, step_bytes, left, (groups - 1) * next);
            for (int t = 0; t < tokens; t++) q[t] = a->q + at[t] * EM_BLOCK;
            for (int part = 0; part < f->parts; part++) {
                for (int i = 0; i < groups * tokens; i++)
                    dot[i] = vi_set1(-bias_of(dtype) * part_sum(a, at[i % tokens], f->parts, part));
                dot_part(dtype, step, next, groups, part, q, tokens, dot);
                for (int g = 0; g < groups; g++)
                    add_part(dtype, a, at, tokens, d + g * next, w + g * next, s, part,
                             dot + g * tokens, sum + g * tokens);
            }
            for (int t = 0; t < tokens; t++) at[t]++;
            ahead += step_bytes;
        }
        d += f->scale_bytes * EM_LANES;
        w += words_bytes;
    }
    for (int g = 0; g < groups; g++)
        for (int t = 0; t < tokens; t++)
            finish(sum[g * tokens + t], o, token + t, (group + g) * EM_LANES);
}

#ifdef EM_TILE_TOKENS
#include "matrices.h"
#else
#define block_matrices(dtype, weights, first_group, n_groups, a, n_tokens, o) 0
#endif

#define BLOCK_CALL(g, ng, t, nt) block_tile(dtype, weights, a, o, g, ng, t, nt)

EM_INLINE void block_product(const int dtype, const uint8_t *weights, int32_t first_group,
                             int32_t n_groups, const em_acts *a, int32_t n_tokens,
                             const em_out *o) {
    const int32_t from = block_matrices(dtype, weights, first_group, n_groups, a, n_tokens, o);
    FOR_TILES(BLOCK_CALL, from, BLOCK_GROUPS, BLOCK_TILE_GROUPS, BLOCK_TOKENS);
}

#define BLOCK_PRODUCT(name, dtype)                                                                 \
    static void name(const uint8_t *weights, int32_t first_group, int32_t n_groups,                \
                     const em_acts *a, int32_t n_tokens, const em_out *o) {                        \
        block_product(dtype, weights, first_group, n_groups, a, n_tokens, o);                      \
    }
BLOCK_PRODUCT(product_q8_0, EM_Q8_0)
BLOCK_PRODUCT(product_q4_0, EM_Q4_0)
BLOCK_PRODUCT(product_q4_1, EM_Q4_1)
BLOCK_PRODUCT(product_q5_0, EM_Q5_0)
BLOCK_PRODUCT(product_q5_1, EM_Q5_1)
BLOCK_PRODUCT(product_q2_k, EM_Q2_K)
BLOCK_PRODUCT(product_q3_k, EM_Q3_K)
BLOCK_PRODUCT(product_q4_k, EM_Q4_K)
BLOCK_PRODUCT(product_q5_k, EM_Q5_K)
BLOCK_PRODUCT(product_q6_k, EM_Q6_K)
BLOCK_PRODUCT(product_iq4_nl, EM_IQ4_NL)
BLOCK_PRODUCT(product_iq4_xs, EM_IQ4_XS)
BLOCK_PRODUCT(product_mxfp4, EM_MXFP4)
