/* Opening a residency: checking what the caller says, room for all state, an engine; and closing.
 */
#define _GNU_SOURCE /* O_DIRECT */

#include "residency.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool queue_open(piece_queue *q, int64_t capacity) {
    q->capacity = capacity;
    q->items = calloc((size_t)capacity, sizeof *q->items);
    return q->items != NULL;
}

void em_residency_close(em_residency *r) {
    /* Threads do not follow a fork: what they wait on ends with the child. */
    if (!r || is_foreign(r)) return;
    if (r->reaping) {
        pthread_mutex_lock(&r->mutex);
        em_residency_drop_ahead(r);
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
    free(r->n_open);
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
    for (int32_t c = 0; c < n_classes; c++)
        if (classes[c].n_slots < 1 || (uintptr_t)classes[c].start % PAGE_BYTES ||
            classes[c].slot_bytes % PAGE_BYTES)
            return false;
    if (piece_bytes < 4096 || piece_bytes % 4096 || piece_bytes > 1u << 30) return false;
    for (int32_t i = 0; i < n_bundles; i++) {
        const em_bundle *b = &bundles[i];
        if (b->slot_class < 0 || b->slot_class >= n_classes || b->bytes < 1 ||
            b->bytes % PAGE_BYTES || b->offset % PAGE_BYTES || b->payload_bytes > b->bytes ||
            b->first_bytes > b->bytes || b->bytes > classes[b->slot_class].slot_bytes)
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
    r->n_open = calloc(k, sizeof *r->n_open);
    r->flying = calloc((size_t)r->most_depth, sizeof *r->flying);
    r->free_tags = calloc((size_t)r->most_depth, sizeof *r->free_tags);
    if (!own || !r->classes || !r->states || !r->ready || !r->occupant || !r->n_open ||
        !r->flying || !r->free_tags)
        return false;
    memcpy(own, bundles, n * sizeof *own);
    memcpy(r->classes, classes, k * sizeof *r->classes);
    for (int32_t i = 0; i < r->n_bundles; i++) r->states[i].slot = NO_SLOT;
    for (int32_t i = r->most_depth; i > 0; i--) r->free_tags[r->n_free_tags++] = i - 1;
    for (int32_t c = 0; c < r->n_classes; c++) {
        r->occupant[c] = malloc(((size_t)classes[c].n_slots + 1) * sizeof **r->occupant);
        if (!r->occupant[c]) return false;
        for (int32_t s = 0; s < classes[c].n_slots; s++) r->occupant[c][s] = EMPTY;
        r->n_open[c] = classes[c].n_slots;
        pieces += (int64_t)(classes[c].slot_bytes / r->piece_bytes + 1) * classes[c].n_slots;
    }
    return queue_open(&r->demand, pieces + 1) && queue_open(&r->ahead, pieces + 1);
}

int32_t em_residency_open(int32_t fd, const em_bundle *bundles, int32_t n_bundles,
                          const em_slot_class *classes, int32_t n_classes, const char *engine,
                          int32_t depth, uint64_t piece_bytes, const em_faults *faults,
                          em_residency **out) {
    if (!valid(bundles, n_bundles, classes, n_classes, depth, piece_bytes)) return EM_INVALID;
    em_residency *r = calloc(1, sizeof *r);
    if (!r) return EM_NO_MEMORY;
    r->owner = getpid();
    r->fd = fd;
#if defined(O_DIRECT)
    r->buffered = !(fcntl(fd, F_GETFL) & O_DIRECT);
#endif
    r->depth = r->most_depth = depth;
    r->idle_since_us = em_now_us();
    r->piece_bytes = piece_bytes;
    r->n_bundles = n_bundles;
    r->n_classes = n_classes;
    pthread_mutex_init(&r->mutex, NULL);
    pthread_cond_init(&r->changed, NULL);
    int32_t status = allocate(r, bundles, classes) ? EM_OK : EM_NO_MEMORY;
    if (status == EM_OK) status = em_io_open(fd, engine, depth, faults, &r->engine, &r->io);
    if (status == EM_OK) {
        r->reaping = pthread_create(&r->reaper, NULL, em_residency_reap, r) == 0;
        if (!r->reaping) status = EM_NO_THREADS;
    }
    if (status != EM_OK) {
        em_residency_close(r);
        return status;
    }
    *out = r;
    return EM_OK;
}
