/* Rows that come and go one by one. Which of them stay is said by row_slots.c. What is absent is
 * read in one batch, neighbours together, by way of staging buffers: reads start and end at whole
 * pages, rows in memory lie close. One thread uses all this, and no lock. */
#define _GNU_SOURCE /* O_DIRECT */

#include "rows.h"

#include "io.h"
#include "row_slots.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_RETRIES = 1000, PAGE = 4096, BATCH = 16 };

typedef struct {
    em_row_set is;
    em_row_slots *slots;
    bool crowded;
    uint32_t base; /* of its rows among those of all sets */
} row_set;

/* One read: `missing` rows [first, end) lie in it; or one part of a row, where those are read one
 * by one: then both count parts. */
typedef struct {
    int32_t first, end, retries;
    uint64_t start;          /* in the file */
    uint64_t arrived, bytes; /* of it */
    uint8_t *buffer;
} flight;

struct em_rows {
    const em_io_engine *engine;
    em_io *io;
    row_set *sets;
    int32_t n_sets, depth;
    int32_t set, *missing;              /* of one take: row ids */
    int32_t n_missing, next, in_flight; /* reads cover those (or their parts) before `next` */
    int32_t parts;                      /* in how many reads a row is read */
    int64_t busy_since_ns;
    flight *flights; /* [2 depth] */
    int32_t *spare;  /* flights that are free */
    int32_t n_spare;
    uint8_t *staging;
    uint64_t stage_bytes;
    int64_t stall_ns;
    em_row_stats stats;
    em_row_failure failure;
    em_demand_log *log;
    em_observer *record;
    void *recorder;
    int fd;
    bool buffered;
    pid_t owner;
};

static uint64_t page_floor(uint64_t offset) { return offset / PAGE * PAGE; }

static uint64_t page_ceil(uint64_t offset) { return (offset + PAGE - 1) / PAGE * PAGE; }

static uint64_t row_start(const em_row_set *s, int32_t id) {
    return s->offset + (s->places ? s->places[id] : (uint64_t)id) * s->row_bytes;
}

/* Orders ids by place, so that neighbours can be read together: a heap of n of them, in place. */
static void sort_by_place(const uint32_t *places, int32_t *ids, int32_t n) {
    for (int32_t end = n, top = n / 2; end > 1;) {
        int32_t at, id;
        if (top > 0) {
            id = ids[--top];
            at = top;
        } else {
            id = ids[--end];
            ids[end] = ids[0];
            at = 0;
        }
        for (int32_t child; (child = 2 * at + 1) < end; at = child) {
            if (child + 1 < end && places[ids[child + 1]] > places[ids[child]]) child++;
            if (places[ids[child]] <= places[id]) break;
            ids[at] = ids[child];
        }
        ids[at] = id;
    }
}

static uint8_t *slot_address(const em_row_set *s, int32_t slot) {
    return (uint8_t *)s->start + (uint64_t)slot * s->row_bytes;
}

static uint8_t *row_address(const row_set *s, int32_t id) {
    return slot_address(&s->is, em_row_slots_of(s->slots, id));
}

/* ---- reads ------------------------------------------------------------------------------------
 */

/* The next read of missing rows from `first` on: neighbours, as far as a buffer holds them. */
static flight *plan(em_rows *r, const em_row_set *s, int32_t first, int32_t n) {
    int32_t tag = r->spare[--r->n_spare], i = first;
    flight *f = &r->flights[tag];
    uint64_t start = page_floor(row_start(s, r->missing[first])), end = start;
    for (; i < n; i++) {
        uint64_t from = row_start(s, r->missing[i]), to = page_ceil(from + s->row_bytes);
        bool follows = from >= start && to >= end && page_floor(from) <= end;
        if (i > first && (!follows || to - start > r->stage_bytes)) break;
        end = to;
    }
    *f = (flight){first, i, 0, start, 0, end - start, r->staging + (uint64_t)tag * r->stage_bytes};
    return f;
}

/* Where the bytes of a row's part start, from the row's first on. */
static uint64_t part_start(const em_rows *r, const em_row_set *s, int32_t part) {
    return s->row_bytes * (uint64_t)part / (uint64_t)r->parts;
}

/* The next read where rows are read in parts. */
static flight *plan_part(em_rows *r, const em_row_set *s, int32_t item) {
    int32_t tag = r->spare[--r->n_spare], part = item % r->parts;
    flight *f = &r->flights[tag];
    uint64_t row = row_start(s, r->missing[item / r->parts]);
    uint64_t start = page_floor(row + part_start(r, s, part));
    uint64_t bytes = page_ceil(row + part_start(r, s, part + 1)) - start;
    *f = (flight){item, item + 1, 0, start, 0, bytes, r->staging + (uint64_t)tag * r->stage_bytes};
    return f;
}

