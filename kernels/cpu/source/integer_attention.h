// Attention over blocks of integer codes, as products of integers: nothing is decoded. decode.h and prefill.h use it.
//
// A stored key or value is scale * code + minimum. Each query, and each query's weights on a tile of tokens, become codes of
// 8 bits and rests of 8 bits below them, so that what they lose is some 2^-15 of their largest: less than any format of the
// cache. Scores are then (codes of the query times codes of the key) * scale + (sum of the query) * minimum, and values
// likewise with the weights times their scales.
#pragma once
#include "cache.h"
#include "integer.h"

#define CODE_BYTES (4 * LANES)                      // codes of one vector
#define FLIP ((uint8_t)(128 - SHIFT))               // codes of 8 bits where products take signed ones
#define PADDED(dim) (((dim) + CODE_BYTES - 1) / CODE_BYTES * CODE_BYTES)

// Rows of numbers in codes: x = scale * (128 * code + rest); zeros up to a whole vector.
typedef struct {
  uint8_t codes[MAX_GROUP][MAX_DIM], rests[MAX_GROUP][MAX_DIM];  // signed
  float scales[MAX_GROUP], sums[MAX_GROUP];
} query_codes;

// What a tile of tokens has of one plane.
typedef struct {
  const uint8_t *codes;  // [count, stride]
  int64_t stride;
  int is_signed;
  float scales[TILE], minima[TILE];  // of the codes as they are multiplied
} tile_codes;

INLINE int has_codes(const plane *pl, int64_t dim) { return pl->kind >= PLANE_INT8 && pl->groups == 1 && dim % UNIT == 0; }

// One scale for all of x [n], n a multiple of 32; returns it. `sum`, unless null, gets the sum of what the codes stand for.
INLINE float codes_of_row(const float *x, int64_t n, uint8_t *codes, uint8_t *rests, float *sum) {
  float most = 0, scale = 0;
  int32_t total = 0, halves[2];
  for (int64_t i = 0; i < n; i += UNIT) {
    float of_unit = most_of(x + i);
    most = of_unit > most ? of_unit : most;
  }
  for (int64_t i = 0; i < n; i += UNIT) {
    scale = quantize_unit(x + i, most, 1, codes + i, rests + i, sum ? halves : 0);
    if (sum) total += halves[0] + halves[1];
  }
  if (sum) *sum = scale * (float)total;
  return scale;
}

// n is a multiple of LANES.
INLINE int all_finite(const float *x, int64_t n) {
  vf zeros = {0};
  for (int64_t i = 0; i < n; i += LANES) zeros += load(x + i) * 0.0f;
  return sum(zeros) == 0.0f;
}

// q [group][dim] in codes; 0 where it has an infinite number or NaN.
static int quantize_queries(int64_t group, int64_t dim, const float *q, query_codes *to) {
  if (!all_finite(q, group * dim)) return 0;
  for (int64_t g = 0; g < group; g++) {
    to->scales[g] = codes_of_row(q + g * dim, dim, to->codes[g], to->rests[g], to->sums + g);
    for (int64_t d = dim; d < PADDED(dim); d++) to->codes[g][d] = to->rests[g][d] = 0;
  }
  return 1;
}

// Tokens first ... first + count - 1 of a plane; `space` [TILE * MAX_DIM] holds their codes where the record has them packed.
INLINE void read_codes(const uint8_t *record, const plane *pl, int64_t dim, int64_t first, int64_t count, int64_t ahead,
                       uint8_t *space, tile_codes *to) {
  int64_t bytes = pl->kind == PLANE_INT4 ? dim / 2 : dim, padded = PADDED(dim);
  const uint8_t *codes = record + pl->codes_at + first * bytes;
  for (int64_t b = 0; b < count * bytes; b += 64) __builtin_prefetch(codes + b + ahead);
  to->codes = codes, to->stride = bytes;
  to->is_signed = pl->kind == PLANE_INT8;
  if (pl->kind == PLANE_INT4) {
    for (int64_t t = 0; t < count; t++)
      for (int64_t d = 0; d < dim / 2; d += 16) {
        v16u both = *(const v16u_u *)(codes + t * bytes + d);
        *(v16u_u *)(space + t * padded + d) = both & 15;
        *(v16u_u *)(space + t * padded + d + dim / 2) = both >> 4;
      }
    to->codes = space, to->stride = padded;
  } else if (padded != dim) {
    for (int64_t t = 0; t < count; t++) __builtin_memcpy(space + t * padded, codes + t * dim, dim);
    to->codes = space, to->stride = padded;
  }
  const uint8_t *scales = record + pl->scales_at + 2 * first, *minima = record + pl->minima_at + 2 * first;
  int64_t t = 0;
  for (; t + LANES <= count; t += LANES) {
    store(to->scales + t, from_half(*(const vhf_u *)(scales + 2 * t)));
    store(to->minima + t, from_half(*(const vhf_u *)(minima + 2 * t)));
  }
  for (; t < count; t++) to->scales[t] = half_at(scales + 2 * t), to->minima[t] = half_at(minima + 2 * t);
  for (; t < TILE; t++) to->scales[t] = to->minima[t] = 0;
  if (to->is_signed)
    for (t = 0; t < TILE; t += LANES) store(to->minima + t, load(to->minima + t) + load(to->scales + t) * (float)FLIP);
}

