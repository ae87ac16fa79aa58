/* Reads through io_uring by its raw system calls: io_uring_setup(2), io_uring_enter(2). */
#if defined(__linux__)

#include "io.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WAKE_TAG UINT64_MAX

/* Buffers are not registered: that would pin the slab's pages, and slots that close give theirs
 * back while the ring lives.
 *
 * Submitters own the submission ring, the reaper the completion ring; the kernel keeps them apart.
 */
struct em_io {
    int fd, ring;
    uint8_t *rings; /* both rings' indices and the completions, in one mapping */
    size_t rings_bytes, sqes_bytes;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    uint32_t *sq_head, *sq_tail, *sq_array, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
};

static int enter(em_io *io, uint32_t submit, uint32_t wait) {
    for (;;) {
        long n = syscall(SYS_io_uring_enter, io->ring, submit, wait,
                         wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
        if (n >= 0) return (int)n;
        if (errno == EAGAIN || errno == EBUSY || errno == ENOMEM)
            sched_yield(); /* the kernel is short of something: it passes */
        else if (errno != EINTR)
            return -errno;
    }
}

static void uring_close(em_io *io) {
    if (io->sqes) munmap(io->sqes, io->sqes_bytes);
    if (io->rings) munmap(io->rings, io->rings_bytes);
    if (io->ring >= 0) close(io->ring);
    free(io);
}

static bool map_rings(em_io *io, const struct io_uring_params *p) {
    size_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    if (!(p->features & IORING_FEAT_SINGLE_MMAP)) return false;
    io->rings_bytes = sq > cq ? sq : cq;
    io->sqes_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    void *rings = mmap(NULL, io->rings_bytes, prot, flags, io->ring, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED) return false;
    io->rings = rings;
    void *sqes = mmap(NULL, io->sqes_bytes, prot, flags, io->ring, IORING_OFF_SQES);
    if (sqes == MAP_FAILED) return false;
    io->sqes = sqes;
    io->sq_head = (uint32_t *)(io->rings + p->sq_off.head);
    io->sq_tail = (uint32_t *)(io->rings + p->sq_off.tail);
    io->sq_array = (uint32_t *)(io->rings + p->sq_off.array);
    io->sq_mask = *(uint32_t *)(io->rings + p->sq_off.ring_mask);
    io->cq_head = (uint32_t *)(io->rings + p->cq_off.head);
    io->cq_tail = (uint32_t *)(io->rings + p->cq_off.tail);
    io->cq_mask = *(uint32_t *)(io->rings + p->cq_off.ring_mask);
    io->cqes = (struct io_uring_cqe *)(io->rings + p->cq_off.cqes);
    return true;
}

static void push(em_io *io, const struct io_uring_sqe *sqe) {
    uint32_t tail = *io->sq_tail, slot = tail & io->sq_mask;
    io->sqes[slot] = *sqe;
    io->sq_array[slot] = slot;
    __atomic_store_n(io->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

static void uring_submit(em_io *io, const em_read *reads, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        push(io, &(struct io_uring_sqe){.opcode = IORING_OP_READ,
                                        .fd = io->fd,
                                        .off = reads[i].offset,
                                        .addr = (uint64_t)(uintptr_t)reads[i].buffer,
                                        .len = (uint32_t)reads[i].bytes,
                                        .user_data = reads[i].tag});
    uint32_t left;
    while ((left = *io->sq_tail - __atomic_load_n(io->sq_head, __ATOMIC_ACQUIRE)) > 0)
        if (enter(io, left, 0) <= 0) break; /* what is left goes with the next call */
}

static int32_t uring_reap(em_io *io, em_done *done, int32_t max) {
    for (;;) {
        int32_t n = 0;
        uint32_t head = *io->cq_head;
        bool woken = false;
        while (n < max && head != __atomic_load_n(io->cq_tail, __ATOMIC_ACQUIRE)) {
            const struct io_uring_cqe *cqe = &io->cqes[head++ & io->cq_mask];
            if (cqe->user_data == WAKE_TAG)
                woken = true;
            else
                done[n++] = (em_done){cqe->user_data, cqe->res};
        }
        __atomic_store_n(io->cq_head, head, __ATOMIC_RELEASE);
        if (n > 0 || woken) return n;
        if (enter(io, 0, 1) < 0) sched_yield();
    }
}

static void uring_wake(em_io *io) {
    push(io, &(struct io_uring_sqe){.opcode = IORING_OP_NOP, .fd = -1, .user_data = WAKE_TAG});
    enter(io, 1, 0);
}

/* Containers refuse these calls in several ways; only a read that went through proves otherwise. */
static bool reads_work(em_io *io) {
    void *page = NULL;
    if (posix_memalign(&page, 4096, 4096) != 0) return false;
    em_read read = {1, 0, page, 4096};
    em_done done = {0, -1};
    uring_submit(io, &read, 1);
    bool works = *io->cq_tail != *io->cq_head || enter(io, 0, 1) >= 0;
    works = works && uring_reap(io, &done, 1) == 1 && done.result >= 0;
    free(page);
    return works;
}

static int32_t uring_open(const em_io_setup *setup, em_io **out) {
    struct io_uring_params params = {0};
    em_io *io = calloc(1, sizeof *io);
    if (!io) return EM_NO_MEMORY;
    io->fd = setup->fd;
    /* Room for `depth` reads and a wake; the completion ring is twice as large. */
    io->ring = (int)syscall(SYS_io_uring_setup, (uint32_t)setup->depth + 1, &params);
    if (io->ring < 0 || !map_rings(io, &params) || !reads_work(io)) {
        uring_close(io);
        return EM_UNSUPPORTED;
    }
    *out = io;
    return EM_OK;
}

const em_io_engine em_io_uring = {"io_uring", uring_open, uring_submit,
                                  uring_reap, uring_wake, uring_close};

#endif
