/* Which bundles are in DRAM, and where. One mutex guards all state but the ready flags.
 *
 *   ABSENT --acquire, prefetch--> LOADING --read ok--> RESIDENT
 *     ^                             |                     |
 *     +---- failed, unpinned -------+    evict: unpinned, lowest rank
 *
 * A slot holds at most one bundle and a bundle has at most one slot. What is loading or pinned is
 * never a victim. A thread of its own reaps reads, so that they go on while others compute. */
#include "residency.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- reads ----------------------------------------------------------------------------------- */

static void queue_push(piece_queue *q, piece p) {
    q->items[(q->first + q->count++) % q->capacity] = p;
}

static piece queue_pop(piece_queue *q) {
    piece p = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->count--;
    return p;
}

/* Fills the device's queue, all demand before anything ahead, by as few calls as possible. */
static void start_reads(em_residency *r) {
    enum { BATCH = 16 };
    em_read batch[BATCH];
    while (r->in_flight < r->depth && r->demand.count + r->ahead.count > 0) {
        int32_t n = 0;
        while (n < BATCH && r->in_flight < r->depth && r->demand.count + r->ahead.count > 0) {
            int32_t tag = r->free_tags[--r->n_free_tags];
            r->flying[tag] = queue_pop(r->demand.count > 0 ? &r->demand : &r->ahead);
            if (r->in_flight++ == 0) r->busy_since_us = em_now_us();
            const piece *p = &r->flying[tag];
            batch[n++] = (em_read){(uint64_t)tag, p->offset, p->buffer, p->bytes};
        }
        r->engine->submit(r->io, batch, n);
    }
}

static uint8_t *slot_address(const em_residency *r, uint32_t bundle) {
    const em_slot_class *c = &r->classes[r->bundles[bundle].slot_class];
    return (uint8_t *)c->start + (uint64_t)r->states[bundle].slot * c->slot_bytes;
}

/* Pieces of equal size (whole pages), none over `most`. */
static int32_t count_pieces(uint64_t bytes, uint64_t most) {
    return (int32_t)((bytes + most - 1) / most);
}

static uint64_t piece_size(const em_residency *r, const em_bundle *b) {
    uint64_t pieces = (uint64_t)count_pieces(b->bytes, r->piece_bytes);
    return (uint64_t)em_round_up((int64_t)((b->bytes + pieces - 1) / pieces), PAGE_BYTES);
}

