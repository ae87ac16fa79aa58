/* Reads by a few threads that each wait in pread: works on every system, and in every container. */
#include "io.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

/* More bring little, and each has a stack (bench/LOG.md). */
enum { MOST_THREADS = 32 };

struct em_io {
    int fd;
    int32_t depth, n_threads;
    bool closing;
    int32_t wakes;
    em_read *queue; /* a ring of `depth` reads */
    em_done *ended; /* a ring of `depth` results */
    int32_t queue_first, queue_count, ended_first, ended_count;
    pthread_mutex_t mutex;
    pthread_cond_t more_work, more_done;
    pthread_t threads[];
};

static void *work(void *arg) {
    em_io *io = arg;
    pthread_mutex_lock(&io->mutex);
    for (;;) {
        while (io->queue_count == 0 && !io->closing) pthread_cond_wait(&io->more_work, &io->mutex);
        if (io->queue_count == 0) break;
        em_read read = io->queue[io->queue_first];
        io->queue_first = (io->queue_first + 1) % io->depth;
        io->queue_count--;
        pthread_mutex_unlock(&io->mutex);
        ssize_t n = pread(io->fd, read.buffer, read.bytes, (off_t)read.offset);
        em_done done = {read.tag, n < 0 ? -errno : n};
        pthread_mutex_lock(&io->mutex);
        io->ended[(io->ended_first + io->ended_count++) % io->depth] = done;
        pthread_cond_signal(&io->more_done);
    }
    pthread_mutex_unlock(&io->mutex);
    return NULL;
}

static void threads_close(em_io *io) {
    pthread_mutex_lock(&io->mutex);
    io->closing = true;
    pthread_cond_broadcast(&io->more_work);
    pthread_mutex_unlock(&io->mutex);
    for (int32_t i = 0; i < io->n_threads; i++) pthread_join(io->threads[i], NULL);
    pthread_mutex_destroy(&io->mutex);
    pthread_cond_destroy(&io->more_work);
    pthread_cond_destroy(&io->more_done);
    free(io->queue);
    free(io->ended);
    free(io);
}

static int32_t threads_open(const em_io_setup *setup, em_io **out) {
    int32_t depth = setup->depth, n_threads = (int32_t)em_min(depth, MOST_THREADS);
    em_io *io = calloc(1, sizeof *io + (size_t)n_threads * sizeof io->threads[0]);
    if (!io) return EM_NO_MEMORY;
    io->fd = setup->fd;
    io->depth = depth;
    io->queue = calloc((size_t)depth, sizeof *io->queue);
    io->ended = calloc((size_t)depth, sizeof *io->ended);
    pthread_mutex_init(&io->mutex, NULL);
    pthread_cond_init(&io->more_work, NULL);
    pthread_cond_init(&io->more_done, NULL);
    int32_t status = io->queue && io->ended ? EM_OK : EM_NO_MEMORY;
    while (status == EM_OK && io->n_threads < n_threads) {
        if (pthread_create(&io->threads[io->n_threads], NULL, work, io) == 0)
            io->n_threads++;
        else
            status = EM_NO_THREADS;
    }
    if (status != EM_OK) {
        threads_close(io);
        return status;
    }
    *out = io;
    return EM_OK;
}

static void threads_submit(em_io *io, const em_read *reads, int32_t n) {
    pthread_mutex_lock(&io->mutex);
    for (int32_t i = 0; i < n; i++)
        io->queue[(io->queue_first + io->queue_count++) % io->depth] = reads[i];
    pthread_cond_broadcast(&io->more_work);
    pthread_mutex_unlock(&io->mutex);
}

static int32_t threads_reap(em_io *io, em_done *done, int32_t max) {
    int32_t n = 0;
    pthread_mutex_lock(&io->mutex);
    while (io->ended_count == 0 && io->wakes == 0) pthread_cond_wait(&io->more_done, &io->mutex);
    while (n < max && io->ended_count > 0) {
        done[n++] = io->ended[io->ended_first];
        io->ended_first = (io->ended_first + 1) % io->depth;
        io->ended_count--;
    }
    if (n == 0) io->wakes--;
    pthread_mutex_unlock(&io->mutex);
    return n;
}

static void threads_wake(em_io *io) {
    pthread_mutex_lock(&io->mutex);
    io->wakes++;
    pthread_cond_signal(&io->more_done);
    pthread_mutex_unlock(&io->mutex);
}

const em_io_engine em_io_threads = {"threads",    threads_open, threads_submit,
                                    threads_reap, threads_wake, threads_close};
