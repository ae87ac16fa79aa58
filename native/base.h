/* What every file of the core shares: attributes, rounding, and the scratch arena of one call. */
#ifndef EM_BASE_H
#define EM_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EM_LANES 16
#define EM_BLOCK 32
#define EM_ALIGN 64

#define EM_INLINE static inline __attribute__((always_inline))

EM_INLINE int64_t em_round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

EM_INLINE int64_t em_min(int64_t a, int64_t b) { return a < b ? a : b; }
EM_INLINE int64_t em_max(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t em_now_ns(void); /* a clock that never goes back */
int64_t em_now_us(void);

/* Takes pieces off the core's scratch, in order; `take` gives NULL once it is used up. */
typedef struct {
    uint8_t *base;
    uint64_t used, size;
} em_arena;

void *em_arena_take(em_arena *arena, uint64_t bytes);

/* Bytes that em_arena_take really uses for a request. */
EM_INLINE uint64_t em_arena_cost(uint64_t bytes) { return (bytes + EM_ALIGN - 1) & ~(uint64_t)63; }

#endif
