/* Turns: rows gathered through few slots, in rounds, with bundles read ahead and reads that fail,
 * are those of the file; and whatever happens nothing stays pinned. */
#include "check.h"
#include "residency.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUNDLES = 24, CLASSES = 2, PAGE = 4096, PIECE = 8192, COLS = 64, ROWS = 32, TOKENS = 40 };
enum { TURNS = 3, EXPERTS = BUNDLES / TURNS, HIDDEN = 32, INTERMEDIATE = 16 };

/* Rows of floats, in bundles of two sizes, each of a class of its own. */
typedef struct {
    FILE *file;
    float rows[BUNDLES * ROWS][COLS];
    em_bundle bundles[BUNDLES];
    uint8_t *slab;
    em_slot_class classes[CLASSES];
    em_core *core;
    em_residency *residency;
    em_stream stream;
    em_lookahead ahead;
    em_demand_log log;
    uint32_t ids[BUNDLES];
    int observed, paused, ends_at;
} world;

static int32_t observe(void *user, int32_t turn, const uint32_t *indices, int32_t n,
                       const int32_t *uses, int32_t tokens) {
    world *w = user;
    (void)turn, (void)indices, (void)uses, (void)tokens;
    CHECK(n > 0, "%d bundles", n);
    return ++w->observed == w->ends_at ? EM_RAISED : EM_OK;
}

static int32_t pause_between(void *user, int32_t turn, const uint32_t *indices, int32_t n,
                             const int32_t *uses, int32_t tokens) {
    world *w = user;
    (void)turn, (void)indices, (void)n, (void)uses, (void)tokens;
    return ++w->paused == w->ends_at ? EM_RAISED : EM_OK;
}

static void make_store(world *w) {
    fill_unit(w->rows[0], BUNDLES * ROWS * COLS, 7);
    w->file = tmpfile();
    uint64_t offset = PAGE;
    for (int32_t i = 0; i < BUNDLES; i++) {
        uint64_t rows = ROWS * COLS * 4, bytes = rows + (i % 3 == 0 ? 3 * PAGE : 0);
        uint8_t *image = calloc(1, bytes);
        memcpy(image, w->rows[i * ROWS], rows);
        w->bundles[i] =
            (em_bundle){offset, bytes, bytes, 0, em_crc32c(0, image, bytes), i % 3 == 0};
        fseek(w->file, (long)offset, SEEK_SET);
        fwrite(image, 1, bytes, w->file);
        offset += bytes;
        free(image);
        w->ids[i] = (uint32_t)i;
    }
    fflush(w->file);
}

/* Arrays are exactly as large as the header asks, so that a sanitizer sees what writes beyond. */
static void open_world(world *w, int32_t slots, const em_faults *faults) {
    memset(w, 0, sizeof *w);
    make_store(w);
    uint64_t each[] = {2 * PAGE, 5 * PAGE};
    if (posix_memalign((void **)&w->slab, PAGE, (size_t)slots * (each[0] + each[1])) != 0) abort();
    w->classes[0] = (em_slot_class){w->slab, each[0], slots};
    w->classes[1] = (em_slot_class){w->slab + (uint64_t)slots * each[0], each[1], slots};
    CHECK(em_core_open(2, NULL, &w->core) == EM_OK, "a core");
    CHECK(em_residency_open(fileno(w->file), w->bundles, BUNDLES, w->classes, CLASSES, "threads", 3,
                            PIECE, faults, &w->residency) == EM_OK,
          "a residency");
    uint64_t *addresses = exact(BUNDLES * 8);
    int64_t *sizes = exact(BUNDLES * 8), *index_of = exact(BUNDLES * 8);
    int32_t *turn_of = exact(BUNDLES * 4), *certain_first = exact((TURNS + 1) * 4);
    uint32_t *certain = exact(4);
    float *ranks = exact(BUNDLES * 4);
    for (int32_t i = 0; i < BUNDLES; i++) {
        addresses[i] = 0;
        sizes[i] = (int64_t)w->bundles[i].bytes;
        index_of[i] = i;
        turn_of[i] = i / EXPERTS;
        ranks[i] = (float)i;
    }
    certain_first[0] = 0; /* bundle 5 is wanted after the first turn */
    for (int32_t turn = 0; turn < TURNS; turn++) certain_first[turn + 1] = 1;
    certain[0] = 5;
    w->ahead = (em_lookahead){.precision = 0.9, .memory = 64, .most_precision = 0.98};
    w->log = (em_demand_log){exact(4 * BUNDLES), exact(8), 0, 0, BUNDLES, 2};
    w->stream = (em_stream){.residency = w->residency,
                            .addresses = addresses,
                            .sizes = sizes,
                            .index_of = index_of,
                            .turn_of = turn_of,
                            .certain_first = certain_first,
                            .certain = certain,
                            .ranks = ranks,
                            .observe = observe,
                            .pause = pause_between,
                            .user = w,
                            .lookahead = &w->ahead,
                            .foreseen = exact(BUNDLES * 4),
                            .indices = exact(BUNDLES * 4),
                            .held = exact(BUNDLES * 8),
                            .uses = exact(BUNDLES * 4),
                            .likely = exact(2 * BUNDLES * 4),
                            .likelihood = exact(BUNDLES * 4),
                            .wanted = exact(BUNDLES),
                            .log = &w->log};
    memset(w->stream.wanted, 0, BUNDLES);
}

