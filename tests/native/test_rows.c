/* Rows that come and go, against a plain model: what is taken has the bytes of the file, on either
 * engine and whatever reads do; those that were used last stay. */
#include "check.h"
#include "rows.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SETS = 3, ROWS = 300, ROOM = 40, PAGE = 4096 };

static const uint64_t ROW_BYTES[SETS] = {700, 4352, 20000};

typedef struct {
    FILE *file;
    uint8_t *bytes[SETS];
    uint32_t checksums[SETS][ROWS],
        places[SETS][ROWS]; /* the rows of all but the first set moved */
    uint8_t *slab;
    em_row_set sets[SETS];
} world;

static const uint8_t *row_of(const world *w, int32_t set, int32_t id) {
    return w->bytes[set] + w->places[set][id] * ROW_BYTES[set];
}

static void make_world(world *w) {
    uint64_t offset = PAGE + 64, at = 0;
    w->file = tmpfile();
    if (posix_memalign((void **)&w->slab, PAGE, ROOM * 3 * 6 * PAGE) != 0) abort();
    for (int32_t s = 0; s < SETS; s++) {
        uint64_t size = ROW_BYTES[s];
        w->bytes[s] = exact(ROWS * size);
        for (uint64_t i = 0; i < ROWS * size; i++) w->bytes[s][i] = (uint8_t)((offset + i) % 251);
        for (int32_t i = 0; i < ROWS; i++) {
            w->places[s][i] = (uint32_t)(s == 0 ? i : i * (3 + 4 * s) % ROWS);
            w->checksums[s][i] = em_crc32c(0, row_of(w, s, i), size);
        }
        fseek(w->file, (long)offset, SEEK_SET);
        fwrite(w->bytes[s], 1, ROWS * size, w->file);
        w->sets[s] = (em_row_set){.offset = offset,
                                  .row_bytes = size,
                                  .checksums = w->checksums[s],
                                  .places = s == 0 ? NULL : w->places[s],
                                  .start = w->slab + at,
                                  .n_rows = ROWS,
                                  .room = ROOM,
                                  .most_room = ROOM};
        offset = (offset + ROWS * size + 100) / 64 * 64;
        at += (ROOM * size + PAGE) / PAGE * PAGE;
    }
    fseek(w->file, PAGE, SEEK_END); /* as in a store, pages follow */
    fputc(0, w->file);
    fflush(w->file);
}

static void end_world(world *w) {
    fclose(w->file);
    free(w->slab);
    for (int32_t s = 0; s < SETS; s++) free(w->bytes[s]);
}

static em_rows *open_rows(world *w, const char *engine, int32_t depth, const em_faults *faults) {
    em_rows *r = NULL;
    int32_t status = em_rows_open(fileno(w->file), w->sets, SETS, engine, depth, faults, &r);
    if (status == EM_UNSUPPORTED && engine && !strcmp(engine, "io_uring")) {
        printf("# io_uring: REFUSED HERE, NOT TESTED\n");
        return NULL;
    }
    CHECK(status == EM_OK, "status %d", status);
    return r;
}

/* n ascending ids, some of them neighbours. */
static void draw(int32_t *ids, int32_t n, uint32_t *seed) {
    int32_t at = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t left = ROWS - at - (n - i);
        uint32_t step = random_bits(seed) % 3 == 0 ? random_bits(seed) % 16 : 0;
        at += (int32_t)step < left ? (int32_t)step : 0;
        ids[i] = at++;
    }
}

static void check_bytes(const world *w, int32_t set, const int32_t *ids, int32_t n,
                        const uint8_t **at, uint32_t seed) {
    for (int32_t i = 0; i < n; i++)
        CHECK(!memcmp(at[i], row_of(w, set, ids[i]), ROW_BYTES[set]), "set %d row %d, seed %u", set,
              ids[i], seed);
}