static void load(em_residency *r, uint32_t bundle, int32_t slot, piece_queue *queue) {
    const em_bundle *b = &r->bundles[bundle];
    bundle_state *s = &r->states[bundle];
    s->state = LOADING;
    s->slot = slot;
    s->failed = false;
    s->prefetched = s->ahead = queue == &r->ahead;
    s->stale = false;
    r->occupant[b->slot_class][slot] = (int32_t)bundle;
    uint8_t *to = slot_address(r, bundle);
    s->pieces_left = count_pieces(b->bytes, r->piece_bytes);
    s->first_left = s->summed = 0;
    s->arrived = s->crc = 0;
    uint64_t even = piece_size(r, b);
    for (int32_t i = 0; i < s->pieces_left; i++) {
        uint64_t start = (uint64_t)i * even;
        uint64_t bytes = b->bytes - start < even ? b->bytes - start : even;
        bool first = start < b->first_bytes;
        s->first_left += first;
        queue_push(queue, (piece){bundle, 0, i, first, b->offset + start, bytes, to + start});
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

static void fail(bundle_state *s, int32_t error) {
    if (!s->failed) s->error = error;
    s->failed = true;
}

/* Time without a demanded read is idle: what reading ahead may use. */
static void await(em_residency *r, uint32_t bundle) {
    if (r->states[bundle].awaited) return;
    r->states[bundle].awaited = true;
    if (r->n_awaited++ == 0) r->stats.idle_us += em_now_us() - r->idle_since_us;
}

static void end_await(em_residency *r, uint32_t bundle) {
    if (!r->states[bundle].awaited) return;
    r->states[bundle].awaited = false;
    if (--r->n_awaited == 0) r->idle_since_us = em_now_us();
}

/* Continues the checksum over what has arrived without a gap, while it is still in the cache, and
 * without the mutex: only the reaper touches what is loading. */
static void sum_arrived(em_residency *r, uint32_t bundle, int32_t index) {
    const em_bundle *b = &r->bundles[bundle];
    bundle_state *s = &r->states[bundle];
    if (index - s->summed < 64) s->arrived |= (uint64_t)1 << (index - s->summed);
    if (!(s->arrived & 1)) return;
    const uint8_t *data = slot_address(r, bundle);
    uint64_t even = piece_size(r, b), start = (uint64_t)s->summed * even, end = start;
    for (; s->arrived & 1; s->arrived >>= 1, s->summed++) end += even;
    if (end > b->payload_bytes) end = b->payload_bytes;
    if (start >= end) return;
    start_reads(r); /* the device goes on meanwhile */
    pthread_mutex_unlock(&r->mutex);
    s->crc = em_crc32c(s->crc, data + start, end - start);
    pthread_mutex_lock(&r->mutex);
}

/* The last piece of a bundle has ended. What the checksum does not cover yet, it covers now. */
static void end_load(em_residency *r, uint32_t bundle) {
    const em_bundle *b = &r->bundles[bundle];
    bundle_state *s = &r->states[bundle];
#if defined(POSIX_FADV_DONTNEED)
    if (r->buffered) { /* or the page cache would keep a second copy */
        pthread_mutex_unlock(&r->mutex);
        posix_fadvise(r->fd, (off_t)b->offset, (off_t)b->bytes, POSIX_FADV_DONTNEED);
        pthread_mutex_lock(&r->mutex);
    }
#endif
    if (!s->failed) {
        uint64_t start = (uint64_t)s->summed * piece_size(r, b);
        if (start < b->payload_bytes) {
            const uint8_t *data = slot_address(r, bundle) + start;
            pthread_mutex_unlock(&r->mutex);
            s->crc = em_crc32c(s->crc, data, b->payload_bytes - start);
            pthread_mutex_lock(&r->mutex);
        }
        if (s->crc != b->crc32c) fail(s, 0);
    }
    /* What was only tried ahead is read again once it is wanted, unless some of it was used. */
    if (s->failed && s->ahead && s->pins > 0 && r->ready[bundle] == EM_READY_NOT) {
        load(r, bundle, s->slot, &r->demand);
        return;
    }
    end_await(r, bundle);
    if (!s->failed) {
        s->state = RESIDENT;
        __atomic_store_n(&r->ready[bundle], EM_READY_WHOLE, __ATOMIC_RELEASE);
        return;
    }
    if (s->pins == 0) {
        vacate(r, bundle);
    } else { /* whoever pinned it sees the flag, and its release frees the slot */
        s->state = RESIDENT;
        r->failure = (em_read_failure){bundle, s->error};
        __atomic_store_n(&r->ready[bundle], EM_READY_FAILED, __ATOMIC_RELEASE);
    }
}

static void end_piece(em_residency *r, const em_done *done) {
    int32_t tag = (int32_t)done->tag;
    piece p = r->flying[tag];
    /* A thread that ends takes its buffered io_uring reads with it: EFAULT or ECANCELED. */
    bool again = p.retries < MAX_RETRIES && (done->result == -EINTR || done->result == -EAGAIN ||
                                             done->result == -EFAULT || done->result == -ECANCELED);
    p.retries++;
    if (done->result > 0) {
        /* What is read again starts where direct reads may start. */
        uint64_t whole = (uint64_t)done->result;
        if (whole < p.bytes) whole = whole / PAGE_BYTES * PAGE_BYTES;
        r->stats.read_bytes += done->result;
        r->stats.reads++;
        p.offset += whole;
        p.buffer += whole;
        p.bytes -= whole;
        again = p.bytes > 0 && (whole > 0 || p.retries < MAX_RETRIES);
    }
    r->free_tags[r->n_free_tags++] = tag;
    if (--r->in_flight == 0) r->stats.busy_us += em_now_us() - r->busy_since_us;
    if (again) {
        queue_push(&r->demand, p);
        return;
    }
    bundle_state *s = &r->states[p.bundle];
    if (p.bytes > 0) fail(s, done->result < 0 ? (int32_t)-done->result : ENODATA);
    if (p.first && --s->first_left == 0 && !s->failed)
        __atomic_store_n(&r->ready[p.bundle], EM_READY_FIRST, __ATOMIC_RELEASE);
    if (p.bytes == 0) sum_arrived(r, p.bundle, p.index);
    if (--s->pieces_left == 0) end_load(r, p.bundle);
}

void *em_residency_reap(void *arg) {
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

/* An empty slot of the class, or that of the unpinned resident with the lowest rank (then vacated),
 * of equals the one with the lowest number: so a replay, which knows no slots, finds the same. With
 * a bundle `below`, only what would leave before that; what was prefetched and not used yet leaves
 * only if it must, for demand. NO_SLOT if there is none; *loading tells whether one may come free
 * by itself. */
static int32_t take_slot(em_residency *r, int32_t slot_class, const float *ranks, int32_t below,
                         bool demanded, bool *loading) {
    const int32_t *occupant = r->occupant[slot_class];
    int32_t best = NO_SLOT, last_resort = NO_SLOT, last = below;
    float limit = below != EMPTY && ranks ? ranks[below] : 0;
    for (int32_t slot = 0; slot < r->n_open[slot_class]; slot++) {
        int32_t bundle = occupant[slot];
        if (bundle == EMPTY) return slot;
        const bundle_state *s = &r->states[bundle];
        if (s->pins > 0) continue;
        if (s->state == LOADING) {
            *loading = true;
            continue;
        }
        if (s->prefetched && !s->stale) {
            if (demanded) last_resort = slot;
            continue;
        }
        float rank = ranks ? ranks[bundle] : 0;
        /* Demand takes whatever there is, also what has a rank that is no number. */
        if (last == EMPTY || rank < limit || (rank == limit && bundle < last)) {
            limit = rank;
            last = bundle;
            best = slot;
        }
    }
    if (best == NO_SLOT) best = last_resort;
    if (best != NO_SLOT) vacate(r, (uint32_t)occupant[best]);
    return best;
}

static void unpin(em_residency *r, uint32_t bundle) {
    bundle_state *s = &r->states[bundle];
    if (--s->pins == 0 && s->failed && s->state == RESIDENT) vacate(r, bundle);
}

void em_residency_drop_ahead(em_residency *r) {
    /* Only bundles none of whose pieces have started: the others arrive anyway. */
    piece_queue kept = r->ahead;
    int64_t n = r->ahead.count;
    kept.count = 0;
    for (int64_t i = 0; i < n; i++) {
        piece p = r->ahead.items[(r->ahead.first + i) % r->ahead.capacity];
        const em_bundle *b = &r->bundles[p.bundle];
        bundle_state *s = &r->states[p.bundle];
        int64_t pieces = count_pieces(b->bytes, r->piece_bytes);
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
        int32_t slot = take_slot(r, slot_class, ranks, EMPTY, true, &loading);
        if (slot != NO_SLOT) {
            load(r, bundle, slot, &r->demand);
            return true;
        }
        if (!loading) return false;
        int64_t before = r->ahead.count;
        em_residency_drop_ahead(r);
        if (r->ahead.count == before) pthread_cond_wait(&r->changed, &r->mutex);
        if (r->states[bundle].state != ABSENT) return true; /* another caller was faster */
    }
}

int32_t em_residency_acquire(em_residency *r, const uint32_t *ids, int32_t n, const float *ranks,
                             uint64_t *addresses) {
    if (is_foreign(r)) return EM_UNSUPPORTED;
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
            if (s->state == LOADING) await(r, ids[placed]);
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
    if (n < 1 || is_foreign(r)) return;
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < (uint32_t)r->n_bundles && r->states[ids[i]].pins > 0) unpin(r, ids[i]);
    pthread_mutex_unlock(&r->mutex);
}

void em_residency_release_all(em_residency *r) {
    if (is_foreign(r)) return;
    pthread_mutex_lock(&r->mutex);
    for (uint32_t bundle = 0; bundle < (uint32_t)r->n_bundles; bundle++)
        while (r->states[bundle].pins > 0) unpin(r, bundle);
    pthread_mutex_unlock(&r->mutex);
}

int32_t em_residency_prefetch(em_residency *r, const uint32_t *ids, int32_t n, const float *ranks,
                              uint64_t most_bytes) {
    int32_t started = 0;
    if (is_foreign(r)) return 0;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] >= (uint32_t)r->n_bundles) return 0;
    pthread_mutex_lock(&r->mutex);
    for (int32_t i = 0; i < n; i++) r->states[ids[i]].pins++; /* so that none is a victim here */
    for (int32_t i = 0; i < n; i++) {
        const em_bundle *b = &r->bundles[ids[i]];
        if (r->states[ids[i]].state != ABSENT) continue;
        if (b->bytes > most_bytes) break;
        bool loading = false;
        int32_t slot = take_slot(r, b->slot_class, ranks, EMPTY, false, &loading);
        if (slot == NO_SLOT) continue;
        load(r, ids[i], slot, &r->ahead);
        most_bytes -= b->bytes;
        started++;
    }
    for (int32_t i = 0; i < n; i++) unpin(r, ids[i]);
    start_reads(r);
    pthread_mutex_unlock(&r->mutex);
    return started;
}

