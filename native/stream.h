/* The operations that take bundles of a stream, each of them in one turn. */
#ifndef EM_STREAM_H
#define EM_STREAM_H

#include "edgemem.h"

int32_t em_stream_ffn(em_core *core, const em_ffn_op *op, int32_t n_tokens);
int32_t em_stream_gather(em_core *core, const em_gather_op *op, int32_t n_tokens);
int32_t em_stream_table(em_core *core, const em_table_op *op, int32_t n_tokens);
int32_t em_stream_neurons(em_core *core, const em_neurons_op *op, int32_t n_tokens);

#endif
