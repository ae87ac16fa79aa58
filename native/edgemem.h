/* The native core's whole interface: what Python (through cffi) and the native tests call.
 *
 * Rules that hold everywhere: a function returns EM_OK or says in its status why nothing was done;
 * nothing prints, aborts or exits; after em_core_reserve nothing is allocated; pointers are
 * borrowed for the length of the call; all arrays are dense and row-major unless a stride is named.
 *
 * Every finite result is the same bytes for every instruction set, thread count and split of tokens
 * over calls: each output element is one chain of operations in an order that only its own inputs
 * fix. Numbers that overflow become infinite or NaN and stay so to the end; they are never replaced
 * by something finite. Indices that come in arrays (ids, tokens, first) are the caller's to check.
 */
#ifndef EDGEMEM_H
#define EDGEMEM_H

#include "flash.h"

#include <stddef.h>
#include <stdint.h>

/* cdef: everything between these two marks is also what cffi parses */

enum {
    EM_OK = 0,
    EM_INVALID = 1,     /* an argument is out of range: a bug of the caller */
    EM_UNSUPPORTED = 2, /* the named instruction set is unknown, not built in, or not run here */
    EM_NO_MEMORY = 3,   /* an allocation failed, or the reserved scratch is too small */
    EM_NO_THREADS = 4,  /* the system refused to start a thread */
    EM_FLASH = 5,       /* a bundle could not be read, or its checksum is wrong */
    EM_RAISED = 6,      /* a function of the caller's says that this is the end */
};

/* Number formats; the codes are those of the store. */
enum {
    EM_F32 = 0,
    EM_F16 = 1,
    EM_BF16 = 2,
    EM_Q8_0 = 3, /* and blocks from here on */
    EM_Q4_0 = 4,
    EM_Q4_1 = 5,
    EM_Q5_0 = 6,
    EM_Q5_1 = 7,
    EM_Q2_K = 8,
    EM_Q3_K = 9,
    EM_Q4_K = 10,
    EM_Q5_K = 11,
    EM_Q6_K = 12,
    EM_IQ4_NL = 13,
    EM_IQ4_XS = 14,
    EM_MXFP4 = 15,
    EM_DTYPES = 16
};

enum {
    EM_SILU = 0,
    EM_GELU = 1,
    EM_GELU_TANH = 2,
    EM_GELU_QUICK = 3,
    EM_RELU = 4,
    EM_RELU2 = 5,
    EM_CLAMPED_SWIGLU = 6, /* of gate and up together: needs both, and clamps infinities too */
};

/* Continues the CRC-32C (Castagnoli) `crc` over n bytes; start with 0. */
uint32_t em_crc32c(uint32_t crc, const void *data, size_t n);

/* Names of the instruction sets built in, best first; NULL past the end. */
const char *em_isa_name(int32_t i);
/* 1 if that instruction set ran its self-test here and gave the portable code's bytes, else 0. */
int32_t em_isa_runs(int32_t i);

/* A thread pool, one table of kernels, and scratch memory. Not reentrant: one call at a time. */
typedef struct em_core em_core;

/* isa: a name, or NULL for the best that runs. n_threads counts the calling thread. */
int32_t em_core_open(int32_t n_threads, const char *isa, em_core **core);
void em_core_close(em_core *core);
const char *em_core_isa(const em_core *core);
/* Grows scratch to at least `bytes`; called when a model is opened, never in a step. */
int32_t em_core_reserve(em_core *core, uint64_t bytes);
/* Gives the memory of scratch beyond `bytes` back to the system until it is used again. */
void em_core_trim(em_core *core, uint64_t bytes);
/* Gives the whole pages of this memory, which its owner keeps, back to the system: then they are
 * zero, and taken again when they are used. */
void em_pages_drop(void *start, uint64_t bytes);
/* What the calling thread has done since open, beside its operations' own work. */
typedef struct {
    int64_t stall_ns;  /* em_ffn_run waited for bundles */
    int64_t taking_ns; /* turns took bundles, let go of them, and called back */
    int64_t foreseeing_ns;
} em_core_times;
em_core_times em_core_clocks(const em_core *core);

