/* Which bundles are in DRAM, and where. One mutex guards all state but the ready flags.
 *
 *   ABSENT --acquire, prefetch--> LOADING --read ok--> RESIDENT
 *     ^                             |                     |
 *     +---- failed, unpinned -------+    evict: unpinned, lowest rank
 *
 * A slot holds at most one bundle and a bundle has at most one slot. What is loading or pinned is
 * never a victim. A thread of its own reaps reads, so that they go on while others compute. */
#include "io.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ABSENT, LOADING, RESIDENT };
enum { NO_SLOT = -1, EMPTY = -1 };

typedef struct {
    int32_t slot; /* of its class */
    int32_t pins;
    int32_t pieces_left; /* of the read that loads it */
    uint8_t state;
    bool failed, verified, prefetched;
} bundle_state;

/* Part of a bundle's read: what is left of it. */
typedef struct {
    uint32_t bundle;
    uint64_t offset, bytes;
    uint8_t *buffer;
} piece;

/* A ring of pieces that wait for room in the device's queue. */
typedef struct {
    piece *items;
    int64_t first, count, capacity;
} piece_queue;

struct em_residency {
    const em_io_engine *engine;
    em_io *io;
    int32_t depth, in_flight, n_bundles, n_classes;
    uint64_t piece_bytes;
    const em_bundle *bundles;
    em_slot_class *classes;
    int32_t **occupant; /* [class][slot]: the bundle, or EMPTY */
    bundle_state *states;
    int32_t *ready;
    piece *flying; /* [depth], by tag */
    int32_t *free_tags;
    int32_t n_free_tags;
    piece_queue demand, ahead;
    em_residency_stats stats;
    em_read_failure failure;
    int64_t busy_since_us;
    bool closing;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t reaper;
    bool reaping;
    pid_t owner;
};

/* ---- reads ----------------------------------------------------------------------------------- */

static bool queue_open(piece_queue *q, int64_t capacity) {
    q->capacity = capacity;
    q->items = calloc((size_t)capacity, sizeof *q->items);
    return q->items != NULL;
}

static void queue_push(piece_queue *q, piece p) {
    q->items[(q->first + q->count++) % q->capacity] = p;
}

static piece queue_pop(piece_queue *q) {
    piece p = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->count--;
    return p;
}

/* Fills the device's queue: all demand before anything ahead. */
static void start_reads(em_residency *r) {
    while (r->n_free_tags > 0 && r->demand.count + r->ahead.count > 0) {
        int32_t tag = r->free_tags[--r->n_free_tags];
        r->flying[tag] = queue_pop(r->demand.count > 0 ? &r->demand : &r->ahead);
        if (r->in_flight++ == 0) r->busy_since_us = em_now_us();
        const piece *p = &r->flying[tag];
        r->engine->submit(r->io, &(em_read){(uint64_t)tag, p->offset, p->buffer, p->bytes}, 1);
    }
}

static uint8_t *slot_address(const em_residency *r, uint32_t bundle) {
    const em_slot_class *c = &r->classes[r->bundles[bundle].slot_class];
    return (uint8_t *)c->start + (uint64_t)r->states[bundle].slot * c->slot_bytes;
}

static void load(em_residency *r, uint32_t bundle, int32_t slot, piece_queue *queue) {
    const em_bundle *b = &r->bundles[bundle];
    bundle_state *s = &r->states[bundle];
    s->state = LOADING;
    s->slot = slot;
    s->failed = false;
    s->prefetched = queue == &r->ahead;
    r->occupant[b->slot_class][slot] = (int32_t)bundle;
    uint8_t *to = slot_address(r, bundle);
    s->pieces_left = 0;
    for (uint64_t done = 0; done < b->bytes; done += r->piece_bytes, s->pieces_left++) {
        uint64_t bytes = b->bytes - done < r->piece_bytes ? b->bytes - done : r->piece_bytes;
        queue_push(queue, (piece){bundle, b->offset + done, bytes, to + done});
    }
    *(s->prefetched ? &r->stats.prefetch_bytes : &r->stats.demand_bytes) += (int64_t)b->bytes;
}

