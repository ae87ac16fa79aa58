/* Routing and FFNs over bundles: against float64, and equal whatever the order in which bundles
 * become ready, the number of threads, and the tokens that share a call. */
#include "check.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HIDDEN = 40, INNER = 24, EXPERTS = 7, TOP = 3, TOKENS = 11, PAIRS = TOKENS * TOP };

static const uint32_t IDS[EXPERTS] = {0, 1, 2, 3, 4, 5, 6};

typedef struct {
    em_ffn ffn;
    uint8_t *bundle[EXPERTS];
    uint64_t address[EXPERTS]; /* of the chosen ones, in id order */
    uint32_t experts[EXPERTS];
    int32_t first[EXPERTS + 1], tokens[PAIRS], n_chosen;
    float weights[PAIRS], x[TOKENS * HIDDEN], logits[TOKENS * EXPERTS];
} problem;

static void make_problem(problem *p, int32_t dtype) {
    size_t up = matrix_bytes(dtype, INNER, HIDDEN), down = matrix_bytes(dtype, HIDDEN, INNER);
    p->ffn = (em_ffn){
        0, (int64_t)up, (int64_t)(2 * up), -1, -1, -1, dtype, dtype, dtype, HIDDEN, INNER, EM_SILU};
    for (int e = 0; e < EXPERTS; e++) {
        p->bundle[e] = exact(2 * up + down);
        for (int part = 0; part < 3; part++) {
            size_t bytes = part == 2 ? down : up;
            uint8_t *w = part == 2 ? random_matrix(dtype, HIDDEN, INNER, (uint32_t)(e * 3 + part))
                                   : random_matrix(dtype, INNER, HIDDEN, (uint32_t)(e * 3 + part));
            memcpy(p->bundle[e] + (size_t)part * up, w, bytes);
            free(w);
        }
    }
    fill_unit(p->x, TOKENS * HIDDEN, 31);
    fill_unit(p->logits, TOKENS * EXPERTS, 32);
}

static void free_problem(problem *p) {
    for (int e = 0; e < EXPERTS; e++) free(p->bundle[e]);
}

static em_core *open_core(int32_t threads) {
    em_core *core;
    CHECK(em_core_open(threads, NULL, &core) == EM_OK, "%d threads", threads);
    uint64_t need = em_ffn_scratch(TOKENS, PAIRS, HIDDEN, INNER);
    uint64_t route = em_route_scratch(TOKENS, EXPERTS, TOP);
    CHECK(em_core_reserve(core, need > route ? need : route) == EM_OK, "%lu", (unsigned long)need);
    return core;
}

static void route(em_core *core, problem *p, int32_t normalize) {
    em_router router = {.n_experts = EXPERTS, .top_k = TOP, .normalize = normalize, .scale = 1};
    p->n_chosen =
        em_route(core, &router, p->logits, TOKENS, p->experts, p->first, p->tokens, p->weights);
    for (int i = 0; i < p->n_chosen; i++)
        p->address[i] = (uint64_t)(uintptr_t)p->bundle[p->experts[i]];
}

static void routing_is_right(em_core *core, problem *p, int32_t normalize) {
    route(core, p, normalize);
    double weight[TOKENS][EXPERTS] = {{0}};
    int seen = 0;
    for (int t = 0; t < TOKENS; t++) {
        double e[EXPERTS], total = 0, kept = 0;
        bool taken[EXPERTS] = {false};
        for (int i = 0; i < EXPERTS; i++) total += e[i] = exp((double)p->logits[t * EXPERTS + i]);
        for (int k = 0; k < TOP; k++) {
            int best = -1;
            for (int i = 0; i < EXPERTS; i++)
                if (!taken[i] && (best < 0 || e[i] > e[best])) best = i;
            taken[best] = true;
            kept += weight[t][best] = e[best] / total;
        }
        for (int i = 0; normalize && i < EXPERTS; i++) weight[t][i] /= kept;
    }
    for (int b = 0; b < p->n_chosen; b++) {
        CHECK(b == 0 || p->experts[b] > p->experts[b - 1], "experts ascend at %d", b);
        for (int i = p->first[b]; i < p->first[b + 1]; i++, seen++) {
            double expected = weight[p->tokens[i]][p->experts[b]];
            CHECK(expected > 0 && fabs(p->weights[i] - expected) < 1e-6, "pair %d: %g, expected %g",
                  i, p->weights[i], expected);
            CHECK(i == p->first[b] || p->tokens[i] > p->tokens[i - 1], "tokens ascend at %d", i);
        }
    }
    CHECK(seen == PAIRS, "%d pairs", seen);
}

