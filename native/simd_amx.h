/* The words of kernels.c for AMX (TILE, INT8): those of AVX-512 with VNNI, and a word that
 * multiplies a block of 16 rows by those of 8 or 16 tokens at once.
 *
 * Tiles are of palette 1 (Intel SDM, vol. 1, chapter 18): 16 rows of 64 bytes at most. Linux lends
 * them to a process that asks. A table of its own, for tests alone, has them emulated. */
#include "simd_avx512.h"

#include <stddef.h>

#define EM_TILE_TOKENS 16

/* Macros, since assemblers read them as parts of registers' names. */
#define TILE_ACTS 0
#define TILE_WEIGHTS 1
#define TILE_DOTS 2
#define TILE_NEXT_ACTS 3
#define TILE_NEXT_WEIGHTS 4
#define TILE_NEXT_DOTS 5
#define TILE_HALF_ACTS 6
#define TILE_HALF_DOTS 7

typedef struct {
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

_Static_assert(sizeof(tile_config) == 64 && offsetof(tile_config, row_bytes) == 16 &&
                   offsetof(tile_config, rows) == 48,
               "as LDTILECFG reads it");

#if defined(EM_ISA_amx_emulated)

#include <stdlib.h>

static _Thread_local struct {
    tile_config config;
    uint8_t rows[8][16][64];
} tiles;

/* What a processor refuses ends the test. */
EM_INLINE void tile_need(bool holds) {
    if (!holds) abort();
}

EM_INLINE void tile_configure(const tile_config *config) {
    uint8_t bytes[64];
    memcpy(bytes, config, 64);
    tile_need(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; i++) tile_need(bytes[i] == 0);
    for (int i = 0; i < 16; i++) {
        int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
        tile_need(row_bytes <= 64 && rows <= 16 && (row_bytes > 0) == (rows > 0));
        tile_need(i < 8 || rows == 0);
    }
    tiles.config = *config;
    memset(tiles.rows, 0xaa, sizeof tiles.rows); /* what is read must have been loaded */
}
EM_INLINE void tile_end(void) { memset(&tiles, 0, sizeof tiles); }
EM_INLINE void tile_zero(int tile) { memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]); }
EM_INLINE void tile_load(int tile, const void *from, int64_t stride) {
    for (int r = 0; r < tiles.config.rows[tile]; r++)
        memcpy(tiles.rows[tile][r], (const uint8_t *)from + r * stride,
               tiles.config.row_bytes[tile]);
}
EM_INLINE void tile_store(int tile, void *to, int64_t stride) {
    for (int r = 0; r < tiles.config.rows[tile]; r++)
        memcpy((uint8_t *)to + r * stride, tiles.rows[tile][r], tiles.config.row_bytes[tile]);
}
/* TDPBSSD: each of to's 32-bit sums += 4 signed bytes of a times 4 signed bytes of b. */
EM_INLINE void tile_dot(int to, int a, int b) {
    const tile_config *c = &tiles.config;
    tile_need(to != a && a != b && b != to && c->palette == 1);
    tile_need(c->rows[to] == c->rows[a] && c->row_bytes[to] == c->row_bytes[b]);
    tile_need(c->row_bytes[a] == 4 * c->rows[b] && c->rows[to] > 0);
    for (int m = 0; m < tiles.config.rows[to]; m++)
        for (int n = 0; n < tiles.config.row_bytes[to] / 4; n++) {
            int32_t sum;
            memcpy(&sum, tiles.rows[to][m] + 4 * n, 4);
            for (int k = 0; k < tiles.config.row_bytes[a] / 4; k++)
                for (int j = 0; j < 4; j++)
                    sum +=
                        (int8_t)tiles.rows[a][m][4 * k + j] * (int8_t)tiles.rows[b][k][4 * n + j];
            memcpy(tiles.rows[to][m] + 4 * n, &sum, 4);
        }
}

#else

#include <sys/syscall.h>
#include <unistd.h>

/* The barriers: compilers do not know how much these two read. */
#define tile_configure(config) (memory_barrier(), _tile_loadconfig(config))
#define tile_end() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride)                                                              \
    do {                                                                                           \
        memory_barrier();                                                                          \
        _tile_loadd(tile, from, stride);                                                           \
    } while (0)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_dot(to, a, b) _tile_dpbssd(to, a, b)

EM_INLINE void memory_barrier(void) { __asm__ volatile("" ::: "memory"); }

#define EM_PREPARE request_tiles
#define ARCH_REQ_XCOMP_PERM 0x1023 /* arch_prctl(2), Linux 5.16 */
#define XFEATURE_XTILEDATA 18

