/* Measured reads: every piece arrives once, on either engine and at any depth; what fails is told.
 */
#include "check.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096, PIECES = 40 };

static const int64_t LONG_NS = 60000000000;

/* Every byte of piece i is i + 1. */
static FILE *make_file(void) {
    FILE *file = tmpfile();
    for (int32_t i = 0; i < PIECES; i++)
        for (int32_t byte = 0; byte < PAGE; byte++) fputc(i + 1, file);
    fflush(file);
    return file;
}

static void offsets_backwards(uint64_t *offsets) {
    for (int32_t i = 0; i < PIECES; i++) offsets[i] = (uint64_t)(PIECES - 1 - i) * PAGE;
}

static bool refused(int32_t status, const char *engine) {
    if (status != EM_UNSUPPORTED || strcmp(engine, "io_uring") != 0) return false;
    printf("# io_uring: REFUSED HERE, NOT TESTED\n");
    return true;
}

/* All `parts` of the buffer take them in turn. */
static void all_pieces_arrive(const char *engine, int32_t depth, int32_t parts) {
    uint64_t offsets[PIECES];
    FILE *file = make_file();
    uint8_t *buffer = exact((size_t)parts * PAGE);
    em_flash_pace pace;
    offsets_backwards(offsets);
    em_pieces pieces = {offsets, PAGE, PIECES};
    int32_t status = em_flash_measure(fileno(file), engine, depth, &pieces, buffer, parts * PAGE,
                                      LONG_NS, &pace);
    if (!refused(status, engine)) {
        CHECK(status == EM_OK && pace.error == 0, "%s: status %d", engine, status);
        CHECK(pace.read_bytes == PIECES * PAGE, "%s: %ld bytes", engine, (long)pace.read_bytes);
        CHECK(pace.spent_ns > 0, "%s: %ld ns", engine, (long)pace.spent_ns);
        bool seen[PIECES + 1] = {false};
        for (int32_t i = 0; i < em_min(parts, PIECES); i++) {
            uint8_t *part = buffer + i * PAGE;
            int32_t piece = part[0];
            bool whole = memcmp(part, part + 1, PAGE - 1) == 0 && piece >= 1 && piece <= PIECES;
            CHECK(whole && !seen[piece], "%s, depth %d: part %d of %d", engine, depth, i, parts);
            if (whole) seen[piece] = true;
        }
    }
    free(buffer);
    fclose(file);
}

static void time_ends_it(const char *engine) {
    uint64_t offsets[PIECES];
    FILE *file = make_file();
    uint8_t *buffer = exact(2 * PAGE);
    em_flash_pace pace;
    offsets_backwards(offsets);
    em_pieces pieces = {offsets, PAGE, PIECES};
    int32_t status = em_flash_measure(fileno(file), engine, 2, &pieces, buffer, 2 * PAGE, 0, &pace);
    if (!refused(status, engine)) {
        CHECK(status == EM_OK, "%s: status %d", engine, status);
        CHECK(pace.read_bytes == 2 * PAGE, "%s: %ld bytes", engine, (long)pace.read_bytes);
    }
    free(buffer);
    fclose(file);
}

static void a_file_that_ends_is_told(const char *engine) {
    uint64_t offsets[2] = {(PIECES - 1) * PAGE, PIECES * PAGE};
    FILE *file = make_file();
    uint8_t *buffer = exact(8 * PAGE);
    em_flash_pace pace;
    em_pieces pieces = {offsets, PAGE, 2};
    int32_t status =
        em_flash_measure(fileno(file), engine, 8, &pieces, buffer, 8 * PAGE, LONG_NS, &pace);
    if (!refused(status, engine)) {
        CHECK(status == EM_FLASH && pace.error == ENODATA, "%s: status %d, error %d", engine,
              status, pace.error);
        em_pieces none = {offsets, 0, 2};
        CHECK(em_flash_measure(fileno(file), engine, 8, &none, buffer, 8 * PAGE, 0, &pace) ==
                  EM_INVALID,
              "%s: pieces of nothing", engine);
        CHECK(em_flash_measure(fileno(file), engine, 8, &pieces, buffer, 8 * PAGE - 1, 0, &pace) ==
                  EM_INVALID,
              "%s: no room", engine);
    }
    free(buffer);
    fclose(file);
}

int main(void) {
    const char *const engines[] = {"io_uring", "threads"};
    const int32_t depths[] = {1, 3, PIECES, 64};
    for (int32_t e = 0; e < 2; e++) {
        for (int32_t d = 0; d < 4; d++) all_pieces_arrive(engines[e], depths[d], depths[d]);
        all_pieces_arrive(engines[e], 2, 5);
        all_pieces_arrive(engines[e], 2, PIECES);
        time_ends_it(engines[e]);
        a_file_that_ends_is_told(engines[e]);
    }
    return check_report();
}
