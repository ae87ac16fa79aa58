/* The pool: every item runs exactly once, regions do not overlap, and opening and closing is clean
 * (ThreadSanitizer watches). */
#include "../../native/pool.h"
#include "check.h"

#include <stdlib.h>
#include <time.h>

enum { MAX_ITEMS = 5000 };

typedef struct {
    int32_t count[MAX_ITEMS];
    int32_t n_threads;
} tally;

static void count_item(void *arg, int64_t item, int32_t thread) {
    tally *t = arg;
    __atomic_fetch_add(&t->count[item], 1, __ATOMIC_RELAXED);
    if (thread < 0 || thread >= t->n_threads)
        __atomic_fetch_add(&t->count[item], 100, __ATOMIC_RELAXED);
}

static void each_item_once(int32_t n_threads) {
    static tally t;
    const int64_t items[] = {0, 1, 2, 3, 7, 64, MAX_ITEMS};
    em_pool *pool;
    CHECK(em_pool_open(n_threads, &pool) == EM_OK, "%d threads", n_threads);
    t.n_threads = n_threads;
    for (int round = 0; round < 200; round++) {
        int64_t n = items[round % 7];
        for (int64_t i = 0; i < MAX_ITEMS; i++) t.count[i] = 0;
        em_pool_run(pool, count_item, &t, n);
        for (int64_t i = 0; i < MAX_ITEMS; i++)
            if (t.count[i] != (i < n)) CHECK(false, "item %ld ran %d times", (long)i, t.count[i]);
        if (round % 50 == 49) nanosleep(&(struct timespec){0, 3000000}, NULL); /* let them sleep */
    }
    CHECK(true, "%d", n_threads);
    em_pool_close(pool);
}

/* A chain of regions, each reading what the one before wrote without atomics. */
static void add_neighbours(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    int64_t *cells = *(int64_t **)arg;
    cells[64 + item] = cells[item] + cells[(item + 1) % 64];
}

static void regions_are_ordered(void) {
    em_pool *pool;
    int64_t cells[128 * 64] = {0}, plain[64], next[64];
    CHECK(em_pool_open(4, &pool) == EM_OK, "%d", 4);
    for (int i = 0; i < 64; i++) cells[i] = plain[i] = i % 3;
    for (int step = 0; step < 60; step++) {
        int64_t *at = cells + 64 * step;
        em_pool_run(pool, add_neighbours, &at, 64);
        for (int i = 0; i < 64; i++) next[i] = plain[i] + plain[(i + 1) % 64];
        for (int i = 0; i < 64; i++) plain[i] = next[i];
        if (step % 10 == 9)
            for (int i = 0; i < 64; i++) CHECK(at[64 + i] == plain[i], "step %d cell %d", step, i);
        if (plain[0] > INT64_MAX / 4) break;
    }
    em_pool_close(pool);
}

int main(void) {
    em_pool *pool;
    CHECK(em_pool_open(0, &pool) == EM_INVALID, "%d threads", 0);
    CHECK(em_pool_open(1025, &pool) == EM_INVALID, "%d threads", 1025);
    for (int32_t n = 1; n <= 5; n++) each_item_once(n);
    regions_are_ordered();
    for (int i = 0; i < 400; i++) { /* open, perhaps run, close at once: no lost wake-up */
        static tally t;
        t.n_threads = 3;
        CHECK(em_pool_open(3, &pool) == EM_OK, "round %d", i);
        if (i % 2) em_pool_run(pool, count_item, &t, 1 + i % 7);
        em_pool_close(pool);
    }
    return check_report();
}
