// Attention of one new token, or of a few as if they came one by one, over ring and blocks.
//
// A query at position i reads position j from the window (ring and chunk, as computed) when j <= i and
// (j < sink or i - j < its head's width), and, in retrieval heads, from its block when j >= sink and
// i - j >= width. The two sets are disjoint. Formats are only known to `decode_plane` and `read_codes`.
#pragma once
#include "integer_attention.h"
#include "linear.h"
#include "select.h"

typedef struct {
  const layer_cache *cache;
  const float *q;    // [count, kv_heads * query_group, dim]
  const float *k, *v;  // [count, kv_heads, dim], not in the ring; null for one token that is in it
  float *out;        // like q
  float *partial;    // [count, kv_heads, max_spans + 1, query_group, dim + 2]: sums, then maximum and total weight
  int64_t count, max_spans;  // spans of the blocks of a head; the window comes before them
} decode_args;

#define MOST_AHEAD 5  // tokens of a step

// What of the blocks is read: positions, or, where blocks are selected, the tokens of the listed ones counted through.
INLINE span read_tokens(const layer_cache *c, span seen) {
  if (!c->selection) return seen;
  return (span){0, list_length(c->selection, blocks_seen(c, seen)) * c->block_size};
}

#define SPAN_TOKENS 512  // least tokens of blocks that are one item of work

INLINE int64_t span_size(const decode_args *a, int64_t tokens) {
  int64_t size = most((tokens + a->max_spans - 1) / a->max_spans, SPAN_TOKENS);
  return (size + TILE - 1) / TILE * TILE;
}

// scores [group][TILE] = q [group][dim] times k [count][dim]; columns up to the next multiple of LANES become -inf.
INLINE void score_tile(int64_t group, int64_t dim, const float *q, const float *k, int64_t count, float *scores) {
  int64_t whole = dim / LANES * LANES;
  for (int64_t g = 0; g < group; g++, q += dim, scores += TILE) {
    for (int64_t t = 0; t < count; t += LANES) {
      vf dots[LANES], sums;
      for (int i = 0; i < LANES; i++) {
        const float *key = k + least(t + i, count - 1) * dim;
        vf acc = {0};
        for (int64_t d = 0; d < whole; d += LANES) acc += load(key + d) * load(q + d);
        dots[i] = acc;
      }
      sums = sum_each(dots);
      store(scores + t, sums);
      for (int64_t d = whole; d < dim; d++)
        for (int i = 0; i < LANES; i++) scores[t + i] += k[least(t + i, count - 1) * dim + d] * q[d];
      for (int64_t i = count; i < t + LANES; i++) scores[i] = -__builtin_inff();
    }
  }
}

// sums [rows][dim] += weights [rows][TILE] times v [count][dim]
INLINE void add_values(int rows, int64_t dim, const float *weights, const float *v, int64_t count, float *sums, int64_t stride) {
  int64_t d = 0;
  for (; d + NR <= dim; d += NR) multiply_rows(rows, 2, weights, TILE, v + d, dim, count, sums + d, stride, 0);
  for (; d + LANES <= dim; d += LANES) multiply_rows(rows, 1, weights, TILE, v + d, dim, count, sums + d, stride, 0);
  for (; d < dim; d++)
    for (int r = 0; r < rows; r++)
      for (int64_t t = 0; t < count; t++) sums[r * stride + d] += weights[r * TILE + t] * v[t * dim + d];
}

// Make weights of scores [group][TILE]; sums [group][dim] keep, behind them, each row's maximum and total weight.
INLINE void weigh_scores(int64_t group, int64_t dim, float *scores, int64_t count, float *sums, int64_t stride) {
  for (int64_t g = 0; g < group; g++) {
    float *row = scores + g * TILE, *top = sums + g * stride + dim, *total = top + 1, before = *top;
    vf tops = splat(before), weights = {0};
    for (int64_t t = 0; t < count; t += LANES) tops = vmax(tops, load(row + t));
    *top = max_of(tops);
    for (int64_t t = 0; t < count; t += LANES) {
      vf w = vexp(load(row + t) - *top);
      store(row + t, w);
      weights += w;
    }
    if (*top > before) {
      float shrink = exp1(before - *top);
      *total *= shrink;
      for (int64_t d = 0; d < dim; d++) sums[g * stride + d] *= shrink;
    }
    *total += sum(weights);
  }
}

