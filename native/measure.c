/* How fast a device gives pieces of a file: an engine, a depth, and nothing done with the bytes. */
#include "io.h"

#include <errno.h>
#include <stdlib.h>

#define MOST_PARTS (1 << 16)

typedef struct {
    const em_io_engine *engine;
    em_io *io;
    const em_pieces *pieces;
    uint8_t *buffer;
    em_read *reads; /* [parts]: what each part of the buffer waits for */
    em_done *done;  /* [depth] */
    int32_t *spare; /* [parts], a ring: parts of the buffer that are free, longest so first */
    int32_t parts, depth, in_flight, first_spare, next;
} measuring;

/* Starts as many reads as the depth allows. */
static void start_pieces(measuring *m) {
    uint64_t bytes = m->pieces->bytes;
    for (; m->in_flight < m->depth && m->next < m->pieces->n; m->in_flight++) {
        int32_t part = m->spare[m->first_spare];
        m->first_spare = (m->first_spare + 1) % m->parts;
        m->reads[part] = (em_read){(uint64_t)part, m->pieces->offsets[m->next++],
                                   m->buffer + (uint64_t)part * bytes, bytes};
        m->engine->submit(m->io, &m->reads[part], 1);
    }
}

/* Takes what ended; whether it is to go on. */
static bool end_pieces(measuring *m, em_flash_pace *pace) {
    int32_t n = m->engine->reap(m->io, m->done, m->depth);
    for (int32_t i = 0; i < n; i++) {
        int32_t part = (int32_t)m->done[i].tag;
        int64_t result = m->done[i].result;
        if ((result == -EINTR || result == -EAGAIN) && pace->error == 0) {
            m->engine->submit(m->io, &m->reads[part], 1);
            continue;
        }
        m->spare[(m->first_spare + m->parts - m->in_flight--) % m->parts] = part;
        if (result > 0) pace->read_bytes += result;
        if (result != (int64_t)m->pieces->bytes && pace->error == 0)
            pace->error = result < 0 ? (int32_t)-result : ENODATA;
    }
    return pace->error == 0;
}

static void read_pieces(measuring *m, int64_t most_ns, em_flash_pace *pace) {
    int64_t started = em_now_ns();
    bool goes_on = true;
    for (;;) {
        if (goes_on) start_pieces(m);
        if (m->in_flight == 0) break;
        goes_on = end_pieces(m, pace) && em_now_ns() - started < most_ns;
    }
    pace->spent_ns = em_now_ns() - started;
}

int32_t em_flash_measure(int32_t fd, const char *engine, int32_t depth, const em_pieces *pieces,
                         void *buffer, uint64_t buffer_bytes, int64_t most_ns,
                         em_flash_pace *pace) {
    if (depth < 1 || pieces->n < 0 || pieces->bytes < 1) return EM_INVALID;
    if (buffer_bytes / pieces->bytes < (uint64_t)depth) return EM_INVALID;
    *pace = (em_flash_pace){0, 0, 0};
    uint64_t fit = buffer_bytes / pieces->bytes;
    int32_t parts = fit < MOST_PARTS ? (int32_t)fit : MOST_PARTS;
    if (parts < depth) parts = depth;
    measuring m = {.pieces = pieces, .buffer = buffer, .parts = parts, .depth = depth};
    int32_t status = em_io_open(fd, engine, depth, NULL, &m.engine, &m.io);
    if (status != EM_OK) return status;
    m.reads = calloc((size_t)parts, sizeof *m.reads);
    m.done = calloc((size_t)depth, sizeof *m.done);
    m.spare = calloc((size_t)parts, sizeof *m.spare);
    status = m.reads && m.done && m.spare ? EM_OK : EM_NO_MEMORY;
    for (int32_t i = 0; status == EM_OK && i < parts; i++) m.spare[i] = i;
    if (status == EM_OK) read_pieces(&m, most_ns, pace);
    m.engine->close(m.io);
    free(m.reads);
    free(m.done);
    free(m.spare);
    return status == EM_OK && pace->error != 0 ? EM_FLASH : status;
}