static void takes_are_right(const char *engine, int32_t depth, const em_faults *faults,
                            int32_t parts) {
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, engine, depth, faults);
    if (r) em_rows_read_in(r, parts);
    int32_t room[SETS] = {ROOM, ROOM, ROOM};
    uint32_t seed = 5;
    for (int64_t step = 1; r && step < 400; step++) {
        int32_t set = (int32_t)(random_bits(&seed) % SETS), ids[ROOM];
        if (step % 20 == 0) { /* fewer rows, or as many again */
            room[set] = 1 + (int32_t)(random_bits(&seed) % ROOM);
            CHECK(em_rows_resize(r, set, room[set]) == EM_OK, "to %d", room[set]);
        }
        if (step % 90 == 0) em_rows_clear(r);
        int32_t n = 1 + (int32_t)(random_bits(&seed) % (uint32_t)room[set]);
        const uint8_t *at[ROOM];
        int64_t waited = 0;
        draw(ids, n, &seed);
        em_row_stats before = em_rows_statistics(r);
        CHECK(em_rows_take(r, set, ids, n, at, &waited) == EM_OK, "step %ld", (long)step);
        check_bytes(&w, set, ids, n, at, seed);
        em_row_stats after = em_rows_statistics(r);
        CHECK(after.hits + after.misses - before.hits - before.misses == n, "step %ld", (long)step);
        CHECK(step % 90 || after.misses - before.misses == n, "%s", "nothing is left");
        CHECK(em_rows_take(r, set, ids, n, at, &waited) == EM_OK, "step %ld", (long)step);
        check_bytes(&w, set, ids, n, at, seed);
        CHECK(em_rows_statistics(r).hits - after.hits == n, "step %ld: all are there", (long)step);
    }
    em_rows_close(r);
    end_world(&w);
}

static int64_t misses_of(em_rows *r, const int32_t *ids, int32_t n) {
    const uint8_t *at[ROOM];
    int64_t waited = 0, before = em_rows_statistics(r).misses;
    CHECK(em_rows_take(r, 0, ids, n, at, &waited) == EM_OK, "%d rows", n);
    return em_rows_statistics(r).misses - before;
}

/* Between two uses of what is used often, more rows pass than there is room for: it stays all the
 * same. */
static void what_is_used_often_or_of_late_stays(void) {
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, NULL, 8, NULL);
    int32_t often[10], once[9], last[9];
    for (int32_t i = 0; i < 10; i++) often[i] = 3 * i;
    CHECK(misses_of(r, often, 10) == 10, "%s", "at first");
    for (int32_t step = 0; step < 70000; step++) {
        if (step % 4 == 0) CHECK(misses_of(r, often, 10) == 0, "at step %d", step);
        if (step > 2000 && step < 69000) continue; /* all the same */
        for (int32_t i = 0; i < 9; i++) once[i] = 100 + step * 9 % 180 + i;
        int64_t missed = misses_of(r, once, 9);
        CHECK(missed == 9 || step / 100 == 690, "at step %d", step); /* of then some are left */
        memcpy(last, once, sizeof last);
    }
    CHECK(misses_of(r, last, 9) == 0, "%s", "the last ones");
    em_rows_close(r);
    end_world(&w);
}

static void pass_takes(em_rows *r, int32_t n) {
    for (int32_t i = 0; i < n; i++) misses_of(r, NULL, 0);
}

static void rows_from(int32_t *ids, int32_t n, int32_t first) {
    for (int32_t i = 0; i < n; i++) ids[i] = first + i;
}

/* After so many takes time begins again: what was used long ago leaves as before, also in takes
 * with the number of the one that used it. */
static void time_begins_again(void) {
    enum { TAKES = 64 << 10, TAKE = 200 };
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, NULL, 8, NULL);
    int32_t old[ROOM], next[ROOM], once[9];
    rows_from(old, ROOM, 0);
    rows_from(next, ROOM, 50);
    for (int32_t i = 1; i <= TAKE; i++) misses_of(r, old, ROOM);
    pass_takes(r, TAKES - TAKE + TAKE - 1);
    CHECK(misses_of(r, next, ROOM) == ROOM, "%s", "all have place");
    CHECK(misses_of(r, next, ROOM) == 0, "%s", "all are there");

    pass_takes(r, TAKES - 2 * TAKE - 3);
    for (int32_t i = 0; i < TAKE; i++) misses_of(r, old, 10);
    for (int32_t i = 0; i < 2 * TAKE; i++) {
        rows_from(once, 9, 100 + 9 * i % 180);
        misses_of(r, next, 10);
        misses_of(r, once, 9);
    }
    CHECK(misses_of(r, next, 10) == 0 && misses_of(r, old, 10) == 10, "%s", "the old ones left");
    em_rows_close(r);
    end_world(&w);
}

