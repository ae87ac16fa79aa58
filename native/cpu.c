/* Which instruction sets are built in, and which of them really run here.
 *
 * A set counts as running when its self-test ends without an illegal instruction and gives the
 * portable code's bytes. What CPUID or the kernel say of it is not asked: hypervisors and emulators
 * lie.
 */
#include "core.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

extern const em_kernels em_kernels_amx, em_kernels_amx_emulated, em_kernels_avx512vnni,
    em_kernels_avx512, em_kernels_avxvnni, em_kernels_avx2, em_kernels_i8mm, em_kernels_dotprod,
    em_kernels_neon, em_kernels_scalar;

static const em_kernels *const best_first[] = {
#if EM_HAVE_amx
    &em_kernels_amx,
#endif
#if EM_HAVE_avx512vnni
    &em_kernels_avx512vnni,
#endif
#if EM_HAVE_avx512
    &em_kernels_avx512,
#endif
#if EM_HAVE_avxvnni
    &em_kernels_avxvnni,
#endif
#if EM_HAVE_avx2
    &em_kernels_avx2,
#endif
#if EM_HAVE_i8mm
    &em_kernels_i8mm,
#endif
#if EM_HAVE_dotprod
    &em_kernels_dotprod,
#endif
#if EM_HAVE_neon
    &em_kernels_neon,
#endif
    &em_kernels_scalar,
#if EM_HAVE_amx_emulated
    &em_kernels_amx_emulated, /* never the best: it is for tests */
#endif
};
#define N_TABLES ((int32_t)(sizeof best_first / sizeof best_first[0]))

static bool runs[N_TABLES];
static pthread_once_t probed = PTHREAD_ONCE_INIT;

/* ---- the self-test -----------------------------------------------------------------------------
 */

enum {
    COLS = 64,
    GROUPS = 5,
    ROWS = 16 * GROUPS,
    TOKENS = 27, /* tiles of 16, of 8, and less */
    WIDE = 256,  /* columns for blocks that have so many, */
    WIDE_TOKENS = 11,
    NUMBERS = WIDE_TOKENS * WIDE, /* of all tokens, in either shape */
    MATRIX_BYTES = ROWS * WIDE * 4,
    ATTENDED = EM_SPAN_ROWS + 6
};

typedef struct {
    float products[EM_DTYPES][(2 * TOKENS + 1) * ROWS];
    float unpacked[EM_DTYPES][WIDE], vectors[7][COLS], attended[4][6 * COLS];
    int8_t q[NUMBERS];
    uint16_t halves[COLS];
    uint64_t sum;
} test_result;

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

/* Finite numbers of every sign in the given format. */
static void fill_matrix(int32_t dtype, int32_t cols, uint8_t *data) {
    uint32_t state = 7;
    for (int i = 0; i < MATRIX_BYTES; i++) data[i] = (uint8_t)(next_random(&state) >> 24);
    int64_t group = em_group_bytes(dtype, cols, EM_LANES);
    int64_t step = dtype == EM_F32 ? 4 : dtype == EM_MXFP4 ? 1 : 2;
    int64_t end = em_dtype_is_block(dtype) ? em_scale_bytes(dtype, cols, EM_LANES) : group;
    for (int64_t g = 0; g < GROUPS; g++)
        for (int64_t i = step - 1; i < end; i += step)
            data[g * group + i] = (uint8_t)((data[g * group + i] & 0x83) | 0x38);
}

/* Products as of all tokens together, of one, and of all in another order. */
static void multiply(const em_kernels *k, int32_t dtype, em_acts acts, int32_t tokens,
                     uint8_t *matrix, test_result *r) {
    int32_t backwards[TOKENS];
    em_out out = {r->products[dtype], NULL, ROWS, ROWS, 0};
    for (int t = 0; t < tokens; t++) backwards[t] = tokens - 1 - t;
    fill_matrix(dtype, acts.cols, matrix);
    k->product[dtype](matrix, 0, GROUPS, &acts, tokens, &out);
    out.out += TOKENS * ROWS;
    k->product[dtype](matrix, 0, GROUPS, &acts, 1, &out); /* one token takes other tiles */
    out.out += ROWS;
    acts.rows = backwards;
    k->product[dtype](matrix, 1, GROUPS - 1, &acts, tokens, &out);
    k->unpack_row(matrix, dtype, EM_LANES, acts.cols, 21, r->unpacked[dtype]);
}

