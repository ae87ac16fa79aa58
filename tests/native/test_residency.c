/* Residency against a plain model: after any sequence of verbs, on any engine, with any fault, what
 * is acquired and ready has the bytes of the file, and slots and pins obey their rules. */
#include "check.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUNDLES = 40, CLASSES = 2, PAGE = 4096, PIECE = 8192 };

typedef struct {
    FILE *file;
    em_bundle bundles[BUNDLES];
    uint8_t *bytes[BUNDLES];
    uint8_t *slab;
    em_slot_class classes[CLASSES];
} world;

static void make_world(world *w, int32_t slots) {
    uint64_t offset = PAGE;
    w->file = tmpfile();
    for (int32_t i = 0; i < BUNDLES; i++) {
        int32_t slot_class = i % 3 == 0;
        uint64_t pages = slot_class ? 7 : 2;
        w->bundles[i] = (em_bundle){offset, pages * PAGE, pages * PAGE - 100, PAGE, 0, slot_class};
        w->bytes[i] = exact(pages * PAGE);
        for (uint64_t k = 0; k < pages * PAGE - 100; k++) /* painted: no two places look alike */
            w->bytes[i][k] = (uint8_t)((offset + k) % 251);
        w->bundles[i].crc32c = em_crc32c(0, w->bytes[i], pages * PAGE - 100);
        fseek(w->file, (long)offset, SEEK_SET);
        fwrite(w->bytes[i], 1, pages * PAGE, w->file);
        offset += pages * PAGE;
    }
    fflush(w->file);
    if (posix_memalign((void **)&w->slab, PAGE, (size_t)slots * 9 * PAGE) != 0) abort();
    w->classes[0] = (em_slot_class){w->slab, 2 * PAGE, slots};
    w->classes[1] = (em_slot_class){w->slab + (size_t)slots * 2 * PAGE, 7 * PAGE, slots};
}

static void end_world(world *w) {
    fclose(w->file);
    free(w->slab);
    for (int32_t i = 0; i < BUNDLES; i++) free(w->bytes[i]);
}

static em_residency *open_residency(world *w, const char *engine, int32_t depth,
                                    const em_faults *faults) {
    em_residency *r = NULL;
    int32_t status = em_residency_open(fileno(w->file), w->bundles, BUNDLES, w->classes, CLASSES,
                                       engine, depth, PIECE, faults, &r);
    if (status == EM_UNSUPPORTED && engine && !strcmp(engine, "io_uring")) {
        printf("# io_uring: REFUSED HERE, NOT TESTED\n");
        return NULL;
    }
    CHECK(status == EM_OK, "status %d", status);
    return r;
}

static bool right_bytes(const world *w, uint32_t id, uint64_t address) {
    return !memcmp((const void *)(uintptr_t)address, w->bytes[id], w->bundles[id].bytes);
}

