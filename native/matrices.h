/* Products of blocks where instructions multiply a step by many tokens', included by products.h:
 * they take what tokens there are in sixteens and eights.
 *
 * To store 256 sums and to scale them takes longer than to multiply (bench/LOG.md). So all else is
 * done once for many: groups are unpacked to signed bytes once for PANEL_TOKENS tokens, and what
 * tokens hold is brought together once for PANEL_GROUPS groups; and sums are asked for AHEAD of
 * those that are scaled, since what tiles store is long in coming. */

enum { PANEL_GROUPS = 8, PANEL_STEPS = 8, PANEL_TOKENS = 64, MOST_PARTS = 2, AHEAD = 3 };

/* Some steps of a group of rows. */
typedef struct {
    _Alignas(64) int8_t q[PANEL_STEPS][EM_BLOCK * EM_LANES];
    vf scale[PANEL_STEPS * MOST_PARTS], minimum[PANEL_STEPS * MOST_PARTS];
} panel_weights;

/* The same steps of some tokens; `minimum` is what minima are multiplied by. */
typedef struct {
    _Alignas(64) int8_t q[PANEL_STEPS][EM_TILE_TOKENS * EM_BLOCK];
    float scale[PANEL_STEPS][EM_TILE_TOKENS], minimum[PANEL_STEPS * MOST_PARTS][EM_TILE_TOKENS];
} panel_acts;

EM_INLINE void panel_unpack(const int dtype, panel_weights *to, const uint8_t *group, int64_t plane,
                            int64_t first, int n, bool ahead) {
    const block_form *f = &FORMS[dtype];
    const vb offset = vb_set1(f->offset);
    for (int i = 0; i < n; i++) {
        const int64_t b = (first + i) / f->steps, s = (first + i) % f->steps;
        const uint8_t *d = group + b * f->scale_bytes * EM_LANES;
        const uint8_t *w = group + plane + b * block_words(dtype) * 4 * EM_LANES;
        const uint8_t *step = w + (f->header + s * step_words(dtype)) * 4 * EM_LANES;
        if (ahead) prefetch(step, step_words(dtype) * 4 * EM_LANES, INT64_MAX, 0);
        for (int c = 0; c < EM_BLOCK / 4; c++)
            vb_store(to->q[i] + 64 * c, vb_sub(quants(dtype, step, c), offset));
        for (int part = 0; part < f->parts; part++) {
            to->scale[i * f->parts + part] = block_scale(dtype, d, w, (int)s, part);
            if (f->minima)
                to->minimum[i * f->parts + part] = block_minimum(dtype, d, w, (int)s, part);
        }
    }
}

EM_INLINE void panel_gather(const int dtype, panel_acts *to, const em_acts *a, int64_t token,
                            const int tokens, int64_t first, int n) {
    const int parts = FORMS[dtype].parts;
    for (int t = 0; t < tokens; t++) {
        const int64_t at = act_row(a, token + t) * a->blocks + first;
        for (int i = 0; i < n; i++) {
            memcpy(to->q[i] + t * EM_BLOCK, a->q + (at + i) * EM_BLOCK, EM_BLOCK);
            to->scale[i][t] = a->scale[at + i];
            for (int part = 0; FORMS[dtype].minima && part < parts; part++)
                to->minimum[i * parts + part][t] =
                    a->scale[at + i] * (float)part_sum(a, at + i, parts, part);
        }
    }
}

EM_INLINE void panel_dot(const int parts, int32_t (*dots)[EM_TILE_TOKENS * EM_LANES],
                         const panel_weights *w, const panel_acts *x, int i, const int tokens) {
    const int width = EM_BLOCK / parts, part = i % parts;
    tiles_dot(dots[i % (AHEAD + 1)], x->q[i / parts] + width * part,
              w->q[i / parts] + width * part * EM_LANES, tokens, i & 1);
}

