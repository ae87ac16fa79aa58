/* Products of every format: the portable code against float64, every instruction set against the
 * portable code (the same bytes), and those bytes against the ones that all machines must give. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 29 };
static const int32_t ROWS[] = {1, 15, 16, 17, 48, 131};
static const int32_t TOKENS[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 27, 33};
enum { N_TOKENS = sizeof TOKENS / sizeof TOKENS[0] };

static const em_kernels *portable;

typedef struct {
    int32_t rows, cols, n;
    float *x, *scale, *bias;
    int8_t *q;
    int32_t *sum, *first;
    em_acts acts;
} problem;

static problem make_problem(const em_kernels *k, int32_t rows, int32_t cols, int32_t n) {
    problem p = {.rows = rows, .cols = cols, .n = n};
    int32_t blocks = (cols + 31) / 32;
    p.x = exact((size_t)n * cols * 4);
    p.bias = exact((size_t)rows * 4);
    p.q = exact((size_t)n * blocks * 32);
    p.scale = exact((size_t)n * blocks * 4);
    p.sum = exact((size_t)n * blocks * 4);
    p.first = exact((size_t)n * blocks * 4);
    fill_unit(p.x, (int64_t)n * cols, 11);
    fill_unit(p.bias, rows, 12);
    for (int32_t t = 0; t < n; t++)
        k->quantize(p.x + (int64_t)t * cols, cols, p.q + (int64_t)t * blocks * 32,
                    p.scale + (int64_t)t * blocks, p.sum + (int64_t)t * blocks,
                    p.first + (int64_t)t * blocks);
    p.acts = (em_acts){p.x, p.q, p.scale, p.sum, NULL, cols, blocks, p.first, 0};
    return p;
}

static void free_problem(problem *p) {
    free(p->x);
    free(p->bias);
    free(p->q);
    free(p->scale);
    free(p->sum);
    free(p->first);
}

static float *multiply(const em_kernels *k, const problem *p, int32_t dtype, const uint8_t *w) {
    float *out = exact((size_t)p->n * p->rows * 4);
    fill_unit(out, (int64_t)p->n * p->rows, 13);
    em_out to = {out, p->bias, p->rows, p->rows, 1};
    k->product[dtype](w, 0, (p->rows + 15) / 16, &p->acts, p->n, &to);
    return out;
}

/* |error| <= bound: one rounding for each step of the chain, on the sum of magnitudes. */
static void against_float64(const problem *p, int32_t dtype, const uint8_t *w, const float *out) {
    float *before = exact((size_t)p->n * p->rows * 4);
    fill_unit(before, (int64_t)p->n * p->rows, 13);
    for (int32_t t = 0; t < p->n; t++)
        for (int32_t r = 0; r < p->rows; r++) {
            double sum = 0, magnitude = 0;
            for (int32_t c = 0; c < p->cols; c++) {
                int64_t at = (int64_t)t * p->acts.blocks * 32 + c;
                double x = dtype >= EM_Q8_0 ? p->q[at] * (double)p->scale[at / 32]
                                            : p->x[(int64_t)t * p->cols + c];
                sum += x * matrix_element(w, dtype, p->cols, r, c);
                magnitude += fabs(x) * matrix_size(w, dtype, p->cols, r, c);
            }
            double expected = sum + p->bias[r] + before[(int64_t)t * p->rows + r];
            double bound = (p->cols + 4) * 0x1p-24 * (magnitude + 2);
            double error = fabs(expected - out[(int64_t)t * p->rows + r]);
            CHECK(error <= bound, "%s %dx%d token %d row %d: error %g > %g", DTYPES[dtype], p->rows,
                  p->cols, t, r, error, bound);
        }
    free(before);
}

/* Of formats that are put together from the same few parts, some cases each. */
static bool taken(int32_t dtype, int number) {
    return dtype <= EM_Q4_0 || (dtype + number) % 4 == 0;
}

