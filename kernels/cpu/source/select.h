// Which blocks a decode step reads: digests of blocks, scores of all of them, the candidates that have the best, and
// those of them that are read, by the weights that weigh.h gives them. The rules are those of kernels/digest.py.
//
// A list holds the blocks of one row of the table in rising order; the last is the newest that is seen at all, which is
// always read. It is made anew at positions that are multiples of `reuse`, where a new block comes into sight, and where
// the steps before this one were not decoded here.
#pragma once
#include "cache.h"
#include "digest.h"

struct selection {
  int64_t budget;     // blocks, beside the newest
  int64_t reuse;      // steps
  const int32_t *channels;  // [rows of the table, num_channels]
  const float *centre;      // like channels
  int64_t num_channels;
  uint8_t *digests;   // [rows of the table, table_stride, digest_bytes]
  int64_t digest_bytes;
  int32_t *lists;     // [rows of the table, budget + 1]
  int64_t *made_at;   // [rows of the table]: what `occasion` was; -1 for no list
  float *scores;      // [kv_heads, table_stride]
  int64_t num_candidates;
  int32_t *candidates;  // [kv_heads, num_candidates], rising
  float *weights;       // [kv_heads, query_group, 2, num_candidates]: of each candidate the largest score of its keys,
                        // and the sum of e^(score - largest)
};

// The blocks that a query at `position` sees: whole ones from `first` on, and `newest`.
typedef struct {
  int64_t first, newest;  // newest < first: none
} seen_blocks;

INLINE seen_blocks blocks_seen(const layer_cache *c, span tokens) {
  if (tokens.end <= tokens.begin) return (seen_blocks){0, -1};
  return (seen_blocks){tokens.begin / c->block_size, (tokens.end - 1) / c->block_size};
}

INLINE int64_t list_length(const selection *s, seen_blocks seen) {
  return seen.newest < seen.first ? 0 : least(seen.newest - seen.first, s->budget) + 1;
}

INLINE int64_t occasion(const selection *s, int64_t position, seen_blocks seen) {
  return position / s->reuse * ((int64_t)1 << 32) + seen.newest;
}

INLINE const int32_t *list_of(const selection *s, int64_t row) { return s->lists + row * (s->budget + 1); }

// ---- digests ----

typedef struct {
  const layer_cache *cache;
  int64_t count;        // new tokens: the blocks that they complete; or 0 for
  int64_t first, last;  // these
} digest_args;

static void run_digest_blocks(const void *args, pool *p, int64_t thread) {
  const digest_args *a = args;
  const layer_cache *c = a->cache;
  const selection *s = c->selection;
  int64_t first = a->first, last = a->last;
  if (a->count) {
    first = *c->start / c->block_size;
    last = (*c->start + a->count) / c->block_size;
  }
  int64_t blocks = last - first;
  if (blocks <= 0) return;
  for (int64_t item; (item = next_item(p)) < blocks * c->kv_heads;) {
    int64_t row = c->rows[item / blocks], block = first + item % blocks;
    if (row < 0) continue;
    const uint8_t *record = c->records + c->table[row * c->table_stride + block] * c->record_bytes;
    make_digest(c, record, s->channels + row * s->num_channels, s->centre + row * s->num_channels, s->num_channels,
                s->digests + (row * c->table_stride + block) * s->digest_bytes);
  }
}

// ---- choosing ----

typedef struct {
  const layer_cache *cache;
  const float *q;  // [kv_heads * query_group, dim]
} select_args;

#define SCORED_TOGETHER 128  // blocks that are one item of work

static void run_score_blocks(const void *args, pool *p, int64_t thread) {
  const select_args *a = args;
  const layer_cache *c = a->cache;
  const selection *s = c->selection;
  seen_blocks seen = blocks_seen(c, block_tokens(c, *c->start));
  int64_t blocks = seen.newest - seen.first, now = occasion(s, *c->start, seen);  // the newest needs no score
  if (blocks <= s->num_candidates) return;
  int64_t parts = (blocks + SCORED_TOGETHER - 1) / SCORED_TOGETHER;
  for (int64_t item; (item = next_item(p)) < parts * c->kv_heads;) {
    int64_t head = item % c->kv_heads, row = c->rows[head], from = item / c->kv_heads * SCORED_TOGETHER;
    if (row < 0 || s->made_at[row] == now) continue;
    const uint8_t *digests = s->digests + (row * c->table_stride + seen.first + from) * s->digest_bytes;
    score_digests(c, a->q + head * c->query_group * c->dim, s->channels + row * s->num_channels, s->num_channels, digests,
                  least(SCORED_TOGETHER, blocks - from), s->scores + head * c->table_stride + from);
  }
}

// The `wanted` largest of scores [count], their numbers rising; of equal ones the older. A heap whose top is the least.
static void largest(const float *scores, int64_t count, int64_t wanted, int32_t first, int32_t *list) {
  int64_t held = 0;
#define WORSE(a, b) (scores[a] < scores[b] || (scores[a] == scores[b] && (a) > (b)))
  for (int32_t i = 0; i < count; i++) {
    int64_t at;
    if (held < wanted) {
      for (at = held++; at > 0 && WORSE(i, list[(at - 1) / 2]); at = (at - 1) / 2) list[at] = list[(at - 1) / 2];
    } else {
      if (!WORSE(list[0], i)) continue;
      for (at = 0;;) {
        int64_t child = 2 * at + 1;
        if (child >= held) break;
        if (child + 1 < held && WORSE(list[child + 1], list[child])) child++;
        if (!WORSE(list[child], i)) break;
        list[at] = list[child];
        at = child;
      }
    }
    list[at] = i;
  }
#undef WORSE
  for (int64_t end = held - 1; end > 0; end--) {  // rising: a heap of the numbers themselves
    for (int64_t root = end == held - 1 ? held / 2 - 1 : 0; root >= 0; root--) {
      int32_t moved = list[root];
      int64_t at = root;
      for (int64_t child; (child = 2 * at + 1) <= end; at = child) {
        if (child < end && list[child + 1] > list[child]) child++;
        if (list[child] <= moved) break;
        list[at] = list[child];
      }
      list[at] = moved;
    }
    int32_t top = list[0];
    list[0] = list[end];
    list[end] = top;
  }
  for (int64_t i = 0; i < held; i++) list[i] += first;
}

