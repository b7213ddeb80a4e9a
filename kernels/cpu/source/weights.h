// Weights in the bits of their file: decoding, and dot products that decode on the way.
//
// A row of a GGUF weight is a run of blocks; every format here is read in units of 32 neighbouring input features.
// Layouts: ggml's ggml-common.h (block_q4_0 ... block_q6_K), AutoAWQ's GEMM layout, and the rows of
// quant/bitsandbytes.py for NF4 and INT8.
#pragma once
#include "simd.h"

enum format { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, AWQ, NF4, INT8, NUM_FORMATS };

#define UNIT 32
#define PER_UNIT (UNIT / LANES)

typedef struct {
  const uint8_t *data;    // [rows, row_bytes]; AWQ: int32 [cols, rows / 8]
  int64_t format;
  int64_t rows;           // out_features
  int64_t cols;           // in_features
  int64_t row_bytes;
  const uint8_t *zeros;   // AWQ: int32 [cols / group, rows / 8]
  const uint8_t *scales;  // AWQ: float16 [cols / group, rows]
  int64_t group;          // AWQ: input features per scale
} matrix;

// 32 values from 16 bytes: the low nibbles first, then the high ones.
INLINE void nibbles(const uint8_t *p, vf *w) {
  for (int i = 0; i < PER_UNIT / 2; i++) {
    vb c = *(const vb_u *)(p + i * LANES);
    w[i] = from_u8(c & 15);
    w[i + PER_UNIT / 2] = from_u8(c >> 4);
  }
}

// The same times scale, plus minimum.
INLINE void scaled_nibbles(const uint8_t *p, float scale, float minimum, vf *w) {
  nibble_table table = nibbles_times(scale, minimum);
  for (int i = 0; i < PER_UNIT / 2; i++) look_up(table, *(const vb_u *)(p + i * LANES), &w[i], &w[i + PER_UNIT / 2]);
}

// The same with a fifth bit per value: bit j of the word belongs to value j.
INLINE void five_bits(const uint8_t *p, uint32_t high, vf *w) {
  nibbles(p, w);
  for (int i = 0; i < PER_UNIT; i++) {
    vu bit;
    for (int j = 0; j < LANES; j++) bit[j] = (uint32_t)j;
    vu fifth = (((vu){0} + (high >> (i * LANES))) >> bit) & 1;
    w[i] += __builtin_convertvector((vi)(fifth << 4), vf);
  }
}

INLINE void scale_by(vf *w, float scale, float minimum) {
  for (int i = 0; i < PER_UNIT; i++) w[i] = w[i] * scale + minimum;
}

INLINE void unit_f32(const uint8_t *row, int64_t u, vf *w) {
  for (int i = 0; i < PER_UNIT; i++) w[i] = load((const float *)row + u * UNIT + i * LANES);
}

INLINE void unit_f16(const uint8_t *row, int64_t u, vf *w) {
  for (int i = 0; i < PER_UNIT; i++) w[i] = from_half(*(const vhf_u *)(row + 2 * (u * UNIT + i * LANES)));
}

INLINE void unit_bf16(const uint8_t *row, int64_t u, vf *w) {
  for (int i = 0; i < PER_UNIT; i++) w[i] = from_bfloat(*(const vh_u *)(row + 2 * (u * UNIT + i * LANES)));
}

INLINE void unit_q8_0(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 34 * u;
  float d = half_at(p);
  for (int i = 0; i < PER_UNIT; i++) w[i] = from_i8(*(const vsb_u *)(p + 2 + i * LANES)) * d;
}

INLINE void unit_q4_0(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 18 * u;
  float d = half_at(p);
  scaled_nibbles(p + 2, d, -8.0f * d, w);
}

INLINE void unit_q4_1(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 20 * u;
  scaled_nibbles(p + 4, half_at(p), half_at(p + 2), w);
}

INLINE void unit_q5_0(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 22 * u;
  float d = half_at(p);
  five_bits(p + 6, *(const u32_u *)(p + 2), w);
  scale_by(w, d, -16.0f * d);
}

INLINE void unit_q5_1(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 24 * u;
  five_bits(p + 8, *(const u32_u *)(p + 4), w);
  scale_by(w, half_at(p), half_at(p + 2));
}