/* sums[t] += the products of n steps, in their order. */
EM_INLINE void panel_multiply(const int dtype, vf *sums, const panel_weights *w,
                              const panel_acts *x, int n, const int tokens) {
    const int parts = FORMS[dtype].parts;
    _Alignas(64) int32_t dots[AHEAD + 1][EM_TILE_TOKENS * EM_LANES];
    vf sum[EM_TILE_TOKENS];
    n *= parts;
    for (int t = 0; t < tokens; t++) sum[t] = sums[t];
    for (int i = 0; i < AHEAD && i < n; i++) panel_dot(parts, dots, w, x, i, tokens);
    for (int i = 0; i < n; i++) {
        if (i + AHEAD < n) panel_dot(parts, dots, w, x, i + AHEAD, tokens);
        const int32_t *dot = dots[i % (AHEAD + 1)];
        const vf scale = w->scale[i];
        for (int t = 0; t < tokens; t++) {
            vf by = vf_mul(scale, vf_set1(x->scale[i / parts][t]));
            sum[t] = vf_fma(vf_from_vi(vi_load(dot + t * EM_LANES)), by, sum[t]);
        }
        for (int t = 0; FORMS[dtype].minima && t < tokens; t++)
            sum[t] = vf_fma(w->minimum[i], vf_set1(x->minimum[i][t]), sum[t]);
    }
    for (int t = 0; t < tokens; t++) sums[t] = sum[t];
}

EM_INLINE void block_panel(const int dtype, const uint8_t *weights, int64_t group, int n_groups,
                           const em_acts *a, int64_t token, int n_tokens, const em_out *o) {
    const int64_t next = em_group_bytes(dtype, a->cols, EM_LANES);
    const int64_t plane = em_scale_bytes(dtype, a->cols, EM_LANES);
    const uint8_t *base = weights + group * next;
    panel_weights w[PANEL_GROUPS];
    vf sums[PANEL_GROUPS][PANEL_TOKENS];
    panel_acts x;
    for (int g = 0; g < n_groups; g++)
        for (int t = 0; t < n_tokens; t++) sums[g][t] = vf_set1(0);
    for (int64_t step = 0; step < a->blocks; step += PANEL_STEPS) {
        const int n = (int)em_min(a->blocks - step, PANEL_STEPS);
        for (int g = 0; g < n_groups; g++)
            panel_unpack(dtype, &w[g], base + g * next, plane, step, n, token == 0);
        for (int t = 0; t < n_tokens; t += EM_TILE_TOKENS) {
            const bool whole = n_tokens - t >= EM_TILE_TOKENS;
            panel_gather(dtype, &x, a, token + t, whole ? EM_TILE_TOKENS : 8, step, n);
            for (int g = 0; g < n_groups; g++)
                if (whole)
                    panel_multiply(dtype, sums[g] + t, &w[g], &x, n, EM_TILE_TOKENS);
                else
                    panel_multiply(dtype, sums[g] + t, &w[g], &x, n, 8);
        }
    }
    for (int g = 0; g < n_groups; g++)
        for (int t = 0; t < n_tokens; t++) finish(sums[g][t], o, token + t, (group + g) * EM_LANES);
}

/* Returns how many tokens were taken. */
EM_INLINE int32_t block_matrices(const int dtype, const uint8_t *weights, int32_t first_group,
                                 int32_t n_groups, const em_acts *a, int32_t n_tokens,
                                 const em_out *o) {
    const int32_t end = n_tokens / 8 * 8;
    if (end == 0) return 0;
    tiles_begin(EM_BLOCK / FORMS[dtype].parts);
    for (int32_t g = 0; g < n_groups; g += PANEL_GROUPS)
        for (int32_t t = 0; t < end; t += PANEL_TOKENS)
            block_panel(dtype, weights, first_group + g, (int)em_min(n_groups - g, PANEL_GROUPS), a,
                        t, (int)em_min(end - t, PANEL_TOKENS), o);
    tiles_end();
    return end;
}
