/* What comes from flash: bundles and rows, which of them are in memory and where. A part of the
 * core's interface, with its rules (edgemem.h). */
#ifndef EM_FLASH_H
#define EM_FLASH_H

#include <stdint.h>

/* cdef: everything between these two marks is also what cffi parses */

/* ---- residency: which bundles are in memory, and where --------------------------------------- */

/* What the fault engine does to reads [first, first + count), counted from 0 as they start. */
enum {
    EM_FAULT_NONE = 0,
    EM_FAULT_ERROR = 1, /* the device says EIO */
    EM_FAULT_SHORT = 2, /* about half of the bytes arrive */
    EM_FAULT_LATE = 3,  /* late_us after they should */
    EM_FAULT_FLIP = 4,  /* with one bit flipped, chosen by the seed */
};

typedef struct {
    int32_t kind;
    int64_t first, count;
    int64_t late_us;
    int64_t bytes_per_s; /* a slow device, whatever the kind; 0 for as fast as it is */
    uint64_t seed;
} em_faults;

typedef struct {
    uint64_t offset;        /* in the file, at a page */
    uint64_t bytes;         /* whole pages */
    uint64_t payload_bytes; /* what crc32c covers */
    uint64_t first_bytes;   /* of the part that is wanted first; 0 where there is none */
    uint32_t crc32c;
    int32_t slot_class;
} em_bundle;

/* Slots of one size: at most n_slots of slot_bytes each, back to back from `start`, page-aligned.
 */
typedef struct {
    void *start;
    uint64_t slot_bytes;
    int32_t n_slots;
} em_slot_class;

typedef struct {
    int64_t hits, misses;               /* of bundles acquired; a bundle still loading is a miss */
    int64_t read_bytes, reads;          /* arrived from the device */
    int64_t demand_bytes;               /* read because they were acquired */
    int64_t prefetch_bytes;             /* read because they were prefetched */
    int64_t useful_bytes, wasted_bytes; /* of those: acquired later, or evicted before */
    int64_t dropped_bytes;              /* prefetches cancelled before they started */
    int64_t stall_us;                   /* em_residency_wait waited */
    int64_t busy_us;                    /* at least one read was in flight */
    int64_t idle_us;                    /* no acquired bundle was being read */
} em_residency_stats;

/* Why the last read failed of what was acquired: which bundle, and the errno (0 for a wrong
 * checksum). */
typedef struct {
    uint32_t bundle;
    int32_t error;
} em_read_failure;

typedef struct em_residency em_residency;

/* A file descriptor (kept by the caller), a slab (likewise), and how to read: engine "io_uring",
 * "threads" or NULL for the best that opens; `depth` reads in flight of at most `piece_bytes` each.
 */
int32_t em_residency_open(int32_t fd, const em_bundle *bundles, int32_t n_bundles,
                          const em_slot_class *classes, int32_t n_classes, const char *engine,
                          int32_t depth, uint64_t piece_bytes, const em_faults *faults,
                          em_residency **residency);
/* Waits for reads in flight. */
void em_residency_close(em_residency *residency);
const char *em_residency_engine(const em_residency *residency);

/* Pins bundles and gives their addresses; starts reading those that are absent, in this order, and
 * does not wait for them. Where a class has no free slot, the unpinned bundle with the lowest
 * ranks[bundle] leaves (of equals the first). EM_NO_MEMORY if more are pinned than there are slots:
 * then nothing is pinned. */
int32_t em_residency_acquire(em_residency *residency, const uint32_t *ids, int32_t n,
                             const float *ranks, uint64_t *addresses);
/* Undoes one acquire of the same bundles. */
void em_residency_release(em_residency *residency, const uint32_t *ids, int32_t n);
/* Undoes every acquire: for a caller that was interrupted and does not know what it held. */
void em_residency_release_all(em_residency *residency);
/* Starts reading the absent of these bundles behind all demand, in this order, up to most_bytes;
 * where no slot is free, the unpinned bundle with the lowest rank leaves that is none of them.
 * Returns how many were started or queued. */
