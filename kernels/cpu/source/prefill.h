// Attention of a chunk of new tokens over ring, chunk and blocks; what is read is what `decode.h` says.
#pragma once
#include "integer_attention.h"
#include "linear.h"

typedef struct {
  const layer_cache *cache;
  const float *q;      // [count, kv_heads * query_group, dim]
  const float *k, *v;  // [count, kv_heads, dim], not yet in the ring
  float *out;          // like q
  float *scratch;      // [threads, scratch_floats(...)]
  int64_t scratch_stride;
  int64_t count, tile;  // new tokens; queries per item of work
  // Sparse prefill (null: all blocks are read): whether a tile of `chosen_tile` queries, at absolute multiples of it,
  // reads a block. [kv_heads, chosen_tiles, chosen_blocks], from tile number `first_chosen` on; `tile` divides it.
  const uint8_t *chosen;
  int64_t chosen_tile, first_chosen, chosen_tiles, chosen_blocks;
  float *weights;       // null, or [count, kv_heads * query_group, 2]: largest score, and the sum of e^(score - largest)
} prefill_args;

// What one item works on: rows are (query, query head) pairs, query by query.
typedef struct {
  int64_t rows, dim, group, first, step;  // `first`: position of the first query; `step`: to the next
  float *q, *rotated, *sums, *scores, *k_t, *k, *v, *top, *total;
  chunk_codes codes;
} tile_state;

// Make weights of the scores of `count` keys from position `begin` on, padded to a multiple of 2 * LANES. Row r sees those
// in [low(i), high(i)) with i its position: part == 0: [begin, i - width + 1); 1: sinks and causal; 2: the band of `width`
// and causal.
static void weigh_rows(tile_state *s, int64_t begin, int64_t count, int part, int64_t width) {
  int64_t padded = (count + NR - 1) / NR * NR;
  for (int64_t r = 0; r < s->rows; r++) {
    int64_t i = s->first + r / s->group * s->step, low = 0, high = count;
    if (part == 0) high = least(count, i - width + 1 - begin);
    if (part >= 1) high = least(count, i + 1 - begin);
    if (part == 2) low = most(0, i - width + 1 - begin);
    float *scores = s->scores + r * TILE, highest = s->top[r];
    if (high <= low) {
      for (int64_t t = 0; t < padded; t++) scores[t] = 0;
      continue;
    }
    for (int64_t t = 0; t < low; t++) scores[t] = -__builtin_inff();
    for (int64_t t = high; t < padded; t++) scores[t] = -__builtin_inff();
    vf tops = load(scores);
    for (int64_t t = LANES; t < padded; t += LANES) tops = vmax(tops, load(scores + t));
    float tile_top = max_of(tops);
    vf weights = {0};
    if (tile_top > highest) {
      float shrink = exp1(highest - tile_top);
      highest = tile_top;
      s->top[r] = highest;
      s->total[r] *= shrink;
      float *sums = s->sums + r * s->dim;
      if (s->sums)
        for (int64_t d = 0; d < s->dim; d++) sums[d] *= shrink;
    }
    for (int64_t t = 0; t < padded; t += LANES) {
      vf w = vexp(load(scores + t) - highest);
      store(scores + t, w);
      weights += w;
    }
    s->total[r] += sum(weights);
  }
}

// Attend to `count` keys from position `begin` on; without `sums` the values are left out.
static void attend_keys(tile_state *s, const float *q, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                        int64_t begin, int64_t count, int part, int64_t width) {
  int64_t dim = s->dim;
  int64_t padded = (count + NR - 1) / NR * NR;
  transpose(k, k_stride, count, dim, s->k_t, TILE);
  for (int64_t d = 0; d < dim; d++)
    for (int64_t t = count; t < padded; t++) s->k_t[d * TILE + t] = 0;
  for (int64_t t = 0; t < padded; t += NR) multiply(s->rows, q, dim, s->k_t + t, TILE, dim, s->scores + t, TILE, 1);
  weigh_rows(s, begin, count, part, width);
  if (!s->sums) return;
  int64_t d = 0;
  for (; d + NR <= dim; d += NR) multiply(s->rows, s->scores, TILE, v + d, v_stride, count, s->sums + d, dim, 0);
  for (; d < dim; d++)
    for (int64_t r = 0; r < s->rows; r++)
      for (int64_t t = 0; t < count; t++) s->sums[r * dim + d] += s->scores[r * TILE + t] * v[t * v_stride + d];
}

