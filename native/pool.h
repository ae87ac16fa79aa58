/* A thread pool for short parallel regions: workers spin a little for the next one, then sleep. */
#ifndef EM_POOL_H
#define EM_POOL_H

#include "base.h"

typedef struct em_pool em_pool;

/* Called for each item in [0, n_items) by whichever thread takes it; `thread` in [0, n_threads). */
typedef void em_task(void *arg, int64_t item, int32_t thread);

int32_t em_pool_open(int32_t n_threads, em_pool **pool);
void em_pool_close(em_pool *pool);
int32_t em_pool_threads(const em_pool *pool);
/* Returns when every item is done. n_items < 2^32; which order they run in is not said. */
void em_pool_run(em_pool *pool, em_task *task, void *arg, int64_t n_items);

#endif