/* out[t, r] (+)= bias[r] + sum over c of weights[r, c] * x[t, c]. `weights` is a store matrix of 16
 * lanes, 64-byte aligned. */
typedef struct {
    const void *weights;
    const float *bias; /* [rows] or NULL */
    float *out;
    int64_t out_stride; /* floats from one token's row to the next */
    int32_t dtype;
    int32_t rows;
    int32_t cols;
    int32_t accumulate; /* add to out instead of replacing it */
} em_linear;

uint64_t em_linear_scratch(int32_t n_tokens, int32_t cols);
/* All the linears read the same x [n_tokens, cols]; it is quantised once if any of them needs it.
 */
int32_t em_linears(em_core *core, const em_linear *linears, int32_t n_linears, const float *x,
                   int32_t n_tokens);

/* Each head of each token has x and out of its own, a stride from the next, and the matrix `rows`
 * rows for each head, head after head, a multiple of 16: out is the first `taken` numbers of x, and
 * then the product of the head's rows and the `cols` numbers after those. */
typedef struct {
    const void *weights;
    const float *x;
    float *out;
    int32_t dtype, n_heads, rows, cols;
    int32_t taken, x_stride, out_stride;
} em_heads;

uint64_t em_heads_scratch(int32_t n_tokens, int32_t n_heads, int32_t cols);
int32_t em_heads_run(em_core *core, const em_heads *heads, int32_t n_tokens);

/* Where an FFN's parts lie in its bundle; offset -1 means absent. Without a gate up alone goes
 * through the activation. */
typedef struct {
    int64_t gate, up, down, gate_bias, up_bias, down_bias;
    int32_t gate_dtype, up_dtype, down_dtype;
    int32_t hidden, intermediate, activation;
} em_ffn;

uint64_t em_ffn_scratch(int32_t n_tokens, int32_t n_pairs, int32_t hidden, int32_t intermediate);
/* out[t] += sum over t's pairs, in bundle order, of weight * ffn(bundle, x[t]).
 * A pair says that a bundle computes a token: pairs [first[b], first[b+1]) belong to bundle b, and
 * pair p takes token tokens[p] with weight weights[p]. Where `ready` is given, gate and up wait for
 * EM_READY_FIRST in ready[ids[b]], down for EM_READY_WHOLE (whoever sets it does so in release
 * order, after the bytes are in place): bundles are computed in the order in which they become
 * ready, and summed in their own order all the same. EM_READY_FAILED ends the call with EM_FLASH
 * before `out` is touched. */
int32_t em_ffn_run(em_core *core, const em_ffn *ffn, int32_t n_bundles, const uint64_t *addresses,
                   const int32_t *ready, const uint32_t *ids, const int32_t *first,
                   const int32_t *tokens, const float *weights, const float *x, int32_t n_tokens,
                   float *out);

/* How logits become scores: a softmax over all experts; a sigmoid of each; or, expert by expert, a
 * softmax over those that are left and close to the best of them (arXiv 2409.12136). */
enum { EM_SOFTMAX = 0, EM_SIGMOID = 1, EM_SPARSEMIXER = 2 };

enum { EM_MOST_GROUPS = 64 };

/* How tokens choose experts: the top_k of the highest scores (ties: the lower id), whose scores are
 * their weights; `normalize`: scaled to sum 1; then times `scale`. A `bias` is added to scores
 * where they are compared, of EM_SIGMOID alone. Of n_groups > 1 groups of experts only top_groups
 * are chosen from: a group is judged by its best, of EM_SIGMOID by the sum of its two best. */
typedef struct {
    int32_t n_experts, top_k, normalize, scoring;
    int32_t n_groups, top_groups; /* 0 for none */
    const float *bias;            /* [n_experts] or NULL */
    float scale;
    float jitter; /* of EM_SPARSEMIXER: experts are close by twice that share */
} em_router;