static void vacate(em_residency *r, uint32_t bundle) {
    bundle_state *s = &r->states[bundle];
    if (s->prefetched && s->state == RESIDENT)
        r->stats.wasted_bytes += (int64_t)r->bundles[bundle].bytes;
    r->occupant[r->bundles[bundle].slot_class][s->slot] = EMPTY;
    s->state = ABSENT;
    s->slot = NO_SLOT;
    s->prefetched = false;
    __atomic_store_n(&r->ready[bundle], 0, __ATOMIC_RELEASE);
}

static void fail(em_residency *r, uint32_t bundle, int32_t error) {
    if (!r->states[bundle].failed) r->failure = (em_read_failure){bundle, error};
    r->states[bundle].failed = true;
}

/* The last piece of a bundle has ended. The checksum is computed without the mutex: nobody else
 * touches what is loading. */
static void end_load(em_residency *r, uint32_t bundle) {
    const em_bundle *b = &r->bundles[bundle];
    bundle_state *s = &r->states[bundle];
    if (!s->failed && !s->verified) {
        const uint8_t *data = slot_address(r, bundle);
        pthread_mutex_unlock(&r->mutex);
        bool matches = em_crc32c(0, data, b->payload_bytes) == b->crc32c;
        pthread_mutex_lock(&r->mutex);
        if (matches)
            s->verified = true;
        else
            fail(r, bundle, 0);
    }
    if (!s->failed) {
        s->state = RESIDENT;
        __atomic_store_n(&r->ready[bundle], 1, __ATOMIC_RELEASE);
        return;
    }
    if (s->pins == 0) {
        vacate(r, bundle);
    } else { /* whoever pinned it sees the flag, and its release frees the slot */
        s->state = RESIDENT;
        __atomic_store_n(&r->ready[bundle], -1, __ATOMIC_RELEASE);
    }
}

static void end_piece(em_residency *r, const em_done *done) {
    int32_t tag = (int32_t)done->tag;
    piece p = r->flying[tag];
    bool again = done->result == -EINTR || done->result == -EAGAIN;
    if (done->result > 0) {
        r->stats.read_bytes += done->result;
        r->stats.reads++;
        p.offset += (uint64_t)done->result;
        p.buffer += done->result;
        p.bytes -= (uint64_t)done->result;
        again = p.bytes > 0;
    }
    r->free_tags[r->n_free_tags++] = tag;
    if (--r->in_flight == 0) r->stats.busy_us += em_now_us() - r->busy_since_us;
    if (again) {
        queue_push(&r->demand, p);
        return;
    }
    if (p.bytes > 0) fail(r, p.bundle, done->result < 0 ? (int32_t)-done->result : ENODATA);
    if (--r->states[p.bundle].pieces_left == 0) end_load(r, p.bundle);
}

static void *reap(void *arg) {
    em_residency *r = arg;
    em_done done[64];
    for (;;) {
        int32_t n = r->engine->reap(r->io, done, 64);
        pthread_mutex_lock(&r->mutex);
        for (int32_t i = 0; i < n; i++) end_piece(r, &done[i]);
        start_reads(r);
        pthread_cond_broadcast(&r->changed);
        bool over = r->closing && r->in_flight == 0;
        pthread_mutex_unlock(&r->mutex);
        if (over) return NULL;
    }
}

/* ---- slots ----------------------------------------------------------------------------------- */

/* An empty slot of the class, or that of the unpinned resident with the lowest rank below `limit`
 * (then vacated). NO_SLOT if there is none; *loading tells whether one may come free by itself. */