static void portable_is_right(void) {
    for (int32_t dtype = 0; dtype < EM_DTYPES; dtype++)
        for (int c = 0; c < N_LENGTHS; c++)
            for (int r = 0; r < 6; r += 2) {
                if (!taken(dtype, c + r / 2)) continue;
                problem p = make_problem(portable, ROWS[r], fitting(dtype, LENGTHS[c]), 3);
                uint8_t *w = random_matrix(dtype, p.rows, p.cols, 5);
                float *out = multiply(portable, &p, dtype, w);
                against_float64(&p, dtype, w, out);
                free(out);
                free(w);
                free_problem(&p);
            }
}

static void same_bytes(const em_kernels *k) {
    for (int32_t dtype = 0; dtype < EM_DTYPES; dtype++)
        for (int c = 0; c < N_LENGTHS; c++)
            for (int r = 0; r < 6; r++) {
                if (!taken(dtype, c + r)) continue;
                int32_t cols = fitting(dtype, LENGTHS[c]), n = TOKENS[(c * 6 + r) % N_TOKENS];
                problem mine = make_problem(k, ROWS[r], cols, n);
                problem plain = make_problem(portable, mine.rows, mine.cols, mine.n);
                size_t blocks = (size_t)mine.n * mine.acts.blocks;
                CHECK(!memcmp(mine.q, plain.q, blocks * 32) &&
                          !memcmp(mine.scale, plain.scale, blocks * 4) &&
                          !memcmp(mine.sum, plain.sum, blocks * 4) &&
                          !memcmp(mine.first, plain.first, blocks * 4),
                      "%s quantises %d columns differently", k->name, mine.cols);
                uint8_t *w = random_matrix(dtype, mine.rows, mine.cols, 6);
                float *a = multiply(k, &mine, dtype, w), *b = multiply(portable, &plain, dtype, w);
                CHECK(!memcmp(a, b, (size_t)mine.n * mine.rows * 4), "%s %s %dx%d, %d tokens",
                      k->name, DTYPES[dtype], mine.rows, mine.cols, mine.n);
                free(a);
                free(b);
                free(w);
                free_problem(&mine);
                free_problem(&plain);
            }
}

/* A scale is an f16 of amax / 127, but neither overflows nor loses bits where an f16 would. */
static void scales_are_f16_of_any_size(const em_kernels *k) {
    const int sizes[] = {0, 100, 40, 7, -7, -14, -40, -100};
    float unit_scale[2];
    int8_t unit_q[64];
    for (int i = 0; i < 8; i++) {
        problem p = make_problem(k, 1, 64, 1);
        for (int c = 0; c < 64; c++) p.x[c] = ldexpf(p.x[c], sizes[i]);
        k->quantize(p.x, 64, p.q, p.scale, p.sum, NULL);
        for (int b = 0; b < 2 && i == 0; b++) {
            float amax = 0, back;
            uint16_t half;
            for (int c = 0; c < 32; c++) amax = fmaxf(amax, fabsf(p.x[32 * b + c]));
            amax /= 127.0f;
            k->store_f16(&amax, 1, &half);
            k->unpack_row((const uint8_t *)&half, EM_F16, 1, 1, 0, &back);
            CHECK(p.scale[b] == back, "%s scales by %a, not %a", k->name, p.scale[b], back);
            unit_scale[b] = p.scale[b];
        }
        if (i == 0) memcpy(unit_q, p.q, 64);
        CHECK(!memcmp(p.q, unit_q, 64), "%s quantises otherwise at 2^%d", k->name, sizes[i]);
        for (int b = 0; b < 2; b++)
            CHECK(p.scale[b] == ldexpf(unit_scale[b], sizes[i]), "%s scales by %a at 2^%d", k->name,
                  p.scale[b], sizes[i]);
        free_problem(&p);
    }
}

