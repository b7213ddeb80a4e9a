// Sparse prefill: how much of the attention of a few queries each block has. What is chosen from it is decided in
// kernels/sparse.py, and `run_prefill_attention` reads what was chosen.
#pragma once
#include "prefill.h"

#define SPAN_BLOCKS 16  // blocks that are one item of work

typedef struct {
  const layer_cache *cache;
  const float *q;  // [count, kv_heads * query_group, dim] of the chunk
  const float *k;  // [count, kv_heads, dim], not yet in the ring
  float *out;      // [kv_heads, queries, query_group, blocks + 1, 2]: largest score, and the sum of e^(score - largest);
                   // the window comes last. Nothing is written for streaming heads.
  float *scratch;  // [threads, scratch_stride]
  int64_t scratch_stride, count;
  int64_t first, step, queries;  // positions first, first + step, ... of the chunk
  int64_t blocks;                // that the last of them sees something of
} estimate_args;

static void put_weights(const estimate_args *a, const tile_state *s, int64_t head, int64_t block) {
  for (int64_t r = 0; r < s->rows; r++) {
    float *out = a->out + ((head * s->rows + r) * (a->blocks + 1) + block) * 2;
    out[0] = s->top[r];
    out[1] = s->total[r];
    s->top[r] = -__builtin_inff();
    s->total[r] = 0;
  }
}

static void run_estimate_blocks(const void *args, pool *p, int64_t thread) {
  const estimate_args *a = args;
  const layer_cache *c = a->cache;
  int64_t start = *c->start, dim = c->dim, group = c->query_group, rows = a->queries * group;
  int64_t spans = (a->blocks + SPAN_BLOCKS - 1) / SPAN_BLOCKS, last = a->first + (a->queries - 1) * a->step;
  tile_state s = {.rows = rows, .dim = dim, .group = group, .first = a->first, .step = a->step};
  s.q = a->scratch + thread * a->scratch_stride;
  s.rotated = s.q + rows * dim;
  s.scores = s.rotated + rows * dim;
  s.k_t = s.scores + rows * TILE;
  s.k = s.k_t + dim * TILE;
  s.top = s.k + dim * TILE;
  s.total = s.top + rows;
  float scale = 1.0f / __builtin_sqrtf((float)dim);
  for (int64_t item; (item = next_item(p)) < (spans + 1) * c->kv_heads;) {
    int64_t head = item % c->kv_heads, span = item / c->kv_heads, width = c->widths[head];
    if (c->rows[head] < 0) continue;
    for (int64_t r = 0; r < rows; r++) {
      int64_t token = a->first + r / group * a->step - start;
      const float *q = a->q + ((token * c->kv_heads + head) * group + r % group) * dim;
      for (int64_t d = 0; d < dim; d++) s.q[r * dim + d] = q[d] * scale;
      for (int64_t d = 0; d < dim; d++) s.rotated[r * dim + d] = s.q[r * dim + d];
      if (c->key.rotate) hadamard(s.rotated + r * dim, dim);
      s.top[r] = -__builtin_inff();
      s.total[r] = 0;
    }
    if (span == spans) {
      prefill_args window = {.cache = c, .k = a->k, .v = a->k};  // values are not looked at
      attend_window(&window, &s, head, 0, least(c->sink, last + 1), 1, width);
      attend_window(&window, &s, head, most(c->sink, a->first - width + 1), last + 1, 2, width);
      put_weights(a, &s, head, a->blocks);
      continue;
    }
    const int64_t *table = c->table + c->rows[head] * c->table_stride;
    for (int64_t block = span * SPAN_BLOCKS; block < least(a->blocks, (span + 1) * SPAN_BLOCKS); block++) {
      int64_t end = least((block + 1) * c->block_size, last - width + 1);
      const uint8_t *record = c->records + table[block] * c->record_bytes;
      for (int64_t position = most(block * c->block_size, c->sink); position < end; position += TILE) {
        int64_t count = least(TILE, end - position);
        decode_plane(record, &c->key, dim, position % c->block_size, count, 0, s.k);
        attend_keys(&s, s.rotated, s.k, dim, 0, 0, position, count, 0, width);
      }
      put_weights(a, &s, head, block);
    }
  }
}
