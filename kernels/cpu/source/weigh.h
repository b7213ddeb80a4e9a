// How much of the attention of a head's queries each candidate has: its keys are looked at, its values are not.
#pragma once
#include "decode.h"

#define WEIGHED_TOGETHER 8  // candidates that are one item of work

static void score_tile_any(int64_t group, int64_t dim, const float *q, const float *k, int64_t count, float *scores) {
  if (dim == 64) score_tile(group, 64, q, k, count, scores);
  else if (dim == 128) score_tile(group, 128, q, k, count, scores);
  else score_tile(group, dim, q, k, count, scores);
}

static void run_weigh_blocks(const void *args, pool *p, int64_t thread) {
  const select_args *a = args;
  const layer_cache *c = a->cache;
  const selection *s = c->selection;
  seen_blocks seen = blocks_seen(c, block_tokens(c, *c->start));
  int64_t blocks = seen.newest - seen.first, count = least(blocks, s->num_candidates), group = c->query_group;
  if (blocks <= s->budget) return;
  int64_t parts = (count + WEIGHED_TOGETHER - 1) / WEIGHED_TOGETHER;
  float q[MAX_GROUP * MAX_DIM], k[TILE * MAX_DIM], scores[MAX_GROUP * TILE] __attribute__((aligned(64)));
  for (int64_t item; (item = next_item(p)) < parts * c->kv_heads;) {
    int64_t head = item % c->kv_heads, row = c->rows[head], from = item / c->kv_heads * WEIGHED_TOGETHER;
    if (row < 0 || s->made_at[row] == occasion(s, *c->start, seen)) continue;
    const int64_t *table = c->table + row * c->table_stride;
    const int32_t *candidates = s->candidates + head * s->num_candidates;
    load_queries(c, a->q, head, c->key.rotate, q);
    for (int64_t i = from; i < least(count, from + WEIGHED_TOGETHER); i++) {
      const uint8_t *record = c->records + table[candidates[i]] * c->record_bytes;
      int64_t ahead = (table[candidates[least(i + 1, count - 1)]] - table[candidates[i]]) * c->record_bytes;
      float top[MAX_GROUP], total[MAX_GROUP];
      for (int64_t g = 0; g < group; g++) top[g] = -__builtin_inff(), total[g] = 0;
      for (int64_t first = most(0, c->sink - candidates[i] * c->block_size); first < c->block_size; first += TILE) {
        int64_t tokens = least(TILE, c->block_size - first);
        decode_plane(record, &c->key, c->dim, first, tokens, ahead, k);
        score_tile_any(group, c->dim, q, k, tokens, scores);
        for (int64_t g = 0; g < group; g++) {
          const float *row_scores = scores + g * TILE;
          vf tops = splat(top[g]), sums = {0};
          for (int64_t t = 0; t < tokens; t += LANES) tops = vmax(tops, load(row_scores + t));
          float highest = max_of(tops);
          for (int64_t t = 0; t < tokens; t += LANES) sums += vexp(load(row_scores + t) - highest);
          total[g] = total[g] * exp1(top[g] - highest) + sum(sums);
          top[g] = highest;
        }
      }
      for (int64_t g = 0; g < group; g++) {
        float *tops = s->weights + (head * group + g) * 2 * s->num_candidates;
        tops[i] = top[g];
        tops[s->num_candidates + i] = total[g];
      }
    }
  }
}