// Attend from q [group][dim] to `count` keys and values.
INLINE void attend_tile(int64_t group, int64_t dim, const float *q, const float *k, const float *v, int64_t count,
                        float *sums, int64_t stride) {
  float scores[MAX_GROUP * TILE] __attribute__((aligned(64)));
  score_tile(group, dim, q, k, count, scores);
  weigh_scores(group, dim, scores, count, sums, stride);
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) add_values(4, dim, scores + g * TILE, v, count, sums + g * stride, stride);
  if (group - g == 3) add_values(3, dim, scores + g * TILE, v, count, sums + g * stride, stride);
  if (group - g == 2) add_values(2, dim, scores + g * TILE, v, count, sums + g * stride, stride);
  if (group - g == 1) add_values(1, dim, scores + g * TILE, v, count, sums + g * stride, stride);
}

static void attend_tile_any(int64_t group, int64_t dim, const float *q, const float *k, const float *v, int64_t count,
                            float *sums, int64_t stride) {
  if (dim == 64) attend_tile(group, 64, q, k, v, count, sums, stride);
  else if (dim == 128) attend_tile(group, 128, q, k, v, count, sums, stride);
  else attend_tile(group, dim, q, k, v, count, sums, stride);
}

// The same of codes.
INLINE void attend_codes_of(int64_t group, int64_t dim, const query_codes *q, const tile_codes *k, int k_signed,
                            const tile_codes *v, int v_signed, int64_t count, float *sums, int64_t stride) {
  float scores[MAX_GROUP * TILE] __attribute__((aligned(64))), scales[MAX_GROUP], minimum[MAX_GROUP];
  uint8_t codes[MAX_GROUP * TILE], rests[MAX_GROUP * TILE];
  weight_codes w = {codes, rests, scales, minimum};
  score_codes(group, dim, q, k, k_signed, count, scores);
  weigh_scores(group, dim, scores, count, sums, stride);
  add_value_codes(group, dim, scores, v, v_signed, count, &w, sums, stride);
}

static void attend_codes(int64_t group, int64_t dim, const query_codes *q, const tile_codes *k, const tile_codes *v,
                         int64_t count, float *sums, int64_t stride) {
#define OF_DIM(dim)                                                                                         \
  if (k->is_signed && v->is_signed) attend_codes_of(group, dim, q, k, 1, v, 1, count, sums, stride);        \
  else if (k->is_signed) attend_codes_of(group, dim, q, k, 1, v, 0, count, sums, stride);                   \
  else attend_codes_of(group, dim, q, k, 0, v, v->is_signed, count, sums, stride);
  if (dim == 64) {
    OF_DIM(64)
  } else if (dim == 128) {
    OF_DIM(128)
  } else {
    attend_codes_of(group, dim, q, k, k->is_signed, v, v->is_signed, count, sums, stride);
  }
#undef OF_DIM
}

INLINE void prefetch_scales(const layer_cache *c, const uint8_t *record) {
  for (int64_t at = c->key.scales_at; at < c->record_bytes; at += 64) __builtin_prefetch(record + at);
}

// The window's keys of `count` positions from `position` on, which the ring holds side by side from `slot` on, but for
// those that are not in it yet.
INLINE void attend_slots(const decode_args *a, int64_t head, const float *q, int64_t slot, int64_t position, int64_t count,
                         float *sums, int64_t stride) {
  const layer_cache *c = a->cache;
  int64_t at = (head * (c->sink + c->recent) + slot) * c->dim, held = a->k ? *c->start - position : count;
  float k[TILE * MAX_DIM], v[TILE * MAX_DIM];
  for (int64_t i = 0; i < count; i += TILE) {
    const float *keys = c->keys + at + i * c->dim, *values = c->values + at + i * c->dim;
    int64_t tile = least(TILE, count - i);
    if (i + tile > held) {
      for (int64_t t = 0; t < tile; t++) {
        int64_t new = ((i + t - held) * c->kv_heads + head) * c->dim;
        const float *key = i + t < held ? keys + t * c->dim : a->k + new, *value = i + t < held ? values + t * c->dim : a->v + new;
        for (int64_t d = 0; d < c->dim; d++) k[t * c->dim + d] = key[d], v[t * c->dim + d] = value[d];
      }
      keys = k, values = v;
    }
    attend_tile_any(c->query_group, c->dim, q, keys, values, tile, sums, stride);
  }
}

