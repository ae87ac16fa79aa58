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

EM_INLINE void prefetch(const void *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const uint8_t *)p + PREFETCH_BYTES + i);
}

#define FLOAT_PRODUCT(name, dtype, type, load)                                                     \
    EM_INLINE void name##_tile(const uint8_t *weights, const em_acts *a, const em_out *o,          \
                               int64_t group, const int groups, int64_t token, const int tokens) { \
        vf sum[FLOAT_SUMS];                                                                        \
        const float *x[FLOAT_TOKENS];                                                              \
        const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES) / (int64_t)sizeof(type);     \
        const type *w = (const type *)weights + group * next;                                      \
        for (int t = 0; t < tokens; t++) x[t] = a->x + act_row(a, token + t) * a->cols;            \
        for (int i = 0; i < groups * tokens; i++) sum[i] = vf_set1(0);                             \
        const int64_t turn = a->cols - PREFETCH_BYTES / (int64_t)(EM_LANES * sizeof(type));        \
        for (int64_t k = 0; k < a->cols; k++) {                                                    \
            const int64_t past = k < turn ? 0 : (groups - 1) * next;                               \
            for (int g = 0; g < groups; g++) {                                                     \
                const type *at = w + g * next + k * EM_LANES;                                      \
                if (token == 0) prefetch(at + past, EM_LANES * sizeof(type));                      \
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

/* A block's quants lie in chunks of 64 bytes, 4 a row: chunk c of 16 rows times one token's q. */
EM_INLINE vi dot_chunk_q8(vi dot, const uint8_t *w, const int8_t *q, int c) {
    return vi_dot_q8(dot, w + 64 * c, q + 4 * c);
}

EM_INLINE vi dot_chunk_q4(vi dot, const uint8_t *w, const int8_t *q, int c) {
    return vi_dot_q4(dot, w + 64 * c, q + 4 * c, q + 16 + 4 * c);
}

/* Where instructions multiply matrices, a block is multiplied by two tokens' at once. */
#ifndef EM_PAIRS
#define EM_PAIRS 0
#define vi_pair_q8(w, a, b, of_a, of_b) (void)(w)
#define vi_pair_q4(w, a, b, of_a, of_b) (void)(w)
#endif

/* Where instructions multiply a whole block by many tokens', they take what tokens there are in
 * sixteens and eights. Returns how many. */
#ifdef EM_TILE_TOKENS
#include "matrices.h"
#else
#define product_q8_matrices(weights, first_group, n_groups, a, n_tokens, o) 0
#define product_q4_matrices(weights, first_group, n_groups, a, n_tokens, o) 0
#endif

/* Chunks go outside and tokens inside: a chunk is unpacked once, and what it is multiplied by is
 * spread over a register once for all groups. */
#define BLOCK_PRODUCT(name, dtype, chunks, bias, dot_chunk, dot_pair)                              \
    EM_INLINE void name##_tile(const uint8_t *weights, const em_acts *a, const em_out *o,          \
                               int64_t group, const int groups, int64_t token, const int tokens) { \
        const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES);                             \
        const uint8_t *base = weights + group * next;                                              \
        const int64_t plane = em_scale_bytes(dtype, a->cols, EM_LANES);                            \
        const int64_t block_bytes = (chunks) * 64 + 2 * EM_LANES;                                  \
        vf sum[BLOCK_TILE_GROUPS * BLOCK_TOKENS];                                                  \
        vi dot[BLOCK_TILE_GROUPS * BLOCK_TOKENS];                                                  \
        int64_t row[BLOCK_TOKENS];                                                                 \
        for (int t = 0; t < tokens; t++) row[t] = act_row(a, token + t) * a->blocks;               \
        for (int i = 0; i < groups * tokens; i++) sum[i] = vf_set1(0);                             \
        const int64_t turn = (next - plane - PREFETCH_BYTES) / block_bytes;                        \
        for (int64_t b = 0; b < a->blocks; b++) {                                                  \
            const uint8_t *w = base + plane + b * ((chunks) * 64);                                 \
            const int64_t past = b < turn ? 0 : (groups - 1) * next;                               \
            for (int g = 0; token == 0 && g < groups; g++)                                         \
                prefetch(base + past + g * next + plane + b * block_bytes, block_bytes);           \
            for (int i = 0; i < groups * tokens; i++)                                              \
                dot[i] = vi_set1(-(bias) * a->sum[row[i % tokens] + b]);                           \
            const int8_t *q[BLOCK_TOKENS];                                                         \
            for (int t = 0; t < tokens; t++) q[t] = a->q + (row[t] + b) * EM_BLOCK;                \
            const int paired = EM_PAIRS ? tokens / 2 * 2 : 0;                                      \
            for (int t = 0; t < paired; t += 2)                                                    \
                for (int g = 0; g < groups; g++)                                                   \
                    dot_pair(w + g * next, q[t], q[t + 1], &dot[g * tokens + t],                   \
                             &dot[g * tokens + t + 1]);                                            \
            for (int c = 0; c < (chunks); c++)                                                     \
                for (int t = paired; t < tokens; t++)                                              \
                    for (int g = 0; g < groups; g++)                                               \
                        dot[g * tokens + t] =                                                      \
                            dot_chunk(dot[g * tokens + t], w + g * next, q[t], c);                 \
            for (int g = 0; g < groups; g++) {                                                     \
                vf d = vf_load_f16((const uint16_t *)(base + g * next) + b * EM_LANES);            \
                for (int t = 0; t < tokens; t++) {                                                 \
                    int i = g * tokens + t;                                                        \
                    vf scale = vf_mul(d, vf_set1(a->scale[row[t] + b]));                           \
                    sum[i] = vf_fma(vf_from_vi(dot[i]), scale, sum[i]);                            \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        for (int g = 0; g < groups; g++)                                                           \
            for (int t = 0; t < tokens; t++)                                                       \
                finish(sum[g * tokens + t], o, token + t, (group + g) * EM_LANES);                 \
    }                                                                                              \
    static void name(const uint8_t *weights, int32_t first_group, int32_t n_groups,                \
                     const em_acts *a, int32_t n_tokens, const em_out *o) {                        \
        const int32_t from = name##_matrices(weights, first_group, n_groups, a, n_tokens, o);      \
        FOR_TILES(name##_CALL, from, BLOCK_GROUPS, BLOCK_TILE_GROUPS, BLOCK_TOKENS);               \
    }

#define product_q8_CALL(g, ng, t, nt) product_q8_tile(weights, a, o, g, ng, t, nt)
#define product_q4_CALL(g, ng, t, nt) product_q4_tile(weights, a, o, g, ng, t, nt)
BLOCK_PRODUCT(product_q8, EM_Q8_0, 8, EM_Q8_BIAS, dot_chunk_q8, vi_pair_q8)
BLOCK_PRODUCT(product_q4, EM_Q4_0, 4, 8, dot_chunk_q4, vi_pair_q4)