static bool request_tiles(void) {
#if defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

#endif

/* Between these two a thread's tiles hold `depth` columns of 16 tokens, two at a time, or of 8;
 * outside them it has none, so that nobody else's are disturbed, and switching threads saves
 * nothing. */
EM_INLINE void tiles_begin(int depth) {
    static const uint8_t acts[] = {TILE_ACTS, TILE_NEXT_ACTS, TILE_HALF_ACTS};
    static const uint8_t weights[] = {TILE_WEIGHTS, TILE_NEXT_WEIGHTS};
    static const uint8_t dots[] = {TILE_DOTS, TILE_NEXT_DOTS, TILE_HALF_DOTS};
    tile_config config = {.palette = 1};
    for (int i = 0; i < 3; i++) {
        config.rows[acts[i]] = config.rows[dots[i]] = i < 2 ? EM_TILE_TOKENS : 8;
        config.row_bytes[acts[i]] = (uint16_t)depth;
        config.row_bytes[dots[i]] = 4 * EM_LANES;
    }
    for (int i = 0; i < 2; i++) {
        config.rows[weights[i]] = (uint8_t)(depth / 4);
        config.row_bytes[weights[i]] = 4 * EM_LANES;
    }
    tile_configure(&config);
}
EM_INLINE void tiles_end(void) { tile_end(); }

/* dots[t * 16 + lane] = token t's columns of q, EM_BLOCK bytes after those of the one before it,
 * times row `lane` of the chunks w. What comes `next` after another takes tiles of its own: it does
 * not wait for that one's. */
#define TILES_DOT(ACTS, WEIGHTS, DOTS)                                                             \
    do {                                                                                           \
        tile_zero(DOTS);                                                                           \
        tile_load(ACTS, q, EM_BLOCK);                                                              \
        tile_load(WEIGHTS, w, 4 * EM_LANES);                                                       \
        tile_dot(DOTS, ACTS, WEIGHTS);                                                             \
        tile_store(DOTS, dots, 4 * EM_LANES);                                                      \
    } while (0)

EM_INLINE void tiles_dot(int32_t *dots, const int8_t *q, const int8_t *w, const int tokens,
                         bool next) {
    if (tokens < EM_TILE_TOKENS)
        TILES_DOT(TILE_HALF_ACTS, TILE_WEIGHTS, TILE_HALF_DOTS);
    else if (next)
        TILES_DOT(TILE_NEXT_ACTS, TILE_NEXT_WEIGHTS, TILE_NEXT_DOTS);
    else
        TILES_DOT(TILE_ACTS, TILE_WEIGHTS, TILE_DOTS);
}

EM_INLINE vb vb_set1(uint8_t x) { return _mm512_set1_epi8((char)x); }
EM_INLINE vb vb_sub(vb a, vb b) { return _mm512_sub_epi8(a, b); }
EM_INLINE void vb_store(int8_t *p, vb a) { _mm512_store_si512(p, a); }

/* Multiply-adds of tiles that stay where they are: how many, and what they add up to. */
static int64_t tiles_peak(float *sum) {
    enum { ROUNDS = 512, CHAINS = 4 };
    uint8_t ones[EM_TILE_TOKENS * EM_BLOCK], more[EM_BLOCK * EM_LANES];
    int32_t dots[CHAINS][EM_TILE_TOKENS * EM_LANES];
    tile_config config = {.palette = 1};
    int64_t total = 0;
    memset(ones, 1, sizeof ones);
    memset(more, 1, sizeof more);
    for (int i = 0; i < TILE_DOTS + CHAINS; i++) {
        config.rows[i] = i == TILE_WEIGHTS ? EM_BLOCK / 4 : EM_TILE_TOKENS;
        config.row_bytes[i] = i == TILE_ACTS ? EM_BLOCK : 4 * EM_LANES;
    }
    tile_configure(&config);
    tile_load(TILE_ACTS, ones, EM_BLOCK);
    tile_load(TILE_WEIGHTS, more, 4 * EM_LANES);
    tile_zero(2);
    tile_zero(3);
    tile_zero(4);
    tile_zero(5);
    for (int round = 0; round < ROUNDS; round++) {
        tile_dot(2, TILE_ACTS, TILE_WEIGHTS);
        tile_dot(3, TILE_ACTS, TILE_WEIGHTS);
        tile_dot(4, TILE_ACTS, TILE_WEIGHTS);
        tile_dot(5, TILE_ACTS, TILE_WEIGHTS);
    }
    tile_store(2, dots[0], 4 * EM_LANES);
    tile_store(3, dots[1], 4 * EM_LANES);
    tile_store(4, dots[2], 4 * EM_LANES);
    tile_store(5, dots[3], 4 * EM_LANES);
    tile_end();
    for (int i = 0; i < CHAINS * EM_TILE_TOKENS * EM_LANES; i++)
        total += dots[i / (EM_TILE_TOKENS * EM_LANES)][i % (EM_TILE_TOKENS * EM_LANES)];
    *sum = (float)total;
    return (int64_t)ROUNDS * CHAINS * EM_TILE_TOKENS * EM_LANES * EM_BLOCK;
}
