/* Products in which each head of a token has rows of its own. */
#include "core.h"

#include <string.h>

static bool takes_blocks(const em_heads *h) { return em_dtype_is_block(h->dtype); }

uint64_t em_heads_scratch(int32_t n_tokens, int32_t n_heads, int32_t cols) {
    return em_acts_bytes((int64_t)n_tokens * n_heads, cols);
}

typedef struct {
    const em_kernels *kernels;
    const em_heads *h;
    em_acts acts; /* [n_heads, n_tokens] rows, as blocks where the matrix needs them */
    int32_t n_tokens;
    int64_t groups, chunk, chunks; /* of a head; that an item takes; and items a head gives */
} heads_task;

/* One head of one token: as blocks, and what is taken over. */
static void prepare_row(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const heads_task *t = arg;
    const em_heads *h = t->h;
    const int64_t head = item % h->n_heads, token = item / h->n_heads;
    const float *x = h->x + item * h->x_stride;
    memcpy(h->out + item * h->out_stride, x, (size_t)h->taken * sizeof *x);
    if (!takes_blocks(h)) return;
    const int64_t at = (head * t->n_tokens + token) * t->acts.blocks;
    t->kernels->quantize(x + h->taken, h->cols, (int8_t *)t->acts.q + at * EM_BLOCK,
                         (float *)t->acts.scale + at, (int32_t *)t->acts.sum + at,
                         (int32_t *)t->acts.first + at);
}

static void multiply_item(void *arg, int64_t item, int32_t thread) {
    (void)thread;
    const heads_task *t = arg;
    const em_heads *h = t->h;
    const int64_t head = item / t->chunks, group = item % t->chunks * t->chunk;
    const int64_t group_bytes = em_group_bytes(h->dtype, h->cols, EM_LANES);
    em_acts acts = em_acts_from(t->acts, head * t->n_tokens); /* its blocks lie head by head */
    acts.x = h->x + head * h->x_stride + h->taken;
    em_out out = {h->out + head * h->out_stride + h->taken, NULL,
                  (int64_t)h->n_heads * h->out_stride, h->rows, 0};
    t->kernels->product[h->dtype]((const uint8_t *)h->weights + head * t->groups * group_bytes,
                                  (int32_t)group, (int32_t)em_min(t->chunk, t->groups - group),
                                  &acts, t->n_tokens, &out);
}

static bool valid(const em_heads *h, int32_t n_tokens) {
    return n_tokens >= 0 && h->n_heads >= 1 && h->rows >= 1 && h->rows % EM_LANES == 0 &&
           em_dtype_fits(h->dtype, h->cols) && h->taken >= 0 &&
           h->x_stride >= (int64_t)h->taken + h->cols &&
           h->out_stride >= (int64_t)h->taken + h->rows;
}

int32_t em_heads_run(em_core *core, const em_heads *h, int32_t n_tokens) {
    if (!valid(h, n_tokens)) return EM_INVALID;
    const int64_t rows = (int64_t)n_tokens * h->n_heads;
    heads_task t = {.kernels = core->kernels, .h = h, .n_tokens = n_tokens};
    em_arena arena = em_core_arena(core);
    t.acts = (em_acts){.cols = h->cols,
                       .blocks = (h->cols + EM_BLOCK - 1) / EM_BLOCK,
                       .stride = (int64_t)h->n_heads * h->x_stride};
    if (takes_blocks(h) && !em_acts_take(&arena, &t.acts, rows)) return EM_NO_MEMORY;
    if (n_tokens == 0) return EM_OK;
    t.groups = h->rows / EM_LANES;
    t.chunk = em_min(t.groups, em_chunk_groups(core, t.groups * h->n_heads));
    t.chunks = (t.groups + t.chunk - 1) / t.chunk;
    em_core_run(core, prepare_row, &t, rows, rows * (takes_blocks(h) ? h->cols * 4 : h->taken));
    em_core_run(core, multiply_item, &t, t.chunks * h->n_heads, rows * h->rows * h->cols);
    return EM_OK;
}