/* Gives pairs for em_ffn_run: `experts` [<= n_experts] ascending, `first` [n_experts + 1], `tokens`
 * and `weights` [n_tokens * top_k]; returns how many experts, or -1 for arguments out of range or
 * scratch too small. */
uint64_t em_route_scratch(int32_t n_tokens, int32_t n_experts, int32_t top_k);
int32_t em_route(em_core *core, const em_router *router, const float *logits, int32_t n_tokens,
                 uint32_t *experts, int32_t *first, int32_t *tokens, float *weights);

/* Each of n_rows rows without bias (NULL): x / sqrt(mean(x^2) + eps) * weight; with it LayerNorm:
 * (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias. out may be x. */
int32_t em_norm(em_core *core, const float *x, const float *weight, const float *bias, float eps,
                int32_t n_rows, int32_t n_cols, float *out);

/* Rows `ids` of a table whose bundles hold rows_per_bundle rows each. out [n, cols]; rows of a
 * bundle whose address is 0 are left as they are. */
int32_t em_embed(em_core *core, const uint64_t *addresses, int32_t rows_per_bundle, int32_t dtype,
                 int32_t lanes, int32_t cols, const int32_t *ids, int32_t n, float *out);

/* cos and sin [n, dims / 2] of (position + i) * inv_freq, times `scale`. */
int32_t em_rope_table(const double *inv_freq, int32_t dims, int64_t position, int32_t n,
                      double scale, float *cos_out, float *sin_out);

/* One layer's attention. The caches are [n_kv_heads, context] rows of em_kv_row_bytes. A value is a
 * row: its numbers and zeros up to a multiple of 16; or, of EM_Q8_0, of 32, in blocks of an
 * f16 scale and 32 int8 quants. Keys lie as rows of weights do, in groups of 16 (FORMAT.md), but
 * planes of scales are not rounded up. */
typedef struct {
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t window;   /* keys a query sees, itself included; 0 for all */
    int32_t rotary;   /* the first so many numbers of a head are rotated; 0 for all */
    int32_t latent;   /* numbers of a value, with which its key of head_dim numbers ends; only the
                       * `rotary` before them are kept as a key. 0: keys are their own */
    int32_t kv_dtype; /* EM_F32, EM_F16 or EM_Q8_0 */
    float scale;      /* of scores; 0 for 1 / sqrt(head_dim) */
    float cap;        /* scores s become cap * tanh(s / cap); 0 for no cap */
    int64_t context;  /* a multiple of 16 */
    void *k_cache;
    void *v_cache;
} em_attention;

int64_t em_kv_row_bytes(int32_t kv_dtype, int32_t head_dim);
uint64_t em_attention_scratch(int32_t n_threads, int32_t head_dim);
/* Rotates q [n, n_heads, head_dim] in place, and k [n, n_kv_heads, head_dim] into the cache with v.
 * With a `latent` k has `rotary` numbers and v `latent`, which make a key together. */
int32_t em_attention_store(em_core *core, const em_attention *a, float *q, const float *k,
                           const float *v, const float *cos_table, const float *sin_table,
                           int64_t position, int32_t n);
/* Causal attention of queries at `position`...: out [n, n_heads, head_dim], which may be q; with a
 * `latent` only the first so many numbers of a head are written. Online softmax. Each head of
 * `sinks` [n_heads], or NULL, has that score more, of a key without a value. */
int32_t em_attention_run(em_core *core, const em_attention *a, const float *sinks, const float *q,
                         int64_t position, int32_t n, float *out);

