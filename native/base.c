#define _GNU_SOURCE /* MADV_DONTNEED */

#include "base.h"

#include "edgemem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

void *em_arena_take(em_arena *arena, uint64_t bytes) {
    uint64_t cost = em_arena_cost(bytes);
    if (cost < bytes || cost > arena->size - arena->used) return NULL;
    void *piece = arena->base + arena->used;
    arena->used += cost;
    return piece;
}

int64_t em_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t em_now_us(void) { return em_now_ns() / 1000; }

void em_pages_drop(void *start, uint64_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)start;
    uintptr_t first = (from + page - 1) / page * page, last = (from + bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_DONTNEED);
}

/* CRC-32C, polynomial 0x1EDC6F41 reflected (RFC 3720, section 12.1). */
#define POLYNOMIAL 0x82F63B78u

/* Eight tables advance the CRC by eight bytes at a time ("slicing-by-8"). */
static uint32_t table[8][256];

__attribute__((constructor)) static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        table[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++)
            table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
}

static uint32_t portable(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint32_t low = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
                              (uint32_t)p[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
              table[4][low >> 24] ^ table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^
              table[0][p[7]];
    }
    while (n--) crc = crc >> 8 ^ table[0][(crc ^ *p++) & 255];
    return crc;
}

#if defined(__x86_64__)
/* Appending `zeros` zero bytes to a message is linear in its CRC; this is that map for LANE_BYTES.
 */
#define LANE_BYTES 4096

static uint32_t shift_table[4][256];

__attribute__((constructor)) static void fill_shift_table(void) {
    uint32_t column[32];
    for (int bit = 0; bit < 32; bit++) {
        column[bit] = 1u << bit;
        for (int i = 0; i < LANE_BYTES * 8; i++)
            column[bit] = column[bit] & 1 ? column[bit] >> 1 ^ POLYNOMIAL : column[bit] >> 1;
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 256; i++)
            for (int bit = 0; bit < 8; bit++)
                if (i >> bit & 1) shift_table[k][i] ^= column[8 * k + bit];
}

static uint32_t shift(uint32_t crc) {
    return shift_table[0][crc & 255] ^ shift_table[1][crc >> 8 & 255] ^
           shift_table[2][crc >> 16 & 255] ^ shift_table[3][crc >> 24];
}

/* The crc32 instruction takes 3 cycles but starts one each cycle: three lanes run at once. The next
 * three are asked for in the order of memory: that order alone is fast. */
__attribute__((target("sse4.2"))) static uint32_t sse42(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 3 * LANE_BYTES; p += 3 * LANE_BYTES, n -= 3 * LANE_BYTES) {
        uint64_t a = crc, b = 0, c = 0;
        for (size_t i = 0; i < LANE_BYTES; i += 8) {
            uint64_t wa, wb, wc;
            for (size_t line = 0; i % 64 == 0 && line < 3 * 64; line += 64)
                _mm_prefetch((const char *)p + 3 * (LANE_BYTES + i) + line, _MM_HINT_T0);
            memcpy(&wa, p + i, 8);
            memcpy(&wb, p + LANE_BYTES + i, 8);
            memcpy(&wc, p + 2 * LANE_BYTES + i, 8);
            a = _mm_crc32_u64(a, wa);
            b = _mm_crc32_u64(b, wb);
            c = _mm_crc32_u64(c, wc);
        }
        crc = shift(shift((uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
    }
    uint64_t wide = crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    return portable((uint32_t)wide, p, n);
}
#endif

uint32_t em_crc32c(uint32_t crc, const void *data, size_t n) {
    const uint8_t *p = data;
    crc = ~crc;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return ~(__builtin_cpu_supports("sse4.2") ? sse42(crc, p, n) : portable(crc, p, n));
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    return ~portable(crc, p, n);
#else
    return ~portable(crc, p, n);
#endif
}