static int32_t take_slot(em_residency *r, int32_t slot_class, const float *ranks, float limit,
                         bool *loading) {
    const int32_t *occupant = r->occupant[slot_class];
    int32_t best = NO_SLOT;
    for (int32_t slot = 0; slot < r->classes[slot_class].n_slots; slot++) {
        int32_t bundle = occupant[slot];
        if (bundle == EMPTY) return slot;
        if (r->states[bundle].pins > 0) continue;
        if (r->states[bundle].state == LOADING) {
            *loading = true;
            continue;
        }
        float rank = ranks ? ranks[bundle] : 0;
        if (rank < limit) {
            limit = rank;
            best = slot;
        }
    }
    if (best != NO_SLOT) vacate(r, (uint32_t)occupant[best]);
    return best;
}

static void unpin(em_residency *r, uint32_t bundle) {
    bundle_state *s = &r->states[bundle];
    if (--s->pins == 0 && s->failed && s->state == RESIDENT) vacate(r, bundle);
}

static void drop_ahead(em_residency *r) {
    /* Only bundles none of whose pieces have started: the others arrive anyway. */
    piece_queue kept = r->ahead;
    int64_t n = r->ahead.count;
    kept.count = 0;
    for (int64_t i = 0; i < n; i++) {
        piece p = r->ahead.items[(r->ahead.first + i) % r->ahead.capacity];
        const em_bundle *b = &r->bundles[p.bundle];
        bundle_state *s = &r->states[p.bundle];
        int64_t pieces = (int64_t)((b->bytes + r->piece_bytes - 1) / r->piece_bytes);
        bool untouched =
            s->pins == 0 && p.offset == b->offset && s->pieces_left == pieces && i + pieces <= n;
        if (!untouched) {
            kept.items[(kept.first + kept.count++) % kept.capacity] = p;
            continue;
        }
        i += pieces - 1;
        r->stats.prefetch_bytes -= (int64_t)b->bytes;
        r->stats.dropped_bytes += (int64_t)b->bytes;
        vacate(r, p.bundle);
    }
    r->ahead = kept;
}

/* ---- verbs ----------------------------------------------------------------------------------- */

/* A queued prefetch that is now wanted goes before the others. */
static void promote(em_residency *r, uint32_t bundle) {
    int64_t n = r->ahead.count;
    for (int64_t i = 0; i < n; i++) {
        piece p = queue_pop(&r->ahead);
        queue_push(p.bundle == bundle ? &r->demand : &r->ahead, p);
    }
}

static bool place(em_residency *r, uint32_t bundle, const float *ranks) {
    int32_t slot_class = r->bundles[bundle].slot_class;
    for (;;) {
        bool loading = false;
        int32_t slot = take_slot(r, slot_class, ranks, INFINITY, &loading);
        if (slot != NO_SLOT) {
            load(r, bundle, slot, &r->demand);
            return true;
        }
        if (!loading) return false;
        int64_t before = r->ahead.count;
        drop_ahead(r);
        if (r->ahead.count == before) pthread_cond_wait(&r->changed, &r->mutex);
    }
}

int32_t em_residency_acquire(em_residency *r, const uint32_t *ids, int32_t n, const float *ranks,
                             uint64_t *addresses) {
    for (int32_t i = 0; i < n; i++)
        if (ids[i] >= (uint32_t)r->n_bundles) return EM_INVALID;
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++) r->states[ids[i]].pins++; /* so that none is a victim here */
    int32_t placed = 0;
    for (; placed < n; placed++) {
        bundle_state *s = &r->states[ids[placed]];
        if (s->state == RESIDENT && !s->failed) {
            r->stats.hits++;
        } else {
            r->stats.misses++;
            if (s->state == LOADING && s->prefetched && r->ahead.count > 0) promote(r, ids[placed]);
            if (s->state == ABSENT && !place(r, ids[placed], ranks)) break;
        }
        if (s->prefetched) {
            r->stats.useful_bytes += (int64_t)r->bundles[ids[placed]].bytes;
            s->prefetched = false;
        }
    }
    start_reads(r);
    for (int32_t i = 0; i < n && placed == n; i++)
        addresses[i] = (uint64_t)(uintptr_t)slot_address(r, ids[i]);
    for (int32_t i = 0; i < n && placed < n; i++) unpin(r, ids[i]);
    pthread_mutex_unlock(&r->mutex);
    return placed == n ? EM_OK : EM_NO_MEMORY;
}

