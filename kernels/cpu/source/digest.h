// Digests of blocks: as kernels/digest.py says.
#pragma once
#include "cache.h"

#define RUN 8  // tokens
#define MAX_CHANNELS 64

INLINE int64_t vector_bytes(int64_t channels) { return channels / 2 + 4; }

// x [channels] as codes, two per byte, then scale and minimum; x is overwritten.
static void encode_vector(float *x, int64_t channels, uint8_t *out) {
  float low = x[0], high = x[0];
  for (int64_t c = 1; c < channels; c++) {
    low = x[c] < low ? x[c] : low;
    high = x[c] > high ? x[c] : high;
  }
  low = as_half(low);
  float scale = as_half(clamp((high - low) / 15.0f, 0.0f, 65504.0f));
  put_half(out + channels / 2, scale);
  put_half(out + channels / 2 + 2, low);
  if (scale == 0) scale = 1;
  for (int64_t c = 0; c < channels; c++) x[c] = clamp(__builtin_roundevenf((x[c] - low) / scale), 0.0f, 15.0f);
  for (int64_t c = 0; c < channels / 2; c++) out[c] = (uint8_t)((uint32_t)x[c] | (uint32_t)x[c + channels / 2] << 4);
}

// channels: of the row; centre: subtracted from the middles.
static void make_digest(const layer_cache *c, const uint8_t *record, const int32_t *channels, const float *centre, int64_t count,
                        uint8_t *out) {
  int64_t run = least(RUN, c->block_size), runs = c->block_size / run;
  float keys[RUN * MAX_DIM];
  for (int64_t r = 0; r < runs; r++, out += 2 * vector_bytes(count)) {
    decode_plane(record, &c->key, c->dim, r * run, run, 0, keys);
    if (c->key.rotate)
      for (int64_t t = 0; t < run; t++) hadamard(keys + t * c->dim, c->dim);
    float middle[MAX_CHANNELS], width[MAX_CHANNELS];
    for (int64_t i = 0; i < count; i++) {
      float low = keys[channels[i]], high = low;
      for (int64_t t = 1; t < run; t++) {
        float x = keys[t * c->dim + channels[i]];
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      middle[i] = (low + high) / 2 - centre[i];
      width[i] = (high - low) / 2;
    }
    encode_vector(middle, count, out);
    encode_vector(width, count, out + vector_bytes(count));
  }
}

// A query head's part of a score: q of the picked channels, once as it is, once without its signs.
typedef struct {
  float q[MAX_CHANNELS], size[MAX_CHANNELS];
} picked_query;

// sums [rows]: add q · x over the channels of a vector, for `rows` query heads; what is left over goes into `rest`.
INLINE void add_vector(int rows, const uint8_t *stored, const picked_query *queries, int sizes, int64_t channels,
                       vf *sums, float *rest) {
  int64_t half = channels / 2, i = 0;
  float scale = half_at(stored + half), low = half_at(stored + half + 2);
  for (; i + LANES <= half; i += LANES) {
    vi packed = __builtin_convertvector(*(const vb_u *)(stored + i), vi);
    vf first = __builtin_convertvector(packed & 15, vf) * scale + low;
    vf second = __builtin_convertvector(packed >> 4, vf) * scale + low;
    for (int g = 0; g < rows; g++) {
      const float *q = sizes ? queries[g].size : queries[g].q;
      sums[g] += first * load(q + i) + second * load(q + half + i);
    }
  }
  for (; i < half; i++)
    for (int g = 0; g < rows; g++) {
      const float *q = sizes ? queries[g].size : queries[g].q;
      rest[g] += ((float)(stored[i] & 15) * scale + low) * q[i] + ((float)(stored[i] >> 4) * scale + low) * q[half + i];
    }
}

// The highest score of the runs of a block, for `rows` query heads.
INLINE float score_block(int rows, const uint8_t *digest, const picked_query *queries, int64_t channels, int64_t runs) {
  int64_t bytes = vector_bytes(channels);
  vf best = splat(-__builtin_inff());
  for (int64_t first = 0; first < runs; first += LANES) {
    vf sums[4][LANES];
    for (int r = 0; r < LANES; r++) {
      vf here[4] = {0};
      float rest[4] = {0};
      const uint8_t *run = digest + least(first + r, runs - 1) * 2 * bytes;
      add_vector(rows, run, queries, 0, channels, here, rest);
      add_vector(rows, run + bytes, queries, 1, channels, here, rest);
      for (int g = 0; g < rows; g++) {
        here[g][0] += rest[g];
        sums[g][r] = here[g];
      }
    }
    for (int g = 0; g < rows; g++) best = vmax(best, sum_each(sums[g]));
  }
  return max_of(best);
}

// scores [count] of blocks for the queries [group][dim] of a head, from their digests, which stand one after the other.
static void score_digests(const layer_cache *c, const float *q, const int32_t *channels, int64_t num_channels,
                          const uint8_t *digests, int64_t count, float *scores) {
  picked_query queries[MAX_GROUP];
  int64_t group = c->query_group, runs = most(1, c->block_size / RUN), bytes = runs * 2 * vector_bytes(num_channels);
  for (int64_t g = 0; g < group; g++)
    for (int64_t i = 0; i < num_channels; i++) {
      queries[g].q[i] = q[g * c->dim + channels[i]];
      queries[g].size[i] = __builtin_fabsf(queries[g].q[i]);
    }
  for (int64_t block = 0; block < count; block++, digests += bytes) {
    float best = -__builtin_inff();
    for (int64_t g = 0; g < group; g += 4) {
      const picked_query *part = queries + g;
      int64_t rows = group - g;
      float score = rows >= 4   ? score_block(4, digests, part, num_channels, runs)
                    : rows == 3 ? score_block(3, digests, part, num_channels, runs)
                    : rows == 2 ? score_block(2, digests, part, num_channels, runs)
                                : score_block(1, digests, part, num_channels, runs);
      best = score > best ? score : best;
    }
    scores[block] = best;
  }
}