int32_t em_residency_prefetch(em_residency *residency, const uint32_t *ids, int32_t n,
                              const float *ranks, uint64_t most_bytes);
/* Forgets prefetches that have not started yet. Bundles that were prefetched stay until they are
 * acquired; `ids` names those that nobody waits for any more. */
void em_residency_cancel(em_residency *residency, const uint32_t *ids, int32_t n);
/* Evicts all that is not pinned, after waiting for what is on its way. */
void em_residency_clear(em_residency *residency);
/* Opens or closes slots of a class, from its last one on. What closing slots hold moves into the
 * others as far as its rank is higher than what is there; their memory goes back to the system.
 * EM_NO_MEMORY if one of them is pinned: then nothing changes. */
int32_t em_residency_resize(em_residency *residency, int32_t slot_class, int32_t n_slots,
                            const float *ranks);
/* Reads in flight from now on, at most as many as at open. */
void em_residency_set_depth(em_residency *residency, int32_t depth);
/* Waits until acquired bundles are there. EM_FLASH if one is not to be had: see failure. */
int32_t em_residency_wait(em_residency *residency, const uint32_t *ids, int32_t n);
/* What a ready flag says; a first part is there before its checksum is known. */
enum { EM_READY_FAILED = -1, EM_READY_NOT = 0, EM_READY_FIRST = 1, EM_READY_WHOLE = 2 };
/* int32 for each bundle: what of it is in place. */
const int32_t *em_residency_ready(const em_residency *residency);
em_read_failure em_residency_failure(em_residency *residency);
em_residency_stats em_residency_statistics(em_residency *residency);

/* A turn demands `indices` [n], streamed bundles or rows of a set, each taken by uses[i] of the
 * tokens (NULL: by one, or it is not known). Gives EM_OK, or EM_RAISED where that is the end of the
 * step. */
typedef int32_t em_observer(void *user, int32_t turn, const uint32_t *indices, int32_t n,
                            const int32_t *uses, int32_t tokens);

/* ---- slots of rows: which of a set are in memory; what reads them is no concern of theirs ------
 */

/* Room for some of n rows. What was used often and of late stays. */
typedef struct em_row_slots em_row_slots;

/* 1 <= room <= most_room <= n_rows. NULL where memory is short. */
em_row_slots *em_row_slots_open(int32_t n_rows, int32_t room, int32_t most_room);
void em_row_slots_close(em_row_slots *slots);
/* What does not fit any more loses its slot. */
void em_row_slots_resize(em_row_slots *slots, int32_t room);
/* A take begins. */
void em_row_slots_begin(em_row_slots *slots);
/* Gives slots to rows `ids` [n], after all that the take wanted before, and all together no more
 * than there is room for: none of them loses it in this take. Those that had none are written to
 * `absent` [n]; gives their number. */
int32_t em_row_slots_want(em_row_slots *slots, const int32_t *ids, int32_t n, int32_t *absent);
/* Lets none of these rows leave that is there now (but of no more than three quarters of the room,
 * the first ones), until the next call; what is wanted meanwhile goes through what is left. */
void em_row_slots_keep(em_row_slots *slots, const int32_t *ids, int32_t n);
/* How many of `ids`, from the first on, one take may want. */
int32_t em_row_slots_fit(const em_row_slots *slots, const int32_t *ids, int32_t n);

/* ---- rows: those of a bundle that come and go one by one --------------------------------------
 */

/* A matrix of lanes 1 in the file, and the memory where some of its rows may be. */
typedef struct {
    uint64_t offset; /* in the file, of the row in the first place */
    uint64_t row_bytes;
    const uint32_t *checksums; /* [n_rows]: crc32c of each row; kept by the caller, as `start` */
    const uint32_t *places;    /* [n_rows]: which place each row has in the file; NULL: its own */
    void *start;               /* most_room rows, back to back, at a page */
    int32_t n_rows;
    int32_t room, most_room; /* rows held at once: at first, and at most */
} em_row_set;

