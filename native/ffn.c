/* Routing, and FFNs over bundles: expert-major, in the order in which bundles become ready.
 */
#include "core.h"

#include <math.h>
#include <sched.h>
#include <string.h>

/* ---- routing ----------------------------------------------------------------------------- */

/* What weights are divided by is no zero. */
#define LEAST_TOTAL 1e-20f

uint64_t em_route_scratch(int32_t n_tokens, int32_t n_experts, int32_t top_k) {
    uint64_t pairs = (uint64_t)n_tokens * (uint64_t)top_k;
    return 2 * em_arena_cost((uint64_t)n_experts * 4) +
           em_arena_cost(((uint64_t)n_experts + 1) * 4) + 2 * em_arena_cost(pairs * 4);
}

/* The first of the largest. */
static int32_t largest(const float *p, int32_t n) {
    int32_t best = 0;
    for (int32_t j = 1; j < n; j++)
        if (p[j] > p[best]) best = j;
    return best;
}

/* The k largest of p in descending order, with their scores; of equals the lower index. Winners in
 * p become -infinity. */
static void take_top(float *p, int32_t n, int32_t k, const float *scores, int32_t *index,
                     float *value) {
    for (int32_t i = 0; i < k; i++) {
        index[i] = largest(p, n);
        value[i] = scores[index[i]];
        p[index[i]] = -INFINITY;
    }
}

/* Leaves in p [n_experts] those of the top groups alone; the others become -infinity. */
static void drop_groups(const em_router *r, float *p) {
    int32_t size = r->n_experts / r->n_groups;
    float sums[EM_MOST_GROUPS];
    bool kept[EM_MOST_GROUPS] = {false};
    for (int32_t g = 0; g < r->n_groups; g++) {
        const float *group = p + g * size;
        int32_t best = largest(group, size);
        float second = -INFINITY;
        for (int32_t j = 0; j < size; j++)
            if (j != best && group[j] > second) second = group[j];
        sums[g] = r->scoring == EM_SIGMOID ? group[best] + second : group[best];
    }
    for (int32_t i = 0; i < r->top_groups; i++) {
        int32_t best = largest(sums, r->n_groups);
        kept[best] = true;
        sums[best] = -INFINITY;
    }
    for (int32_t j = 0; j < r->n_experts; j++)
        if (!kept[j / size]) p[j] = -INFINITY;
}

/* One by one: the best that is left, and its share among those that are close to it. */
static void mix_sparsely(const em_kernels *kernels, const em_router *r, const float *logits,
                         float *left, float *close, int32_t *index, float *value) {
    memcpy(left, logits, (size_t)r->n_experts * sizeof *left);
    for (int32_t i = 0; i < r->top_k; i++) {
        index[i] = largest(left, r->n_experts);
        float best = left[index[i]];
        for (int32_t j = 0; j < r->n_experts; j++) {
            float size = fabsf(logits[j]) > best ? fabsf(logits[j]) : best;
            close[j] = (best - logits[j]) / size > 2 * r->jitter ? -INFINITY : left[j];
        }
        kernels->softmax(close, r->n_experts);
        value[i] = close[index[i]];
        left[index[i]] = -INFINITY;
    }
}

/* Which experts a token takes, and with which weights. p and scores [n_experts] are scratch. */
static void choose(const em_kernels *kernels, const em_router *r, const float *logits, float *p,
                   float *scores, int32_t *index, float *value) {
    const size_t bytes = (size_t)r->n_experts * sizeof *p;
    if (r->scoring == EM_SPARSEMIXER) {
        mix_sparsely(kernels, r, logits, p, scores, index, value);
        return;
    }
    memcpy(scores, logits, bytes);
    if (r->scoring == EM_SIGMOID)
        kernels->sigmoid(scores, r->n_experts);
    else
        kernels->softmax(scores, r->n_experts);
    memcpy(p, scores, bytes);
    for (int32_t j = 0; r->bias && j < r->n_experts; j++) p[j] += r->bias[j];
    if (r->n_groups > 1) drop_groups(r, p);
    take_top(p, r->n_experts, r->top_k, scores, index, value);
}

static bool valid_router(const em_router *r) {
    if (r->n_experts < 1 || r->top_k < 1 || r->top_k > r->n_experts) return false;
    if (r->scoring < EM_SOFTMAX || r->scoring > EM_SPARSEMIXER) return false;
    if (r->n_groups <= 1) return true;
    return r->scoring != EM_SPARSEMIXER && r->n_groups <= EM_MOST_GROUPS &&
           r->n_experts % r->n_groups == 0 && r->n_experts >= 2 * r->n_groups &&
           r->top_groups >= 1 && r->top_groups <= r->n_groups &&
           r->top_k <= r->n_experts / r->n_groups * r->top_groups;
}