static void end_world(world *w) {
    em_stream *s = &w->stream;
    em_residency_close(w->residency);
    em_core_close(w->core);
    void *owned[] = {(void *)s->addresses,
                     (void *)s->sizes,
                     (void *)s->index_of,
                     (void *)s->turn_of,
                     (void *)s->certain_first,
                     (void *)s->certain,
                     (void *)s->ranks,
                     s->foreseen,
                     s->indices,
                     s->held,
                     s->uses,
                     s->likely,
                     s->likelihood,
                     s->wanted,
                     w->log.indices,
                     w->log.counts,
                     w->slab};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) free(owned[i]);
    fclose(w->file);
}

static bool nothing_is_pinned(const world *w) {
    for (int32_t i = 0; i < BUNDLES; i++)
        if (w->residency->states[i].pins != 0) return false;
    return true;
}

/* Gathers random rows as one operation; true if they are the file's. */
static int32_t gather(world *w, uint32_t *seed, int32_t most, bool *right) {
    int32_t ids[TOKENS], uses[BUNDLES] = {0}, failed = 0;
    uint32_t wanted[BUNDLES], n = 0;
    uint64_t *addresses = exact(BUNDLES * 8);
    float *out = exact(TOKENS * COLS * 4);
    for (int32_t t = 0; t < TOKENS; t++) {
        uint32_t bundle = random_bits(seed) % (uint32_t)most;
        ids[t] = (int32_t)(bundle * ROWS + random_bits(seed) % ROWS);
        uses[bundle]++;
    }
    int32_t counts[BUNDLES];
    for (uint32_t b = 0; b < BUNDLES; b++)
        if (uses[b] > 0) {
            counts[n] = uses[b];
            wanted[n++] = b;
        }
    em_op op = {.kind = EM_OP_GATHER};
    op.gather = (em_gather_op){&w->stream, w->ids, wanted, counts, ids,       (int32_t)n, BUNDLES,
                               ROWS,       EM_F32, 1,      COLS,   addresses, out};
    int32_t status = em_ops_run(w->core, &op, 1, NULL, 0, TOKENS, &failed);
    *right = true;
    for (int32_t t = 0; t < TOKENS && status == EM_OK; t++)
        *right &= memcmp(out + t * COLS, w->rows[ids[t]], COLS * 4) == 0;
    free(out);
    free(addresses);
    return status;
}

/* Two at the least: one is computed while the next lands. */
static void any_number_of_slots(void) {
    for (int32_t slots = 2; slots <= BUNDLES; slots++) {
        world w;
        uint32_t seed = (uint32_t)slots;
        bool right;
        open_world(&w, slots, NULL);
        for (int32_t most = 1; most <= BUNDLES; most++) {
            int32_t status = gather(&w, &seed, most, &right);
            CHECK(status == EM_OK && right, "%d slots, %d bundles: %d", slots, most, status);
        }
        CHECK(slots > 3 || w.paused > 0, "%d slots", slots);
        CHECK(w.log.n_turns == BUNDLES, "%d turns", (int)w.log.n_turns);
        CHECK(nothing_is_pinned(&w), "%d slots", slots);
        end_world(&w);
    }
}