/* What is kept stays until it is let go, whatever is taken; a quarter of the room is for others. */
static void what_is_kept_stays(void) {
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, NULL, 8, NULL);
    int32_t kept[ROOM], others[ROOM], both[ROOM];
    rows_from(kept, ROOM, 0);
    rows_from(others, ROOM, 100);
    rows_from(both, ROOM / 2, 10);
    rows_from(both + ROOM / 2, ROOM / 2, 100);
    em_rows_keep(r, 0, kept, ROOM);
    CHECK(em_rows_fit(r, 0, others, ROOM) == ROOM, "%s", "what is absent is not kept");
    misses_of(r, kept, ROOM);
    em_rows_keep(r, 0, kept, ROOM / 2);
    CHECK(em_rows_fit(r, 0, others, ROOM) == ROOM / 2, "%s", "beside what is kept");
    CHECK(em_rows_fit(r, 0, both, ROOM) == ROOM / 2 + 10, "%s", "of which some are kept");
    for (int32_t i = 0; i < 30; i++) {
        rows_from(others, ROOM / 2, 100 + i);
        misses_of(r, others, ROOM / 2);
    }
    CHECK(misses_of(r, kept, ROOM / 2) == 0, "%s", "kept");
    em_rows_keep(r, 0, kept, 10);
    CHECK(em_rows_fit(r, 0, others, ROOM) == ROOM - 10, "%s", "others are let go");
    em_rows_keep(r, 0, NULL, 0);
    rows_from(others, ROOM, 200);
    misses_of(r, others, ROOM);
    CHECK(misses_of(r, kept, ROOM) == ROOM, "%s", "let go");
    em_rows_keep(r, 0, kept, ROOM);
    CHECK(em_rows_fit(r, 0, others, ROOM) == ROOM / 4, "%s", "a quarter");
    em_rows_clear(r);
    CHECK(em_rows_fit(r, 0, others, ROOM) == ROOM, "%s", "nothing is kept any more");
    em_rows_close(r);
    end_world(&w);
}

/* Whatever goes wrong with the nth read: the right row is named, the next take is right, and what
 * is there of other sets is not touched. */
static void faults_are_told(const char *engine, int32_t kind, int32_t error, int32_t parts) {
    for (int64_t nth = 0; nth < 12; nth++) {
        world w;
        make_world(&w);
        int64_t before = parts > 1 ? ROOM * parts : 1; /* reads of the first set */
        em_faults faults = {
            .kind = kind, .first = before + nth, .count = 1, .seed = 77 + (uint64_t)nth};
        em_rows *r = open_rows(&w, engine, 4, &faults);
        if (r) em_rows_read_in(r, parts);
        int32_t ids[ROOM], first[ROOM], failed = 0;
        const uint8_t *at[ROOM], *first_at[ROOM];
        int64_t waited = 0;
        for (int32_t i = 0; i < ROOM; i++) ids[i] = i * 5;
        for (int32_t i = 0; i < ROOM; i++) first[i] = i;
        if (r) CHECK(em_rows_take(r, 0, first, ROOM, first_at, &waited) == EM_OK, "%s", "first");
        for (int32_t step = 0; r && step < 3; step++) {
            int32_t status = em_rows_take(r, 1, ids, ROOM, at, &waited);
            em_row_failure failure = em_rows_failure(r);
            CHECK(status == (failure.failed ? EM_FLASH : EM_OK), "status %d", status);
            if (status == EM_OK) {
                check_bytes(&w, 1, ids, ROOM, at, 0);
                continue;
            }
            failed++;
            CHECK(failure.set == 1 && failure.row % 5 == 0 && failure.error == error,
                  "row %d, error %d", failure.row, failure.error);
        }
        if (r) check_bytes(&w, 0, first, ROOM, first_at, 0);
        /* A flipped bit may be one that belongs to no row. */
        CHECK(!r || failed == 1 || (failed == 0 && kind != EM_FAULT_ERROR), "read %ld: %d times",
              (long)nth, failed);
        em_rows_close(r);
        end_world(&w);
    }
}