int32_t em_route(em_core *core, const em_router *r, const float *logits, int32_t n_tokens,
                 uint32_t *experts, int32_t *first, int32_t *tokens, float *weights) {
    if (n_tokens < 0 || !valid_router(r)) return -1;
    const int32_t n_experts = r->n_experts, top_k = r->top_k;
    em_arena arena = em_core_arena(core);
    uint64_t pairs = (uint64_t)n_tokens * (uint64_t)top_k;
    float *p = em_arena_take(&arena, (uint64_t)n_experts * 4);
    float *scores = em_arena_take(&arena, (uint64_t)n_experts * 4);
    int32_t *start = em_arena_take(&arena, ((uint64_t)n_experts + 1) * 4);
    int32_t *chosen = em_arena_take(&arena, pairs * 4);
    float *mass = em_arena_take(&arena, pairs * 4);
    if (!p || !scores || !start || !chosen || !mass) return -1;
    memset(start, 0, ((size_t)n_experts + 1) * 4);
    for (int64_t t = 0; t < n_tokens; t++) {
        int32_t *index = chosen + t * top_k;
        float *value = mass + t * top_k, total = LEAST_TOTAL;
        choose(core->kernels, r, logits + t * n_experts, p, scores, index, value);
        for (int32_t i = 0; i < top_k; i++) {
            total += value[i];
            start[index[i] + 1]++;
        }
        for (int32_t i = 0; i < top_k; i++) {
            if (r->normalize) value[i] /= total;
            value[i] *= r->scale;
        }
    }
    int32_t n_chosen = 0;
    for (int32_t e = 0; e < n_experts; e++) {
        if (start[e + 1] > 0) {
            experts[n_chosen] = (uint32_t)e;
            first[n_chosen++] = start[e];
        }
        start[e + 1] += start[e];
    }
    first[n_chosen] = (int32_t)pairs;
    for (uint64_t i = 0; i < pairs; i++) { /* a counting sort: by expert, then by token */
        int32_t at = start[chosen[i]]++;
        tokens[at] = (int32_t)(i / (uint64_t)top_k);
        weights[at] = mass[i];
    }
    return n_chosen;
}

/* ---- FFN -------------------------------------------------------------------------------- */

uint64_t em_ffn_scratch(int32_t n_tokens, int32_t n_pairs, int32_t hidden, int32_t intermediate) {
    uint64_t pairs = (uint64_t)n_pairs;
    return em_acts_bytes(n_tokens, hidden) + em_acts_bytes(n_pairs, intermediate) +
           2 * em_arena_cost(pairs * (uint64_t)intermediate * 4) +
           em_arena_cost(pairs * (uint64_t)hidden * 4) + em_arena_cost(pairs * 4) +
           em_arena_cost(3 * pairs * 4) + em_arena_cost(((uint64_t)n_tokens + 1) * 4);
}

typedef struct {
    const em_kernels *kernels;
    const em_ffn *ffn;
    const uint64_t *addresses;
    const int32_t *first;               /* bundle -> its first pair, counted from `before` */
    int32_t before;                     /* pairs of bundles that belong to other calls */
    const int32_t *tokens;              /* pair -> token */
    const float *weights;               /* pair -> weight */
    const int32_t *batch;               /* the bundles of this round */
    int64_t chunk;                      /* groups an item takes */
    int64_t chunks;                     /* items a bundle gives */
    em_acts x, h;                       /* inputs of gate and up, by token; of down, by pair */
    float *gate, *up, *y;               /* by pair */
    int32_t *token_first, *token_pairs; /* token -> its pairs, in bundle order */
    float *out;
} ffn_task;

static const float *vector_at(const uint8_t *bundle, int64_t offset) {
    return offset < 0 ? NULL : (const float *)(bundle + offset);
}

static int32_t pair_of(const ffn_task *t, int32_t b) { return t->first[b] - t->before; }

static const uint8_t *bundle_at(const ffn_task *t, int32_t b) {
    return (const uint8_t *)(uintptr_t)t->addresses[b];
}

static void gate_up_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const ffn_task *t = arg;
    const em_ffn *f = t->ffn;
    int32_t b = t->batch[item / t->chunks], first = pair_of(t, b), n = pair_of(t, b + 1) - first;
    int64_t group = item % t->chunks * t->chunk, width = f->intermediate;
    int64_t groups = em_min(t->chunk, (width + EM_LANES - 1) / EM_LANES - group);
    const uint8_t *bundle = bundle_at(t, b);
    em_acts x = t->x;
    x.rows = t->tokens + first;
    float *gate = t->gate + first * width, *up = t->up + first * width;
    int64_t row = group * EM_LANES, rows = em_min(groups * EM_LANES, width - row);
    bool gated = f->gate >= 0;
    em_out to_up = {gated ? up : gate, vector_at(bundle, f->up_bias), width, f->intermediate, 0};
    em_out to_gate = {gate, vector_at(bundle, f->gate_bias), width, f->intermediate, 0};
    if (gated)
        t->kernels->product[f->gate_dtype](bundle + f->gate, (int32_t)group, (int32_t)groups, &x, n,
                                           &to_gate);
    t->kernels->product[f->up_dtype](bundle + f->up, (int32_t)group, (int32_t)groups, &x, n,
                                     &to_up);
    for (int64_t i = 0; i < n; i++)
        t->kernels->gate(gate + i * width + row, gated ? up + i * width + row : NULL, (int32_t)rows,
                         f->activation);
}