INLINE vcodes load_codes(const uint8_t *p, int is_signed) {
  typedef vcodes vcodes_u __attribute__((aligned(1)));
  vcodes codes = *(const vcodes_u *)p;
  return is_signed ? codes ^ FLIP : codes;
}

INLINE vi load_x(const uint8_t *p) { return *(const vi_u *)p; }

INLINE vi four_for_all(const uint8_t *p) { return (vi){0} + *(const i32_u *)p; }

// As `score_tile`: scores [group][TILE].
INLINE void score_codes(int64_t group, int64_t dim, const query_codes *q, const tile_codes *k, int is_signed, int64_t count,
                        float *scores) {
  for (int64_t g = 0; g < group; g++, scores += TILE) {
    for (int64_t t = 0; t < count; t += LANES) {
      vi dots[LANES];
      for (int i = 0; i < LANES; i++) {
        const uint8_t *key = k->codes + least(t + i, count - 1) * k->stride;
        vi sums = {0};
        for (int64_t d = 0; d < dim; d += CODE_BYTES)
          sums = dot_lanes(sums, load_codes(key + d, is_signed), load_x(q->codes[g] + d), is_signed);
        sums <<= 7;
        for (int64_t d = 0; d < dim; d += CODE_BYTES)
          sums = dot_lanes(sums, load_codes(key + d, is_signed), load_x(q->rests[g] + d), is_signed);
        dots[i] = sums;
      }
      store(scores + t, __builtin_convertvector(sum_each_code(dots), vf) * q->scales[g] * load(k->scales + t) + load(k->minima + t) * q->sums[g]);
    }
    for (int64_t t = count; t < (count + LANES - 1) / LANES * LANES; t++) scores[t] = -__builtin_inff();
  }
}

// The codes of four tokens side by side: lane 4 * i + j of to[k] holds those of dimension 16 * i + 4 * k + j.
INLINE void side_by_side(vcodes a, vcodes b, vcodes c, vcodes d, vcodes *to) {
#if LANES == 16 && defined(__AVX512BW__)
#define ZIP(bits, half, x, y) (vcodes) _mm512_unpack##half##_epi##bits((__m512i)(x), (__m512i)(y))
#elif defined(__AVX2__) && LANES == 8
#define ZIP(bits, half, x, y) (vcodes) _mm256_unpack##half##_epi##bits((__m256i)(x), (__m256i)(y))
#endif
#if defined(ZIP)
  vcodes ab = ZIP(8, lo, a, b), ab_high = ZIP(8, hi, a, b), cd = ZIP(8, lo, c, d), cd_high = ZIP(8, hi, c, d);
  to[0] = ZIP(16, lo, ab, cd), to[1] = ZIP(16, hi, ab, cd);
  to[2] = ZIP(16, lo, ab_high, cd_high), to[3] = ZIP(16, hi, ab_high, cd_high);
#undef ZIP
#else
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < LANES; i++) {
      int from = i / 4 * 16 + 4 * k + i % 4;
      to[k][4 * i] = a[from], to[k][4 * i + 1] = b[from], to[k][4 * i + 2] = c[from], to[k][4 * i + 3] = d[from];
    }
#endif
}

