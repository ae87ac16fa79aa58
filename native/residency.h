/* What a residency is made of, for the files that implement it, and for streams. */
#ifndef EM_RESIDENCY_H
#define EM_RESIDENCY_H

#include "io.h"

#include <pthread.h>
#include <unistd.h>

enum { ABSENT, LOADING, RESIDENT };
enum { NO_SLOT = -1, EMPTY = -1 };

typedef struct {
    int32_t slot; /* of its class */
    int32_t pins;
    int32_t pieces_left; /* of the read that loads it */
    int32_t first_left;  /* of these, those with bytes of the first part */
    int32_t summed;      /* pieces that `crc` covers, from the first on */
    uint64_t arrived;    /* of the pieces after those, a bit for each that is there */
    uint32_t crc;
    int32_t error; /* why it failed: an errno, 0 for a wrong checksum */
    uint8_t state;
    bool failed;
    bool prefetched; /* loaded ahead, and not acquired since: no victim, unless it is stale */
    bool stale;      /* not wanted any more by whoever prefetched it */
    bool ahead;      /* what loads it now began as a prefetch */
    bool awaited;    /* loading, and acquired */
} bundle_state;

/* Part of a bundle's read: what is left of it. */
typedef struct {
    uint32_t bundle;
    int32_t retries;
    int32_t index; /* in its bundle */
    bool first;    /* has bytes of the bundle's first part */
    uint64_t offset, bytes;
    uint8_t *buffer;
} piece;

enum { MAX_RETRIES = 1000, PAGE_BYTES = 4096 };

/* A ring of pieces that wait for room in the device's queue. */
typedef struct {
    piece *items;
    int64_t first, count, capacity;
} piece_queue;

struct em_residency {
    const em_io_engine *engine;
    em_io *io;
    int32_t depth, most_depth, in_flight, n_bundles, n_classes;
    int32_t n_awaited; /* bundles */
    uint64_t piece_bytes;
    const em_bundle *bundles;
    em_slot_class *classes;
    int32_t *n_open;    /* [class]: slots in use, the first ones */
    int32_t **occupant; /* [class][slot]: the bundle, or EMPTY */
    bundle_state *states;
    int32_t *ready;
    piece *flying; /* [most_depth], by tag */
    int32_t *free_tags;
    int32_t n_free_tags;
    piece_queue demand, ahead;
    em_residency_stats stats;
    em_read_failure failure;
    int64_t busy_since_us, idle_since_us;
    bool closing;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t reaper;
    bool reaping, buffered;
    int fd;
    pid_t owner;
};

/* Rings and slots belong to the process that opened them; in a child of it the mutex may be locked
 * for ever, by a thread that the child does not have. */
EM_INLINE bool is_foreign(const em_residency *r) { return r->owner != getpid(); }

/* The thread that ends reads, and forgetting prefetches that have not started (under the mutex). */
void *em_residency_reap(void *residency);
void em_residency_drop_ahead(em_residency *residency);

#endif