typedef struct {
    int64_t hits, misses;      /* of rows taken */
    int64_t read_bytes, reads; /* arrived from the device: whole pages */
    int64_t busy_us;           /* at least one read was in flight */
    int64_t stall_us;          /* takes waited; the core's clock counts that too */
} em_row_stats;

/* Why the last take failed: which row of which set, and the errno (0 for a wrong checksum). */
typedef struct {
    int32_t failed; /* 0: it did not */
    int32_t set, row, error;
} em_row_failure;

typedef struct em_rows em_rows;

/* As em_residency_open, but for one thread; sets are copied. */
int32_t em_rows_open(int32_t fd, const em_row_set *sets, int32_t n_sets, const char *engine,
                     int32_t depth, const em_faults *faults, em_rows **rows);
void em_rows_close(em_rows *rows);
const char *em_rows_engine(const em_rows *rows);
/* Bytes of one of the 2 * depth buffers that rows of so many bytes are read by way of. */
uint64_t em_row_stage_bytes(uint64_t row_bytes);
/* Changes how many rows a set may hold; what does not fit leaves, and its memory goes back. */
int32_t em_rows_resize(em_rows *rows, int32_t set, int32_t room);
/* Lets each part of a row be read by itself, as if they were not bundled: for comparisons. */
void em_rows_read_in(em_rows *rows, int32_t parts);
/* Lets all rows leave. */
void em_rows_clear(em_rows *rows);
/* How many rows of a set may be held at once. */
int32_t em_rows_room(const em_rows *rows, int32_t set);
/* Gives the addresses of rows `ids` [n], ascending and no more than there is room for, after
 * reading those that are absent; they stay until the set's next take. `*waited_ns` grows by what
 * reading took. EM_FLASH: some could not be read, see em_rows_failure; EM_UNSUPPORTED: another
 * process's. */
int32_t em_rows_take(em_rows *rows, int32_t set, const int32_t *ids, int32_t n, const uint8_t **at,
                     int64_t *waited_ns);

/* What turns demanded, one after another. What there is no room for is lost, but counted. */
typedef struct {
    uint32_t *indices, *counts; /* of all turns; of each turn */
    int64_t n_indices, n_turns, indices_room, turns_room;
} em_demand_log;
/* Lets turns write their demand into the log (NULL: none): rows of all sets are numbered one after
 * another. */
void em_rows_log(em_rows *rows, em_demand_log *log);
/* Tells `record` (NULL: nobody) of each turn that is over: its set, and the rows that it took. */
void em_rows_record(em_rows *rows, em_observer *record, void *user);
em_row_stats em_rows_statistics(const em_rows *rows);
em_row_failure em_rows_failure(em_rows *rows); /* tells it once */

/* ---- the pace of a device --------------------------------------------------------------------
 */

/* Parts of a file, all of one size. */
typedef struct {
    const uint64_t *offsets; /* [n] */
    uint64_t bytes;
    int32_t n;
} em_pieces;

/* What arrived, in how long; the errno of the first read that failed, or 0. */
typedef struct {
    int64_t read_bytes, spent_ns;
    int32_t error;
} em_flash_pace;

/* Reads pieces in their order, `depth` at a time, until all are there or `most_ns` are over, and
 * does nothing with them. `buffer` has room for at least `depth` of them, aligned as the file asks,
 * and all of it takes them in turn, as slots do: a part that a cache still has is written faster.
 * `engine` as em_residency_open. EM_FLASH: a read failed, or the file ends before it. */
int32_t em_flash_measure(int32_t fd, const char *engine, int32_t depth, const em_pieces *pieces,
                         void *buffer, uint64_t buffer_bytes, int64_t most_ns, em_flash_pace *pace);

/* end cdef */

#endif
