/* When bundles are expected to be used next, after each layer's turn: the arithmetic of
 * edgemem/policies/next_use.py, which says what it means. Loops over a layer's bundles are plain,
 * so that the compiler makes vectors of them. */
#include "base.h"
#include "edgemem.h"

#include <math.h>

/* Below this a rate is nothing. Smaller floats would in the end be subnormal, which is slow. */
#define LEAST_FLOAT 1e-20f

static void rates_decay(float *restrict rates, int64_t n, float keep) {
    for (int64_t i = 0; i < n; i++) {
        float left = rates[i] * keep;
        rates[i] = left < LEAST_FLOAT ? 0 : left;
    }
}

/* Moves the shares towards the rates that expected this turn's uses (expectation maximisation). */
static void shares_learn(em_next_use *s, const double *weights, const uint32_t *ids, int32_t n,
                         const int32_t *uses) {
    int64_t n_bundles = s->starts[s->n_layers];
    double credit[EM_MOST_RATES] = {0}, expected[EM_MOST_RATES], count = 0;
    for (int32_t i = 0; i < n; i++) {
        double use = uses ? (double)uses[i] : 1, sum = 0;
        for (int32_t r = 0; r < s->n_rates; r++) {
            double rate = s->rates[r * n_bundles + ids[i]] / weights[r];
            expected[r] = s->shares[r] * (rate + s->least_rate);
            sum += expected[r];
        }
        for (int32_t r = 0; r < s->n_rates; r++) credit[r] += use * expected[r] / sum;
        count += use;
    }
    if (count == 0) return;
    for (int32_t r = 0; r < s->n_rates; r++)
        s->shares[r] += s->learning * (credit[r] / count - s->shares[r]);
}

static void rates_feed(em_next_use *s, int32_t layer, const uint32_t *ids, int32_t n,
                       const int32_t *uses, int32_t tokens) {
    int64_t n_bundles = s->starts[s->n_layers], start = s->starts[layer];
    double *weights = s->weights + (int64_t)layer * s->n_rates;
    for (int32_t r = 0; r < s->n_rates; r++) {
        float *rates = s->rates + r * n_bundles;
        double keep = tokens == 1 ? s->keep[r] : pow(s->keep[r], (double)tokens);
        float gain = (float)((1 - keep) / (double)tokens);
        rates_decay(rates + start, s->starts[layer + 1] - start, (float)keep);
        for (int32_t i = 0; i < n; i++) rates[ids[i]] += uses ? gain * (float)uses[i] : gain;
        weights[r] = weights[r] * keep + (1 - keep);
    }
}

/* ranks = -(moment of the next use), from the mixture of this layer's rates. */
static void ranks_restate(em_next_use *s, int32_t layer) {
    int64_t n_bundles = s->starts[s->n_layers], start = s->starts[layer];
    int64_t n = s->starts[layer + 1] - start;
    const double *weights = s->weights + (int64_t)layer * s->n_rates;
    float *restrict ranks = s->ranks + start;
    for (int64_t i = 0; i < n; i++) ranks[i] = s->prior;
    for (int32_t r = 0; r < s->n_rates; r++) {
        const float *restrict rates = s->rates + r * n_bundles + start;
        float share = (float)(s->shares[r] / weights[r]);
        for (int64_t i = 0; i < n; i++) ranks[i] += share * rates[i];
    }
    float cycle = (float)-s->n_layers, now = (float)(s->clock + layer);
    for (int64_t i = 0; i < n; i++) ranks[i] = cycle / ranks[i] - now;
}

/* Starts a step; sets the clock back from time to time, so that float keeps telling layers apart.
 */
static void clock_advance(em_next_use *s) {
    s->clock += s->n_layers;
    if (s->clock < s->longest_clock) return;
    for (int64_t i = 0; i < s->starts[s->n_layers]; i++) s->ranks[i] += (float)s->clock;
    s->clock = 0;
}

int32_t em_next_use_observe(em_next_use *s, int32_t layer, const uint32_t *ids, int32_t n,
                            const int32_t *uses, int32_t tokens) {
    if (layer < 0 || layer >= s->n_layers || n < 0 || tokens < 1) return EM_INVALID;
    if (s->n_rates < 1 || s->n_rates > EM_MOST_RATES) return EM_INVALID;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < s->starts[layer] || ids[i] >= s->starts[layer + 1]) return EM_INVALID;
    if (layer <= s->last_layer) clock_advance(s);
    s->last_layer = layer;
    const double *weights = s->weights + (int64_t)layer * s->n_rates;
    if (weights[0] > 0) shares_learn(s, weights, ids, n, uses);
    rates_feed(s, layer, ids, n, uses, tokens);
    ranks_restate(s, layer);
    return EM_OK;
}
