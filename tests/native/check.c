#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long passed, failed;

const int32_t LENGTHS[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 251, 256, 1000};
const int N_LENGTHS = sizeof LENGTHS / sizeof LENGTHS[0];
const char *const DTYPES[5] = {"f32", "f16", "bf16", "q8_0", "q4_0"};

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

uint8_t *random_matrix(int32_t dtype, int32_t rows, int32_t cols, uint32_t seed) {
    size_t bytes = matrix_bytes(dtype, rows, cols), group = (size_t)em_group_bytes(dtype, cols, 16);
    size_t scales = (size_t)em_scale_bytes(dtype, cols, 16);
    uint8_t *data = exact(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)(random_bits(&seed) >> 24);
    for (size_t i = 0; i < bytes; i++) {
        bool is_scale = dtype >= EM_Q8_0 && i % group < scales;
        if (dtype == EM_F32 && i % 4 == 3) data[i] = (uint8_t)((data[i] & 0x81) | 0x3c);
        if (dtype == EM_BF16 && i % 2 == 1) data[i] = (uint8_t)((data[i] & 0x81) | 0x3c);
        if ((dtype == EM_F16 || is_scale) && i % 2 == 1)
            data[i] = (uint8_t)((data[i] & 0x83) | 0x24);
    }
    return data;
}

static double half(const uint8_t *p) {
    int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent ? (1024 + fraction) * (double)(1ull << exponent) : 2.0 * fraction;
    return (bits & 0x8000 ? -value : value) * 0x1p-25;
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
    int block = col / 32, k = col % 32;
    const uint8_t *quants = group + em_scale_bytes(dtype, cols, 16);
    double d = half(group + 2 * (block * 16 + lane));
    if (dtype == EM_Q8_0) return d * (quants[((block * 8 + k / 4) * 16 + lane) * 4 + k % 4] - 128);
    int byte = quants[((block * 4 + k % 16 / 4) * 16 + lane) * 4 + k % 4];
    return d * ((k < 16 ? byte & 15 : byte >> 4) - 8);
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
