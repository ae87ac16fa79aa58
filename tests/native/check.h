/* A test harness in a page: checks that name what failed, seeded numbers, and boundary lengths. */
#ifndef CHECK_H
#define CHECK_H

#include "edgemem.h"
#include "kernels.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Fails the test, saying where and with what numbers, unless `holds`. */
#define CHECK(holds, ...) check_that(holds, __FILE__, __LINE__, #holds, __VA_ARGS__)
void check_that(bool holds, const char *file, int line, const char *what, const char *format, ...);
int check_report(void); /* prints the closing line; the exit status */

/* Reproducible on every machine: integers only, then one exact conversion. */
uint32_t random_bits(uint32_t *state);
float random_unit(uint32_t *state); /* in [-1, 1), a multiple of 2^-20 */
void fill_unit(float *x, int64_t n, uint32_t seed);

/* 64-byte aligned, exactly sized, so that AddressSanitizer sees the first byte too far. */
void *exact(size_t bytes);

/* A number of columns that a format may have, not below `cols`. */
int32_t fitting(int32_t dtype, int32_t cols);

/* A store matrix of 16 lanes with scales in a normal range, its elements as doubles, and the
 * magnitudes of what those are sums of. */
uint8_t *random_matrix(int32_t dtype, int32_t rows, int32_t cols, uint32_t seed);
double matrix_element(const uint8_t *data, int32_t dtype, int32_t cols, int32_t row, int32_t col);
double matrix_size(const uint8_t *data, int32_t dtype, int32_t cols, int32_t row, int32_t col);
size_t matrix_bytes(int32_t dtype, int32_t rows, int32_t cols);

extern const int32_t LENGTHS[]; /* boundary lengths */
extern const int N_LENGTHS;
extern const char *const DTYPES[EM_DTYPES];

/* Whether this of several combinations of ways is to be tested: all are, but for every third where
 * a sanitizer or an emulator takes a hundred times as long. */
bool is_chosen(int64_t combination);

/* Calls f for every instruction set that runs here. */
void for_each_isa(void (*f)(const em_kernels *k));

#endif