static void every_read_fails_once(void) {
    int failed = 0;
    for (int64_t nth = 0; nth < 32; nth++) {
        world w;
        uint32_t seed = 3;
        bool right;
        em_faults faults = {.kind = nth % 2 ? EM_FAULT_ERROR : EM_FAULT_FLIP,
                            .first = nth,
                            .count = 1,
                            .seed = (uint64_t)nth};
        open_world(&w, 2, &faults);
        int32_t status = gather(&w, &seed, BUNDLES, &right);
        failed += status == EM_FLASH;
        CHECK((status == EM_OK && right) || status == EM_FLASH, "read %d: %d", (int)nth, status);
        CHECK(nothing_is_pinned(&w), "read %d", (int)nth);
        em_residency_clear(w.residency);
        CHECK(gather(&w, &seed, BUNDLES, &right) == EM_OK && right, "after read %d", (int)nth);
        end_world(&w);
    }
    CHECK(failed > 20, "%d of 32 failed", failed); /* what was read ahead is read again */
}

static void what_is_raised_ends_it(void) {
    for (int ends_at = 1; ends_at <= 3; ends_at++) {
        world w;
        uint32_t seed = 5;
        bool right;
        open_world(&w, 2, NULL);
        w.ends_at = ends_at; /* at first in observe, else between rounds */
        CHECK(gather(&w, &seed, BUNDLES, &right) == EM_RAISED, "at %d", ends_at);
        CHECK(nothing_is_pinned(&w) && w.stream.busy == 0, "at %d", ends_at);
        w.ends_at = 0;
        CHECK(gather(&w, &seed, BUNDLES, &right) == EM_OK && right, "at %d", ends_at);
        end_world(&w);
    }
}

static void closed_or_busy(void) {
    world w;
    uint32_t seed = 9;
    bool right;
    open_world(&w, 2, NULL);
    w.stream.busy = 1;
    CHECK(gather(&w, &seed, BUNDLES, &right) == EM_UNSUPPORTED, "busy");
    w.stream.busy = 0;
    w.stream.residency = NULL;
    CHECK(gather(&w, &seed, BUNDLES, &right) == EM_UNSUPPORTED, "closed");
    end_world(&w);
}

/* A layer of experts: what it takes and what it foresees are as the test says. */
typedef struct {
    em_route_op takes, foresees;
    uint32_t taken[2], foreseen[2];
    int32_t n_taken, n_foreseen;
    em_op routing, op; /* routing does nothing */
} layer;

static const em_ffn FFN = {.gate = 0,
                           .up = INTERMEDIATE * HIDDEN * 4,
                           .down = 2 * INTERMEDIATE * HIDDEN * 4,
                           .gate_bias = -1,
                           .up_bias = -1,
                           .down_bias = -1,
                           .hidden = HIDDEN,
                           .intermediate = INTERMEDIATE};
static const int32_t FIRST[] = {0, 1, 2}, ZEROS[2];
static float state[HIDDEN], out[HIDDEN], one[2] = {1, 1};

static void make_layers(world *w, layer *layers) {
    CHECK(em_core_reserve(w->core, em_ffn_scratch(1, 2, HIDDEN, INTERMEDIATE)) == EM_OK, "%s",
          "scratch");
    for (int32_t i = 0; i < TURNS; i++) {
        layer *l = &layers[i];
        *l = (layer){.n_taken = 2, .n_foreseen = 2};
        l->takes = (em_route_op){.experts = l->taken,
                                 .first = (int32_t *)FIRST,
                                 .weights = one,
                                 .n_chosen = &l->n_taken};
        l->foresees =
            (em_route_op){.experts = l->foreseen, .weights = one, .n_chosen = &l->n_foreseen};
        l->routing.kind = EM_OP_CLAMP;
        l->routing.elements = (em_elements_op){.x = state, .cols = HIDDEN, .limit = 1e9f};
        l->op.kind = EM_OP_FFN;
        l->op.ffn = (em_ffn_op){.stream = &w->stream,
                                .ffn = &FFN,
                                .bundles = w->ids + i * EXPERTS,
                                .routing = &l->takes,
                                .tokens = ZEROS,
                                .weights = one,
                                .x = state,
                                .out = out};
        if (i + 1 < TURNS)
            l->op.ffn.foresight =
                (em_foresight){&l->routing, 1, &l->foresees, w->ids + (i + 1) * EXPERTS,
                               &layers[i + 1].op.ffn.foresight};
    }
}

