/* Turns: a part of a model takes the bundles it wants, for as long as it computes with them.
 *
 * Resident bundles are just there. Of streamed ones a turn's whole demand is issued at once, in
 * rounds where it is more than memory holds; while its last reads run, what comes after it is read
 * ahead; then what has landed is computed. */
#include "stream.h"

#include "core.h"
#include "residency.h"
#include "rows.h"

#include <string.h>

/* Turns that are asked what they will want, until one lacks something. A third brought nothing. */
#define MOST_AHEAD 2

/* Bundles that are held for one computation. */
typedef struct {
    const uint64_t *addresses;
    const int32_t *ready; /* NULL: all are there */
    const uint32_t *indices;
    int32_t first; /* their place in the turn's demand */
    int32_t n;
} held_round;

typedef struct {
    const uint32_t *bundles, *picked; /* bundles[picked[i]], or bundles[i] where NULL */
    const int32_t *uses;
    int32_t n, tokens;
    const em_foresight *foresight; /* NULL: none */
    int32_t (*compute)(em_core *core, const void *op, const held_round *round, int32_t tokens);
    const void *op;
    int64_t computing_ns, foreseeing_ns; /* so far */
} em_turn;

static int32_t compute(em_core *core, em_turn *t, const held_round *round) {
    int64_t started = em_now_ns();
    int32_t status = t->compute(core, t->op, round, t->tokens);
    t->computing_ns += em_now_ns() - started;
    return status;
}

/* ---- reading ahead ----------------------------------------------------------------------- */

/* Compares what was foreseen of a turn with what came, and forgets what has not started. */
static void learn(em_stream *s, int32_t turn, int32_t n) {
    int32_t used = 0, stale = 0, later = 0, foreseen = s->n_foreseen;
    if (foreseen == 0) return;
    for (int32_t i = 0; i < n; i++) s->wanted[s->indices[i]] = 1;
    for (int32_t i = 0; i < foreseen; i++) {
        uint32_t index = s->foreseen[i];
        if (s->turn_of[index] != turn)
            s->foreseen[later++] = index;
        else if (s->wanted[index])
            used++;
        else
            s->likely[stale++] = index;
    }
    for (int32_t i = 0; i < n; i++) s->wanted[s->indices[i]] = 0;
    s->n_foreseen = later;
    if (s->lookahead) em_lookahead_learn(s->lookahead, foreseen - later, used);
    if (stale == 0) return;
    em_residency_cancel(s->residency, s->likely, stale);
    s->n_foreseen = 0; /* what has not started for later turns is cancelled with it */
}

static void write_foreseen(em_stream *s, uint32_t index) {
    for (int32_t i = 0; i < s->n_foreseen; i++)
        if (s->foreseen[i] == index) return;
    s->foreseen[s->n_foreseen++] = index;
}

/* The bundles that the present state asks for, likeliest first, of equals the first first. */
static int32_t foresee(em_core *core, em_stream *s, const em_foresight *f, int32_t tokens,
                       uint32_t *likely, int32_t *n_likely) {
    const em_route_op *r = f->routing;
    int32_t failed, n = 0;
    int32_t status = em_ops_run(core, f->ops, f->n_ops, NULL, 0, tokens, &failed);
    if (status != EM_OK) return status;
    for (int32_t i = 0; i < *r->n_chosen; i++) {
        int64_t index = s->index_of[f->bundles[r->experts[i]]];
        float likelihood = tokens > 1 ? (float)(r->first[i + 1] - r->first[i]) : r->weights[i];
        if (index < 0) continue;
        int32_t at = n++;
        for (; at > 0 && s->likelihood[at - 1] < likelihood; at--) {
            s->likelihood[at] = s->likelihood[at - 1];
            likely[at] = likely[at - 1];
        }
        s->likelihood[at] = likelihood;
        likely[at] = (uint32_t)index;
    }
    *n_likely = n;
    return EM_OK;
}

/* Starts on what a later turn will likely want, `*n` of `likely`; `*absent`: how much of that is
 * not there. The `kept` bundles before those are wanted sooner, and are there. */
static int32_t read_ahead(em_core *core, em_stream *s, const em_foresight *f, int32_t tokens,
                          uint64_t room, int32_t kept, int32_t *n, int32_t *absent) {
    uint32_t *likely = s->likely + kept;
    int32_t status = foresee(core, s, f, tokens, likely, n);
    if (status != EM_OK) return status;
    const int32_t *ready = em_residency_ready(s->residency);
    for (int32_t i = 0; i < *n; i++) {
        uint32_t index = likely[i], *to = likely + *absent;
        if (__atomic_load_n(&ready[index], __ATOMIC_ACQUIRE) != EM_READY_NOT) continue;
        memmove(to + 1, to, (size_t)(i - *absent) * sizeof *to);
        *to = index;
        ++*absent;
        write_foreseen(s, index);
    }
    if (*absent == 0) return EM_OK;
    /* Behind the absent those that are there go along, so that none of them makes place. */
    memcpy(likely + *n, s->likely, (size_t)kept * sizeof *likely);
    em_residency_prefetch(s->residency, likely, *n + kept, s->ranks, room);
    return EM_OK;
}

