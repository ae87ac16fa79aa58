/* Attention through the core: the bytes that all machines must give, however steps are cut and
 * threads share them, for every type of cache. */
#include "check.h"

#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 150, ROOM = 160, N_SHAPES = 13, N_TYPES = 3 };

static const int32_t TYPES[N_TYPES] = {EM_F16, EM_Q8_0, EM_F32};

typedef struct {
    int32_t heads, kv_heads, dim, window, rotary;
    float scale, cap;
    bool sinks;
    int32_t latent;
} shape;

static const shape SHAPES[N_SHAPES] = {
    {1, 1, 2, 0, 0, 0, 0, false, 0},        {4, 2, 16, 5, 0, 0, 0, false, 0},
    {6, 1, 18, 0, 0, 0, 0, false, 0},       {3, 3, 64, 40, 0, 0, 0, false, 0},
    {16, 2, 128, 0, 0, 0, 0, false, 0},     {40, 1, 34, 17, 0, 0, 0, false, 0},
    {7, 1, 80, 0, 0, 0, 0, false, 0},       {6, 2, 20, 9, 6, 0.5f, 2.0f, false, 0},
    {4, 1, 64, 0, 0, 0, 1.5f, false, 0},    {16, 2, 64, 0, 0, 0, 0, true, 0},
    {40, 1, 18, 7, 0, 0, 1.5f, true, 0},    {16, 1, 112, 0, 16, 0.1f, 0, false, 96},
    {3, 1, 58, 11, 10, 0, 1.5f, false, 48},
};

typedef struct {
    em_attention a;
    float *q, *k, *v, *turn, *out;
    float sinks[40]; /* of the heads */
    int64_t k_dim, v_dim;
    size_t k_bytes, v_bytes; /* of the caches */
} problem;

static problem make_problem(const shape *s, int32_t kv_dtype) {
    problem p = {.a = {.n_heads = s->heads,
                       .n_kv_heads = s->kv_heads,
                       .head_dim = s->dim,
                       .window = s->window,
                       .rotary = s->rotary,
                       .latent = s->latent,
                       .scale = s->scale,
                       .cap = s->cap,
                       .kv_dtype = kv_dtype,
                       .context = ROOM}};
    int64_t rows = (int64_t)CONTEXT * s->dim;
    p.k_dim = s->latent ? s->rotary : s->dim;
    p.v_dim = s->latent ? s->latent : s->dim;
    p.k_bytes = (size_t)s->kv_heads * ROOM * (size_t)em_kv_row_bytes(kv_dtype, (int32_t)p.k_dim);
    p.v_bytes = (size_t)s->kv_heads * ROOM * (size_t)em_kv_row_bytes(kv_dtype, (int32_t)p.v_dim);
    p.a.k_cache = exact(p.k_bytes);
    p.a.v_cache = exact(p.v_bytes);
    memset(p.a.k_cache, 0xfe, p.k_bytes); /* NaN: nothing but what was stored may be read */
    memset(p.a.v_cache, 0xfe, p.v_bytes);
    p.q = exact((size_t)rows * s->heads * 4);
    p.k = exact((size_t)(CONTEXT * s->kv_heads * p.k_dim) * 4);
    p.v = exact((size_t)(CONTEXT * s->kv_heads * p.v_dim) * 4);
    p.turn = exact((size_t)rows * 4);
    p.out = exact((size_t)rows * s->heads * 4);
    fill_unit(p.q, rows * s->heads, 1);
    fill_unit(p.k, CONTEXT * s->kv_heads * p.k_dim, 2);
    fill_unit(p.v, CONTEXT * s->kv_heads * p.v_dim, 3);
    memset(p.out, 0, (size_t)rows * s->heads * 4);
    fill_unit(p.turn, rows, 4);
    fill_unit(p.sinks, s->heads, 5);
    for (int32_t i = 0; i < s->heads; i++) p.sinks[i] *= 8;
    for (int64_t i = 0; i < rows * s->heads; i++) p.q[i] *= 3;
    return p;
}