// Lanes of four vectors of `side_by_side` in the order of their dimensions.
INLINE void in_order(const vf *x, vf *to) {
#if LANES == 16
#define LANES_OF(a, b, i) /* lanes i and i + 1 of both, in turn */                                                     \
  __builtin_shufflevector(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * i + 16, 4 * i + 17, 4 * i + 18, 4 * i + 19, \
                          4 * i + 4, 4 * i + 5, 4 * i + 6, 4 * i + 7, 4 * i + 20, 4 * i + 21, 4 * i + 22, 4 * i + 23)
#define HALF_OF(a, b, i)                                                                                               \
  __builtin_shufflevector(a, b, 8 * i, 8 * i + 1, 8 * i + 2, 8 * i + 3, 8 * i + 4, 8 * i + 5, 8 * i + 6, 8 * i + 7,    \
                          8 * i + 16, 8 * i + 17, 8 * i + 18, 8 * i + 19, 8 * i + 20, 8 * i + 21, 8 * i + 22, 8 * i + 23)
  vf first[2] = {LANES_OF(x[0], x[1], 0), LANES_OF(x[0], x[1], 2)};
  vf second[2] = {LANES_OF(x[2], x[3], 0), LANES_OF(x[2], x[3], 2)};
  to[0] = HALF_OF(first[0], second[0], 0), to[1] = HALF_OF(first[0], second[0], 1);
  to[2] = HALF_OF(first[1], second[1], 0), to[3] = HALF_OF(first[1], second[1], 1);
#undef LANES_OF
#undef HALF_OF
#else
  for (int k = 0; k < 2; k++) {
    to[k] = __builtin_shufflevector(x[2 * k], x[2 * k + 1], 0, 1, 2, 3, 8, 9, 10, 11);
    to[2 + k] = __builtin_shufflevector(x[2 * k], x[2 * k + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
}

// A tile's weights, times the scales of its values, in codes.
typedef struct {
  uint8_t *codes, *rests;    // [rows, TILE], signed
  float *scales, *minimum;   // [rows]; what the minima of the values come to
} weight_codes;

INLINE void quantize_weights(const float *weights, int64_t row, const tile_codes *v, int64_t count, const weight_codes *to) {
  float scaled[TILE] __attribute__((aligned(64)));
  vf minima = {0}, all = {0};
  int64_t t = 0, tokens = (count + UNIT - 1) / UNIT * UNIT;
  for (; t < count; t += LANES) {
    vf w = load(weights + t), u = w * load(v->scales + t);
    store(scaled + t, u);
    minima += w * load(v->minima + t);
    all += u;
  }
  for (; t < tokens; t++) scaled[t] = 0;
  to->scales[row] = codes_of_row(scaled, tokens, to->codes + row * TILE, to->rests + row * TILE, 0);
  to->minimum[row] = sum(minima + all * 0.0f);  // what is not finite has no codes, and must not be lost
}

// sums [rows][dim], `stride` apart, += weights times the values of CODE_BYTES dimensions from d on: quads [count / 4][4].
INLINE void multiply_quads(int rows, const weight_codes *w, int64_t first, const vcodes *quads, int64_t num_quads, int is_signed,
                           int64_t d, int64_t dim, float *sums, int64_t stride) {
  vi acc[3][4] = {0};
  for (int64_t quad = 0; quad < num_quads; quad++)
    for (int r = 0; r < rows; r++) {
      vi weights = four_for_all(w->codes + (first + r) * TILE + 4 * quad);
      for (int k = 0; k < 4; k++) acc[r][k] = dot_lanes(acc[r][k], quads[4 * quad + k], weights, is_signed);
    }
  for (int r = 0; r < rows; r++)
    for (int k = 0; k < 4; k++) acc[r][k] <<= 7;
  for (int64_t quad = 0; quad < num_quads; quad++)
    for (int r = 0; r < rows; r++) {
      vi weights = four_for_all(w->rests + (first + r) * TILE + 4 * quad);
      for (int k = 0; k < 4; k++) acc[r][k] = dot_lanes(acc[r][k], quads[4 * quad + k], weights, is_signed);
    }
  for (int r = 0; r < rows; r++) {
    vf x[4], ordered[4];
    for (int k = 0; k < 4; k++) x[k] = __builtin_convertvector(acc[r][k], vf) * w->scales[first + r] + w->minimum[first + r];
    in_order(x, ordered);
    float *to = sums + (first + r) * stride + d;
    for (int k = 0; k < 4; k++)
      if (d + k * LANES < dim) store(to + k * LANES, load(to + k * LANES) + ordered[k]);
  }
}

// sums [rows][dim], `stride` apart, += weights [rows][TILE], 0 beyond `count`, times values.
INLINE void add_value_codes(int64_t rows, int64_t dim, const float *weights, const tile_codes *v, int is_signed, int64_t count,
                            const weight_codes *w, float *sums, int64_t stride) {
  int64_t num_quads = (count + 3) / 4;
  for (int64_t r = 0; r < rows; r++) quantize_weights(weights + r * TILE, r, v, count, w);
  for (int64_t d = 0; d < dim; d += CODE_BYTES) {
    vcodes quads[TILE];
    for (int64_t quad = 0; quad < num_quads; quad++) {
      vcodes codes[4];
      for (int i = 0; i < 4; i++)
        codes[i] = load_codes(v->codes + least(4 * quad + i, count - 1) * v->stride + d, is_signed);
      side_by_side(codes[0], codes[1], codes[2], codes[3], quads + 4 * quad);
    }
    int64_t r = 0;
    for (; r + 3 <= rows; r += 3) multiply_quads(3, w, r, quads, num_quads, is_signed, d, dim, sums, stride);
    if (rows - r == 2) multiply_quads(2, w, r, quads, num_quads, is_signed, d, dim, sums, stride);
    if (rows - r == 1) multiply_quads(1, w, r, quads, num_quads, is_signed, d, dim, sums, stride);
  }
}

// Queries in codes against keys whose codes are turned, four dimensions together: k_t [dim / 4][TILE] words.
INLINE void multiply_key_codes(int rows, const uint8_t *codes, const uint8_t *rests, int64_t dim, const uint8_t *k_t,
                               int is_signed, vi *acc) {
  for (int i = 0; i < 2 * rows; i++) acc[i] = (vi){0};
  for (int part = 0; part < 2; part++) {
    const uint8_t *x = part ? rests : codes;
    for (int64_t d = 0; d < dim; d += 4) {
      vcodes k[2] = {load_codes(k_t + d * TILE, is_signed), load_codes(k_t + d * TILE + CODE_BYTES, is_signed)};
      for (int r = 0; r < rows; r++) {
        vi q = four_for_all(x + r * dim + d);
        for (int j = 0; j < 2; j++) acc[2 * r + j] = dot_lanes(acc[2 * r + j], k[j], q, is_signed);
      }
    }
    if (!part)
      for (int i = 0; i < 2 * rows; i++) acc[i] <<= 7;
  }
}

// A chunk's queries in codes, and what their weights on a tile become.
typedef struct {
  uint8_t *codes, *rests;  // [rows, dim], signed
  float *scales, *sums;    // [rows]
  weight_codes weights;
} chunk_codes;

// scores [rows][TILE] of queries against `count` keys, up to the next multiple of 2 * LANES.
INLINE void score_chunk(int64_t rows, int64_t dim, const chunk_codes *q, const tile_codes *k, int is_signed, int64_t count,
                        const float *k_t, float *scores) {
  for (int64_t t = 0; t < count; t += 2 * LANES) {
    const uint8_t *turned = (const uint8_t *)(k_t + t);
    for (int64_t r = 0, step; r < rows; r += step) {
      vi acc[2 * CODE_ROWS];
      step = rows - r >= CODE_ROWS ? CODE_ROWS : 1;
      const uint8_t *codes = q->codes + r * dim, *rests = q->rests + r * dim;
      if (step == CODE_ROWS) multiply_key_codes(CODE_ROWS, codes, rests, dim, turned, is_signed, acc);
      else multiply_key_codes(1, codes, rests, dim, turned, is_signed, acc);
      for (int64_t i = 0; i < step; i++)
        for (int j = 0; j < 2; j++) {
          vf scale = load(k->scales + t + j * LANES) * q->scales[r + i], minimum = load(k->minima + t + j * LANES) * q->sums[r + i];
          store(scores + (r + i) * TILE + t + j * LANES, __builtin_convertvector(acc[2 * i + j], vf) * scale + minimum);
        }
    }
  }
}
