/* The operations that take bundles of a stream, each of them in one turn. */
#ifndef EM_STREAM_H
#define EM_STREAM_H

#include "edgemem.h"

/* Writes down that a turn demanded `indices` [n], counted from `base`. */
void em_demand_write(em_demand_log *log, const uint32_t *indices, int32_t n, uint32_t base);

int32_t em_stream_ffn(em_core *core, const em_ffn_op *op, int32_t n_tokens);
int32_t em_stream_gather(em_core *core, const em_gather_op *op, int32_t n_tokens);
int32_t em_stream_table(em_core *core, const em_table_op *op, int32_t n_tokens);
int32_t em_stream_neurons(em_core *core, const em_neurons_op *op, int32_t n_tokens);

#endif