void em_residency_release(em_residency *r, const uint32_t *ids, int32_t n) {
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < (uint32_t)r->n_bundles && r->states[ids[i]].pins > 0) unpin(r, ids[i]);
    pthread_mutex_unlock(&r->mutex);
}

int32_t em_residency_prefetch(em_residency *r, const uint32_t *ids, int32_t n, const float *ranks) {
    int32_t started = 0;
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] >= (uint32_t)r->n_bundles || r->states[ids[i]].state != ABSENT) continue;
        bool loading = false;
        float limit = ranks ? ranks[ids[i]] : 0;
        int32_t slot = take_slot(r, r->bundles[ids[i]].slot_class, ranks, limit, &loading);
        if (slot == NO_SLOT || r->states[ids[i]].pins > 0) continue;
        load(r, ids[i], slot, &r->ahead);
        started++;
    }
    start_reads(r);
    pthread_mutex_unlock(&r->mutex);
    return started;
}

void em_residency_cancel(em_residency *r) {
    pthread_mutex_lock(&r->mutex);
    drop_ahead(r);
    pthread_mutex_unlock(&r->mutex);
}

int32_t em_residency_wait(em_residency *r, const uint32_t *ids, int32_t n) {
    int32_t status = EM_OK;
    int64_t since = em_now_us();
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++) {
        while (r->states[ids[i]].state == LOADING) pthread_cond_wait(&r->changed, &r->mutex);
        if (r->states[ids[i]].failed || r->states[ids[i]].state == ABSENT) status = EM_FLASH;
    }
    r->stats.stall_us += em_now_us() - since;
    pthread_mutex_unlock(&r->mutex);
    return status;
}

const int32_t *em_residency_ready(const em_residency *r) { return r->ready; }
const char *em_residency_engine(const em_residency *r) { return r->engine->name; }

em_read_failure em_residency_failure(em_residency *r) {
    pthread_mutex_lock(&r->mutex);
    em_read_failure failure = r->failure;
    pthread_mutex_unlock(&r->mutex);
    return failure;
}

em_residency_stats em_residency_statistics(em_residency *r) {
    pthread_mutex_lock(&r->mutex);
    em_residency_stats stats = r->stats;
    if (r->in_flight > 0) stats.busy_us += em_now_us() - r->busy_since_us;
    pthread_mutex_unlock(&r->mutex);
    return stats;
}

/* ---- open and close -------------------------------------------------------------------------- */

void em_residency_close(em_residency *r) {
    if (!r) return;
    if (r->reaping && r->owner == getpid()) { /* threads do not follow a fork */
        pthread_mutex_lock(&r->mutex);
        drop_ahead(r);
        r->closing = true;
        r->engine->wake(r->io);
        pthread_mutex_unlock(&r->mutex);
        pthread_join(r->reaper, NULL);
    }
    if (r->io) r->engine->close(r->io);
    for (int32_t c = 0; r->occupant && c < r->n_classes; c++) free(r->occupant[c]);
    pthread_mutex_destroy(&r->mutex);
    pthread_cond_destroy(&r->changed);
    free(r->occupant);
    free((void *)r->bundles);
    free(r->classes);
    free(r->states);
    free(r->ready);
    free(r->flying);
    free(r->free_tags);
    free(r->demand.items);
    free(r->ahead.items);
    free(r);
}

static bool valid(const em_bundle *bundles, int32_t n_bundles, const em_slot_class *classes,
                  int32_t n_classes, int32_t depth, uint64_t piece_bytes) {
    if (n_bundles < 1 || n_classes < 1 || depth < 1 || depth > 1024) return false;
    if (piece_bytes < 4096 || piece_bytes % 4096 || piece_bytes > 1u << 30) return false;
    for (int32_t i = 0; i < n_bundles; i++) {
        const em_bundle *b = &bundles[i];
        if (b->slot_class < 0 || b->slot_class >= n_classes || b->bytes < 1 ||
            b->payload_bytes > b->bytes || b->bytes > classes[b->slot_class].slot_bytes)
            return false;
    }
    return true;
}