int32_t em_clamp(float *x, int64_t n, float limit);
int32_t em_scale(em_core *core, float *x, int64_t n, float factor);
/* x = limit * tanh(x / limit) */
int32_t em_cap(em_core *core, float *x, int64_t n, float limit);
/* out += factor * x */
int32_t em_add(em_core *core, float *out, const float *x, int64_t n, float factor);
int32_t em_sigmoid(em_core *core, float *x, int32_t n);
/* Each of n_rows rows, in place. */
int32_t em_softmax(em_core *core, float *x, int32_t n_rows, int32_t n_cols);
/* What a product of block formats makes of its input x [n_rows, n_cols] first: blocks of 32, the
 * last filled up with zeros. q [n_rows, blocks, 32]; scale and sum [n_rows, blocks]. */
int32_t em_quantize(em_core *core, const float *x, int32_t n_rows, int32_t n_cols, int8_t *q,
                    float *scale, int32_t *sum);

/* Adds up 8-byte words: the plain read that kernels are measured against. */
uint64_t em_read_bytes(em_core *core, const void *data, uint64_t bytes);
/* `items` runs, shared by the threads, of the multiply-adds that products of this dtype are made
 * of, without memory: the pace that bounds products of many tokens. Returns how many they were, or
 * -1 for arguments out of range. */
int64_t em_peak(em_core *core, int32_t dtype, int32_t items);

/* An FFN whose neurons lie apart. One matrix decides which of them are active: that of the gate, or
 * without a gate that of up. Those rest whose magnitude behind the activation is at most
 * `threshold`: with 0, those that add nothing. Of the active ones alone a row is used, which holds,
 * where there is a gate, the row of up, and the column of down. Offsets are in the bundle of what
 * is not neurons; -1 means absent.
 *
 * With a predictor no matrix decides: of those neurons alone a row is used for which
 * score(reduce(x)) + score_bias is above 0, and it begins with the row that decides. */
typedef struct {
    int64_t deciding, deciding_bias, up_bias, down_bias;
    int64_t reduce, score, score_bias; /* [rank, hidden], [intermediate, rank]: the predictor */
    int32_t deciding_dtype, dtype, predictor_dtype; /* `dtype` is that of rows */
    int32_t rank;
    int32_t row_parts; /* rows of `hidden` columns that a neuron's row is made of */
    int32_t gated, hidden, intermediate, activation;
    float threshold;
} em_neurons;

/* Neurons are decided about in so many parts of whole chunks; what a part wants is read while the
 * next one is multiplied. */
enum { EM_NEURON_CHUNK = 1024, EM_NEURON_PARTS = 4 };

/* Rows in memory, where `rows` is NULL, or those of a set. */
typedef struct {
    const void *resident;
    const uint32_t *places; /* of resident rows, as in em_row_set */
    em_rows *rows;
    int32_t set;
} em_neuron_rows;

/* `rank`: the largest of a predictor, no larger than `hidden`; 0 where there is none. */
uint64_t em_neurons_scratch(int32_t n_threads, int32_t n_tokens, int32_t hidden,
                            int32_t intermediate, int32_t rank);
/* out[t] += ffn(x[t]), as em_ffn_run computes it with all neurons where rows are floats and the
 * threshold is 0 (with a predictor: with those that it names for token t); `*used`: rows that some
 * token took. EM_FLASH where rows could not be read; then `out` is not touched. */
int32_t em_neurons_run(em_core *core, const em_neurons *neurons, const void *bundle,
                       const em_neuron_rows *rows, const float *x, int32_t n_tokens, float *out,
                       int64_t *used);

/* ---- policy: when bundles are expected to be used next -------------------------------------- */

enum { EM_MOST_RATES = 8 };

/* The state of edgemem/policies/next_use.py, which says what it means and owns the arrays; there
 * are n = starts[n_layers] bundles, numbered layer by layer. */
typedef struct {
    const int64_t *starts; /* [n_layers + 1]: the first bundle of each layer, and n */
    const double *keep;    /* [n_rates]: what one token leaves of a rate */
    double *weights;       /* [n_layers, n_rates]: a rate that was fed with ones, from 0 */
    double *shares;        /* [n_rates]: of the rates in the mixture */
    float *rates;          /* [n_rates, n] */
    float *ranks;          /* [n] */
    double learning, least_rate;
    float prior;
    int32_t n_layers, n_rates;
    int32_t last_layer;    /* observed; -1 at first */
    int64_t clock;         /* of this step's first layer, in layers */
    int64_t longest_clock; /* where it is set back to 0 */
} em_next_use;