// Scale and minimum of the s-th sub-block of Q4_K and Q5_K (their packing: quant/gguf.py).
INLINE void k_scale(const uint8_t *p, int s, float *scale, float *minimum) {
  const uint8_t *q = p + 4;
  int sc, m;
  if (s < 4) {
    sc = q[s] & 63;
    m = q[s + 4] & 63;
  } else {
    sc = (q[s + 4] & 15) | ((q[s - 4] >> 6) << 4);
    m = (q[s + 4] >> 4) | ((q[s] >> 6) << 4);
  }
  *scale = half_at(p) * (float)sc;
  *minimum = -half_at(p + 2) * (float)m;
}

// 32 values of one sub-block of Q4_K or Q5_K: sub-blocks 2i and 2i + 1 are the low and high nibbles of 32 bytes.
INLINE void k_nibbles(const uint8_t *p, int s, vf *w) {
  for (int i = 0; i < PER_UNIT; i++) {
    vb c = *(const vb_u *)(p + 32 * (s / 2) + i * LANES);
    w[i] = from_u8(s & 1 ? c >> 4 : c & 15);
  }
}

INLINE void unit_q4_k(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 144 * (u / 8);
  float scale, minimum;
  k_scale(p, u % 8, &scale, &minimum);
  k_nibbles(p + 16, u % 8, w);
  scale_by(w, scale, minimum);
}

INLINE void unit_q5_k(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 176 * (u / 8);
  int s = u % 8;
  float scale, minimum;
  k_scale(p, s, &scale, &minimum);
  k_nibbles(p + 48, s, w);
  for (int i = 0; i < PER_UNIT; i++) {
    vb high = (*(const vb_u *)(p + 16 + i * LANES) >> s) & 1;
    w[i] += from_u8(high << 4);
  }
  scale_by(w, scale, minimum);
}

INLINE void unit_q6_k(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 210 * (u / 8);
  int s = u % 8, run = s / 4, part = s % 4;  // 2 runs of 4 units; a pair of high bits for each
  const uint8_t *low = p + 64 * run + 32 * (part % 2), *high = p + 128 + 32 * run;
  const int8_t *scales = (const int8_t *)(p + 192) + 2 * s;
  float d = half_at(p + 208);
  for (int i = 0; i < PER_UNIT; i++) {
    vb c = *(const vb_u *)(low + i * LANES), h = (*(const vb_u *)(high + i * LANES) >> (2 * part)) & 3;
    c = (part < 2 ? c & 15 : c >> 4) | (h << 4);
    w[i] = (from_u8(c) - 32.0f) * (d * (float)scales[i * LANES / 16]);
  }
}

// NF4: blocks of 64 values in 36 bytes: float32 absmax | 2 runs of 16 bytes: 16 low nibbles, then 16 high ones.
INLINE void unit_nf4(const uint8_t *row, int64_t u, vf *w) {
  const uint8_t *p = row + 36 * (u / 2);
  any_table table = nf4_times(*(const float_u *)p);
  for (int i = 0; i < PER_UNIT / 2; i++) {
    vb c = *(const vb_u *)(p + 4 + 16 * (u % 2) + i * LANES);
    w[i] = look_up_any(&table, c & 15);
    w[i + PER_UNIT / 2] = look_up_any(&table, c >> 4);
  }
}

// INT8: float32 absmax of the row | its int8 codes; a value is code * absmax * (1 / 127), in this order.
INLINE void unit_int8(const uint8_t *row, int64_t u, vf *w) {
  float absmax = *(const float_u *)row;
  for (int i = 0; i < PER_UNIT; i++)
    w[i] = from_i8(*(const vsb_u *)(row + 4 + u * UNIT + i * LANES)) * absmax * 7.874015718698502e-3f;
}

typedef void (*decode_fn)(const uint8_t *row, int64_t first, int64_t units, float *out);
typedef void (*dot_fn)(const uint8_t *row, int64_t row_bytes, const float *x, int64_t units, float *y);

#define ROWS_AT_ONCE 2
#ifndef PREFETCH
#define PREFETCH 4096
#endif