static void a_file_that_ends_early_is_told(void) {
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, NULL, 1, NULL);
    const int32_t ids[] = {0, 100, ROWS - 1};
    const uint8_t *at[3];
    int64_t waited = 0;
    CHECK(ftruncate(fileno(w.file), (off_t)(w.sets[2].offset + 5 * ROW_BYTES[2])) == 0, "%d",
          errno);
    CHECK(em_rows_take(r, 2, ids, 3, at, &waited) == EM_FLASH, "%s", "truncated");
    em_row_failure failure = em_rows_failure(r);
    CHECK(failure.row == 100 && failure.error == ENODATA, "row %d: the first", failure.row);
    CHECK(!em_rows_failure(r).failed, "%s", "it is told once");
    CHECK(em_rows_take(r, 2, ids, 1, at, &waited) == EM_OK, "%s", "what is left");
    em_rows_close(r);
    end_world(&w);
}

/* Takes rows of the first set that were not there, and checks what that read. */
static void check_reads(const world *w, em_rows *r, const int32_t *ids, int32_t n, int64_t reads,
                        int64_t pages, const char *which) {
    const uint8_t *at[ROOM];
    int64_t waited = 0;
    em_rows_clear(r);
    em_row_stats before = em_rows_statistics(r);
    CHECK(em_rows_take(r, 0, ids, n, at, &waited) == EM_OK, "%s", which);
    check_bytes(w, 0, ids, n, at, 0);
    em_row_stats after = em_rows_statistics(r);
    CHECK(after.reads - before.reads == reads, "%s: %d reads", which,
          (int)(after.reads - before.reads));
    CHECK(after.read_bytes - before.read_bytes == pages * PAGE, "%s: %d pages", which,
          (int)((after.read_bytes - before.read_bytes) / PAGE));
}