/* Starts on later turns' bundles while this turn is computed: on those that are certain, and on
 * what the first of them that lacks something will likely want. */
static int32_t look_ahead(em_core *core, em_stream *s, int32_t turn, em_turn *t) {
    int32_t from = s->certain_first[turn], sure = s->certain_first[turn + 1] - from;
    if (sure > 0)
        em_residency_prefetch(s->residency, s->certain + from, sure, s->ranks, UINT64_MAX);
    const em_foresight *f = t->foresight;
    if (!f || f->n_ops == 0 || !s->lookahead) return EM_OK;
    em_residency_stats stats = em_residency_statistics(s->residency);
    int64_t room = em_lookahead_admit(s->lookahead, stats.idle_us, stats.read_bytes, stats.busy_us);
    if (room == 0) return EM_OK;
    int64_t started = em_now_ns();
    int32_t absent = 0, kept = 0, n = 0, status = EM_OK;
    for (int32_t i = 0; i < MOST_AHEAD && f && f->n_ops > 0; i++, f = f->next, kept += n) {
        status = read_ahead(core, s, f, t->tokens, (uint64_t)room, kept, &n, &absent);
        if (status != EM_OK || absent > 0) break;
    }
    t->foreseeing_ns += em_now_ns() - started;
    return status;
}

/* ---- turns ------------------------------------------------------------------------------- */

/* edgemem/planner.py's rule: how many of the turn's bundles are held at once. All, or where a class
 * has fewer slots, half of those of the tightest, so that the next round lands while one is
 * computed. */
/* (Slots change only between steps, so that they need no lock here.) */
static int32_t round_size(const em_residency *r, const uint32_t *indices, int32_t n) {
    int32_t tight = INT32_MAX;
    for (int32_t c = 0; c < r->n_classes; c++) {
        if (n <= r->n_open[c]) continue;
        int32_t count = 0;
        for (int32_t i = 0; i < n; i++) count += r->bundles[indices[i]].slot_class == c;
        if (count > r->n_open[c] && r->n_open[c] < tight) tight = r->n_open[c];
    }
    return tight == INT32_MAX ? n : tight < 4 ? 1 : tight / 2;
}

/* Computes with bundles first…end of the turn's demand, and lets go of them. */
static int32_t give(em_core *core, em_stream *s, em_turn *t, int32_t first, int32_t end) {
    held_round round = {s->held + first, em_residency_ready(s->residency), s->indices + first,
                        first, end - first};
    int32_t status = compute(core, t, &round);
    em_residency_release(s->residency, s->indices + first, end - first);
    return status;
}

/* All rounds of a turn: the reads of one run while the one before it is computed. */
static int32_t run_rounds(em_core *core, em_stream *s, int32_t turn, em_turn *t) {
    int32_t size = round_size(s->residency, s->indices, t->n), given = 0, held = 0;
    int32_t status = EM_OK;
    while (held < t->n && status == EM_OK) {
        int32_t start = held, n = t->n - held < size ? t->n - held : size;
        status =
            em_residency_acquire(s->residency, s->indices + start, n, s->ranks, s->held + start);
        if (status != EM_OK) break;
        held += n;
        if (start == given) continue;
        status = give(core, s, t, given, start);
        given = start;
        if (status == EM_OK && s->pause)
            status = s->pause(s->user, turn, s->indices, t->n, t->uses, t->tokens);
    }
    if (status == EM_OK) {
        learn(s, turn, t->n);
        status = look_ahead(core, s, turn, t);
    }
    if (status == EM_OK) {
        status = give(core, s, t, given, held);
        given = held;
    }
    em_residency_release(s->residency, s->indices + given, held - given);
    return status;
}

static int32_t observe(em_stream *s, int32_t turn, const em_turn *t) {
    if (s->policy)
        return em_next_use_observe(s->policy, turn, s->indices, t->n, t->uses, t->tokens);
    return s->observe(s->user, turn, s->indices, t->n, t->uses, t->tokens);
}

static int32_t take_turn(em_core *core, em_stream *s, em_turn *t) {
    if (t->n == 0) return EM_OK;
    for (int32_t i = 0; i < t->n; i++) {
        uint32_t bundle = t->bundles[t->picked ? t->picked[i] : (uint32_t)i];
        s->demand_bytes += s->sizes[bundle];
        s->indices[i] = (uint32_t)s->index_of[bundle];
        s->held[i] = s->addresses[bundle];
    }
    if (s->index_of[t->bundles[t->picked ? t->picked[0] : 0]] < 0) {
        held_round all = {s->held, NULL, s->indices, 0, t->n};
        return compute(core, t, &all);
    }
    if (!s->residency) return EM_UNSUPPORTED; /* closed */
    int32_t turn = s->turn_of[s->indices[0]];
    int32_t status = observe(s, turn, t);
    if (status == EM_OK) status = run_rounds(core, s, turn, t);
    if (status == EM_OK && s->log) em_demand_write(s->log, s->indices, t->n, 0);
    if (status == EM_OK && s->record)
        status = s->record(s->user, turn, s->indices, t->n, t->uses, t->tokens);
    return status;
}