void em_residency_cancel(em_residency *r, const uint32_t *ids, int32_t n) {
    if (is_foreign(r)) return;
    pthread_mutex_lock(&r->mutex);
    em_residency_drop_ahead(r);
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < (uint32_t)r->n_bundles) r->states[ids[i]].stale = true;
    pthread_mutex_unlock(&r->mutex);
}

void em_residency_clear(em_residency *r) {
    if (is_foreign(r)) return;
    pthread_mutex_lock(&r->mutex);
    em_residency_drop_ahead(r);
    for (int32_t i = 0; i < r->n_bundles; i++) {
        bundle_state *s = &r->states[i];
        while (s->pins == 0 && s->state == LOADING) pthread_cond_wait(&r->changed, &r->mutex);
        if (s->pins == 0 && s->state == RESIDENT) vacate(r, (uint32_t)i);
    }
    pthread_mutex_unlock(&r->mutex);
}

/* What a closing slot holds goes into one that stays open, if that holds nothing or less. */
static void close_slot(em_residency *r, int32_t slot_class, int32_t slot, const float *ranks) {
    int32_t bundle = r->occupant[slot_class][slot];
    if (bundle == EMPTY) return;
    bool loading = false;
    int32_t to = take_slot(r, slot_class, ranks, bundle, false, &loading);
    if (to == NO_SLOT) {
        vacate(r, (uint32_t)bundle);
        return;
    }
    const uint8_t *from = slot_address(r, (uint32_t)bundle);
    r->occupant[slot_class][slot] = EMPTY;
    r->occupant[slot_class][to] = bundle;
    r->states[bundle].slot = to;
    memcpy(slot_address(r, (uint32_t)bundle), from, r->bundles[bundle].bytes);
}

