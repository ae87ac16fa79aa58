/* What was used often and of late stays: a window over the last tokens (arXiv 2312.11514, section
 * 3.1), as wide as memory allows, that frequent rows outlast. */
#include "row_slots.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { ABSENT = -1, EMPTY = -1 };

/* Uses count half as much after so many takes (bench/LOG.md). */
#define HALF_LIFE 64
/* Ages are told apart in steps of 1/64 of that, up to 9 of them. */
enum { AGES = 1024, AGES_PER_LIFE = 64, YOUNGEST = 7, MOST_TAKES = HALF_LIFE << 10 };

struct em_row_slots {
    int32_t *slot_of;  /* [n_rows], or ABSENT */
    int32_t *occupant; /* [most_room], or EMPTY */
    float *heat;       /* [n_rows]: log2 of all uses, a use counting 2^(when / HALF_LIFE) */
    int32_t *used;     /* [n_rows]: when it was used last */
    bool *kept;        /* [n_rows]: may not leave */
    int32_t n_rows, room, most_room, n_kept;
    int32_t now; /* takes so far */
};

int32_t em_row_slots_of(const em_row_slots *p, int32_t id) { return p->slot_of[id]; }

void em_row_slots_vacate(em_row_slots *p, int32_t id) {
    p->occupant[p->slot_of[id]] = EMPTY;
    p->slot_of[id] = ABSENT;
}

/* Counts a use of a row now. */
static void warm(em_row_slots *p, int32_t id) {
    float now = (float)p->now / HALF_LIFE, before = p->heat[id];
    p->heat[id] = now + log2f(1 + exp2f(before - now));
    p->used[id] = p->now;
}

/* Lets time begin again, so that floats stay exact enough. */
static void start_over(em_row_slots *p) {
    for (int32_t i = 0; i < p->n_rows; i++) {
        p->heat[i] -= (float)p->now / HALF_LIFE;
        p->used[i] -= p->now;
    }
    p->now = 0;
}

/* The colder a slot's row, the higher; highest for empty slots, 0 for rows of the present take and
 * those that are kept. */
static int32_t age_of(const em_row_slots *p, int32_t slot) {
    int32_t id = p->occupant[slot];
    if (id == EMPTY) return AGES - 1;
    if (p->used[id] == p->now || p->kept[id]) return 0;
    float age = ((float)p->now / HALF_LIFE - p->heat[id] + YOUNGEST) * AGES_PER_LIFE;
    return age < 1 ? 1 : age > AGES - 2 ? AGES - 2 : (int32_t)age;
}

/* Gives each of n rows a slot: empty ones, then those of the coldest rows. */
static void place(em_row_slots *p, const int32_t *ids, int32_t n) {
    int32_t counts[AGES] = {0}, room = p->room, least = AGES - 1, colder = 0, placed = 0;
    for (int32_t slot = 0; slot < room; slot++) counts[age_of(p, slot)]++;
    while (colder + counts[least] < n && least > 1) colder += counts[least--];
    int32_t of_least = n - colder; /* how many of the warmest that must leave do so */
    for (int32_t slot = 0; slot < room && placed < n; slot++) {
        int32_t age = age_of(p, slot);
        if (age < least || (age == least && of_least-- <= 0)) continue;
        if (p->occupant[slot] != EMPTY) em_row_slots_vacate(p, p->occupant[slot]);
        p->occupant[slot] = ids[placed];
        p->slot_of[ids[placed++]] = slot;
    }
}

void em_row_slots_begin(em_row_slots *p) {
    if (p->now == MOST_TAKES) start_over(p);
    p->now++;
}

int32_t em_row_slots_want(em_row_slots *p, const int32_t *ids, int32_t n, int32_t *absent) {
    int32_t n_absent = 0;
    for (int32_t i = 0; i < n; i++) {
        if (p->slot_of[ids[i]] == ABSENT) absent[n_absent++] = ids[i];
        warm(p, ids[i]);
    }
    if (n_absent > 0) place(p, absent, n_absent);
    return n_absent;
}

void em_row_slots_keep(em_row_slots *p, const int32_t *ids, int32_t n) {
    int32_t most = p->room - (p->room + 3) / 4;
    memset(p->kept, 0, (size_t)p->n_rows * sizeof *p->kept);
    p->n_kept = 0;
    for (int32_t i = 0; i < n && p->n_kept < most; i++) {
        p->kept[ids[i]] = p->slot_of[ids[i]] != ABSENT;
        p->n_kept += p->kept[ids[i]];
    }
}

int32_t em_row_slots_fit(const em_row_slots *p, const int32_t *ids, int32_t n) {
    int32_t left = p->room - p->n_kept, fit = 0;
    for (; fit < n; fit++) {
        if (p->kept[ids[fit]]) continue;
        if (left-- == 0) break;
    }
    return fit;
}

void em_row_slots_resize(em_row_slots *p, int32_t room) {
    for (int32_t slot = room; slot < p->room; slot++)
        if (p->occupant[slot] != EMPTY) em_row_slots_vacate(p, p->occupant[slot]);
    p->room = room;
}

void em_row_slots_forget(em_row_slots *p) {
    p->now = 0;
    for (int32_t i = 0; i < p->n_rows; i++) p->heat[i] = -MOST_TAKES;
    for (int32_t i = 0; i < p->n_rows; i++) p->used[i] = -1;
    memset(p->kept, 0, (size_t)p->n_rows * sizeof *p->kept);
    p->n_kept = 0;
    for (int32_t i = 0; i < p->n_rows; i++) p->slot_of[i] = ABSENT;
    for (int32_t i = 0; i < p->most_room; i++) p->occupant[i] = EMPTY;
}

em_row_slots *em_row_slots_open(int32_t n_rows, int32_t room, int32_t most_room) {
    size_t n = (size_t)n_rows;
    em_row_slots *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->n_rows = n_rows;
    p->room = room;
    p->most_room = most_room;
    p->slot_of = malloc(n * sizeof *p->slot_of);
    p->occupant = malloc((size_t)most_room * sizeof *p->occupant);
    p->heat = malloc(n * sizeof *p->heat);
    p->used = malloc(n * sizeof *p->used);
    p->kept = malloc(n * sizeof *p->kept);
    if (!p->slot_of || !p->occupant || !p->heat || !p->used || !p->kept) {
        em_row_slots_close(p);
        return NULL;
    }
    em_row_slots_forget(p);
    return p;
}

void em_row_slots_close(em_row_slots *p) {
    if (!p) return;
    free(p->slot_of);
    free(p->occupant);
    free(p->heat);
    free(p->used);
    free(p->kept);
    free(p);
}
