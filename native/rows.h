/* A take of rows (em_rows_take) in steps, so that reads run while it is found out which rows are
 * wanted. Every take that is begun is to be finished. */
#ifndef EM_ROWS_H
#define EM_ROWS_H

#include "base.h"
#include "edgemem.h"

int32_t em_rows_begin(em_rows *rows, int32_t set);
/* More rows, after all before them, and all together no more than there is room for: starts reading
 * what is absent, and does not wait for it. `*waited_ns` grows by what asking the system took. */
void em_rows_want(em_rows *rows, const int32_t *ids, int32_t n, int64_t *waited_ns);
/* Waits for all that was wanted, which is `ids` [n]. */
int32_t em_rows_finish(em_rows *rows, const int32_t *ids, int32_t n, const uint8_t **at,
                       int64_t *waited_ns);

/* See em_row_slots_keep, em_row_slots_fit. */
void em_rows_keep(em_rows *rows, int32_t set, const int32_t *ids, int32_t n);
int32_t em_rows_fit(const em_rows *rows, int32_t set, const int32_t *ids, int32_t n);

/* Whether a turn wanted more than there is room for: noted by one for the next. */
void em_rows_crowd(em_rows *rows, int32_t set, bool crowded);
bool em_rows_crowded(const em_rows *rows, int32_t set);

/* A turn of so many tokens is over that took these rows: tells those who want to know. Gives EM_OK,
 * or EM_RAISED where that is the end of the step. */
int32_t em_rows_write_down(em_rows *rows, int32_t set, const int32_t *ids, int32_t n,
                           int32_t tokens);

/* Writes down that a turn demanded `indices` [n], counted from `base`. */
void em_demand_write(em_demand_log *log, const uint32_t *indices, int32_t n, uint32_t base);

#endif
