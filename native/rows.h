/* Rows of a store's matrices that come and go one by one: small ones, by the hundred thousand. */
#ifndef EM_ROWS_H
#define EM_ROWS_H

#include "edgemem.h"

/* How many rows of a set may be held at once. */
int32_t em_rows_room(const em_rows *rows, int32_t set);
uint64_t em_rows_row_bytes(const em_rows *rows, int32_t set);

/* Gives the addresses of rows `ids` [n], ascending and no more than there is room for, after
 * reading those that are absent; they stay until the set's next take. `*waited_ns` grows by what
 * reading took. EM_FLASH: some could not be read, see em_rows_failure; EM_UNSUPPORTED: another
 * process's. */
int32_t em_rows_take(em_rows *rows, int32_t set, const int32_t *ids, int32_t n, const uint8_t **at,
                     int64_t *waited_ns);

#endif