/* Random verbs; pins are the only state a caller can rely on, and they must hold. */
static void random_verbs(const char *engine, uint32_t seed, int32_t depth) {
    enum { SLOTS = 6, HELD = 4 };
    world w;
    make_world(&w, SLOTS);
    em_residency *r = open_residency(&w, engine, depth, NULL);
    uint32_t held[HELD][3];
    uint64_t at[HELD][3];
    int32_t n_held[HELD] = {0};
    float ranks[BUNDLES];
    for (int step = 0; r && step < 600; step++) {
        int32_t h = (int32_t)(random_bits(&seed) % HELD);
        for (int i = 0; i < BUNDLES; i++) ranks[i] = random_unit(&seed);
        if (n_held[h] > 0) {
            CHECK(em_residency_wait(r, held[h], n_held[h]) == EM_OK, "seed %u step %d", seed, step);
            for (int i = 0; i < n_held[h]; i++)
                CHECK(right_bytes(&w, held[h][i], at[h][i]), "bundle %u, step %d", held[h][i],
                      step);
            em_residency_release(r, held[h], n_held[h]);
            n_held[h] = 0;
        } else if (random_bits(&seed) % 3 > 0) {
            int32_t n = 1 + (int32_t)(random_bits(&seed) % 3);
            for (int i = 0; i < n; i++) held[h][i] = random_bits(&seed) % BUNDLES;
            int32_t status = em_residency_acquire(r, held[h], n, ranks, at[h]);
            CHECK(status == EM_OK || status == EM_NO_MEMORY, "status %d", status);
            if (status == EM_OK) n_held[h] = n;
        } else {
            uint32_t ids[4];
            for (int i = 0; i < 4; i++) ids[i] = random_bits(&seed) % BUNDLES;
            em_residency_prefetch(r, ids, 4, ranks, UINT64_MAX);
            if (random_bits(&seed) % 3 == 0) em_residency_cancel(r, ids, 2);
            int32_t open = 1 + (int32_t)(random_bits(&seed) % (uint32_t)w.classes[0].n_slots);
            int32_t status =
                em_residency_resize(r, (int32_t)(random_bits(&seed) % CLASSES), open, ranks);
            CHECK(status == EM_OK || status == EM_NO_MEMORY, "status %d", status);
            em_residency_set_depth(r, 1 + (int32_t)(random_bits(&seed) % (uint32_t)depth));
        }
        for (int a = 0; a < HELD; a++)
            for (int b = 0; b < a; b++)
                for (int i = 0; i < n_held[a]; i++)
                    for (int j = 0; j < n_held[b]; j++)
                        CHECK((held[a][i] == held[b][j]) == (at[a][i] == at[b][j]),
                              "bundles %u and %u", held[a][i], held[b][j]);
    }
    if (r) {
        em_residency_stats s = em_residency_statistics(r);
        CHECK(s.hits > 0 && s.misses > 0 && s.demand_bytes + s.prefetch_bytes >= s.useful_bytes,
              "hits %ld misses %ld", (long)s.hits, (long)s.misses);
        em_residency_close(r);
    }
    end_world(&w);
}

/* More pins than slots: refused, and nothing is pinned by the attempt. */
static void too_many_pins(void) {
    world w;
    make_world(&w, 2);
    em_residency *r = open_residency(&w, "threads", 2, NULL);
    const uint32_t three[] = {1, 2, 4}, two[] = {5, 7};
    uint64_t at[3];
    CHECK(em_residency_acquire(r, three, 3, NULL, at) == EM_NO_MEMORY, "%d slots", 2);
    CHECK(em_residency_acquire(r, two, 2, NULL, at) == EM_OK, "after a refusal%s", "");
    CHECK(em_residency_wait(r, two, 2) == EM_OK, "%d", 2);
    CHECK(em_residency_acquire(r, three, 1, NULL, at) == EM_NO_MEMORY, "all pinned%s", "");
    em_residency_release(r, two, 1);
    CHECK(em_residency_acquire(r, three, 1, NULL, at) == EM_OK, "one unpinned%s", "");
    CHECK(em_residency_wait(r, three, 1) == EM_OK && right_bytes(&w, 1, at[0]), "%d", 1);
    const uint32_t wild[] = {BUNDLES};
    CHECK(em_residency_acquire(r, wild, 1, NULL, at) == EM_INVALID, "bundle %d", BUNDLES);
    em_residency_close(r);
    end_world(&w);
}

