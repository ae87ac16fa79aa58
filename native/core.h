/* What an em_core is made of, for the files that implement its operations. */
#ifndef EM_CORE_H
#define EM_CORE_H

#include "kernels.h"
#include "pool.h"

struct em_core {
    em_pool *pool;
    const em_kernels *kernels;
    uint8_t *scratch;
    uint64_t scratch_bytes;
    em_core_times times;
    int64_t aside_ns; /* of all operations so far, what is not their own work */
};

EM_INLINE em_arena em_core_arena(const em_core *core) {
    return (em_arena){core->scratch, 0, core->scratch_bytes};
}

/* Whether there is such a format, and it may have rows of so many columns: the last block of 32 may
 * be a part, that of more may not. */
bool em_dtype_fits(int32_t dtype, int32_t cols);
/* Whether rows of it that lie on their own can be multiplied and added up. */
EM_INLINE bool em_dtype_gathers(int32_t dtype) { return dtype >= EM_F32 && dtype <= EM_Q4_0; }

/* Runs items in parallel, or right here where `work` (multiplications or so) is too little to
 * share. */
void em_core_run(em_core *core, em_task *task, void *arg, int64_t n_items, int64_t work);

/* How many groups of rows one item takes, so that each thread finds several items to take. */
int64_t em_chunk_groups(const em_core *core, int64_t groups);

/* Scratch for the int8 form of n rows of `cols`, and filling it in (in parallel where it pays). */
uint64_t em_acts_bytes(int64_t n, int32_t cols);
bool em_acts_take(em_arena *arena, em_acts *acts, int64_t n);
em_acts em_acts_from(em_acts acts, int64_t row); /* from a row on */
void em_acts_quantize(em_core *core, const em_acts *acts, const int32_t *rows, int64_t n);

/* Bytes of a neuron's row. */
EM_INLINE int64_t em_neuron_bytes(const em_neurons *n) {
    return em_group_bytes(n->dtype, n->row_parts * n->hidden, 1);
}

#endif
