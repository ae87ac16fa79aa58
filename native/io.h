/* Reading pages from flash: engines that differ in how they ask the system, and in nothing else.
 *
 * An engine is used by several submitters one at a time (the caller holds a lock) and one reaper.
 */
#ifndef EM_IO_H
#define EM_IO_H

#include "base.h"
#include "edgemem.h"

/* One contiguous read into memory; both aligned as O_DIRECT asks. */
typedef struct {
    uint64_t tag;
    uint64_t offset;
    uint8_t *buffer;
    uint64_t bytes;
} em_read;

/* How a read ended: the bytes that arrived, or -errno. Fewer bytes than asked may arrive: whoever
 * submitted goes on from there, as after EINTR and EAGAIN. */
typedef struct {
    uint64_t tag;
    int64_t result;
} em_done;

typedef struct em_io em_io;
typedef struct em_io_engine em_io_engine;

typedef struct {
    int fd;
    int32_t depth;             /* the most reads in flight */
    const em_io_engine *inner; /* for the fault engine: what it wraps, */
    em_faults faults;          /* and what it does to it */
} em_io_setup;

/* submit: starts reads (at most `depth` are in flight, by the caller's count) and never waits.
 * reap: gives 1..max ended reads, waiting for the first; 0 once `wake` was called.
 * wake: lets a waiting reaper return.
 * `open` gives a status. */
struct em_io_engine {
    const char *name;
    int32_t (*open)(const em_io_setup *setup, em_io **io);
    void (*submit)(em_io *io, const em_read *reads, int32_t n);
    int32_t (*reap)(em_io *io, em_done *done, int32_t max);
    void (*wake)(em_io *io);
    void (*close)(em_io *io); /* after the last read has been reaped */
};

/* Opens the engine of that name, or the best one that opens for NULL; with `faults` wrapped in the
 * fault engine. */
int32_t em_io_open(int fd, const char *name, int32_t depth, const em_faults *faults,
                   const em_io_engine **engine, em_io **io);

extern const em_io_engine em_io_threads;
#if defined(__linux__)
extern const em_io_engine em_io_uring;
#endif

/* Wraps another: chosen reads fail, stop short, arrive late or with a flipped bit. */
extern const em_io_engine em_io_fault;

#endif