static void lowest_rank_leaves(void) {
    world w;
    make_world(&w, 3);
    em_residency *r = open_residency(&w, "threads", 4, NULL);
    const uint32_t all[] = {1, 2, 4};
    float ranks[BUNDLES] = {0};
    uint64_t at[3];
    ranks[1] = 5, ranks[2] = -1, ranks[4] = 3, ranks[8] = 4;
    em_residency_acquire(r, all, 3, ranks, at);
    em_residency_wait(r, all, 3);
    em_residency_release(r, all, 3);
    const uint32_t ahead[] = {2, 5, 7};
    CHECK(em_residency_prefetch(r, ahead + 1, 2, ranks, 2 * PAGE) == 1, "room for one%s", "");
    em_residency_wait(r, (const uint32_t[]){5}, 1);
    em_residency_cancel(r, (const uint32_t[]){5}, 1); /* or 4 would leave, which ranks higher */
    em_residency_acquire(r, (const uint32_t[]){8}, 1, ranks, at);
    em_residency_wait(r, (const uint32_t[]){8}, 1);
    const int32_t *ready = em_residency_ready(r);
    CHECK(ready[1] == EM_READY_WHOLE && ready[4] == EM_READY_WHOLE && ready[8] == EM_READY_WHOLE,
          "%d %d %d", ready[1], ready[4], ready[8]);
    CHECK(ready[2] == 0 && ready[5] == 0, "%d %d", ready[2], ready[5]);
    em_residency_stats s = em_residency_statistics(r);
    CHECK(s.wasted_bytes == 2 * PAGE, "%ld wasted", (long)s.wasted_bytes);
    em_residency_release(r, (const uint32_t[]){8}, 1);
    CHECK(em_residency_prefetch(r, ahead, 3, ranks, UINT64_MAX) == 3, "2, 5 and 7%s", "");
    CHECK(em_residency_wait(r, ahead, 3) == EM_OK, "not one of them left%s", "");
    CHECK(em_residency_prefetch(r, (const uint32_t[]){8}, 1, ranks, UINT64_MAX) == 0,
          "what waits to be used is no victim%s", "");
    CHECK(em_residency_acquire(r, (const uint32_t[]){8}, 1, ranks, at) == EM_OK, "but of demand%s",
          "");
    em_residency_close(r);
    end_world(&w);
}

/* Closing slots keeps what ranks highest, and its bytes; opening them again finds them empty. */
static void closing_slots(void) {
    world w;
    make_world(&w, 4);
    em_residency *r = open_residency(&w, "threads", 2, NULL);
    const uint32_t all[] = {1, 2, 4, 5};
    float ranks[BUNDLES] = {0};
    uint64_t at[4];
    ranks[1] = 1, ranks[2] = 3, ranks[4] = 2, ranks[5] = 4;
    em_residency_acquire(r, all, 4, ranks, at);
    CHECK(em_residency_wait(r, all, 4) == EM_OK, "%d bundles", 4);
    CHECK(em_residency_resize(r, 0, 3, ranks) == EM_NO_MEMORY, "all are pinned%s", "");
    em_residency_release(r, all, 4);
    CHECK(em_residency_resize(r, 0, 0, ranks) == EM_INVALID, "%d slots", 0);
    CHECK(em_residency_resize(r, 0, 5, ranks) == EM_INVALID, "%d slots", 5);
    CHECK(em_residency_resize(r, 0, 2, ranks) == EM_OK, "%d slots", 2);
    const int32_t *ready = em_residency_ready(r);
    CHECK(!ready[1] && ready[2] && !ready[4] && ready[5], "kept: %d %d %d %d", ready[1], ready[2],
          ready[4], ready[5]);
    em_residency_acquire(r, (const uint32_t[]){2, 5}, 2, ranks, at);
    CHECK(right_bytes(&w, 2, at[0]) && right_bytes(&w, 5, at[1]), "moved bytes%s", "");
    CHECK(em_residency_acquire(r, all, 1, ranks, at) == EM_NO_MEMORY, "both are pinned%s", "");
    CHECK(em_residency_resize(r, 0, 4, ranks) == EM_OK, "%d slots", 4);
    CHECK(em_residency_acquire(r, all, 1, ranks, at) == EM_OK, "%d slots", 4);
    CHECK(em_residency_wait(r, all, 1) == EM_OK && right_bytes(&w, 1, at[0]), "bundle %d", 1);
    em_residency_close(r);
    end_world(&w);
}