static void take(world *w, layer *l, uint32_t first, uint32_t second) {
    int32_t failed;
    l->taken[0] = first, l->taken[1] = second;
    int32_t status = em_ops_run(w->core, &l->op, 1, NULL, 0, 1, &failed);
    CHECK(status == EM_OK, "experts %u and %u: %d", first, second, status);
}

static bool asked_for(const world *w, int32_t turn, int32_t expert) {
    pthread_mutex_lock(&w->residency->mutex); /* its reads go on */
    bool asked = w->residency->states[turn * EXPERTS + expert].state != ABSENT;
    pthread_mutex_unlock(&w->residency->mutex);
    return asked;
}

static void reads_ahead_for_the_first_turn_that_lacks_something(void) {
    for (int lacking = 1; lacking <= 2; lacking++) {
        world w;
        layer layers[TURNS];
        const uint32_t second[] = {EXPERTS + 1, EXPERTS + 2};
        uint64_t addresses[2];
        open_world(&w, BUNDLES, NULL);
        w.ahead.longest_idle_us = 1e6;
        w.ahead.idle_us = 1e6;
        w.ahead.bytes_per_us = 1e6;
        make_layers(&w, layers);
        for (uint32_t i = 0; i < 2; i++) {
            layers[0].foreseen[i] = 1 + i;
            layers[1].foreseen[i] = 3 + i;
        }
        if (lacking == 2) {
            CHECK(em_residency_acquire(w.residency, second, 2, w.stream.ranks, addresses) == EM_OK,
                  "%s", "two of the second turn");
            em_residency_wait(w.residency, second, 2);
            em_residency_release(w.residency, second, 2);
        }
        take(&w, &layers[0], 0, 7);
        CHECK(asked_for(&w, 1, 1) && asked_for(&w, 1, 2), "turn %d lacks", lacking);
        CHECK(asked_for(&w, 2, 3) == (lacking == 2), "turn %d lacks", lacking);
        CHECK(w.stream.n_foreseen == 2, "%d foreseen", w.stream.n_foreseen);
        double before = w.ahead.precision;
        take(&w, &layers[1], 1, 2); /* all that was foreseen of this turn, and nothing else */
        CHECK(lacking == 1 ? w.ahead.precision > before : w.ahead.precision == before,
              "turn %d lacked: %f, %f before", lacking, w.ahead.precision, before);
        CHECK(w.stream.n_foreseen == 2, "%d foreseen", w.stream.n_foreseen);
        before = w.ahead.precision;
        take(&w, &layers[2], 3, 5); /* half of it */
        CHECK(w.ahead.precision < before, "%f, %f before", w.ahead.precision, before);
        CHECK(w.stream.n_foreseen == 0, "%d foreseen", w.stream.n_foreseen);
        CHECK(nothing_is_pinned(&w), "turn %d lacked", lacking);
        end_world(&w);
    }
}

/* With room for two bundles of a size, what the next turn has must not make place for later ones.
 */
static void what_is_wanted_sooner_stays(void) {
    world w;
    layer layers[TURNS];
    const uint32_t second[] = {EXPERTS + 1, EXPERTS + 3};
    uint64_t addresses[2];
    open_world(&w, 2, NULL);
    int32_t *certain_first = (int32_t *)w.stream.certain_first;
    memset(certain_first, 0, (TURNS + 1) * sizeof *certain_first);
    w.ahead.longest_idle_us = w.ahead.idle_us = w.ahead.bytes_per_us = 1e6;
    make_layers(&w, layers);
    layers[0].foreseen[0] = 1, layers[0].foreseen[1] = 3;
    layers[1].foreseen[0] = 3, layers[1].foreseen[1] = 4;
    CHECK(em_residency_acquire(w.residency, second, 2, w.stream.ranks, addresses) == EM_OK, "%s",
          "two of the second turn");
    em_residency_wait(w.residency, second, 2);
    em_residency_release(w.residency, second, 2);
    take(&w, &layers[0], 0, 7);
    CHECK(asked_for(&w, 1, 1) && asked_for(&w, 1, 3), "%s", "they are gone");
    end_world(&w);
}

int main(void) {
    what_is_wanted_sooner_stays();
    reads_ahead_for_the_first_turn_that_lacks_something();
    any_number_of_slots();
    every_read_fails_once();
    what_is_raised_ends_it();
    closed_or_busy();
    return check_report();
}
