/* Products of blocks and many tokens by tiles, included by products.h where there are some.
 *
 * A block of a group's 16 rows times that of 16 tokens is one instruction; what takes the time is
 * to store its 256 sums and to scale them. So all else is done once for many: groups are unpacked
 * to signed bytes once for PANEL_TOKENS tokens, and what tokens hold is brought together once for
 * PANEL_GROUPS groups. Tiles are asked for AHEAD blocks early: what they store is long in coming.
 */

enum { PANEL_GROUPS = 8, PANEL_BLOCKS = 8, PANEL_TOKENS = 64, AHEAD = 3 };

typedef int8_t tile_weights[EM_BLOCK * EM_LANES];

/* PANEL_BLOCKS blocks of up to EM_TILE_TOKENS tokens. */
typedef struct {
    _Alignas(64) int8_t q[PANEL_BLOCKS][EM_TILE_TOKENS * EM_BLOCK];
    float scale[PANEL_BLOCKS][EM_TILE_TOKENS];
} tile_acts;

EM_INLINE void tile_gather(tile_acts *to, const em_acts *a, int64_t token, const int tokens,
                           int64_t block, int n_blocks) {
    for (int t = 0; t < tokens; t++) {
        int64_t from = act_row(a, token + t) * a->blocks + block;
        for (int b = 0; b < n_blocks; b++) {
            memcpy(to->q[b] + t * EM_BLOCK, a->q + (from + b) * EM_BLOCK, EM_BLOCK);
            to->scale[b][t] = a->scale[from + b];
        }
    }
}

/* sums[t] += the products of n_blocks blocks, whose rows' scales are at d, in their order. */
EM_INLINE void tile_multiply(vf *sums, const tile_weights *w, const uint16_t *d, const tile_acts *x,
                             int n_blocks, const int tokens) {
    _Alignas(64) int32_t dots[AHEAD + 1][EM_TILE_TOKENS * EM_LANES];
    vf sum[EM_TILE_TOKENS];
    for (int t = 0; t < tokens; t++) sum[t] = sums[t];
    for (int b = 0; b < n_blocks && b < AHEAD; b++)
        tiles_dot(dots[b], x->q[b], w[b], tokens, b & 1);
    for (int b = 0; b < n_blocks; b++) {
        const int next = b + AHEAD;
        if (next < n_blocks)
            tiles_dot(dots[next % (AHEAD + 1)], x->q[next], w[next], tokens, next & 1);
        const int32_t *dot = dots[b % (AHEAD + 1)];
        vf rows = vf_load_f16(d + b * EM_LANES);
        for (int t = 0; t < tokens; t++) {
            vf scale = vf_mul(rows, vf_set1(x->scale[b][t]));
            sum[t] = vf_fma(vf_from_vi(vi_load(dot + t * EM_LANES)), scale, sum[t]);
        }
    }
    for (int t = 0; t < tokens; t++) sums[t] = sum[t];
}

#define BLOCK_MATRICES(name, dtype, block_bytes, widen)                                            \
    static void name##_panel(const uint8_t *weights, int64_t group, int n_groups,                  \
                             const em_acts *a, int64_t token, int n_tokens, const em_out *o) {     \
        const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES);                             \
        const int64_t plane = em_scale_bytes(dtype, a->cols, EM_LANES);                            \
        const uint8_t *base = weights + group * next;                                              \
        _Alignas(64) tile_weights wide[PANEL_GROUPS][PANEL_BLOCKS];                                \
        vf sums[PANEL_GROUPS][PANEL_TOKENS];                                                       \
        tile_acts x;                                                                               \
        for (int g = 0; g < n_groups; g++)                                                         \
            for (int t = 0; t < n_tokens; t++) sums[g][t] = vf_set1(0);                            \
        for (int64_t block = 0; block < a->blocks; block += PANEL_BLOCKS) {                        \
            const int n =                                                                          \
                a->blocks - block < PANEL_BLOCKS ? (int)(a->blocks - block) : PANEL_BLOCKS;        \
            for (int g = 0; g < n_groups; g++)                                                     \
                for (int b = 0; b < n; b++) {                                                      \
                    const uint8_t *from = base + g * next + plane + (block + b) * (block_bytes);   \
                    if (token == 0) prefetch(from, block_bytes);                                   \
                    widen(wide[g][b], from);                                                       \
                }                                                                                  \
            for (int t = 0; t < n_tokens; t += EM_TILE_TOKENS) {                                   \
                const bool whole = n_tokens - t >= EM_TILE_TOKENS;                                 \
                tile_gather(&x, a, token + t, whole ? EM_TILE_TOKENS : 8, block, n);               \
                for (int g = 0; g < n_groups; g++) {                                               \
                    const uint16_t *d = (const uint16_t *)(base + g * next) + block * EM_LANES;    \
                    if (whole)                                                                     \
                        tile_multiply(sums[g] + t, wide[g], d, &x, n, EM_TILE_TOKENS);             \
                    else                                                                           \
                        tile_multiply(sums[g] + t, wide[g], d, &x, n, 8);                          \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        for (int g = 0; g < n_groups; g++)                                                         \
            for (int t = 0; t < n_tokens; t++)                                                     \
                finish(sums[g][t], o, token + t, (group + g) * EM_LANES);                          \
    }                                                                                              \
    static int32_t name##_matrices(const uint8_t *weights, int32_t first_group, int32_t n_groups,  \
                                   const em_acts *a, int32_t n_tokens, const em_out *o) {          \
        const int32_t end = n_tokens / 8 * 8;                                                      \
        if (end == 0) return 0;                                                                    \
        tiles_begin();                                                                             \
        for (int32_t g = 0; g < n_groups; g += PANEL_GROUPS)                                       \
            for (int32_t t = 0; t < end; t += PANEL_TOKENS)                                        \
                name##_panel(weights, first_group + g,                                             \
                             n_groups - g < PANEL_GROUPS ? n_groups - g : PANEL_GROUPS, a, t,      \
                             end - t < PANEL_TOKENS ? end - t : PANEL_TOKENS, o);                  \
        tiles_end();                                                                               \
        return end;                                                                                \
    }

BLOCK_MATRICES(product_q8, EM_Q8_0, 8 * 64, widen_q8)
BLOCK_MATRICES(product_q4, EM_Q4_0, 4 * 64, widen_q4)
