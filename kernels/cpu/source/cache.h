// One layer's share of the KV cache as the kernels see it, and where its blocks lie.
#pragma once
#include "planes.h"
#include "pool.h"

#define MAX_GROUP 32
#define MAX_DIM 256
#define TILE 64  // keys looked at together: at least a block

typedef struct selection selection;

typedef struct {
  float *keys, *values;     // the ring of this layer: [kv_heads, slots, dim]
  uint8_t *records;         // [num_records, record_bytes]
  int64_t *table;           // [retrieval heads of this layer, table_stride]: the record of each block
  const int64_t *rows;      // [kv_heads]: the row of `table`, or -1 in a streaming head
  const int64_t *widths;    // [kv_heads]: recent tokens read from the window
  const int64_t *start;     // how many tokens were there before the new ones
  int64_t table_stride, record_bytes, block_size;
  int64_t kv_heads, query_group, dim;
  int64_t sink, recent;     // of the ring; retrieval heads have width == recent
  plane key, value;
  // Where blocks have their homes elsewhere, with copies in the first records; a mapped file is asked ahead of time:
  int (*advise)(void *, size_t, int);  // madvise; null where there is no file
  int64_t first_home;                  // number of the first home record
  int64_t num_slots;                   // copies of each row's blocks
  int64_t next_row, next_rows;         // rows of `table` that the next layer reads
  int64_t *tags;                       // [rows of the table, num_slots]: whose copy it is; null where all is in memory
  int64_t integers;                    // whether blocks of integer codes are met by codes
  const selection *selection;          // which blocks a decode step reads; null for all of them
} layer_cache;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t slot_of(const layer_cache *c, int64_t position) {
  return position < c->sink ? position : c->sink + (position - c->sink) % c->recent;
}

// Tokens begin .. end - 1.
typedef struct {
  int64_t begin, end;
} span;

// What a query at `position` reads from blocks.
INLINE span block_tokens(const layer_cache *c, int64_t position) {
  return (span){c->sink, most(c->sink, position - c->recent + 1)};
}

// The queries of a KV head, scaled, and rotated like the keys they meet.
INLINE void load_queries(const layer_cache *c, const float *q, int64_t head, int rotate, float *to) {
  float scale = 1.0f / __builtin_sqrtf((float)c->dim);
  for (int64_t g = 0; g < c->query_group; g++, to += c->dim) {
    for (int64_t d = 0; d < c->dim; d++) to[d] = q[(head * c->query_group + g) * c->dim + d] * scale;
    if (rotate) hadamard(to, c->dim);
  }
}

#define PAGE 4096
#define WILL_NEED 3  // MADV_WILLNEED, the same number on every Linux

// Ask for `bytes` of a mapped file to be read while something else is computed.
INLINE void ask_for(const layer_cache *c, uint8_t *begin, int64_t bytes) {
  uintptr_t from = (uintptr_t)begin / PAGE * PAGE, to = (uintptr_t)begin + (uintptr_t)bytes;
  if (bytes > 0) c->advise((void *)from, to - from, WILL_NEED);
}

// While this layer is computed, the next one's blocks come: `item` of next_rows. Copies in memory fill the first slots.
static void read_ahead(const layer_cache *c, int64_t item, int64_t seen_end) {
  int64_t blocks = (seen_end + c->block_size - 1) / c->block_size, row = c->next_row + item;
  uint8_t *homes = c->records + (c->first_home + row * c->table_stride) * c->record_bytes;
  ask_for(c, homes + c->num_slots * c->record_bytes, (blocks - c->num_slots) * c->record_bytes);
}