/* Copies of the caller's tables and room for all state; false where memory is short. */
static bool allocate(em_residency *r, const em_bundle *bundles, const em_slot_class *classes) {
    size_t n = (size_t)r->n_bundles, k = (size_t)r->n_classes;
    int64_t pieces = 0;
    em_bundle *own = malloc(n * sizeof *own);
    r->bundles = own;
    r->classes = malloc(k * sizeof *r->classes);
    r->states = calloc(n, sizeof *r->states);
    r->ready = calloc(n, sizeof *r->ready);
    r->occupant = calloc(k, sizeof *r->occupant);
    r->flying = calloc((size_t)r->depth, sizeof *r->flying);
    r->free_tags = calloc((size_t)r->depth, sizeof *r->free_tags);
    if (!own || !r->classes || !r->states || !r->ready || !r->occupant || !r->flying ||
        !r->free_tags)
        return false;
    memcpy(own, bundles, n * sizeof *own);
    memcpy(r->classes, classes, k * sizeof *r->classes);
    for (int32_t i = 0; i < r->n_bundles; i++) r->states[i].slot = NO_SLOT;
    for (int32_t i = 0; i < r->depth; i++) r->free_tags[r->n_free_tags++] = r->depth - 1 - i;
    for (int32_t c = 0; c < r->n_classes; c++) {
        r->occupant[c] = malloc(((size_t)classes[c].n_slots + 1) * sizeof **r->occupant);
        if (!r->occupant[c]) return false;
        for (int32_t s = 0; s < classes[c].n_slots; s++) r->occupant[c][s] = EMPTY;
        pieces += (int64_t)(classes[c].slot_bytes / r->piece_bytes + 1) * classes[c].n_slots;
    }
    return queue_open(&r->demand, pieces + 1) && queue_open(&r->ahead, pieces + 1);
}

static int32_t open_engine(em_residency *r, int fd, const char *name, const em_faults *faults) {
    const em_io_engine *all[] = {
#if defined(__linux__)
        &em_io_uring,
#endif
        &em_io_threads,
    };
    em_io_setup setup = {.fd = fd, .depth = r->depth};
    int32_t status = EM_UNSUPPORTED;
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (name && strcmp(name, all[i]->name) != 0) continue;
        r->engine = all[i];
        if (faults) {
            setup.inner = all[i];
            setup.faults = *faults;
            r->engine = &em_io_fault;
        }
        status = r->engine->open(&setup, &r->io);
        if (status == EM_OK) return EM_OK;
        r->io = NULL;
    }
    return status;
}

int32_t em_residency_open(int32_t fd, const em_bundle *bundles, int32_t n_bundles,
                          const em_slot_class *classes, int32_t n_classes, const char *engine,
                          int32_t depth, uint64_t piece_bytes, const em_faults *faults,
                          em_residency **out) {
    if (!valid(bundles, n_bundles, classes, n_classes, depth, piece_bytes)) return EM_INVALID;
    em_residency *r = calloc(1, sizeof *r);
    if (!r) return EM_NO_MEMORY;
    r->owner = getpid();
    r->depth = depth;
    r->piece_bytes = piece_bytes;
    r->n_bundles = n_bundles;
    r->n_classes = n_classes;
    pthread_mutex_init(&r->mutex, NULL);
    pthread_cond_init(&r->changed, NULL);
    int32_t status = allocate(r, bundles, classes) ? EM_OK : EM_NO_MEMORY;
    if (status == EM_OK) status = open_engine(r, fd, engine, faults);
    if (status == EM_OK) {
        r->reaping = pthread_create(&r->reaper, NULL, reap, r) == 0;
        if (!r->reaping) status = EM_NO_THREADS;
    }
    if (status != EM_OK) {
        em_residency_close(r);
        return status;
    }
    *out = r;
    return EM_OK;
}