static em_read read_of(const em_rows *r, const flight *f) {
    return (em_read){(uint64_t)(f - r->flights), f->start + f->arrived, f->buffer + f->arrived,
                     f->bytes - f->arrived};
}

static void fail(em_rows *r, int32_t set, int32_t id, int32_t error) {
    if (!r->failure.failed) r->failure = (em_row_failure){1, set, id, error};
}

/* What a read brought of a row's part; the row is checked when all of it is there. */
static void land_part(em_rows *r, int32_t set, const flight *f, int32_t error) {
    row_set *s = &r->sets[set];
    int32_t id = r->missing[f->first / r->parts], part = f->first % r->parts;
    if (em_row_slots_of(s->slots, id) < 0) return; /* another part of it failed */
    if (f->arrived < f->bytes) {
        fail(r, set, id, error);
        em_row_slots_vacate(s->slots, id);
        return;
    }
    uint64_t from = part_start(r, &s->is, part), bytes = part_start(r, &s->is, part + 1) - from;
    uint64_t at = row_start(&s->is, id) + from - f->start;
    memcpy(row_address(s, id) + from, f->buffer + at, bytes);
}

static void check_parts(em_rows *r) {
    row_set *s = &r->sets[r->set];
    for (int32_t i = 0; i < r->n_missing; i++) {
        int32_t id = r->missing[i];
        if (em_row_slots_of(s->slots, id) < 0 ||
            em_crc32c(0, row_address(s, id), s->is.row_bytes) == s->is.checksums[id])
            continue;
        fail(r, r->set, id, 0);
        em_row_slots_vacate(s->slots, id);
    }
}

/* Copies what a read brought to where it belongs, and checks it. */
static void land(em_rows *r, int32_t set, const flight *f, int32_t error) {
    row_set *s = &r->sets[set];
    if (r->parts > 1) land_part(r, set, f, error);
    for (int32_t i = f->first; r->parts == 1 && i < f->end; i++) {
        int32_t id = r->missing[i];
        uint8_t *to = row_address(s, id);
        bool there = f->arrived == f->bytes;
        if (there) memcpy(to, f->buffer + (row_start(&s->is, id) - f->start), s->is.row_bytes);
        if (there && em_crc32c(0, to, s->is.row_bytes) == s->is.checksums[id]) continue;
        fail(r, set, id, there ? 0 : error);
        em_row_slots_vacate(s->slots, id);
    }
#if defined(POSIX_FADV_DONTNEED)
    /* Or the page cache would keep a second copy. */
    if (r->buffered) posix_fadvise(r->fd, (off_t)f->start, (off_t)f->bytes, POSIX_FADV_DONTNEED);
#endif
    r->spare[r->n_spare++] = (int32_t)(f - r->flights);
}

/* Whether a read that ended is to be asked for once more, or for what is left of it. */
static bool resumes(em_rows *r, flight *f, int64_t result, int32_t *error) {
    *error = result < 0 ? (int32_t)-result : ENODATA;
    bool again = result == -EINTR || result == -EAGAIN || result == -EFAULT || result == -ECANCELED;
    if (result > 0) {
        uint64_t whole = (uint64_t)result;
        if (whole < f->bytes - f->arrived) whole = page_floor(whole);
        f->arrived += whole;
        r->stats.read_bytes += result;
        r->stats.reads++;
        again = f->arrived < f->bytes;
    }
    return again && f->retries++ < MAX_RETRIES;
}

/* Starts what the device has room for. */
static void start_reads(em_rows *r) {
    em_read batch[BATCH];
    int32_t n = BATCH;
    while (n == BATCH) {
        int32_t items = r->n_missing * r->parts;
        for (n = 0; n < BATCH && r->next < items && r->in_flight < r->depth; n++) {
            if (r->n_spare == 0) break;
            const em_row_set *s = &r->sets[r->set].is;
            flight *f = r->parts > 1 ? plan_part(r, s, r->next) : plan(r, s, r->next, items);
            if (r->in_flight++ == 0) r->busy_since_ns = em_now_ns();
            r->next = f->end;
            batch[n] = read_of(r, f);
        }
        if (n > 0) r->engine->submit(r->io, batch, n);
    }
}