/* Ties go in the order of the bundles' numbers, wherever they lie. */
static void the_first_of_equals_leaves(void) {
    world w;
    make_world(&w, 3);
    em_residency *r = open_residency(&w, "threads", 4, NULL);
    const uint32_t all[] = {8, 2, 5}, next[] = {1};
    const float ranks[BUNDLES] = {0};
    uint64_t at[3];
    em_residency_acquire(r, all, 3, ranks, at);
    em_residency_wait(r, all, 3);
    em_residency_release(r, all, 3);
    em_residency_acquire(r, next, 1, ranks, at);
    em_residency_wait(r, next, 1);
    const int32_t *ready = em_residency_ready(r);
    CHECK(ready[2] == 0 && ready[5] == EM_READY_WHOLE && ready[8] == EM_READY_WHOLE, "%d %d %d",
          ready[2], ready[5], ready[8]);
    em_residency_close(r);
    end_world(&w);
}

/* Clearing leaves what is pinned, waits for what is on its way, and all slots can be used after. */
static void cleared(const char *engine) {
    world w;
    make_world(&w, 3);
    em_residency *r = open_residency(&w, engine, 2, NULL);
    const uint32_t pinned[] = {1}, ahead[] = {2, 4}, next[] = {5, 7};
    uint64_t at[2], again[2];
    for (int round = 0; r && round < 20; round++) {
        em_residency_acquire(r, pinned, 1, NULL, at);
        em_residency_prefetch(r, ahead, 2, NULL, UINT64_MAX);
        em_residency_clear(r);
        const int32_t *ready = em_residency_ready(r);
        CHECK(ready[2] == 0 && ready[4] == 0, "%d %d", ready[2], ready[4]);
        CHECK(em_residency_acquire(r, next, 2, NULL, again) == EM_OK, "round %d", round);
        CHECK(em_residency_wait(r, next, 2) == EM_OK && right_bytes(&w, 7, again[1]), "%d", round);
        CHECK(em_residency_wait(r, pinned, 1) == EM_OK && right_bytes(&w, 1, at[0]), "%d", round);
        em_residency_release(r, next, 2);
        em_residency_release(r, pinned, 1);
        em_residency_clear(r);
        CHECK(ready[1] == 0 && ready[5] == 0 && ready[7] == 0, "round %d", round);
    }
    if (r) {
        CHECK(em_residency_statistics(r).hits == 0, "%ld hits",
              (long)em_residency_statistics(r).hits);
        em_residency_close(r);
    }
    end_world(&w);
}

/* Each read of a short run misbehaves in turn: an error names the bundle, or the bytes are right.
 */
static void every_fault(const char *engine) {
    const char *names[] = {"none", "error", "short", "late", "flip"};
    for (int32_t kind = EM_FAULT_ERROR; kind <= EM_FAULT_FLIP; kind++)
        for (int64_t n = 0; n < 12; n++) {
            world w;
            make_world(&w, 4);
            em_faults faults = {kind, n, 1, 2000, 0, (uint64_t)n * 7919 + 1};
            em_residency *r = open_residency(&w, engine, 3, &faults);
            if (!r) {
                end_world(&w);
                return;
            }
            int failures = 0;
            for (uint32_t id = 0; id < 8; id++) {
                uint64_t at;
                CHECK(em_residency_acquire(r, &id, 1, NULL, &at) == EM_OK, "bundle %u", id);
                int32_t status = em_residency_wait(r, &id, 1);
                if (status == EM_FLASH) {
                    em_read_failure f = em_residency_failure(r);
                    CHECK(f.bundle == id && f.error == (kind == EM_FAULT_ERROR ? EIO : 0),
                          "%s at read %ld: bundle %u errno %d", names[kind], (long)n, f.bundle,
                          f.error);
                    failures++;
                    em_residency_release(r, &id, 1);
                    CHECK(em_residency_acquire(r, &id, 1, NULL, &at) == EM_OK &&
                              em_residency_wait(r, &id, 1) == EM_OK,
                          "bundle %u reads again", id);
                }
                CHECK(right_bytes(&w, id, at), "%s at read %ld: bundle %u", names[kind], (long)n,
                      id);
                em_residency_release(r, &id, 1);
            }
            bool fails = kind == EM_FAULT_ERROR || kind == EM_FAULT_FLIP;
            CHECK(failures <= 1 && (fails || !failures), "%s at %ld", names[kind], (long)n);
            em_residency_close(r);
            end_world(&w);
        }
}

