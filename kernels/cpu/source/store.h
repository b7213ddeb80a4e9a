// Storing new keys and values: blocks that they complete are encoded, and the ring keeps what stays.
#pragma once
#include "cache.h"

typedef struct {
  const layer_cache *cache;
  const float *k, *v;  // [count, kv_heads, dim] of the new tokens
  int64_t count;
} store_args;

// Encode a head's block whose last token is among the new ones. Runs before the ring is written.
static void close_block(const store_args *a, int64_t head, int64_t block) {
  const layer_cache *c = a->cache;
  int64_t start = *c->start;
  if (c->rows[head] < 0) return;
  uint8_t *record = c->records + c->table[c->rows[head] * c->table_stride + block] * c->record_bytes;
  for (int64_t t = 0; t < c->block_size; t++) {
    int64_t position = block * c->block_size + t;
    int64_t old = (head * (c->sink + c->recent) + slot_of(c, position)) * c->dim;
    int64_t new = ((position - start) * c->kv_heads + head) * c->dim;
    float x[MAX_DIM];
    const float *k = position < start ? c->keys + old : a->k + new, *v = position < start ? c->values + old : a->v + new;
    for (int64_t d = 0; d < c->dim; d++) x[d] = k[d];
    encode_token(record, &c->key, c->dim, t, x);
    for (int64_t d = 0; d < c->dim; d++) x[d] = v[d];
    encode_token(record, &c->value, c->dim, t, x);
  }
}

static void run_close_blocks(const void *args, pool *p, int64_t thread) {
  const store_args *a = args;
  const layer_cache *c = a->cache;
  int64_t start = *c->start, first = start / c->block_size, blocks = (start + a->count) / c->block_size - first;
  if (blocks <= 0) return;
  for (int64_t item; (item = next_item(p)) < blocks * c->kv_heads;) close_block(a, item / blocks, first + item % blocks);
}

// Keep in a head's ring what stays of the new tokens.
static void write_head(const store_args *a, int64_t head) {
  const layer_cache *c = a->cache;
  int64_t start = *c->start, end = start + a->count;
  for (int64_t position = start; position < end; position++) {
    if (position >= c->sink && position < end - c->recent) {
      position = most(position, end - c->recent - 1);
      continue;
    }
    int64_t to = (head * (c->sink + c->recent) + slot_of(c, position)) * c->dim;
    int64_t from = ((position - start) * c->kv_heads + head) * c->dim;
    for (int64_t d = 0; d < c->dim; d++) {
      c->keys[to + d] = a->k[from + d];
      c->values[to + d] = a->v[from + d];
    }
  }
}

static void run_write_ring(const void *args, pool *p, int64_t thread) {
  const store_args *a = args;
  for (int64_t head; (head = next_item(p)) < a->cache->kv_heads;) write_head(a, head);
}

typedef struct {
  const store_args *layers;  // [num_layers]: of all tokens of a step that looked ahead
  int64_t num_layers, row;   // which of them is the next token of the context
} accept_args;

// Store one token in all layers.
static void run_accept(const void *args, pool *p, int64_t thread) {
  const accept_args *a = args;
  int64_t heads = a->layers->cache->kv_heads;
  for (int64_t item; (item = next_item(p)) < a->num_layers * heads;) {
    store_args one = a->layers[item / heads];
    const layer_cache *c = one.cache;
    one.k += a->row * heads * c->dim, one.v += a->row * heads * c->dim, one.count = 1;
    if ((*c->start + 1) % c->block_size == 0) close_block(&one, item % heads, *c->start / c->block_size);
    write_head(&one, item % heads);
  }
}