// The same for a block's keys and values in codes.
static void attend_key_codes(tile_state *s, const tile_codes *k, const tile_codes *v, int64_t begin, int64_t count, int64_t width) {
  int64_t words = s->dim / 4, padded = (count + NR - 1) / NR * NR;
  transpose((const float *)k->codes, k->stride / 4, count, words, s->k_t, TILE);
  for (int64_t d = 0; d < words; d++)
    for (int64_t t = count; t < padded; t++) s->k_t[d * TILE + t] = 0;
  if (k->is_signed) score_chunk(s->rows, s->dim, &s->codes, k, 1, count, s->k_t, s->scores);
  else score_chunk(s->rows, s->dim, &s->codes, k, 0, count, s->k_t, s->scores);
  weigh_rows(s, begin, count, 0, width);
  if (v->is_signed) add_value_codes(s->rows, s->dim, s->scores, v, 1, count, &s->codes.weights, s->sums, s->dim);
  else add_value_codes(s->rows, s->dim, s->scores, v, 0, count, &s->codes.weights, s->sums, s->dim);
}

// The rows' queries in codes; 0 where they cannot be.
static int codes_of_queries(const layer_cache *c, tile_state *s, const float *q) {
  if (!c->integers || !has_codes(&c->key, s->dim) || !has_codes(&c->value, s->dim)) return 0;
  if (!all_finite(q, s->rows * s->dim)) return 0;
  for (int64_t r = 0, at = 0; r < s->rows; r++, at += s->dim)
    s->codes.scales[r] = codes_of_row(q + at, s->dim, s->codes.codes + at, s->codes.rests + at, s->codes.sums + r);
  return 1;
}

// Window keys of positions begin .. end - 1, from the ring or from the chunk.
static void attend_window(const prefill_args *a, tile_state *s, int64_t head, int64_t begin, int64_t end, int part,
                          int64_t width) {
  const layer_cache *c = a->cache;
  int64_t start = *c->start;
  while (begin < end) {
    int64_t count = least(TILE, end - begin), stride = c->dim;
    const float *k, *v;
    if (begin < start) {
      int64_t slot = slot_of(c, begin), limit = begin < c->sink ? c->sink : c->sink + c->recent;
      count = least(count, least(start - begin, limit - slot));
      k = c->keys + (head * (c->sink + c->recent) + slot) * c->dim;
      v = c->values + (head * (c->sink + c->recent) + slot) * c->dim;
    } else {
      stride = c->kv_heads * c->dim;
      k = a->k + (begin - start) * stride + head * c->dim;
      v = a->v + (begin - start) * stride + head * c->dim;
    }
    attend_keys(s, s->q, k, stride, v, stride, begin, count, part, width);
    begin += count;
  }
}

