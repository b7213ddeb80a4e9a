// The compiled CPU kernels of duolocal, one translation unit. Called from kernels/cpu/*.py through ctypes.
#include "decode.h"
#include "elementwise.h"
#include "linear.h"
#include "planes.h"
#include "pool.h"
#include "prefill.h"
#include "select.h"
#include "sparse.h"
#include "store.h"
#include "weigh.h"
#include "weights.h"

enum operation_id { RMS_NORM, LINEAR, ROPE, SILU_MUL, EMBED, CLOSE_BLOCKS, WRITE_RING, DECODE_ATTENTION, MERGE, PREFILL_ATTENTION,
                    DIGEST_BLOCKS, SCORE_BLOCKS, CHOOSE_CANDIDATES, WEIGH_BLOCKS, CHOOSE_BLOCKS, ESTIMATE_BLOCKS, QUANTIZE_ROWS, ACCEPT };

void *duo_operation(int64_t id) {
  static const operation table[] = {run_rms_norm,     run_linear,     run_rope,             run_silu_mul, run_embed,
                                    run_close_blocks, run_write_ring, run_decode_attention, run_merge,    run_prefill_attention,
                                    run_digest_blocks, run_score_blocks, run_choose_candidates,
                                    run_weigh_blocks,  run_choose_blocks, run_estimate_blocks,
                                    run_quantize_rows, run_accept};
  return (void *)table[id];
}

// The size of each structure, for Python to compare with its own.
int64_t duo_size(int64_t id) {
  static const int64_t sizes[] = {sizeof(pool),       sizeof(op),         sizeof(matrix),      sizeof(linear_args),
                                  sizeof(rms_norm_args), sizeof(rope_args),  sizeof(silu_args),   sizeof(embed_args),
                                  sizeof(plane),      sizeof(layer_cache), sizeof(store_args), sizeof(decode_args),
                                  sizeof(prefill_args),  sizeof(selection),  sizeof(digest_args), sizeof(select_args),
                                  sizeof(estimate_args), sizeof(quantize_args), sizeof(accept_args)};
  return sizes[id];
}

int64_t duo_lanes(void) { return LANES; }

// The clock of `pool.times`.
int64_t duo_ticks(void) { return ticks(); }