static void down_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const ffn_task *t = arg;
    const em_ffn *f = t->ffn;
    int32_t b = t->batch[item / t->chunks], first = pair_of(t, b), n = pair_of(t, b + 1) - first;
    int64_t group = item % t->chunks * t->chunk;
    int64_t groups = em_min(t->chunk, (f->hidden + EM_LANES - 1) / EM_LANES - group);
    const uint8_t *bundle = bundle_at(t, b);
    const em_acts h = em_acts_from(t->h, first);
    em_out to_y = {t->y + (int64_t)first * f->hidden, vector_at(bundle, f->down_bias), f->hidden,
                   f->hidden, 0};
    t->kernels->product[f->down_dtype](bundle + f->down, (int32_t)group, (int32_t)groups, &h, n,
                                       &to_y);
}

static void sum_token(void *arg, int64_t token, int32_t thread) {
    (void)thread;
    const ffn_task *t = arg;
    int64_t hidden = t->ffn->hidden;
    for (int32_t i = t->token_first[token]; i < t->token_first[token + 1]; i++) {
        int32_t pair = t->token_pairs[i];
        t->kernels->axpy(t->out + token * hidden, t->weights[pair], t->y + pair * hidden,
                         (int32_t)hidden);
    }
}

/* The inverse of `tokens`: each token's pairs in ascending order. */
static void group_by_token(ffn_task *t, int32_t n_tokens, int32_t n_pairs) {
    int32_t *start = t->token_first;
    memset(start, 0, ((size_t)n_tokens + 1) * 4);
    for (int32_t p = 0; p < n_pairs; p++) start[t->tokens[p] + 1]++;
    for (int32_t i = 0; i < n_tokens; i++) start[i + 1] += start[i];
    for (int32_t p = 0; p < n_pairs; p++) t->token_pairs[start[t->tokens[p]]++] = p;
    for (int32_t i = n_tokens; i > 0; i--) start[i] = start[i - 1];
    start[0] = 0;
}

/* Bundles of a call that wait for the same flag. */
typedef struct {
    int32_t *items, count;
} waiting;

/* Moves bundles whose flag is at least `least` from `from` to `to`; -1 if one failed. */
static int32_t take_ready(const int32_t *ready, const uint32_t *ids, int32_t least, waiting *from,
                          waiting *to) {
    int32_t left = 0, taken = 0;
    for (int32_t i = 0; i < from->count; i++) {
        int32_t b = from->items[i];
        int32_t flag = ready ? __atomic_load_n(&ready[ids[b]], __ATOMIC_ACQUIRE) : least;
        if (flag < 0) return -1;
        if (flag >= least) {
            to->items[to->count++] = b;
            taken++;
        } else {
            from->items[left++] = b;
        }
    }
    from->count = left;
    return taken;
}

static void run_gate_up(em_core *core, ffn_task *t, int32_t n) {
    int64_t pairs = 0, weights = (int64_t)t->ffn->hidden * t->ffn->intermediate;
    for (int32_t i = 0; i < n; i++) pairs += t->first[t->batch[i] + 1] - t->first[t->batch[i]];
    int64_t inner = (t->ffn->intermediate + EM_LANES - 1) / EM_LANES;
    t->chunk = em_chunk_groups(core, inner * n);
    t->chunks = (inner + t->chunk - 1) / t->chunk;
    em_core_run(core, gate_up_item, t, t->chunks * n, 2 * pairs * weights);
    for (int32_t i = 0; t->h.q && i < n; i++) {
        int32_t b = t->batch[i];
        const em_acts part = em_acts_from(t->h, pair_of(t, b));
        em_acts_quantize(core, &part, NULL, t->first[b + 1] - t->first[b]);
    }
}

static void run_down(em_core *core, ffn_task *t, int32_t n) {
    int64_t pairs = 0, weights = (int64_t)t->ffn->hidden * t->ffn->intermediate;
    for (int32_t i = 0; i < n; i++) pairs += t->first[t->batch[i] + 1] - t->first[t->batch[i]];
    int64_t outer = (t->ffn->hidden + EM_LANES - 1) / EM_LANES;
    t->chunk = em_chunk_groups(core, outer * n);
    t->chunks = (outer + t->chunk - 1) / t->chunk;
    em_core_run(core, down_item, t, t->chunks * n, pairs * weights);
}