/* `tokens` tokens demanded bundles `ids` [n] of a layer, each once and each taken by uses[i] of the
 * tokens (NULL: by one): restates the layer's ranks. EM_INVALID changes nothing: an id is not the
 * layer's, or a number is out of range. */
int32_t em_next_use_observe(em_next_use *state, int32_t layer, const uint32_t *ids, int32_t n,
                            const int32_t *uses, int32_t tokens);

/* ---- lookahead: how much to read ahead of demand --------------------------------------------- */

/* The state of edgemem/lookahead.py, which says what it means. */
typedef struct {
    double precision, idle_us, bytes_per_us; /* averages */
    int64_t idle_before, read_before, busy_before;
    int64_t pause, layers_left;
    double memory, longest_idle_us, first_precision, least_precision, most_precision;
    int64_t longest_pause;
} em_lookahead;

/* Bytes that may be read now for layers to come, given the residency's counters; once a layer. */
int64_t em_lookahead_admit(em_lookahead *state, int64_t idle_us, int64_t read_bytes,
                           int64_t busy_us);
/* Of `foreseen` bundles that were not in memory a layer did use `used`. */
void em_lookahead_learn(em_lookahead *state, int32_t foreseen, int32_t used);

/* ---- streams: how turns take their bundles --------------------------------------------------- */

/* The state of edgemem/streamer.py, which owns the arrays. Of all n_bundles bundles some are
 * streamed: those are numbered as in the residency. */
typedef struct {
    em_residency *residency;      /* NULL where nothing streams, and once it is closed */
    const uint64_t *addresses;    /* [n_bundles]: of those that are not streamed */
    const int64_t *sizes;         /* [n_bundles] */
    const int64_t *index_of;      /* [n_bundles]: -1 for those that are not streamed */
    const int32_t *turn_of;       /* [n_streamed] */
    const int32_t *certain_first; /* [n_turns + 1] */
    const uint32_t *certain;      /* streamed bundles that are wanted after each turn, surely */
    const float *ranks;           /* [n_streamed]: the lowest leaves first */
    em_next_use *policy;          /* observes every turn; or, where that is NULL, `observe` does */
    em_observer *observe;
    em_observer *record; /* is told of a turn when it is over; may be NULL */
    em_observer *pause;  /* is called between the rounds of a turn, so that signals are heard */
    void *user;
    int32_t busy;            /* a turn is running: another one is refused */
    em_lookahead *lookahead; /* NULL: nothing is foreseen */
    int64_t demand_bytes;    /* of all bundles that turns took */
    int32_t n_foreseen;      /* of `foreseen`: what was read ahead of its turn */
    uint32_t *foreseen;      /* [n_streamed] */
    uint32_t *indices;       /* [n_bundles]: scratch of one turn, as all that follow */
    uint64_t *held;          /* [n_bundles] */
    int32_t *uses;           /* [n_bundles] */
    uint32_t *likely;        /* [2 n_streamed] */
    float *likelihood;       /* [n_streamed] */
    uint8_t *wanted;         /* [n_streamed], zeros between turns */
    em_demand_log *log;      /* NULL: none is kept */
} em_stream;

/* ---- operations in a row --------------------------------------------------------------------- */

/* One of the calls above as a layer repeats it in every step: all that does not change with it.
 * Pointers are to scratch of n tokens; numbers of rows and columns are for one token. */
