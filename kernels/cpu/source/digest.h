// Digests of blocks: as kernels/digest.py says.
#pragma once
#include "cache.h"

#define RUN 16  // tokens
#define REACH 0.5f
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

// sum over channels of q * codes
INLINE float dot_codes(const uint8_t *codes, const float *q, int64_t channels) {
  int64_t half = channels / 2, i = 0;
  vf low = {0}, high = {0};
  for (; i + LANES <= half; i += LANES) {
    vi packed = __builtin_convertvector(*(const vb_u *)(codes + i), vi);
    low += __builtin_convertvector(packed & 15, vf) * load(q + i);
    high += __builtin_convertvector(packed >> 4, vf) * load(q + half + i);
  }
  float total = sum(low + high);
  for (; i < half; i++) total += (float)(codes[i] & 15) * q[i] + (float)(codes[i] >> 4) * q[half + i];
  return total;
}

// scores [count] of blocks for the queries [group][dim] of a head, from their digests, which stand one after the other.
static void score_digests(const layer_cache *c, const float *queries, const int32_t *channels, int64_t num_channels,
                          const uint8_t *digests, int64_t count, float *scores) {
  float q[MAX_CHANNELS], size[MAX_CHANNELS], all = 0, all_sizes = 0;
  for (int64_t i = 0; i < num_channels; i++) {
    q[i] = size[i] = 0;
    for (int64_t g = 0; g < c->query_group; g++) {
      float x = queries[g * c->dim + channels[i]];
      q[i] += x;
      size[i] += __builtin_fabsf(x);
    }
    size[i] *= REACH;
    all += q[i];
    all_sizes += size[i];
  }
  int64_t runs = most(1, c->block_size / RUN), bytes = vector_bytes(num_channels);
  for (int64_t block = 0; block < count; block++) {
    float best = -__builtin_inff();
    for (int64_t r = 0; r < runs; r++, digests += 2 * bytes) {
      const uint8_t *width = digests + bytes;
      float score = dot_codes(digests, q, num_channels) * half_at(digests + num_channels / 2) +
                    half_at(digests + num_channels / 2 + 2) * all;
      score += dot_codes(width, size, num_channels) * half_at(width + num_channels / 2) +
               half_at(width + num_channels / 2 + 2) * all_sizes;
      best = score > best ? score : best;
    }
    scores[block] = best;
  }
}