static void ffn_is_right(em_core *core, problem *p, double bound) {
    float out[TOKENS * HIDDEN];
    fill_unit(out, TOKENS * HIDDEN, 33);
    double expected[TOKENS * HIDDEN];
    for (int i = 0; i < TOKENS * HIDDEN; i++) expected[i] = out[i];
    int32_t dtype = p->ffn.gate_dtype;
    for (int b = 0; b < p->n_chosen; b++)
        for (int i = p->first[b]; i < p->first[b + 1]; i++) {
            const uint8_t *w = p->bundle[p->experts[b]];
            const float *x = p->x + p->tokens[i] * HIDDEN;
            double h[INNER];
            for (int r = 0; r < INNER; r++) {
                double g = 0, u = 0;
                for (int c = 0; c < HIDDEN; c++) {
                    g += x[c] * matrix_element(w, dtype, HIDDEN, r, c);
                    u += x[c] * matrix_element(w + p->ffn.up, dtype, HIDDEN, r, c);
                }
                h[r] = g / (1 + exp(-g)) * u;
            }
            for (int r = 0; r < HIDDEN; r++) {
                double y = 0;
                for (int c = 0; c < INNER; c++)
                    y += h[c] * matrix_element(w + p->ffn.down, dtype, INNER, r, c);
                expected[p->tokens[i] * HIDDEN + r] += p->weights[i] * y;
            }
        }
    CHECK(em_ffn_run(core, &p->ffn, p->n_chosen, p->address, NULL, NULL, p->first, p->tokens,
                     p->weights, p->x, TOKENS, out) == EM_OK,
          "dtype %d", dtype);
    double worst = 0, top = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        worst = fmax(worst, fabs(out[i] - expected[i]));
        top = fmax(top, fabs(expected[i]));
    }
    CHECK(worst <= bound * top, "%s: error %g of %g", DTYPES[dtype], worst, top);
}

typedef struct {
    int32_t *ready;
    int32_t n;
    uint32_t seed;
} arrivals;

static void *arrive(void *arg) {
    arrivals *a = arg;
    for (int32_t left = a->n; left > 0;) {
        int32_t b = (int32_t)(random_bits(&a->seed) % (uint32_t)a->n);
        int32_t flag = __atomic_load_n(&a->ready[b], __ATOMIC_RELAXED);
        if (flag == EM_READY_WHOLE) continue;
        nanosleep(&(struct timespec){0, 20000}, NULL);
        int32_t steps = flag == EM_READY_NOT ? 1 + (int32_t)(random_bits(&a->seed) % 2) : 1;
        __atomic_store_n(&a->ready[b], flag + steps, __ATOMIC_RELEASE);
        left -= flag + steps == EM_READY_WHOLE;
    }
    return NULL;
}

static void order_does_not_matter(problem *p) {
    float plain[TOKENS * HIDDEN] = {0};
    em_core *one = open_core(1);
    route(one, p, 1);
    em_ffn_run(one, &p->ffn, p->n_chosen, p->address, NULL, NULL, p->first, p->tokens, p->weights,
               p->x, TOKENS, plain);
    em_core_close(one);
    for (int32_t threads = 1; threads <= 3; threads++) {
        em_core *core = open_core(threads);
        for (uint32_t seed = 0; seed < 5; seed++) {
            float out[TOKENS * HIDDEN] = {0};
            int32_t ready[EXPERTS] = {0};
            arrivals a = {ready, p->n_chosen, seed};
            pthread_t thread;
            pthread_create(&thread, NULL, arrive, &a);
            int32_t status = em_ffn_run(core, &p->ffn, p->n_chosen, p->address, ready, IDS,
                                        p->first, p->tokens, p->weights, p->x, TOKENS, out);
            pthread_join(thread, NULL);
            CHECK(status == EM_OK && !memcmp(out, plain, sizeof out), "seed %u, %d threads", seed,
                  threads);
        }
        em_core_close(core);
    }
}

static void a_failed_bundle_changes_nothing(em_core *core, problem *p) {
    float out[TOKENS * HIDDEN] = {0}, zero[TOKENS * HIDDEN] = {0};
    int32_t ready[EXPERTS] = {2, 1, -1, 2, 2, 2, 2};
    int32_t status = em_ffn_run(core, &p->ffn, p->n_chosen, p->address, ready, IDS, p->first,
                                p->tokens, p->weights, p->x, TOKENS, out);
    CHECK(status == EM_FLASH && !memcmp(out, zero, sizeof out), "status %d", status);
}

