#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long passed, failed;

const int32_t LENGTHS[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 251, 256, 1000};
const int N_LENGTHS = sizeof LENGTHS / sizeof LENGTHS[0];
const char *const DTYPES[EM_DTYPES] = {"f32",  "f16",    "bf16",   "q8_0", "q4_0", "q4_1",
                                       "q5_0", "q5_1",   "q2_k",   "q3_k", "q4_k", "q5_k",
                                       "q6_k", "iq4_nl", "iq4_xs", "mxfp4"};

void check_that(bool holds, const char *file, int line, const char *what, const char *format, ...) {
    if (holds) {
        passed++;
        return;
    }
    if (failed++ >= 20) return;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: %s: ", file, line, what);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

int check_report(void) {
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed > 0 || passed == 0;
}

uint32_t random_bits(uint32_t *state) {
    uint64_t x = *state = *state * 747796405u + 2891336453u;
    x ^= x >> ((x >> 28) + 4);
    x = (uint32_t)x * 277803737u;
    return (uint32_t)(x ^ x >> 22);
}

float random_unit(uint32_t *state) {
    return (float)((int32_t)(random_bits(state) >> 11) - (1 << 20)) * 0x1p-20f;
}

void fill_unit(float *x, int64_t n, uint32_t seed) {
    for (int64_t i = 0; i < n; i++) x[i] = random_unit(&seed);
}

void *exact(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) abort();
    memset(p, 0, bytes);
    return p;
}

size_t matrix_bytes(int32_t dtype, int32_t rows, int32_t cols) {
    return (size_t)((rows + 15) / 16) * (size_t)em_group_bytes(dtype, cols, 16);
}

static bool in_256s(int32_t dtype) {
    return (dtype >= EM_Q2_K && dtype <= EM_Q6_K) || dtype == EM_IQ4_XS;
}

int32_t fitting(int32_t dtype, int32_t cols) {
    return in_256s(dtype) ? (cols + 255) / 256 * 256 : cols;
}

uint8_t *random_matrix(int32_t dtype, int32_t rows, int32_t cols, uint32_t seed) {
    size_t bytes = matrix_bytes(dtype, rows, cols), group = (size_t)em_group_bytes(dtype, cols, 16);
    size_t scales = (size_t)em_scale_bytes(dtype, cols, 16);
    uint8_t *data = exact(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)(random_bits(&seed) >> 24);
    for (size_t i = 0; i < bytes; i++) {
        bool is_scale = dtype >= EM_Q8_0 && i % group < scales;
        if (dtype == EM_F32 && i % 4 == 3) data[i] = (uint8_t)((data[i] & 0x81) | 0x3c);
        if (dtype == EM_BF16 && i % 2 == 1) data[i] = (uint8_t)((data[i] & 0x81) | 0x3c);
        if (dtype == EM_MXFP4 && is_scale)
            data[i] = (uint8_t)((data[i] & 0xf) | 0x70);
        else if ((dtype == EM_F16 || is_scale) && i % 2 == 1)
            data[i] = (uint8_t)((data[i] & 0x83) | 0x24);
    }
    return data;
}

static double half(const uint8_t *p) {
    int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent ? (1024 + fraction) * (double)(1ull << exponent) : 2.0 * fraction;
    return (bits & 0x8000 ? -value : value) * 0x1p-25;
}

/* One lane of a block, as FORMAT.md draws it. */
typedef struct {
    const uint8_t *scales, *words;
    int lane;
} place;

static int byte_of(place p, int word, int j) { return p.words[(word * 16 + p.lane) * 4 + j]; }

static int field(place p, int word, int bit, int width) {
    return byte_of(p, word, bit / 8) >> bit % 8 & ((1 << width) - 1);
}

/* Bits of column k of 32 in a plane that begins at a word. */
static int plane_bits(place p, int word, int k, int width) {
    int c = k / 4;
    return byte_of(p, word + c % width, k % 4) >> c / width * width & ((1 << width) - 1);
}

static int six_bits(place p, int low, int high, int s, int first) {
    return field(p, low, 4 * s, 4) | field(p, high, first + 2 * s, 2) << 4;
}

/* What the quant of column k of a block is multiplied by, what is added, and the quant. */
typedef struct {
    double scale, minimum;
    int quant;
} number;

