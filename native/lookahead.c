/* How much to read ahead of demand: the arithmetic of edgemem/lookahead.py, which says what it
 * means. */
#include "base.h"
#include "edgemem.h"

#define MOST_BYTES 1e18

int64_t em_lookahead_admit(em_lookahead *s, int64_t idle_us, int64_t read_bytes, int64_t busy_us) {
    double idle = (double)(idle_us - s->idle_before), busy = (double)(busy_us - s->busy_before);
    double read = (double)(read_bytes - s->read_before);
    s->idle_before = idle_us;
    s->read_before = read_bytes;
    s->busy_before = busy_us;
    if (idle > s->longest_idle_us) idle = s->longest_idle_us;
    s->idle_us += (idle - s->idle_us) / s->memory;
    if (busy > 0) {
        double weight = s->bytes_per_us > 0 ? s->memory : 1;
        s->bytes_per_us += (read / busy - s->bytes_per_us) / weight;
    }
    if (s->layers_left > 0) {
        s->layers_left--;
        return 0;
    }
    double hit = s->precision < s->most_precision ? s->precision : s->most_precision;
    double admitted = s->idle_us * s->bytes_per_us / (1 - hit);
    return (int64_t)(admitted < 0 ? 0 : admitted > MOST_BYTES ? MOST_BYTES : admitted);
}

void em_lookahead_learn(em_lookahead *s, int32_t foreseen, int32_t used) {
    if (foreseen < 1) return;
    s->precision += ((double)used / foreseen - s->precision) / s->memory;
    if (s->precision >= s->least_precision) return;
    s->layers_left = s->pause;
    s->pause = 2 * s->pause < s->longest_pause ? 2 * s->pause : s->longest_pause;
    s->precision = s->first_precision;
}