// Where the sums of one token, head and span are; span 0 is the window.
INLINE float *partial_sums(const decode_args *a, int64_t token, int64_t head, int64_t which) {
  const layer_cache *c = a->cache;
  return a->partial + ((token * c->kv_heads + head) * (a->max_spans + 1) + which) * c->query_group * (c->dim + 2);
}

INLINE float *fresh_sums(const decode_args *a, int64_t token, int64_t head, int64_t which) {
  const layer_cache *c = a->cache;
  int64_t dim = c->dim, stride = dim + 2;
  float *sums = partial_sums(a, token, head, which);
  for (int64_t g = 0; g < c->query_group; g++) {
    for (int64_t d = 0; d < dim; d++) sums[g * stride + d] = 0;
    sums[g * stride + dim] = -__builtin_inff();
    sums[g * stride + dim + 1] = 0;
  }
  return sums;
}

static void decode_window(const decode_args *a, int64_t token, int64_t head) {
  const layer_cache *c = a->cache;
  int64_t position = *c->start + token, stride = c->dim + 2;
  float q[MAX_GROUP * MAX_DIM], *sums = fresh_sums(a, token, head, 0);
  load_queries(c, a->q + token * c->kv_heads * c->query_group * c->dim, head, 0, q);
  int64_t sinks = least(c->sink, position + 1), first = most(c->sink, position - c->widths[head] + 1);
  attend_slots(a, head, q, 0, 0, sinks, sums, stride);
  if (first > position) return;
  int64_t from = slot_of(c, first), to = slot_of(c, position);  // both ends included
  int64_t before = from <= to ? to - from + 1 : c->sink + c->recent - from;  // the ring's end
  attend_slots(a, head, q, from, first, before, sums, stride);
  if (from > to) attend_slots(a, head, q, c->sink, first + before, to - c->sink + 1, sums, stride);
}

// Span number `which` of a head's blocks for tokens first .. last: each is decoded once.
static void decode_span(const decode_args *a, int64_t first_token, int64_t last_token, int64_t head, int64_t which) {
  const layer_cache *c = a->cache;
  int64_t position = *c->start, dim = c->dim, group = c->query_group, stride = dim + 2;
  span seen = block_tokens(c, position + last_token), blocks = read_tokens(c, seen);
  int64_t size = span_size(a, blocks.end - blocks.begin);
  int64_t begin = blocks.begin + (which - 1) * size, end = least(blocks.end, begin + size);
  if (begin >= end) return;
  float q[MOST_AHEAD][MAX_GROUP * MAX_DIM], k[TILE * MAX_DIM], v[TILE * MAX_DIM], *sums[MOST_AHEAD];
  query_codes codes[MOST_AHEAD];
  int by_codes = c->integers && has_codes(&c->key, dim) && has_codes(&c->value, dim);
  for (int64_t token = first_token; token <= last_token; token++) {
    load_queries(c, a->q + token * c->kv_heads * group * dim, head, c->key.rotate, q[token]);
    sums[token] = fresh_sums(a, token, head, which);
    by_codes = by_codes && quantize_queries(group, dim, q[token], codes + token);
  }
  const int64_t *table = c->table + c->rows[head] * c->table_stride;
  const int32_t *list = c->selection ? list_of(c->selection, c->rows[head]) : 0;
  while (begin < end) {
    int64_t block = begin / c->block_size, first = begin % c->block_size, next;
    int64_t count = least(TILE, least(end - begin, c->block_size - first));
    next = begin + count < end ? (begin + count) / c->block_size : block;
    begin += count;
    if (list) {
      block = list[block], next = list[next];
      int64_t skipped = most(0, seen.begin - block * c->block_size - first);
      int64_t left = seen.end - block * c->block_size - first;
      if (skipped >= count || left <= skipped) continue;
      first += skipped, count = least(count, left) - skipped;
    }
    const uint8_t *record = c->records + table[block] * c->record_bytes;
    int64_t ahead = (table[next] - table[block]) * c->record_bytes;
    tile_codes of_keys, of_values;
    prefetch_scales(c, record + ahead);
    if (by_codes) {
      read_codes(record, &c->key, dim, first, count, ahead, (uint8_t *)k, &of_keys);
      read_codes(record, &c->value, dim, first, count, ahead, (uint8_t *)v, &of_values);
    } else {
      decode_plane(record, &c->key, dim, first, count, ahead, k);
      decode_plane(record, &c->value, dim, first, count, ahead, v);
    }
    for (int64_t token = first_token; token <= last_token; token++) {
      // An earlier token sees fewer: the last of them are later in its window.
      int64_t sees = token == last_token ? count
                                         : least(count, block_tokens(c, position + token).end - block * c->block_size - first);
      if (sees <= 0) continue;
      if (by_codes) attend_codes(group, dim, codes + token, &of_keys, &of_values, sees, sums[token], stride);
      else attend_tile_any(group, dim, q[token], k, v, sees, sums[token], stride);
    }
  }
}