/* By one thread (`probed`), whose stack may be small. */
static void self_test(const em_kernels *k, test_result *r) {
    static const float weight_seed[4] = {0.25f, -1.5f, 3.0f, -0.0625f};
    static _Alignas(64) uint8_t matrix[MATRIX_BYTES];
    static float x[NUMBERS], scale[NUMBERS / EM_BLOCK];
    static int32_t sum[NUMBERS / EM_BLOCK], first[NUMBERS / EM_BLOCK];
    for (int i = 0; i < NUMBERS; i++) x[i] = weight_seed[i % 4] * (float)(i % 37 - 18);
    for (int t = 0; t < NUMBERS / COLS; t++)
        k->quantize(x + t * COLS, COLS, r->q + t * COLS, scale + t * 2, sum + t * 2, first + t * 2);
    em_acts acts = {x, r->q, scale, sum, NULL, COLS, COLS / EM_BLOCK, first, 0};
    em_acts wide = {x, r->q, scale, sum, NULL, WIDE, WIDE / EM_BLOCK, first, 0};
    for (int32_t dtype = EM_F32; dtype <= EM_Q4_0; dtype++)
        multiply(k, dtype, acts, TOKENS, matrix, r);
    for (int32_t dtype = EM_Q4_1; dtype < EM_DTYPES; dtype++)
        multiply(k, dtype, wide, WIDE_TOKENS, matrix, r);
    memcpy(r->vectors[0], x, COLS * sizeof *x);
    k->softmax(r->vectors[0], COLS);
    k->rms_norm(x, x + COLS, 1e-6f, COLS, r->vectors[1]);
    k->layer_norm(x, x + COLS, x + 2 * COLS, 1e-6f, COLS, r->vectors[5]);
    k->rotate(x, r->vectors[0], r->vectors[1], COLS, r->vectors[2]);
    memcpy(r->vectors[3], x, COLS * sizeof *x);
    k->gate(r->vectors[3], x + COLS, COLS, EM_GELU);
    k->store_f16(x, COLS, r->halves);
    for (int32_t dtype = EM_F32; dtype <= EM_Q8_0; dtype++) {
        static _Alignas(64) uint8_t keys[(ATTENDED + EM_LANES) * COLS * 4];
        static _Alignas(64) uint8_t values[ATTENDED * COLS * 4];
        static float block[EM_SPAN_ROWS * COLS];
        float *out = r->attended[dtype];
        if (dtype == EM_BF16) continue;
        memset(keys, 0, sizeof keys);
        int64_t row_bytes = em_kv_row_bytes(dtype, COLS);
        for (int i = 0; i < ATTENDED; i++) {
            k->store_key(x + i, COLS, dtype, keys + i / EM_LANES * EM_LANES * row_bytes,
                         i % EM_LANES);
            k->store_value(x + i, COLS, dtype, values + i * row_bytes);
        }
        em_queries queries = {.acts = acts,
                              .keys = {keys, row_bytes, COLS},
                              .values = {values, row_bytes, COLS},
                              .begin = 1,
                              .end = ATTENDED - 1,
                              .n_rows = 6,
                              .heads = 3,
                              .dtype = dtype,
                              .block = block,
                              .out = out};
        k->attend(&queries);
    }
    memcpy(r->vectors[4], x, COLS * sizeof *x);
    k->sigmoid(r->vectors[4], COLS);
    memcpy(r->vectors[6], x, COLS * sizeof *x);
    k->axpy(r->vectors[6], 0.3f, r->unpacked[EM_Q8_0], COLS);
    r->sum = k->read_bytes(matrix, MATRIX_BYTES);
}

static sigjmp_buf escape;
static pthread_t prober;
static struct sigaction before;

static void on_illegal(int signal_number) {
    if (pthread_equal(pthread_self(), prober)) siglongjmp(escape, 1);
    /* Another thread's fault is not ours: put its handling back and let it happen again. */
    sigaction(signal_number, &before, NULL);
}

static bool matches_portable(const em_kernels *kernels) {
    static test_result expected, found;
    memset(&expected, 0, sizeof expected);
    memset(&found, 0, sizeof found);
    self_test(&em_kernels_scalar, &expected);
    if (sigsetjmp(escape, 1)) return false;
    if (kernels->prepare && !kernels->prepare()) return false;
    self_test(kernels, &found);
    return memcmp(&expected, &found, sizeof found) == 0;
}

bool em_by_two_caches;

/* By its own word: were it a lie, it would cost speed alone. */
static bool is_intel(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

static void probe(void) {
    struct sigaction action = {.sa_handler = on_illegal};
    sigemptyset(&action.sa_mask);
    prober = pthread_self();
    sigaction(SIGILL, &action, &before);
    for (int32_t i = 0; i < N_TABLES; i++) runs[i] = matches_portable(best_first[i]);
    sigaction(SIGILL, &before, NULL);
    em_by_two_caches = is_intel();
}

/* ---- choosing ---------------------------------------------------------------------------- */

const char *em_isa_name(int32_t i) { return i >= 0 && i < N_TABLES ? best_first[i]->name : NULL; }

int32_t em_isa_runs(int32_t i) {
    pthread_once(&probed, probe);
    return i >= 0 && i < N_TABLES && runs[i];
}

const em_kernels *em_kernels_pick(const char *isa, int32_t *status) {
    *status = EM_OK;
    for (int32_t i = 0; i < N_TABLES; i++)
        if (em_isa_runs(i) && (!isa || strcmp(isa, best_first[i]->name) == 0)) return best_first[i];
    *status = EM_UNSUPPORTED;
    return NULL;
}