// decode_*: units first .. first + units - 1 of a row. dot_*: two rows times x, added to y[0] and y[1].
#define DEFINE_FORMAT(name, unit_bytes)                                                                            \
  static void decode_##name(const uint8_t *row, int64_t first, int64_t units, float *out) {               \
    for (int64_t u = 0; u < units; u++) {                                                                 \
      vf w[PER_UNIT];                                                                                     \
      unit_##name(row, first + u, w);                                                                     \
      for (int i = 0; i < PER_UNIT; i++) store(out + u * UNIT + i * LANES, w[i]);                         \
    }                                                                                                     \
  }                                                                                                       \
  static void dot_##name(const uint8_t *row, int64_t row_bytes, const float *x, int64_t units, float *y) { \
    vf a[PER_UNIT] = {0}, b[PER_UNIT] = {0};                                                              \
    for (int64_t u = 0; u < units; u++) {                                                                 \
      vf w[PER_UNIT], v[PER_UNIT];                                                                        \
      __builtin_prefetch(row + u * (unit_bytes) + PREFETCH);                                              \
      __builtin_prefetch(row + row_bytes + u * (unit_bytes) + PREFETCH);                                  \
      unit_##name(row, u, w);                                                                             \
      unit_##name(row + row_bytes, u, v);                                                                 \
      for (int i = 0; i < PER_UNIT; i++) {                                                                \
        vf xi = load(x + u * UNIT + i * LANES);                                                           \
        a[i] += w[i] * xi;                                                                                \
        b[i] += v[i] * xi;                                                                                \
      }                                                                                                   \
    }                                                                                                     \
    vf sa = a[0], sb = b[0];                                                                              \
    for (int i = 1; i < PER_UNIT; i++) {                                                                  \
      sa += a[i];                                                                                         \
      sb += b[i];                                                                                         \
    }                                                                                                     \
    y[0] += sum(sa);                                                                                      \
    y[1] += sum(sb);                                                                                      \
  }

DEFINE_FORMAT(f32, 128)
DEFINE_FORMAT(f16, 64)
DEFINE_FORMAT(bf16, 64)
DEFINE_FORMAT(q8_0, 34)
DEFINE_FORMAT(q4_0, 18)
DEFINE_FORMAT(q4_1, 20)
DEFINE_FORMAT(q5_0, 22)
DEFINE_FORMAT(q5_1, 24)
DEFINE_FORMAT(q4_k, 18)
DEFINE_FORMAT(q5_k, 22)
DEFINE_FORMAT(q6_k, 26)
DEFINE_FORMAT(nf4, 18)
DEFINE_FORMAT(int8, 32)

static const decode_fn decoders[NUM_FORMATS] = {decode_f32,  decode_f16,  decode_bf16, decode_q8_0, decode_q4_0, decode_q4_1,
                                                decode_q5_0, decode_q5_1, decode_q4_k, decode_q5_k, decode_q6_k, 0,
                                                decode_nf4,  decode_int8};
static const dot_fn dots[NUM_FORMATS] = {dot_f32,  dot_f16,  dot_bf16, dot_q8_0, dot_q4_0, dot_q4_1,
                                         dot_q5_0, dot_q5_1, dot_q4_k, dot_q5_k, dot_q6_k, 0,
                                         dot_nf4,  dot_int8};

// One value of a 16- or 32-bit row: what is left of a row that is no whole number of units.
INLINE float dense_at(const matrix *w, const uint8_t *row, int64_t col) {
  if (w->format == F32) return ((const float_u *)row)[col];
  if (w->format == F16) return half_at(row + 2 * col);
  return bfloat_at(row + 2 * col);
}

// Decode columns first .. first + count - 1 of one row; `first` is a multiple of 32.
static void decode_row(const matrix *w, int64_t row, int64_t first, int64_t count, float *out) {
  const uint8_t *data = w->data + row * w->row_bytes;
  int64_t units = count / UNIT;
  decoders[w->format](data, first / UNIT, units, out);
  for (int64_t col = units * UNIT; col < count; col++) out[col] = dense_at(w, data, first + col);
}

// AWQ: nibbles 0 ... 7 of an int32, from below, hold output channels 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
#define AWQ_WORDS (LANES / 8)  // packed words that hold LANES output channels
#define AWQ_STRIP 8            // vectors of channels whose sums stay in registers
#define AWQ_CHANNELS (AWQ_STRIP * LANES)
#define AWQ_AHEAD 64           // input features between what is prefetched and what is read

// LANES channels, in order, from AWQ_WORDS words; of `there` words if these are fewer, then zeros. The codes are the lowest
// four bits.
INLINE vi awq_bits(const int32_t *words, int64_t there) {
  int32_t some[AWQ_WORDS] = {0};
  if (there < AWQ_WORDS) {
    for (int64_t i = 0; i < there; i++) some[i] = words[i];
    words = some;
  }
#if LANES == 16
  const vu bit = {0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28};
  typedef uint32_t pair __attribute__((vector_size(8)));
  typedef pair pair_u __attribute__((aligned(4)));
  pair p = *(const pair_u *)words;
  vu spread = __builtin_shufflevector(p, p, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
#else
  const vu bit = {0, 16, 4, 20, 8, 24, 12, 28};
  vu spread = (vu){0} + (uint32_t)*words;
#endif
  return (vi)(spread >> bit);
}

// The codes as numbers.
INLINE vf awq_codes(const int32_t *words, int64_t there) {
#if LANES == 16
  const vf steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vf)__builtin_ia32_permvarsf512(steps, awq_bits(words, there));  // the permutation reads the lowest four bits
#else
  return __builtin_convertvector(awq_bits(words, there) & 15, vf);
#endif
}