static bool any_in(const em_residency *r, int32_t slot_class, int32_t first, bool pinned) {
    for (int32_t slot = first; slot < r->n_open[slot_class]; slot++) {
        int32_t bundle = r->occupant[slot_class][slot];
        if (bundle == EMPTY) continue;
        if (pinned ? r->states[bundle].pins > 0 : r->states[bundle].state == LOADING) return true;
    }
    return false;
}

int32_t em_residency_resize(em_residency *r, int32_t slot_class, int32_t n_slots,
                            const float *ranks) {
    if (is_foreign(r)) return EM_UNSUPPORTED;
    if (slot_class < 0 || slot_class >= r->n_classes || n_slots < 1 ||
        n_slots > r->classes[slot_class].n_slots)
        return EM_INVALID;
    pthread_mutex_lock(&r->mutex);
    int32_t before = r->n_open[slot_class], status = EM_OK;
    if (n_slots >= before) {
        r->n_open[slot_class] = n_slots;
    } else if (any_in(r, slot_class, n_slots, true)) {
        status = EM_NO_MEMORY;
    } else {
        em_residency_drop_ahead(r);
        while (any_in(r, slot_class, n_slots, false)) pthread_cond_wait(&r->changed, &r->mutex);
        r->n_open[slot_class] = n_slots;
        for (int32_t slot = n_slots; slot < before; slot++) close_slot(r, slot_class, slot, ranks);
        const em_slot_class *c = &r->classes[slot_class];
        em_pages_drop((uint8_t *)c->start + (uint64_t)n_slots * c->slot_bytes,
                      (uint64_t)(before - n_slots) * c->slot_bytes);
    }
    pthread_mutex_unlock(&r->mutex);
    return status;
}

void em_residency_set_depth(em_residency *r, int32_t depth) {
    pthread_mutex_lock(&r->mutex);
    r->depth = depth < 1 ? 1 : depth > r->most_depth ? r->most_depth : depth;
    start_reads(r);
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
    if (is_foreign(r)) return r->stats;
    pthread_mutex_lock(&r->mutex);
    em_residency_stats stats = r->stats;
    if (r->in_flight > 0) stats.busy_us += em_now_us() - r->busy_since_us;
    if (r->n_awaited == 0) stats.idle_us += em_now_us() - r->idle_since_us;
    pthread_mutex_unlock(&r->mutex);
    return stats;
}