/* Of the first set five rows and a bit lie in each page. */
static void neighbours_are_read_together(void) {
    world w;
    make_world(&w);
    em_rows *r = open_rows(&w, NULL, 4, NULL);
    const int32_t in_a_row[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, apart[] = {0, 1, 150, 151};
    const int32_t in_pages_in_a_row[] = {0, 6}, with_a_page_between[] = {0, 12};
    check_reads(&w, r, in_a_row, 10, 1, 2, "in a row");
    check_reads(&w, r, apart, 4, 2, 2, "apart");
    check_reads(&w, r, in_pages_in_a_row, 2, 1, 2, "in pages in a row");
    check_reads(&w, r, with_a_page_between, 2, 2, 2, "with a page between");
    em_rows_close(r);

    /* All of one place after another, which ids are not. */
    int32_t ids[ROOM], n = 0;
    for (int32_t i = 0; i < ROWS; i++) w.places[0][i] = (uint32_t)(i * 7 % ROWS);
    w.sets[0].places = w.places[0];
    for (int32_t i = 0; i < ROWS; i++) {
        w.checksums[0][i] = em_crc32c(0, row_of(&w, 0, i), ROW_BYTES[0]);
        if (w.places[0][i] < ROOM) ids[n++] = i;
    }
    r = open_rows(&w, NULL, 4, NULL);
    check_reads(&w, r, ids, n, 1, 7, "by place");
    em_rows_close(r);
    end_world(&w);
}

/* What is wanted later may lie before what was wanted first, even in the same page. */
static void places_of_two_wants_may_cross(int32_t each) {
    world w;
    make_world(&w);
    w.sets[0].places = w.places[0];
    for (int32_t s = 0; s < SETS; s++)
        for (int32_t i = 0; i < ROWS; i++) w.places[s][i] = (uint32_t)(ROWS - 1 - i);
    for (int32_t s = 0; s < SETS; s++)
        for (int32_t i = 0; i < ROWS; i++)
            w.checksums[s][i] = em_crc32c(0, row_of(&w, s, i), ROW_BYTES[s]);
    em_rows *r = open_rows(&w, NULL, 1, NULL);
    for (int32_t step = 0; step < 20; step++) {
        int32_t set = step % SETS, ids[ROOM], apart = 1 + step / SETS % 2;
        const uint8_t *at[ROOM];
        int64_t waited = 0;
        for (int32_t i = 0; i < ROOM; i++) ids[i] = (step * 13) % 200 + apart * i;
        CHECK(em_rows_begin(r, set) == EM_OK, "step %d", step);
        for (int32_t i = 0; i < ROOM; i += each) em_rows_want(r, ids + i, each, &waited);
        CHECK(em_rows_finish(r, ids, ROOM, at, &waited) == EM_OK, "step %d", step);
        check_bytes(&w, set, ids, ROOM, at, 0);
    }
    em_rows_close(r);
    end_world(&w);
}

static void arguments_are_checked(void) {
    world w;
    make_world(&w);
    em_rows *r = NULL;
    em_row_set bad = w.sets[0];
    bad.room = ROWS + 1;
    CHECK(em_rows_open(fileno(w.file), &bad, 1, NULL, 4, NULL, &r) == EM_INVALID, "%s", "room");
    bad = w.sets[0];
    bad.checksums = NULL;
    CHECK(em_rows_open(fileno(w.file), &bad, 1, NULL, 4, NULL, &r) == EM_INVALID, "%s", "sums");
    CHECK(em_rows_open(fileno(w.file), w.sets, SETS, NULL, 0, NULL, &r) == EM_INVALID, "%s", "0");
    r = open_rows(&w, NULL, 4, NULL);
    CHECK(em_rows_resize(r, 0, ROOM + 1) == EM_INVALID, "%s", "more than at open");
    CHECK(em_rows_resize(r, SETS, 1) == EM_INVALID, "%s", "no such set");
    const int32_t wrong[][2] = {{1, 1}, {2, 1}, {-1, 0}, {0, ROWS}};
    const uint8_t *at[ROOM + 1];
    int64_t waited;
    for (int i = 0; i < 4; i++)
        CHECK(em_rows_take(r, 0, wrong[i], 2, at, &waited) == EM_INVALID, "%d", i);
    CHECK(em_rows_take(r, SETS, wrong[3], 1, at, &waited) == EM_INVALID, "%s", "no such set");
    CHECK(em_rows_take(r, 0, wrong[3], ROOM + 1, at, &waited) == EM_INVALID, "%s", "too many");
    em_rows_close(r);
    end_world(&w);
}

int main(void) {
    const char *const engines[] = {"io_uring", "threads"};
    const em_faults some_short = {.kind = EM_FAULT_SHORT, .first = 3, .count = 60};
    for (int e = 0; e < 2; e++) {
        for (int32_t parts = 1; parts <= 3; parts++) takes_are_right(engines[e], 1, NULL, parts);
        for (int32_t parts = 1; parts <= 3; parts++) takes_are_right(engines[e], 32, NULL, parts);
        for (int32_t parts = 1; parts <= 3; parts++)
            takes_are_right(engines[e], 4, &some_short, parts);
        for (int32_t parts = 1; parts <= 2; parts++)
            faults_are_told(engines[e], EM_FAULT_ERROR, EIO, parts);
        for (int32_t parts = 1; parts <= 2; parts++)
            faults_are_told(engines[e], EM_FAULT_FLIP, 0, parts);
        for (int32_t parts = 1; parts <= 2; parts++)
            faults_are_told(engines[e], EM_FAULT_SHORT, -1, parts);
    }
    what_is_used_often_or_of_late_stays();
    time_begins_again();
    what_is_kept_stays();
    a_file_that_ends_early_is_told();
    neighbours_are_read_together();
    places_of_two_wants_may_cross(1);
    places_of_two_wants_may_cross(8);
    arguments_are_checked();
    return check_report();
}