// Scales of the same channels.
INLINE vf awq_scales(const uint8_t *scales, int64_t there) {
  if (there >= AWQ_WORDS) return from_half(*(const vhf_u *)scales);
  vf some = {0};
  for (int64_t i = 0; i < 8 * there; i++) some[i] = half_at(scales + 2 * i);
  return some;
}

// y [vectors * LANES] += channels of one group times x [w->group], whose sum is x_sum. words, zeros and scales begin at
// the first channel; `vectors` is a constant wherever this is inlined, so that the sums stay in registers.
INLINE void awq_strip(int vectors, int64_t there, const matrix *w, const int32_t *words, const int32_t *zeros,
                      const uint8_t *scales, const float *x, float x_sum, float *y) {
  vf acc[AWQ_STRIP] = {0};
  int64_t stride = w->rows / 8;
  for (int64_t k = 0; k < w->group; k++, words += stride) {
    vf xk = splat(x[k]);
    __builtin_prefetch(words + AWQ_AHEAD * stride);
#pragma clang loop unroll(full)
    for (int i = 0; i < vectors; i++) acc[i] += awq_codes(words + i * AWQ_WORDS, there) * xk;
  }
  for (int i = 0; i < vectors; i++) {
    vf offset = awq_codes(zeros + i * AWQ_WORDS, there) * x_sum;
    store(y + i * LANES, load(y + i * LANES) + (acc[i] - offset) * awq_scales(scales + 2 * i * LANES, there));
  }
}

// y [count, rounded up to LANES] = output channels first .. first + count - 1, a multiple of 8, times x [cols].
static void awq_dot(const matrix *w, int64_t first, int64_t count, const float *x, float *y) {
  int64_t row = w->rows / 8, words = count / 8;
  for (int64_t i = 0; i < count; i += LANES) store(y + i, splat(0));
  for (int64_t group = 0; group < w->cols / w->group; group++, x += w->group) {
    const int32_t *q = (const int32_t *)w->data + group * w->group * row + first / 8;
    const int32_t *z = (const int32_t *)w->zeros + group * row + first / 8;
    const uint8_t *scales = w->scales + 2 * (group * w->rows + first);
    float x_sum = 0;
    for (int64_t k = 0; k < w->group; k++) x_sum += x[k];
    int64_t at = 0;
#define STRIPS(vectors)                                                                                            \
  for (; at + (vectors) * AWQ_WORDS <= words; at += (vectors) * AWQ_WORDS)                                         \
    awq_strip(vectors, AWQ_WORDS, w, q + at, z + at, scales + 16 * at, x, x_sum, y + 8 * at);
    STRIPS(AWQ_STRIP)
    STRIPS(4)
    STRIPS(1)
#undef STRIPS
    if (at < words) awq_strip(1, words - at, w, q + at, z + at, scales + 16 * at, x, x_sum, y + 8 * at);
  }
}

// out[k][0 .. channels - 1] for input features first .. first + count - 1, the channels from 8 * word on, 0 beyond the
// last; rows of `out` are `stride` floats apart; `channels` is a multiple of LANES.
static void awq_decode(const matrix *w, int64_t word, int64_t channels, int64_t first, int64_t count, float *out,
                       int64_t stride) {
  int64_t words = w->rows / 8;
  for (int64_t c = 0; c < channels; c += LANES) {
    int64_t at = word + c / 8, there = words - at;
    vf scale = {0}, zero = {0};
    for (int64_t k = 0; k < count; k++) {
      int64_t group = (first + k) / w->group;
      if (k == 0 || (first + k) % w->group == 0) {
        zero = awq_codes((const int32_t *)w->zeros + group * words + at, there);
        scale = awq_scales(w->scales + 2 * (group * w->rows + 8 * at), there);
      }
      vf codes = awq_codes((const int32_t *)w->data + (first + k) * words + at, there);
      store(out + k * stride + c, (codes - zero) * scale);
    }
  }
}