static void run_prefill_attention(const void *args, pool *p, int64_t thread) {
  const prefill_args *a = args;
  const layer_cache *c = a->cache;
  int64_t start = *c->start, dim = c->dim, group = c->query_group, most_rows = a->tile * group;
  int64_t before = a->chosen ? start % a->tile : 0;  // an item lies in one tile of the choice
  int64_t tiles = (before + a->count + a->tile - 1) / a->tile;
  float *at = a->scratch + thread * a->scratch_stride;
  tile_state s = {.dim = dim, .group = group, .step = 1};
  s.q = at;
  s.rotated = s.q + most_rows * dim;
  s.sums = s.rotated + most_rows * dim;
  s.scores = s.sums + most_rows * dim;
  s.k_t = s.scores + most_rows * TILE;
  s.k = s.k_t + dim * TILE;
  s.v = s.k + dim * TILE;
  s.top = s.v + dim * TILE;
  s.total = s.top + most_rows;
  s.codes.scales = s.total + most_rows;
  s.codes.sums = s.codes.scales + most_rows;
  s.codes.weights.scales = s.codes.sums + most_rows;
  s.codes.weights.minimum = s.codes.weights.scales + most_rows;
  s.codes.codes = (uint8_t *)(s.codes.weights.minimum + most_rows);
  s.codes.rests = s.codes.codes + most_rows * dim;
  s.codes.weights.codes = s.codes.rests + most_rows * dim;
  s.codes.weights.rests = s.codes.weights.codes + most_rows * TILE;
  float scale = 1.0f / __builtin_sqrtf((float)dim);
  int64_t asking = c->advise ? c->next_rows : 0;
  for (int64_t item; (item = next_item(p) - asking) < tiles * c->kv_heads;) {
    if (item < 0) {
      read_ahead(c, item + asking, block_tokens(c, start + a->count - 1).end);
      continue;
    }
    int64_t head = item % c->kv_heads, tile = tiles - 1 - item / c->kv_heads;  // the last see most: they come first
    int64_t begin = most(0, tile * a->tile - before), end = least(a->count, (tile + 1) * a->tile - before);
    int64_t queries = end - begin, width = c->widths[head];
    s.first = start + begin;
    s.rows = queries * group;
    int64_t last = s.first + queries - 1;
    for (int64_t r = 0; r < s.rows; r++) {
      const float *q = a->q + (((begin + r / group) * c->kv_heads + head) * group + r % group) * dim;
      for (int64_t d = 0; d < dim; d++) s.q[r * dim + d] = q[d] * scale;
      for (int64_t d = 0; d < dim; d++) s.sums[r * dim + d] = 0;
      s.top[r] = -__builtin_inff();
      s.total[r] = 0;
    }
    int64_t seen_end = last - width + 1;  // of the blocks, by any query of the tile
    if (c->rows[head] >= 0 && seen_end > c->sink) {
      const float *q = s.q;
      if (c->key.rotate) {
        for (int64_t i = 0; i < s.rows * dim; i++) s.rotated[i] = s.q[i];
        for (int64_t r = 0; r < s.rows; r++) hadamard(s.rotated + r * dim, dim);
        q = s.rotated;
      }
      int by_codes = codes_of_queries(c, &s, q);
      const int64_t *table = c->table + c->rows[head] * c->table_stride;
      int64_t choice = a->chosen ? s.first / a->chosen_tile - a->first_chosen : -1;
      const uint8_t *chosen = 0;
      if (choice >= 0 && choice < a->chosen_tiles)
        chosen = a->chosen + (head * a->chosen_tiles + choice) * a->chosen_blocks;
      for (int64_t position = c->sink; position < seen_end;) {
        int64_t block = position / c->block_size, first = position % c->block_size;
        int64_t count = least(TILE, least(seen_end - position, c->block_size - first));
        if (chosen && !chosen[block]) {
          position += c->block_size - first;
          continue;
        }
        const uint8_t *record = c->records + table[block] * c->record_bytes;
        if (by_codes) {
          tile_codes of_keys, of_values;
          read_codes(record, &c->key, dim, first, count, 0, (uint8_t *)s.k, &of_keys);
          read_codes(record, &c->value, dim, first, count, 0, (uint8_t *)s.v, &of_values);
          attend_key_codes(&s, &of_keys, &of_values, position, count, width);
        } else {
          decode_plane(record, &c->key, dim, first, count, 0, s.k);
          decode_plane(record, &c->value, dim, first, count, 0, s.v);
          attend_keys(&s, q, s.k, dim, s.v, dim, position, count, 0, width);
        }
        position += count;
      }
      if (c->value.rotate)
        for (int64_t r = 0; r < s.rows; r++) hadamard(s.sums + r * dim, dim);
    }
    attend_window(a, &s, head, 0, least(c->sink, last + 1), 1, width);
    attend_window(a, &s, head, most(c->sink, s.first - width + 1), last + 1, 2, width);
    for (int64_t r = 0; r < s.rows; r++) {
      float *out = a->out + (((begin + r / group) * c->kv_heads + head) * group + r % group) * dim;
      for (int64_t d = 0; d < dim; d++) out[d] = s.sums[r * dim + d] / s.total[r];
      if (!a->weights) continue;
      float *weights = a->weights + (out - a->out) / dim * 2;
      weights[0] = s.top[r];
      weights[1] = s.total[r];
    }
  }
}