static void arguments_are_checked(em_core *core, problem *p) {
    em_ffn bad = p->ffn;
    float out[TOKENS * HIDDEN];
    bad.up_dtype = 99;
    CHECK(em_ffn_run(core, &bad, 1, p->address, NULL, NULL, p->first, p->tokens, p->weights, p->x,
                     TOKENS, out) == EM_INVALID,
          "dtype %d", bad.up_dtype);
    em_core *small;
    em_core_open(1, NULL, &small);
    CHECK(em_ffn_run(small, &p->ffn, p->n_chosen, p->address, NULL, NULL, p->first, p->tokens,
                     p->weights, p->x, TOKENS, out) == EM_NO_MEMORY,
          "no scratch%s", "");
    em_linear linear = {p->bundle[0], NULL, out, INNER, EM_F32, INNER, 0, 0};
    CHECK(em_linears(small, &linear, 1, p->x, 1) == EM_INVALID, "cols %d", linear.cols);
    em_core_close(small);
    em_core *none = NULL;
    CHECK(em_core_open(1, "mmx", &none) == EM_UNSUPPORTED && !none, "isa %s", "mmx");
}

enum { MANY = 24, CHOSEN = 3, N_ROUTERS = 4 };

static const float BIAS[MANY] = {0.3f, -0.2f, 0.1f, 0.5f, -0.4f, 0.25f};

static const em_router ROUTERS[N_ROUTERS] = {
    {.n_experts = MANY, .top_k = CHOSEN, .normalize = 1, .scale = 2},
    {.n_experts = MANY, .top_k = CHOSEN, .scoring = EM_SIGMOID, .bias = BIAS, .scale = 2.5f},
    {.n_experts = MANY,
     .top_k = CHOSEN,
     .normalize = 1,
     .scoring = EM_SIGMOID,
     .n_groups = 6,
     .top_groups = 2,
     .bias = BIAS,
     .scale = 1},
    {.n_experts = MANY, .top_k = 2, .scoring = EM_SPARSEMIXER, .scale = 1, .jitter = 0.1f},
};

static const uint32_t ROUTED[N_ROUTERS] = {0x663e320c, 0x06c23cd5, 0x194dbb6a, 0xc974ac12};

/* The bytes that all machines must give, of what each kind of router chooses. */
static void routers_choose(const em_kernels *k) {
    em_core *core;
    CHECK(em_core_open(1, k->name, &core) == EM_OK, "%s does not open", k->name);
    CHECK(em_core_reserve(core, em_route_scratch(TOKENS, MANY, CHOSEN)) == EM_OK, "%s", k->name);
    float logits[TOKENS * MANY], weights[TOKENS * CHOSEN];
    fill_unit(logits, TOKENS * MANY, 33);
    for (int i = 0; i < TOKENS * MANY; i++) logits[i] *= 5;
    for (int r = 0; r < N_ROUTERS; r++) {
        const em_router *router = &ROUTERS[r];
        uint32_t experts[MANY];
        int32_t first[MANY + 1], tokens[TOKENS * CHOSEN];
        int32_t n = em_route(core, router, logits, TOKENS, experts, first, tokens, weights);
        size_t pairs = (size_t)(TOKENS * router->top_k);
        CHECK(n > 0 && first[n] == (int32_t)pairs, "router %d: %d experts", r, n);
        uint32_t crc = em_crc32c(0, experts, (size_t)n * sizeof *experts);
        crc = em_crc32c(crc, tokens, pairs * sizeof *tokens);
        crc = em_crc32c(crc, weights, pairs * sizeof *weights);
        CHECK(crc == ROUTED[r], "%s: router %d: 0x%08x, not 0x%08x", k->name, r, crc, ROUTED[r]);
    }
    em_router bad = ROUTERS[2];
    bad.top_groups = 7;
    CHECK(em_route(core, &bad, logits, TOKENS, NULL, NULL, NULL, NULL) == -1, "groups %d", 7);
    em_core_close(core);
}

int main(void) {
    for_each_isa(routers_choose);
    for (int32_t dtype = EM_F32; dtype <= EM_Q4_0; dtype++) {
        static problem p;
        make_problem(&p, dtype);
        em_core *core = open_core(2);
        routing_is_right(core, &p, 0);
        routing_is_right(core, &p, 1);
        ffn_is_right(core, &p, dtype >= EM_Q8_0 ? 0.02 : 1e-5);
        order_does_not_matter(&p);
        a_failed_bundle_changes_nothing(core, &p);
        arguments_are_checked(core, &p);
        em_core_close(core);
        free_problem(&p);
    }
    return check_report();
}