/* Extremes: the largest quants and activations, where a 16-bit intermediate would saturate. */
static void extremes_do_not_saturate(const em_kernels *k) {
    const uint8_t bytes[] = {0x00, 0x01, 0x80, 0xff};
    for (int32_t dtype = EM_Q8_0; dtype < EM_DTYPES; dtype++)
        for (int i = 0; i < 32; i++) {
            int32_t cols = fitting(dtype, 64);
            problem p = make_problem(k, 16, cols, i < 16 ? 1 : 16);
            for (int c = 0; c < cols * p.n; c++) p.q[c] = i % 4 < 2 ? 127 : -127;
            for (int b = 0; b < p.acts.blocks * p.n; b++) p.sum[b] = 2 * (p.first[b] = 16 * p.q[0]);
            uint8_t *w = random_matrix(dtype, 16, cols, 7);
            size_t scales = (size_t)em_scale_bytes(dtype, cols, 16);
            memset(w + scales, bytes[i / 4 % 4], matrix_bytes(dtype, 16, cols) - scales);
            float *a = multiply(k, &p, dtype, w), *b = multiply(portable, &p, dtype, w);
            CHECK(!memcmp(a, b, 64 * (size_t)p.n), "%s %s at byte %d, %d tokens", k->name,
                  DTYPES[dtype], bytes[i / 4 % 4], p.n);
            against_float64(&p, dtype, w, b);
            free(a);
            free(b);
            free(w);
            free_problem(&p);
        }
}

/* A token's result does not depend on which tokens are computed beside it, nor on their order; nor
 * a group's on which groups are. */
static void batch_does_not_matter(const em_kernels *k) {
    int32_t rows[MAX_TOKENS];
    for (int t = 0; t < MAX_TOKENS; t++) rows[t] = t % 4 == 3 ? rows[t - 1] : t * 11 % MAX_TOKENS;
    for (int32_t dtype = 0; dtype < EM_DTYPES; dtype++) {
        problem p = make_problem(k, 48, fitting(dtype, 96), MAX_TOKENS);
        uint8_t *w = random_matrix(dtype, p.rows, p.cols, 9);
        float out[MAX_TOKENS][48], one[48];
        em_acts gathered = p.acts;
        gathered.rows = rows;
        em_out to = {out[0], NULL, 48, 48, 0};
        for (int g = 0; g < 3; g += 2)
            k->product[dtype](w, g, 2 - g / 2, &gathered, MAX_TOKENS, &to);
        for (int t = 0; t < MAX_TOKENS; t++) {
            gathered.rows = rows + t;
            to.out = one;
            for (int g = 2; g >= 0; g--) k->product[dtype](w, g, 1, &gathered, 1, &to);
            CHECK(!memcmp(one, out[t], sizeof one), "%s %s token %d", k->name, DTYPES[dtype], t);
        }
        free(w);
        free_problem(&p);
    }
}

/* Painted with a cycle of 251, a matrix shows any block that is taken from the wrong place. */
static void golden_bytes(void) {
    const uint32_t expected[EM_DTYPES] = {0x311fc3f6, 0x52955308, 0x2b402a4a, 0x7055c6df,
                                          0x2ea8a33f, 0xf3578e9a, 0x545b9c6f, 0x9da03d79,
                                          0xbdc8b8ad, 0x28531afe, 0x6a7f7514, 0xcea572a5,
                                          0x1ddf4b64, 0x595efd61, 0xb2fedd6e, 0x83390cb0};
    for (int32_t dtype = 0; dtype < EM_DTYPES; dtype++) {
        problem p = make_problem(portable, 131, fitting(dtype, 1000), 3);
        uint8_t *w = random_matrix(dtype, p.rows, p.cols, 17);
        size_t group = (size_t)em_group_bytes(dtype, p.cols, 16);
        size_t scales = (size_t)em_scale_bytes(dtype, p.cols, 16);
        for (size_t i = 0; dtype >= EM_Q8_0 && i < matrix_bytes(dtype, p.rows, p.cols); i++)
            if (i % group >= scales) w[i] = (uint8_t)(i % 251);
        float *out = multiply(portable, &p, dtype, w);
        uint32_t crc = em_crc32c(0, out, (size_t)p.n * p.rows * 4);
        CHECK(crc == expected[dtype], "%s gave 0x%08x, not 0x%08x", DTYPES[dtype], crc,
              expected[dtype]);
        free(out);
        free(w);
        free_problem(&p);
    }
}

int main(void) {
    int32_t status;
    portable = em_kernels_pick("scalar", &status);
    CHECK(portable != NULL, "status %d", status);
    portable_is_right();
    golden_bytes();
    for_each_isa(same_bytes);
    for_each_isa(scales_are_f16_of_any_size);
    for_each_isa(extremes_do_not_saturate);
    for_each_isa(batch_does_not_matter);
    return check_report();
}
