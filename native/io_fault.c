/* An engine that wraps another and misbehaves on purpose: what devices and file systems do, on
 * demand. */
#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    const em_io_engine *inner;
    em_io *io;
    em_faults faults;
    int64_t started; /* reads so far */
    int32_t depth;
    struct {
        uint64_t tag;
        uint8_t *buffer;
        uint64_t bytes;
        int64_t index;
    } reads[]; /* in flight, one slot each; bytes 0 means free */
} fault_io;

static int32_t fault_open(const em_io_setup *setup, em_io **out) {
    fault_io *io = calloc(1, sizeof *io + (size_t)setup->depth * sizeof io->reads[0]);
    if (!io) return EM_NO_MEMORY;
    io->inner = setup->inner;
    io->faults = setup->faults;
    io->depth = setup->depth;
    int32_t status = io->inner->open(setup, &io->io);
    if (status != EM_OK) {
        free(io);
        return status;
    }
    *out = (em_io *)io;
    return EM_OK;
}

static bool is_hit(const em_faults *f, int64_t index) {
    return f->kind != EM_FAULT_NONE && index >= f->first && index < f->first + f->count;
}

static void sleep_us(int64_t us) {
    struct timespec time = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&time, &time) != 0 && errno == EINTR) {}
}

static void fault_submit(em_io *base, const em_read *reads, int32_t n) {
    fault_io *io = (fault_io *)base;
    for (int32_t i = 0; i < n; i++) {
        em_read read = reads[i];
        int64_t index = io->started++;
        if (is_hit(&io->faults, index) && io->faults.kind == EM_FAULT_SHORT)
            read.bytes = (uint64_t)em_max(512, (int64_t)read.bytes / 2 / 4096 * 4096);
        for (int32_t slot = 0; slot < io->depth; slot++)
            if (__atomic_load_n(&io->reads[slot].bytes, __ATOMIC_ACQUIRE) == 0) {
                io->reads[slot].tag = read.tag;
                io->reads[slot].buffer = read.buffer;
                io->reads[slot].index = index;
                __atomic_store_n(&io->reads[slot].bytes, read.bytes, __ATOMIC_RELEASE);
                break;
            }
        io->inner->submit(io->io, &read, 1);
    }
}

static void misbehave(fault_io *io, em_done *done) {
    for (int32_t slot = 0; slot < io->depth; slot++) {
        uint64_t bytes = __atomic_load_n(&io->reads[slot].bytes, __ATOMIC_ACQUIRE);
        if (bytes == 0 || io->reads[slot].tag != done->tag) continue;
        const em_faults *f = &io->faults;
        uint64_t bit = (uint64_t)(f->seed * 2654435761u) % (bytes * 8);
        if (is_hit(f, io->reads[slot].index)) {
            if (f->kind == EM_FAULT_ERROR) done->result = -EIO;
            if (f->kind == EM_FAULT_LATE) sleep_us(f->late_us);
            if (f->kind == EM_FAULT_FLIP && done->result > (int64_t)(bit / 8))
                io->reads[slot].buffer[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        if (f->bytes_per_s > 0) sleep_us((int64_t)(bytes * 1000000 / (uint64_t)f->bytes_per_s));
        __atomic_store_n(&io->reads[slot].bytes, 0, __ATOMIC_RELEASE);
        return;
    }
}

static int32_t fault_reap(em_io *base, em_done *done, int32_t max) {
    fault_io *io = (fault_io *)base;
    int32_t n = io->inner->reap(io->io, done, max);
    for (int32_t i = 0; i < n; i++) misbehave(io, &done[i]);
    return n;
}

static void fault_wake(em_io *base) {
    fault_io *io = (fault_io *)base;
    io->inner->wake(io->io);
}

static void fault_close(em_io *base) {
    fault_io *io = (fault_io *)base;
    io->inner->close(io->io);
    free(io);
}

const em_io_engine em_io_fault = {"fault",    fault_open, fault_submit,
                                  fault_reap, fault_wake, fault_close};
