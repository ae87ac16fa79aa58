/* A take of rows (em_rows_take) in steps, so that reads run while it is found out which rows are
 * wanted. Every take that is begun is to be finished. */
#ifndef EM_ROWS_H
#define EM_ROWS_H

#include "edgemem.h"

int32_t em_rows_begin(em_rows *rows, int32_t set);
/* More rows, after all before them, and all together no more than there is room for: starts reading
 * what is absent, and does not wait. */
void em_rows_want(em_rows *rows, const int32_t *ids, int32_t n);
/* Waits for all that was wanted, which is `ids` [n]. */
int32_t em_rows_finish(em_rows *rows, const int32_t *ids, int32_t n, const uint8_t **at,
                       int64_t *waited_ns);

#endif