enum {
    EM_OP_NORM = 0,
    EM_OP_LINEARS = 1,
    EM_OP_CLAMP = 2,
    EM_OP_ATTEND = 3, /* store, then run */
    EM_OP_ROUTE = 4,
    EM_OP_SIGMOID = 5,
    EM_OP_FFN = 6, /* these take bundles of a stream */
    EM_OP_GATHER = 7,
    EM_OP_TABLE = 8,
    EM_OP_NEURONS = 9,
    EM_OP_SCALE = 10,
    EM_OP_CAP = 11,
    EM_OP_CLEAR = 12, /* x = 0 */
    EM_OP_ADD = 13,   /* x += factor * y */
    EM_OP_HEADS = 14,
};

typedef struct {
    const float *x, *weight, *bias; /* em_norm */
    float *out;
    float eps;
    int32_t rows, cols;
} em_norm_op;

typedef struct {
    const em_linear *items;
    const float *x;
    int32_t n_items;
} em_linears_op;

typedef struct {
    float *q;
    const float *k, *v, *cos_table, *sin_table;
    const float *sinks; /* [n_heads] or NULL */
    float *out;
} em_attend_op;

typedef struct {
    em_router router;
    const float *logits;
    int32_t *n_chosen; /* what em_route returns */
    uint32_t *experts;
    int32_t *first, *tokens;
    float *weights;
} em_route_op;

typedef struct {
    float *x;
    const float *y;
    int32_t cols;
    float limit;  /* of EM_OP_CLAMP and EM_OP_CAP */
    float factor; /* of EM_OP_SCALE and EM_OP_ADD */
} em_elements_op;

/* What a later turn will want, as far as the present state tells: `ops` route tokens. */
typedef struct em_foresight {
    struct em_op *ops;
    int32_t n_ops;
    const em_route_op *routing;      /* of the EM_OP_ROUTE among them */
    const uint32_t *bundles;         /* of its experts */
    const struct em_foresight *next; /* of the turn after it */
} em_foresight;

/* em_ffn_run. Without `routing` all tokens take bundles[0]. */
typedef struct {
    em_stream *stream;
    const em_ffn *ffn;
    const uint32_t *bundles; /* of the experts */
    const em_route_op *routing;
    const int32_t *tokens; /* by pair; without routing by token */
    const float *weights;
    const float *x;
    float *out;
    em_foresight foresight; /* n_ops = 0: none */
} em_ffn_op;

/* em_embed, with bundles `wanted` of the table's `bundles`, each by uses[i] of the tokens. */
typedef struct {
    em_stream *stream;
    const uint32_t *bundles, *wanted;
    const int32_t *uses, *ids;
    int32_t n_wanted, n_bundles, rows_per_bundle, dtype, lanes, cols;
    uint64_t *addresses; /* [n_bundles], for the operation to use */
    float *out;
} em_gather_op;

/* em_linears with a matrix whose rows lie in `bundles`, as many in each, but for the last. */
typedef struct {
    em_stream *stream;
    const uint32_t *bundles;
    em_linear *items; /* [n_bundles], whose weights and out are the operation's to set */
    int32_t n_bundles, rows_per_bundle;
    const float *x;
    float *out;
} em_table_op;

/* em_neurons_run with the first of `bundles`. */
typedef struct {
    em_stream *stream;
    const em_neurons *neurons;
    const uint32_t *bundles;
    em_neuron_rows rows;
    const float *x;
    float *out;
} em_neurons_op;

typedef struct em_op {
    int32_t kind;
    int64_t spent_ns; /* so far, without waiting for bundles and what em_core_times has */
    em_norm_op norm;
    em_linears_op linears;
    em_heads heads;
    em_attend_op attend;
    em_route_op route;
    em_elements_op elements;
    em_ffn_op ffn;
    em_gather_op gather;
    em_table_op table;
    em_neurons_op neurons;
} em_op;

/* Runs operations one after another on n tokens at `position`; `attention` is the layer's, or NULL
 * where none attends. Gives the first status that is not EM_OK, and in *failed which operation's.
 */
int32_t em_ops_run(em_core *core, em_op *ops, int32_t n_ops, const em_attention *attention,
                   int64_t position, int32_t n_tokens, int32_t *failed);

/* end cdef */

#endif