// How a token's blocks are split among the threads.
typedef struct {
  int64_t size, count;
} split;

INLINE split split_blocks(const decode_args *a, int64_t token) {
  span blocks = read_tokens(a->cache, block_tokens(a->cache, *a->cache->start + token));
  int64_t size = span_size(a, blocks.end - blocks.begin);
  return (split){size, (blocks.end - blocks.begin + size - 1) / size};
}

static void run_decode_attention(const void *args, pool *p, int64_t thread) {
  const decode_args *a = args;
  const layer_cache *c = a->cache;
  int64_t last = a->count - 1, windows = a->count * c->kv_heads;
  split of_first = split_blocks(a, 0), of_last = split_blocks(a, last);
  int64_t asking = c->advise && !c->selection ? c->next_rows : 0;
  int together = of_first.size == of_last.size;  // else every token has spans of its own, and no more than one size allows
  int64_t spans = (together ? of_last.count : a->max_spans) * c->kv_heads, items = windows + spans * (together ? 1 : a->count);
  for (int64_t item; (item = next_item(p) - asking) < items;) {
    if (item < 0) {
      read_ahead(c, item + asking, block_tokens(c, *c->start + last).end);
      continue;
    }
    int64_t head = item % c->kv_heads;
    if (item < windows) {
      decode_window(a, item / c->kv_heads, head);
    } else if (c->rows[head] >= 0) {
      int64_t token = (item - windows) / spans, which = (item - windows) % spans / c->kv_heads + 1;
      decode_span(a, together ? 0 : token, together ? last : token, head, which);
    }
  }
}

// Join the spans of every head: out = sum of weighted values over sum of weights.
static void run_merge(const void *args, pool *p, int64_t thread) {
  const decode_args *a = args;
  const layer_cache *c = a->cache;
  int64_t dim = c->dim, group = c->query_group, stride = dim + 2;
  for (int64_t item; (item = next_item(p)) < a->count * c->kv_heads * group;) {
    int64_t token = item / (c->kv_heads * group), head = item / group % c->kv_heads, g = item % group;
    const float *part = partial_sums(a, token, head, 0) + g * stride;
    int64_t parts = c->rows[head] < 0 ? 1 : split_blocks(a, token).count + 1, apart = group * stride;
    float top = part[dim], total = 0, sums[MAX_DIM];
    for (int64_t i = 1; i < parts; i++) top = part[i * apart + dim] > top ? part[i * apart + dim] : top;
    for (int64_t d = 0; d < dim; d++) sums[d] = 0;
    for (int64_t i = parts - 1; i >= 0; i--) {
      if (i == 0 && c->value.rotate && parts > 1) hadamard(sums, dim);
      float share = exp1(part[i * apart + dim] - top);
      total += part[i * apart + dim + 1] * share;
      for (int64_t d = 0; d < dim; d++) sums[d] += part[i * apart + d] * share;
    }
    for (int64_t d = 0; d < dim; d++) a->out[item * dim + d] = sums[d] / total;
  }
}
