/* The table of kernels: compiled once per instruction set from kernels.c, chosen once in cpu.c.
 *
 * A kernel works on one thread's share. Every table computes the same bytes. */
#ifndef EM_KERNELS_H
#define EM_KERNELS_H

#include "base.h"
#include "edgemem.h"

/* Activations of the tokens that one product reads: floats, and for block formats their int8 form.
 */
typedef struct {
    const float *x;      /* [n_tokens, cols] */
    const int8_t *q;     /* [n_tokens, blocks * 32], zero beyond cols */
    const float *scale;  /* [n_tokens, blocks] */
    const int32_t *sum;  /* [n_tokens, blocks]: the sum of each block's q */
    const int32_t *rows; /* which rows of the above the tokens are, or NULL for 0, 1, 2... */
    int32_t cols, blocks;
    const int32_t *first; /* [n_tokens, blocks]: the sum of the first half of each block's q */
    int64_t stride;       /* floats from one row of x to the next; 0 for cols */
} em_acts;

/* Where the products of rows [row0, row0 + 16 * n_groups) go. */
typedef struct {
    float *out; /* token t's element r is out[t * stride + r] */
    const float *bias;
    int64_t stride;
    int32_t rows; /* rows of the whole matrix: the last group may be partial */
    int32_t accumulate;
} em_out;

/* Bytes of a block of EM_Q8_0 in the KV cache: an f16 scale and 32 quants. */
#define EM_KV_BLOCK_BYTES 34

/* Rows of a store matrix of lanes 1, wherever they are. */
typedef struct {
    const uint8_t *const *rows;
    int32_t n, dtype;
    int64_t plane; /* bytes of a row's plane of scales */
} em_gathered;

#define EM_QUERIES 32
#define EM_SPAN_ROWS 64

/* Keys or values of one head in the KV cache: so many numbers with the zeros after them. */
typedef struct {
    const uint8_t *rows;
    int64_t row_bytes;
    int32_t padded;
} em_kept;

/* Up to EM_QUERIES queries of one key/value head: row r, of `heads` each token, sees keys
 * [begin, end + r / heads). */
typedef struct {
    em_acts acts;         /* the queries [n_rows, padded], as keys are; as blocks too where keys are
                           * of EM_Q8_0 */
    em_kept keys, values; /* the cache of the head, key 0's first */
    int64_t begin, end;
    int32_t n_rows, heads, dtype;
    float cap;            /* of scores (em_attention) */
    const float *sinks;   /* [heads] or NULL (em_attention_run) */
    const float *latents; /* [n_rows, padded], as values are: what of a query meets them; or NULL */
    float *block; /* scratch [EM_SPAN_ROWS, padded], of keys or of values, or their scales */
    float *out;   /* [n_rows, padded], as values are */
} em_queries;

typedef void em_product(const uint8_t *weights, int32_t first_group, int32_t n_groups,
                        const em_acts *acts, int32_t n_tokens, const em_out *out);

typedef struct {
    const char *name;
    em_product *product[EM_DTYPES]; /* by dtype code */
    /* Columns [first, first + cols) of up to EM_LANES rows as one group of a store matrix; of block
     * formats `first` is at a block. */
    void (*gather_rows)(const em_gathered *rows, int64_t first, int32_t cols, uint8_t *group);
    /* sum[c] += weights[i] * rows[i][first + c] for c < cols, in the order of i. `first` is a
     * multiple of 16; of block formats it and `cols` are whole blocks. */
    void (*add_rows)(const em_gathered *rows, int64_t first, int32_t cols, const float *weights,
                     float *sum);
    /* One row of `cols` floats into int8 blocks of 32: q = round(x * 127 / amax), and for scale
     * amax / 127 rounded to 11 significant bits. `first`, sums of first halves, may be NULL. */
    void (*quantize)(const float *x, int32_t cols, int8_t *q, float *scale, int32_t *sum,
                     int32_t *first);
    void (*rms_norm)(const float *x, const float *weight, float eps, int32_t n, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int32_t n,
                       float *out);
    /* gate[i] = activation(gate[i]) * up[i], or without `up` (NULL) the activation alone; of
     * EM_CLAMPED_SWIGLU gelu_quick(min(gate[i], 7)) * (1 + up[i] clamped to +-7) */
    void (*gate)(float *gate, const float *up, int32_t n, int32_t activation);
    /* x[i] = exp(x[i] - max) / sum */
    void (*softmax)(float *x, int32_t n);
    void (*sigmoid)(float *x, int32_t n);
    /* x[i] = limit * tanh(x[i] / limit) */
    void (*cap)(float *x, int32_t n, float limit);
    void (*scale)(float *x, int32_t n, float factor);
    /* out[i] += weight * x[i] */
    void (*axpy)(float *out, float weight, const float *x, int32_t n);
    /* Rotates the pairs (x[i], x[i + n/2]) by the angles of cos, sin [n/2]; out may be x. */
    void (*rotate)(const float *x, const float *cos_t, const float *sin_t, int32_t n, float *out);
    /* f32 to f16, round to nearest even. */
    void (*store_f16)(const float *x, int32_t n, uint16_t *out);
    /* n floats as one of a group's 16 keys, or as a value, of the KV cache (em_attention); zeros
     * beyond them. */
    void (*store_key)(const float *x, int32_t n, int32_t dtype, void *group, int64_t key);
    void (*store_value)(const float *x, int32_t n, int32_t dtype, void *row);
    void (*attend)(const em_queries *queries);
    /* Row `row` of a store matrix as floats. */
    void (*unpack_row)(const uint8_t *data, int32_t dtype, int32_t lanes, int32_t cols, int64_t row,
                       float *out);
    uint64_t (*read_bytes)(const uint8_t *data, uint64_t bytes);
    /* Some microseconds of the multiply-adds that a product of this dtype is made of, on memory of
     * a few lines: how many. `sum` is what they add up to, so that none can be left out. */
    int64_t (*peak)(int32_t dtype, float *sum);
    /* Asks the system for what the instructions need, before the first of them; NULL: nothing. */
    bool (*prepare)(void);
} em_kernels;

EM_INLINE int64_t em_acts_stride(const em_acts *a) { return a->stride ? a->stride : a->cols; }

EM_INLINE bool em_dtype_is_block(int32_t dtype) { return dtype >= EM_Q8_0; }

/* Bytes of one group of `lanes` rows, and of its plane of scales (dtypes.py, FORMAT.md). */
int64_t em_group_bytes(int32_t dtype, int32_t cols, int32_t lanes);
int64_t em_scale_bytes(int32_t dtype, int32_t cols, int32_t lanes);

/* cpu.c: whether to ask for memory into the second cache, then into the first: this processor is of
 * a kind that was faster so (bench/LOG.md). No bit of a result depends on it. */
extern bool em_by_two_caches;

/* cpu.c: the table of that name, or the best one that runs; NULL with a status if there is none. */
const em_kernels *em_kernels_pick(const char *isa, int32_t *status);

#endif