static number number_at(place p, int32_t dtype, int k) {
    static const int NEAR_NORMAL[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};
    static const int E2M1[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    int s = k / 32, part = k / 16 % 2, i = k % 32;
    double d = dtype == EM_MXFP4 ? 0 : half(p.scales + 2 * p.lane);
    const uint8_t *second = p.scales + 32 + 2 * p.lane;
    switch (dtype) {
    case EM_Q8_0: return (number){d, 0, plane_bits(p, 0, i, 8) - 128};
    case EM_Q4_0: return (number){d, 0, plane_bits(p, 0, i, 4) - 8};
    case EM_Q4_1: return (number){d, half(second), plane_bits(p, 0, i, 4)};
    case EM_Q5_0: return (number){d, 0, plane_bits(p, 0, i, 4) + 16 * plane_bits(p, 4, i, 1) - 16};
    case EM_Q5_1:
        return (number){d, half(second), plane_bits(p, 0, i, 4) + 16 * plane_bits(p, 4, i, 1)};
    case EM_Q2_K: {
        int both = byte_of(p, k / 64, k / 16 % 4);
        return (number){d * (both & 15), -half(second) * (both >> 4),
                        plane_bits(p, 4 + 2 * s, i, 2)};
    }
    case EM_Q3_K:
        return (number){d * (six_bits(p, part, 2, s, 16 * part) - 32), 0,
                        plane_bits(p, 3 + 3 * s, i, 2) + 4 * plane_bits(p, 3 + 3 * s + 2, i, 1) -
                            4};
    case EM_Q4_K:
        return (number){d * six_bits(p, 0, 2, s, 0), -half(second) * six_bits(p, 1, 2, s, 16),
                        plane_bits(p, 3 + 4 * s, i, 4)};
    case EM_Q5_K:
        return (number){d * six_bits(p, 0, 2, s, 0), -half(second) * six_bits(p, 1, 2, s, 16),
                        plane_bits(p, 3 + 5 * s, i, 4) + 16 * plane_bits(p, 7 + 5 * s, i, 1)};
    case EM_Q6_K:
        return (number){d * (byte_of(p, k / 64, k / 16 % 4) - 128), 0,
                        plane_bits(p, 4 + 6 * s, i, 4) + 16 * plane_bits(p, 8 + 6 * s, i, 2) - 32};
    case EM_IQ4_NL: return (number){d, 0, NEAR_NORMAL[plane_bits(p, 0, i, 4)]};
    case EM_IQ4_XS: {
        int low = field(p, 0, 4 * s, 4), high = second[s / 4] >> s % 4 * 2 & 3;
        return (number){d * ((low | high << 4) - 32), 0,
                        NEAR_NORMAL[plane_bits(p, 1 + 4 * s, i, 4)]};
    }
    default: return (number){ldexp(1, p.scales[p.lane] - 128), 0, E2M1[plane_bits(p, 0, i, 4)]};
    }
}

/* Of a row's block: its part of the plane of scales, and all else. */
static const int SCALE_BYTES[EM_DTYPES] = {0, 0, 0, 2, 2, 4, 2, 4, 4, 2, 4, 4, 2, 2, 4, 1};
static const int WORD_BYTES[EM_DTYPES] = {0,  0,   0,   32,  16,  16, 20,  20,
                                          80, 108, 140, 172, 208, 16, 132, 16};

static number block_number(const uint8_t *group, int32_t dtype, int32_t cols, int lane, int col) {
    int width = in_256s(dtype) ? 256 : 32, b = col / width, scales = 16 * SCALE_BYTES[dtype];
    int plane = ((cols + width - 1) / width * scales + 63) / 64 * 64;
    place p = {group + b * scales, group + plane + b * 16 * WORD_BYTES[dtype], lane};
    return number_at(p, dtype, col % width);
}

double matrix_element(const uint8_t *data, int32_t dtype, int32_t cols, int32_t row, int32_t col) {
    const uint8_t *group = data + row / 16 * em_group_bytes(dtype, cols, 16);
    int lane = row % 16;
    if (dtype == EM_F32) return ((const float *)group)[col * 16 + lane];
    if (dtype == EM_F16) return half(group + 2 * (col * 16 + lane));
    if (dtype == EM_BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)group)[col * 16 + lane] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    number n = block_number(group, dtype, cols, lane, col);
    return n.scale * n.quant + n.minimum;
}

double matrix_size(const uint8_t *data, int32_t dtype, int32_t cols, int32_t row, int32_t col) {
    if (dtype < EM_Q8_0) return fabs(matrix_element(data, dtype, cols, row, col));
    const uint8_t *group = data + row / 16 * em_group_bytes(dtype, cols, 16);
    number n = block_number(group, dtype, cols, row % 16, col);
    return fabs(n.scale * n.quant) + fabs(n.minimum);
}

bool is_chosen(int64_t combination) {
#ifdef EM_SLOW_RUN
    return combination % 3 == 0;
#else
    (void)combination;
    return true;
#endif
}

void for_each_isa(void (*f)(const em_kernels *k)) {
    for (int32_t i = 0; em_isa_name(i); i++) {
        int32_t status;
        const em_kernels *k = em_isa_runs(i) ? em_kernels_pick(em_isa_name(i), &status) : NULL;
        if (strcmp(em_isa_name(i), "amx_emulated") == 0) /* it needs AVX-512 and no more */
            CHECK(k || !em_kernels_pick("avx512vnni", &status), "%s", "emulated tiles run");
        printf("# %s: %s\n", em_isa_name(i), k ? "tested" : "DOES NOT RUN HERE, NOT TESTED");
        if (k) f(k);
    }
}