INLINE void number_blocks(int32_t *list, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; i++) list[i] = (int32_t)(first + i);
}

INLINE int listed(const int32_t *list, int64_t count, int64_t block) {
  int64_t low = 0, high = count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (list[middle] < block) low = middle + 1;
    else high = middle;
  }
  return low < count && list[low] == block;
}

// Ask for the listed blocks that have no copy: a page that is faulted in unasked brings megabytes around it along.
static void ask_for_listed(const layer_cache *c, int64_t row, const int32_t *list, int64_t count) {
  const int64_t *table = c->table + row * c->table_stride;
  int64_t home = c->first_home + row * c->table_stride;
  for (int64_t i = 0; i < count; i++)
    if (table[list[i]] == home + list[i]) ask_for(c, c->records + table[list[i]] * c->record_bytes, c->record_bytes);
}

// Copy what will be read from its home to memory, over copies that will not be.
static void fetch(const layer_cache *c, int64_t row, const int32_t *list, int64_t count) {
  int64_t *table = c->table + row * c->table_stride, *tags = c->tags + row * c->num_slots;
  int64_t home = c->first_home + row * c->table_stride;
  if (!c->num_slots) return;
  for (int64_t i = 0; i < count; i++) {
    int64_t block = list[i], slot = block % c->num_slots, old = tags[slot];
    if (old == block || (old >= 0 && listed(list, count, old))) continue;
    if (old >= 0) table[old] = home + old;
    const uint64_t *from = (const uint64_t *)(c->records + (home + block) * c->record_bytes);
    uint64_t *to = (uint64_t *)(c->records + (row * c->num_slots + slot) * c->record_bytes);
    for (int64_t word = 0; word < c->record_bytes / 8; word++) to[word] = from[word];
    tags[slot] = block;
    table[block] = row * c->num_slots + slot;
  }
}

static void run_choose_candidates(const void *args, pool *p, int64_t thread) {
  const select_args *a = args;
  const layer_cache *c = a->cache;
  const selection *s = c->selection;
  seen_blocks seen = blocks_seen(c, block_tokens(c, *c->start));
  int64_t blocks = seen.newest - seen.first, count = least(blocks, s->num_candidates);
  if (blocks <= s->budget) return;
  for (int64_t head; (head = next_item(p)) < c->kv_heads;) {
    int64_t row = c->rows[head];
    if (row < 0 || s->made_at[row] == occasion(s, *c->start, seen)) continue;
    int32_t *candidates = s->candidates + head * s->num_candidates;
    if (blocks == count) number_blocks(candidates, count, seen.first);
    else largest(s->scores + head * c->table_stride, blocks, count, (int32_t)seen.first, candidates);
    if (c->advise) ask_for_listed(c, row, candidates, count);
  }
}

// The candidates of which a head's queries see most, rising: its list but for the newest.
static void choose_among(const layer_cache *c, int64_t head, int64_t count, int32_t *list) {
  const selection *s = c->selection;
  const int32_t *candidates = s->candidates + head * s->num_candidates;
  float *shares = s->scores + head * c->table_stride;
  for (int64_t i = 0; i < count; i++) shares[i] = 0;
  for (int64_t g = 0; g < c->query_group; g++) {
    const float *tops = s->weights + (head * c->query_group + g) * 2 * s->num_candidates;
    const float *totals = tops + s->num_candidates;
    float top = tops[0], whole = 0;
    for (int64_t i = 1; i < count; i++) top = tops[i] > top ? tops[i] : top;
    for (int64_t i = 0; i < count; i++) whole += totals[i] * exp1(tops[i] - top);
    for (int64_t i = 0; i < count; i++) shares[i] += totals[i] * exp1(tops[i] - top) / whole;
  }
  largest(shares, count, s->budget, 0, list);
  for (int64_t i = 0; i < s->budget; i++) list[i] = candidates[list[i]];
}

static void run_choose_blocks(const void *args, pool *p, int64_t thread) {
  const select_args *a = args;
  const layer_cache *c = a->cache;
  const selection *s = c->selection;
  seen_blocks seen = blocks_seen(c, block_tokens(c, *c->start));
  int64_t count = list_length(s, seen), now = occasion(s, *c->start, seen);
  if (!count) return;
  for (int64_t head; (head = next_item(p)) < c->kv_heads;) {
    int64_t row = c->rows[head];
    if (row < 0) continue;
    int32_t *list = s->lists + row * (s->budget + 1);
    if (s->made_at[row] == now) {
      if (c->advise) ask_for_listed(c, row, list, count);
      continue;
    }
    int64_t blocks = seen.newest - seen.first;
    if (blocks <= s->budget) number_blocks(list, blocks, seen.first);
    else choose_among(c, head, least(blocks, s->num_candidates), list);
    list[count - 1] = (int32_t)seen.newest;
    s->made_at[row] = now;
    if (c->advise) ask_for_listed(c, row, list, count);
    if (c->tags) fetch(c, row, list, count);
  }
}
