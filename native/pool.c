#include "pool.h"

#include "edgemem.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

/* About 50 us: longer than the gap between two regions of a step, shorter than a nap is worth. */
#define SPINS 8000

/* A part of a region's items, in a cache line of its own: [end - left, end). `claim` has the
 * region's number above and `left` below. */
typedef struct {
    _Alignas(64) _Atomic uint64_t claim;
    _Atomic int64_t end;
} em_part;

/* Each thread takes the items of its own part in order, so that it reads memory as it lies; then it
 * helps with the parts of the others. A worker that wakes late finds another number or no item, so
 * nobody waits for workers, only for items. */
struct em_pool {
    pthread_t *threads;
    em_part *parts;    /* [n_threads] */
    int32_t n_threads; /* the caller included */
    int32_t n_started;
    pid_t owner; /* workers do not follow a fork */

    _Alignas(64) _Atomic uint32_t region;
    _Atomic(em_task *) task;
    void *_Atomic arg;
    _Alignas(64) _Atomic int64_t n_done;
    _Alignas(64) _Atomic int32_t sleeping;
    _Atomic bool closing;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

typedef struct {
    em_pool *pool;
    int32_t index;
} worker_start;

EM_INLINE void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

EM_INLINE uint32_t region_of(uint64_t claim) { return (uint32_t)(claim >> 32); }

/* Runs what is left of one thread's part; how many items that were. */
static int64_t take_part(em_pool *pool, em_part *part, uint32_t region, int32_t thread) {
    uint64_t claim = atomic_load(&part->claim);
    int64_t done = 0;
    while (region_of(claim) == region && (uint32_t)claim > 0) {
        /* If the exchange succeeds, these are that region's: while it has unclaimed items, its
         * caller has not come back to write the next. */
        em_task *task = atomic_load(&pool->task);
        void *arg = atomic_load(&pool->arg);
        int64_t end = atomic_load(&part->end);
        if (!atomic_compare_exchange_weak(&part->claim, &claim, claim - 1)) continue;
        task(arg, end - (int64_t)(uint32_t)claim, thread);
        done++;
        claim = atomic_load(&part->claim);
    }
    return done;
}

/* Runs items of the present region until none is left or another one has begun. */
static void take_items(em_pool *pool, uint32_t region, int32_t thread) {
    int64_t done = 0;
    for (int32_t i = 0; i < pool->n_threads; i++) {
        int32_t of = thread + i < pool->n_threads ? thread + i : thread + i - pool->n_threads;
        done += take_part(pool, &pool->parts[of], region, thread);
    }
    if (done > 0) atomic_fetch_add(&pool->n_done, done);
}

static void wait_for_region(em_pool *pool, uint32_t seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&pool->region, memory_order_acquire) != seen) return;
        pause_cpu();
    }
    /* Sequentially consistent on both sides: either the caller sees us in `sleeping`, or we see its
     * new region before we wait. */
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(&pool->region) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *start_arg) {
    worker_start start = *(worker_start *)start_arg;
    free(start_arg);
    em_pool *pool = start.pool;
    for (uint32_t seen = 0;;) {
        wait_for_region(pool, seen);
        /* In this order: closing is set before the last region begins, so whoever has seen that
         * region knows. */
        seen = atomic_load(&pool->region);
        if (atomic_load(&pool->closing)) return NULL;
        take_items(pool, seen, start.index);
    }
}

static uint32_t begin_region(em_pool *pool, int64_t n_items) {
    uint32_t region = atomic_load(&pool->region) + 1;
    int64_t start = 0;
    for (int32_t i = 0; i < pool->n_threads; i++) {
        int64_t end = n_items * (i + 1) / pool->n_threads;
        atomic_store(&pool->parts[i].end, end);
        atomic_store(&pool->parts[i].claim, (uint64_t)region << 32 | (uint64_t)(end - start));
        start = end;
    }
    atomic_store(&pool->region, region);
    if (atomic_load(&pool->sleeping) > 0 && pool->owner == getpid()) { /* a child has no workers */
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    return region;
}

void em_pool_run(em_pool *pool, em_task *task, void *arg, int64_t n_items) {
    if (pool->n_threads == 1 || n_items <= 1) {
        for (int64_t item = 0; item < n_items; item++) task(arg, item, 0);
        return;
    }
    atomic_store(&pool->task, task);
    atomic_store(&pool->arg, arg);
    atomic_store(&pool->n_done, 0);
    take_items(pool, begin_region(pool, n_items), 0);
    for (int spin = 0; atomic_load_explicit(&pool->n_done, memory_order_acquire) < n_items;
         spin++) {
        if (spin < SPINS)
            pause_cpu();
        else
            sched_yield();
    }
}

static bool start_worker(em_pool *pool, int32_t index) {
    worker_start *start = malloc(sizeof *start);
    if (!start) return false;
    *start = (worker_start){pool, index};
    if (pthread_create(&pool->threads[index], NULL, work, start) != 0) {
        free(start);
        return false;
    }
    pool->n_started++;
    return true;
}

int32_t em_pool_open(int32_t n_threads, em_pool **out) {
    if (n_threads < 1 || n_threads > 1024) return EM_INVALID;
    em_pool *pool = aligned_alloc(64, (size_t)em_round_up(sizeof *pool, 64));
    if (!pool) return EM_NO_MEMORY;
    *pool = (em_pool){.n_threads = n_threads, .owner = getpid()};
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    pool->parts = aligned_alloc(64, (size_t)n_threads * sizeof *pool->parts);
    if (!pool->threads || !pool->parts) {
        free(pool->threads);
        free(pool->parts);
        free(pool);
        return EM_NO_MEMORY;
    }
    for (int32_t i = 0; i < n_threads; i++) pool->parts[i] = (em_part){0, 0};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int32_t i = 1; i < n_threads; i++)
        if (!start_worker(pool, i)) {
            em_pool_close(pool);
            return EM_NO_THREADS;
        }
    *out = pool;
    return EM_OK;
}

void em_pool_close(em_pool *pool) {
    /* A forked child has no workers to wake, and what they wait on ends with the child. */
    if (!pool || pool->owner != getpid()) return;
    atomic_store(&pool->closing, true);
    begin_region(pool, 0);
    for (int32_t i = 1; i <= pool->n_started; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool->threads);
    free(pool->parts);
    free(pool);
}

int32_t em_pool_threads(const em_pool *pool) { return pool->n_threads; }