/* What fails is what was acquired, whatever else failed after it. */
static void the_failure_is_of_what_is_wanted(void) {
    world w;
    make_world(&w, 4);
    em_faults faults = {EM_FAULT_ERROR, 0, 1000, 0, 0, 1};
    em_residency *r = open_residency(&w, "threads", 1, &faults);
    const uint32_t wanted = 1, ahead[] = {2, 4};
    uint64_t at;
    CHECK(em_residency_acquire(r, &wanted, 1, NULL, &at) == EM_OK, "bundle %u", wanted);
    CHECK(em_residency_prefetch(r, ahead, 2, NULL, UINT64_MAX) == 2, "%d slots", 4);
    CHECK(em_residency_wait(r, ahead, 2) == EM_FLASH, "bundle %u", ahead[0]);
    CHECK(em_residency_wait(r, &wanted, 1) == EM_FLASH, "bundle %u", wanted);
    em_read_failure f = em_residency_failure(r);
    CHECK(f.bundle == wanted && f.error == EIO, "bundle %u errno %d", f.bundle, f.error);
    em_residency_close(r);
    end_world(&w);
}

/* Whoever was interrupted may start over; a rank that is no number is a victim like others. */
static void starting_over(void) {
    world w;
    make_world(&w, 2);
    em_residency *r = open_residency(&w, "threads", 2, NULL);
    const uint32_t two[] = {1, 2}, next[] = {4, 5};
    uint64_t at[2];
    float ranks[BUNDLES];
    for (int i = 0; i < BUNDLES; i++) ranks[i] = NAN;
    CHECK(em_residency_acquire(r, two, 2, ranks, at) == EM_OK, "%d slots", 2);
    CHECK(em_residency_acquire(r, next, 2, ranks, at) == EM_NO_MEMORY, "%d slots", 2);
    em_residency_release_all(r);
    CHECK(em_residency_acquire(r, next, 2, ranks, at) == EM_OK, "after starting over%s", "");
    CHECK(em_residency_wait(r, next, 2) == EM_OK && right_bytes(&w, 4, at[0]), "bundle %d", 4);
    em_residency_close(r);
    end_world(&w);
}

static void truncated_file(void) {
    world w;
    make_world(&w, 4);
    em_residency *r = open_residency(&w, NULL, 3, NULL);
    const uint32_t last = BUNDLES - 1, first = 0;
    uint64_t at;
    CHECK(ftruncate(fileno(w.file), (off_t)(w.bundles[last].offset + PAGE)) == 0, "errno %d",
          errno);
    em_residency_acquire(r, &last, 1, NULL, &at);
    CHECK(em_residency_wait(r, &last, 1) == EM_FLASH, "bundle %u", last);
    CHECK(em_residency_failure(r).error == ENODATA, "errno %d", em_residency_failure(r).error);
    em_residency_release(r, &last, 1);
    em_residency_acquire(r, &first, 1, NULL, &at);
    CHECK(em_residency_wait(r, &first, 1) == EM_OK && right_bytes(&w, 0, at), "bundle %u", first);
    em_residency_close(r);
    end_world(&w);
}

int main(void) {
    const char *engines[] = {"threads", "io_uring"};
    for (int e = 0; e < 2; e++) {
        for (uint32_t seed = 1; seed <= 6; seed++)
            random_verbs(engines[e], seed, 1 + (int)seed % 5);
        every_fault(engines[e]);
        cleared(engines[e]);
    }
    too_many_pins();
    lowest_rank_leaves();
    the_first_of_equals_leaves();
    closing_slots();
    truncated_file();
    the_failure_is_of_what_is_wanted();
    starting_over();
    return check_report();
}