static void free_problem(problem *p) {
    free(p->a.k_cache);
    free(p->a.v_cache);
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->turn);
    free(p->out);
}

/* Feeds CONTEXT tokens in steps of 1, 2, 3... up to `most`. */
static void feed(em_core *core, problem *p, bool sinks, int32_t most) {
    int64_t dim = p->a.head_dim, heads = p->a.n_heads * dim;
    int64_t half = (p->a.rotary ? p->a.rotary : dim) / 2;
    for (int64_t at = 0, n = 1; at < CONTEXT; at += n, n = em_min(n + 1, most)) {
        if (most == CONTEXT) n = CONTEXT;
        n = em_min(n, CONTEXT - at);
        const float *c = p->turn + at * half, *s = c + CONTEXT * half;
        const float *k = p->k + at * p->a.n_kv_heads * p->k_dim;
        const float *v = p->v + at * p->a.n_kv_heads * p->v_dim;
        int32_t status =
            em_attention_store(core, &p->a, p->q + at * heads, k, v, c, s, at, (int32_t)n);
        CHECK(status == EM_OK, "storing: status %d", status);
        status = em_attention_run(core, &p->a, sinks ? p->sinks : NULL, p->q + at * heads, at,
                                  (int32_t)n, p->out + at * heads);
        CHECK(status == EM_OK, "attending: status %d", status);
    }
}

static uint32_t bytes_of(const char *isa, int32_t threads, const shape *s, int32_t type,
                         int32_t most) {
    em_core *core;
    CHECK(em_core_open(threads, isa, &core) == EM_OK, "%s does not open", isa);
    CHECK(em_core_reserve(core, em_attention_scratch(threads, s->dim)) == EM_OK, "%s", isa);
    problem p = make_problem(s, type);
    feed(core, &p, s->sinks, most);
    uint32_t crc = em_crc32c(0, p.out, (size_t)CONTEXT * s->heads * s->dim * 4);
    crc = em_crc32c(crc, p.a.k_cache, p.k_bytes);
    crc = em_crc32c(crc, p.a.v_cache, p.v_bytes);
    free_problem(&p);
    em_core_close(core);
    return crc;
}

static const uint32_t GOLDEN[N_TYPES][N_SHAPES] = {
    {0x7999f920, 0x673d6984, 0x91cc5937, 0x8916f743, 0x20d12b4d, 0xc9169212, 0xe5ea8893, 0x3f796990,
     0x9d3056d7, 0xbebcae90, 0x297dd9f0, 0xa0661522, 0x49cc5fc9},
    {0x8c69420c, 0xb66fc47e, 0xe69183ca, 0x975c1060, 0x9226fc76, 0x368c7183, 0xf19a8852, 0x885b7a3c,
     0x684a5be3, 0x8b987ff9, 0x34ab0c56, 0xf6f0dba6, 0xe4e8c1d8},
    {0x9e324e79, 0xbe36c96c, 0x78742bb2, 0x933fcba2, 0x4925efca, 0x69f724d4, 0xd1cce1b9, 0x68132ad9,
     0x7142ccaa, 0xae5e5d42, 0x999376cb, 0x65cb5517, 0x4902cbeb}};

static void golden_bytes(const em_kernels *k) {
    for (int type = 0; type < N_TYPES; type++)
        for (int s = 0; s < N_SHAPES; s++)
            for (int32_t threads = 1; threads <= 3; threads++) {
                static const int32_t most[] = {CONTEXT, 1, 19};
                if (!is_chosen(type + s + threads)) continue;
                uint32_t crc =
                    bytes_of(k->name, threads, &SHAPES[s], TYPES[type], most[threads - 1]);
                CHECK(crc == GOLDEN[type][s], "%s: %s, shape %d, %d threads: 0x%08x, not 0x%08x",
                      k->name, DTYPES[TYPES[type]], s, threads, crc, GOLDEN[type][s]);
            }
}

int main(void) {
    for_each_isa(golden_bytes);
    return check_report();
}