static int32_t run_turn(em_core *core, em_stream *s, em_turn *t) {
    if (s->busy) return EM_UNSUPPORTED;
    int64_t started = em_now_ns();
    s->busy = 1;
    int32_t status = take_turn(core, s, t);
    s->busy = 0;
    int64_t taking = em_now_ns() - started - t->computing_ns - t->foreseeing_ns;
    core->times.taking_ns += taking;
    core->times.foreseeing_ns += t->foreseeing_ns;
    core->aside_ns += taking + t->foreseeing_ns;
    return status;
}

/* ---- what takes turns -------------------------------------------------------------------- */

static int32_t wait_for(em_core *core, em_stream *s, const held_round *r) {
    if (!r->ready) return EM_OK;
    int64_t started = em_now_ns();
    int32_t status = em_residency_wait(s->residency, r->indices, r->n);
    core->aside_ns += em_now_ns() - started;
    return status;
}

static int32_t compute_ffn(em_core *core, const void *op, const held_round *r, int32_t tokens) {
    const em_ffn_op *f = op;
    const int32_t all[] = {0, tokens};
    const int32_t *first = f->routing ? f->routing->first + r->first : all;
    return em_ffn_run(core, f->ffn, r->n, r->addresses, r->ready, r->indices, first, f->tokens,
                      f->weights, f->x, tokens, f->out);
}

int32_t em_stream_ffn(em_core *core, const em_ffn_op *f, int32_t tokens) {
    em_turn turn = {
        .bundles = f->bundles, .n = 1, .tokens = tokens, .compute = compute_ffn, .op = f};
    const em_route_op *r = f->routing;
    if (r) {
        turn.picked = r->experts;
        turn.n = *r->n_chosen;
        turn.foresight = &f->foresight;
        for (int32_t i = 0; tokens > 1 && i < turn.n; i++)
            f->stream->uses[i] = r->first[i + 1] - r->first[i];
        if (tokens > 1) turn.uses = f->stream->uses;
    }
    return run_turn(core, f->stream, &turn);
}

static int32_t compute_gather(em_core *core, const void *op, const held_round *r, int32_t tokens) {
    const em_gather_op *g = op;
    int32_t status = wait_for(core, g->stream, r);
    if (status != EM_OK) return status;
    memset(g->addresses, 0, (size_t)g->n_bundles * sizeof *g->addresses);
    for (int32_t i = 0; i < r->n; i++) g->addresses[g->wanted[r->first + i]] = r->addresses[i];
    return em_embed(core, g->addresses, g->rows_per_bundle, g->dtype, g->lanes, g->cols, g->ids,
                    tokens, g->out);
}

int32_t em_stream_gather(em_core *core, const em_gather_op *g, int32_t tokens) {
    em_turn turn = {.bundles = g->bundles,
                    .picked = g->wanted,
                    .uses = g->uses,
                    .n = g->n_wanted,
                    .tokens = tokens,
                    .compute = compute_gather,
                    .op = g};
    return run_turn(core, g->stream, &turn);
}

static int32_t compute_table(em_core *core, const void *op, const held_round *r, int32_t tokens) {
    const em_table_op *t = op;
    int32_t status = wait_for(core, t->stream, r);
    if (status != EM_OK) return status;
    em_linear *items = t->items + r->first;
    for (int32_t i = 0; i < r->n; i++) {
        items[i].weights = (const void *)(uintptr_t)r->addresses[i];
        items[i].out = t->out + (int64_t)(r->first + i) * t->rows_per_bundle;
    }
    return em_linears(core, items, r->n, t->x, tokens);
}

int32_t em_stream_table(em_core *core, const em_table_op *t, int32_t tokens) {
    em_turn turn = {.bundles = t->bundles,
                    .n = t->n_bundles,
                    .tokens = tokens,
                    .compute = compute_table,
                    .op = t};
    return run_turn(core, t->stream, &turn);
}

static int32_t compute_neurons(em_core *core, const void *op, const held_round *r, int32_t tokens) {
    const em_neurons_op *o = op;
    int32_t status = wait_for(core, o->stream, r);
    if (status != EM_OK) return status;
    const em_neurons *f = o->neurons;
    int64_t used = 0;
    status = em_neurons_run(core, f, (const void *)(uintptr_t)r->addresses[0], &o->rows, o->x,
                            tokens, o->out, &used);
    o->stream->demand_bytes += used * em_neuron_bytes(f);
    return status;
}

int32_t em_stream_neurons(em_core *core, const em_neurons_op *o, int32_t tokens) {
    em_turn turn = {
        .bundles = o->bundles, .n = 1, .tokens = tokens, .compute = compute_neurons, .op = o};
    return run_turn(core, o->stream, &turn);
}