/* Waits until some reads end. The device goes on while what they brought is checked. */
static void end_reads(em_rows *r) {
    em_done done[BATCH];
    flight *whole[BATCH];
    int32_t ended = 0, errors[BATCH], n = r->engine->reap(r->io, done, BATCH);
    for (int32_t i = 0; i < n; i++) {
        flight *f = &r->flights[done[i].tag];
        if (resumes(r, f, done[i].result, &errors[ended])) {
            em_read rest = read_of(r, f);
            r->engine->submit(r->io, &rest, 1);
        } else {
            whole[ended++] = f;
            if (--r->in_flight == 0) r->stats.busy_us += (em_now_ns() - r->busy_since_ns) / 1000;
        }
    }
    start_reads(r);
    for (int32_t i = 0; i < ended; i++) land(r, r->set, whole[i], errors[i]);
}

void em_rows_keep(em_rows *r, int32_t set, const int32_t *ids, int32_t n) {
    em_row_slots_keep(r->sets[set].slots, ids, n);
}

int32_t em_rows_fit(const em_rows *r, int32_t set, const int32_t *ids, int32_t n) {
    return em_row_slots_fit(r->sets[set].slots, ids, n);
}

void em_rows_crowd(em_rows *r, int32_t set, bool crowded) { r->sets[set].crowded = crowded; }
bool em_rows_crowded(const em_rows *r, int32_t set) { return r->sets[set].crowded; }

void em_demand_write(em_demand_log *log, const uint32_t *indices, int32_t n, uint32_t base) {
    if (log->n_turns < log->turns_room && log->n_indices + n <= log->indices_room) {
        uint32_t *to = log->indices + log->n_indices;
        for (int32_t i = 0; i < n; i++) to[i] = base + indices[i];
        log->counts[log->n_turns] = (uint32_t)n;
    }
    log->n_turns++;
    log->n_indices += n;
}

int32_t em_rows_write_down(em_rows *r, int32_t set, const int32_t *ids, int32_t n, int32_t tokens) {
    const uint32_t *indices = (const uint32_t *)ids;
    if (r->log) em_demand_write(r->log, indices, n, r->sets[set].base);
    return r->record ? r->record(r->recorder, set, indices, n, NULL, tokens) : EM_OK;
}

int32_t em_rows_begin(em_rows *r, int32_t set) {
    if (r->owner != getpid()) return EM_UNSUPPORTED;
    r->failure.failed = 0;
    r->set = set;
    r->next = r->n_missing = 0;
    em_row_slots_begin(r->sets[set].slots);
    return EM_OK;
}

static void count_stall(em_rows *r, int64_t ns, int64_t *waited_ns) {
    *waited_ns += ns;
    r->stall_ns += ns;
    r->stats.stall_us = r->stall_ns / 1000;
}

void em_rows_want(em_rows *r, const int32_t *ids, int32_t n, int64_t *waited_ns) {
    int32_t *missing = r->missing + r->n_missing;
    int32_t absent = em_row_slots_want(r->sets[r->set].slots, ids, n, missing);
    r->stats.hits += n - absent;
    r->stats.misses += absent;
    if (absent == 0) return;
    const em_row_set *is = &r->sets[r->set].is;
    if (is->places) sort_by_place(is->places, missing, absent);
    r->n_missing += absent;
    int64_t since = em_now_ns();
    start_reads(r);
    count_stall(r, em_now_ns() - since, waited_ns);
}

int32_t em_rows_finish(em_rows *r, const int32_t *ids, int32_t n, const uint8_t **at,
                       int64_t *waited_ns) {
    const row_set *s = &r->sets[r->set];
    int64_t since = em_now_ns();
    for (start_reads(r); r->in_flight > 0; start_reads(r)) end_reads(r);
    if (r->parts > 1) check_parts(r);
    count_stall(r, em_now_ns() - since, waited_ns);
    if (r->failure.failed) return EM_FLASH;
    for (int32_t i = 0; i < n; i++) at[i] = row_address(s, ids[i]);
    return EM_OK;
}

int32_t em_rows_take(em_rows *r, int32_t set, const int32_t *ids, int32_t n, const uint8_t **at,
                     int64_t *waited_ns) {
    if (set < 0 || set >= r->n_sets || n < 0 || n > r->sets[set].is.room) return EM_INVALID;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] <= (i ? ids[i - 1] : -1) || ids[i] >= r->sets[set].is.n_rows) return EM_INVALID;
    int32_t status = em_rows_begin(r, set);
    if (status != EM_OK) return status;
    em_rows_want(r, ids, n, waited_ns);
    return em_rows_finish(r, ids, n, at, waited_ns);
}

/* ---- opening, changing, closing ---------------------------------------------------------------
 */

int32_t em_rows_room(const em_rows *r, int32_t set) { return r->sets[set].is.room; }
const char *em_rows_engine(const em_rows *r) { return r->engine->name; }
void em_rows_read_in(em_rows *r, int32_t parts) { r->parts = parts < 1 ? 1 : parts; }
void em_rows_log(em_rows *r, em_demand_log *log) { r->log = log; }