/* Computes bundles as they become ready: gate and up of those whose first part is there, down of
 * those that are whole. `lists` has room for three times n_bundles. */
static int32_t run_as_ready(em_core *core, ffn_task *t, const int32_t *ready, const uint32_t *ids,
                            int32_t n_bundles, int32_t *lists) {
    waiting inner = {lists, n_bundles}, outer = {lists + n_bundles, 0};
    waiting batch = {lists + 2 * n_bundles, 0};
    for (int32_t b = 0; b < n_bundles; b++) inner.items[b] = b;
    t->batch = batch.items;
    while (inner.count + outer.count > 0) {
        batch.count = 0;
        int32_t n = take_ready(ready, ids, EM_READY_FIRST, &inner, &batch);
        if (n > 0) {
            run_gate_up(core, t, n);
            for (int32_t i = 0; i < n; i++) outer.items[outer.count++] = batch.items[i];
            batch.count = 0;
        }
        int32_t m = n < 0 ? n : take_ready(ready, ids, EM_READY_WHOLE, &outer, &batch);
        if (m > 0) run_down(core, t, m);
        if (m < 0) return EM_FLASH;
        if (n + m > 0) continue;
        int64_t since = em_now_ns();
        sched_yield();
        int64_t waited = em_now_ns() - since;
        core->times.stall_ns += waited;
        core->aside_ns += waited;
    }
    return EM_OK;
}

static bool valid_ffn(const em_ffn *f) {
    return em_dtype_fits(f->gate_dtype, f->hidden) && em_dtype_fits(f->up_dtype, f->hidden) &&
           em_dtype_fits(f->down_dtype, f->intermediate) && f->activation >= EM_SILU &&
           f->activation <= (f->gate < 0 ? EM_RELU2 : EM_CLAMPED_SWIGLU);
}

int32_t em_ffn_run(em_core *core, const em_ffn *f, int32_t n_bundles, const uint64_t *addresses,
                   const int32_t *ready, const uint32_t *ids, const int32_t *first,
                   const int32_t *tokens, const float *weights, const float *x, int32_t n_tokens,
                   float *out) {
    if (!valid_ffn(f) || n_bundles < 0 || n_tokens < 0) return EM_INVALID;
    if (n_bundles == 0 || n_tokens == 0) return EM_OK;
    const int32_t before = first[0], pairs = first[n_bundles] - before;
    ffn_task t = {.kernels = core->kernels,
                  .ffn = f,
                  .addresses = addresses,
                  .first = first,
                  .before = before,
                  .tokens = tokens + before,
                  .weights = weights + before,
                  .out = out};
    em_arena arena = em_core_arena(core);
    t.x = (em_acts){.x = x, .cols = f->hidden, .blocks = (f->hidden + EM_BLOCK - 1) / EM_BLOCK};
    t.gate = em_arena_take(&arena, (uint64_t)pairs * (uint64_t)f->intermediate * 4);
    t.up = em_arena_take(&arena, (uint64_t)pairs * (uint64_t)f->intermediate * 4);
    t.y = em_arena_take(&arena, (uint64_t)pairs * (uint64_t)f->hidden * 4);
    t.h = (em_acts){.x = t.gate,
                    .cols = f->intermediate,
                    .blocks = (f->intermediate + EM_BLOCK - 1) / EM_BLOCK};
    t.token_pairs = em_arena_take(&arena, (uint64_t)pairs * 4);
    t.token_first = em_arena_take(&arena, ((uint64_t)n_tokens + 1) * 4);
    int32_t *lists = em_arena_take(&arena, 3 * (uint64_t)pairs * 4);
    bool wide = em_dtype_is_block(f->gate_dtype) || em_dtype_is_block(f->up_dtype);
    bool fits =
        t.gate && t.up && t.y && t.token_pairs && t.token_first && lists && n_bundles <= pairs;
    if (fits && wide) fits = em_acts_take(&arena, &t.x, n_tokens);
    if (fits && em_dtype_is_block(f->down_dtype)) fits = em_acts_take(&arena, &t.h, pairs);
    if (!fits) return EM_NO_MEMORY;

    if (wide) em_acts_quantize(core, &t.x, NULL, n_tokens);
    int32_t status = run_as_ready(core, &t, ready, ids, n_bundles, lists);
    if (status != EM_OK) return status;
    group_by_token(&t, n_tokens, pairs);
    em_core_run(core, sum_token, &t, n_tokens, (int64_t)pairs * f->hidden);
    return EM_OK;
}