void em_rows_record(em_rows *r, em_observer *record, void *user) {
    r->record = record;
    r->recorder = user;
}

em_row_stats em_rows_statistics(const em_rows *r) { return r->stats; }

em_row_failure em_rows_failure(em_rows *r) {
    em_row_failure failure = r->failure;
    r->failure.failed = 0;
    return failure;
}

int32_t em_rows_resize(em_rows *r, int32_t set, int32_t room) {
    if (r->owner != getpid()) return EM_UNSUPPORTED;
    if (set < 0 || set >= r->n_sets || room < 1 || room > r->sets[set].is.most_room)
        return EM_INVALID;
    row_set *s = &r->sets[set];
    em_row_slots_resize(s->slots, room);
    if (room < s->is.room)
        em_pages_drop(slot_address(&s->is, room), (uint64_t)(s->is.room - room) * s->is.row_bytes);
    s->is.room = room;
    return EM_OK;
}

void em_rows_clear(em_rows *r) {
    for (int32_t i = 0; r->owner == getpid() && i < r->n_sets; i++)
        em_row_slots_forget(r->sets[i].slots);
}

void em_rows_close(em_rows *r) {
    if (!r || r->owner != getpid()) return;
    if (r->io) r->engine->close(r->io);
    for (int32_t i = 0; r->sets && i < r->n_sets; i++) em_row_slots_close(r->sets[i].slots);
    free(r->sets);
    free(r->missing);
    free(r->flights);
    free(r->spare);
    free(r->staging);
    free(r);
}

static bool valid(const em_row_set *sets, int32_t n_sets, int32_t depth) {
    if (n_sets < 1 || depth < 1 || depth > 1024) return false;
    for (int32_t i = 0; i < n_sets; i++) {
        const em_row_set *s = &sets[i];
        if (!s->checksums || !s->start || s->row_bytes < 1 || s->row_bytes > 1u << 30 ||
            s->n_rows < 1 || s->room < 1 || s->room > s->most_room || s->most_room > s->n_rows)
            return false;
    }
    return true;
}

static bool allocate(em_rows *r, const em_row_set *sets) {
    uint64_t longest = 0;
    int32_t most = 0;
    size_t n_flights = 2 * (size_t)r->depth;
    r->sets = calloc((size_t)r->n_sets, sizeof *r->sets);
    if (!r->sets) return false;
    for (int32_t i = 0; i < r->n_sets; i++) {
        r->sets[i].is = sets[i];
        r->sets[i].slots = em_row_slots_open(sets[i].n_rows, sets[i].room, sets[i].most_room);
        if (!r->sets[i].slots) return false;
        r->sets[i].base = i ? r->sets[i - 1].base + (uint32_t)sets[i - 1].n_rows : 0;
        if (sets[i].row_bytes > longest) longest = sets[i].row_bytes;
        if (sets[i].most_room > most) most = sets[i].most_room;
    }
    r->stage_bytes = em_row_stage_bytes(longest);
    r->missing = malloc((size_t)most * sizeof *r->missing);
    r->flights = calloc(n_flights, sizeof *r->flights);
    r->spare = calloc(n_flights, sizeof *r->spare);
    r->staging = aligned_alloc(PAGE, n_flights * r->stage_bytes);
    if (!r->missing || !r->flights || !r->spare || !r->staging) return false;
    while (r->n_spare < (int32_t)n_flights) {
        r->spare[r->n_spare] = r->n_spare;
        r->n_spare++;
    }
    return true;
}

uint64_t em_row_stage_bytes(uint64_t row_bytes) {
    const uint64_t least = 32 << 10, spans = page_ceil(row_bytes) + PAGE;
    return spans > least ? spans : least;
}

int32_t em_rows_open(int32_t fd, const em_row_set *sets, int32_t n_sets, const char *engine,
                     int32_t depth, const em_faults *faults, em_rows **out) {
    if (!valid(sets, n_sets, depth)) return EM_INVALID;
    em_rows *r = calloc(1, sizeof *r);
    if (!r) return EM_NO_MEMORY;
    r->owner = getpid();
    r->fd = fd;
    r->n_sets = n_sets;
    r->depth = depth;
    r->parts = 1;
#if defined(O_DIRECT)
    r->buffered = !(fcntl(fd, F_GETFL) & O_DIRECT);
#endif
    int32_t status = allocate(r, sets) ? EM_OK : EM_NO_MEMORY;
    if (status == EM_OK) status = em_io_open(fd, engine, depth, faults, &r->engine, &r->io);
    if (status != EM_OK) {
        em_rows_close(r);
        return status;
    }
    *out = r;
    return EM_OK;
}
