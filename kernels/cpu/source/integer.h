// Products of integers: x in 8 bits, W in the bits of its file.
//
// A token's x is quantized alone, in units of 32 input features: scale = absmax / 127, code = x / scale, rounded. Where a
// unit holds a value far above the token's others, that error would be the largest of all: a second code of 8 bits, of
// what the first left in steps of scale / 128, takes it away. A weight is scale * code + minimum, so a unit adds (sum of
// code * code) * scale * scale + minimum * (sum of x). The sums of codes are the same integers however many tokens there
// are; only their sum in float32 may differ in its order.
#pragma once
#include "pool.h"
#include "weights.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

typedef uint8_t v32u __attribute__((vector_size(32)));
typedef uint8_t v16u __attribute__((vector_size(16)));
typedef uint8_t v8u __attribute__((vector_size(8)));
typedef int8_t v8s __attribute__((vector_size(8)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef _Float16 v8f16 __attribute__((vector_size(16)));
typedef v32u v32u_u __attribute__((aligned(1)));
typedef v16u v16u_u __attribute__((aligned(1)));
typedef v8s v8s_u __attribute__((aligned(1)));
typedef v8 v8_u4 __attribute__((aligned(4)));
typedef v8i v8i_u4 __attribute__((aligned(4)));
typedef int32_t i32_u __attribute__((aligned(1)));

// With VNNI codes are unsigned, at most 255, and those of signed bytes are shifted by 128. Elsewhere codes are at most
// 127 or signed bytes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define SHIFT 128
#else
#define SHIFT 0
#endif

// sums[i] += the four products of bytes 4i ... 4i + 3. `is_signed`: the codes are signed bytes, shifted by SHIFT.
INLINE v8i dot32(v8i sums, v32u codes, v32u x, int is_signed) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (v8i)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
#elif defined(__AVXVNNI__)
  return (v8i)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__)
  __m256i w = (__m256i)codes, v = (__m256i)x;
  if (is_signed) {  // |w| <= 128 and |x| <= 127: a pair stays within 16 bits
    v = _mm256_sign_epi8(v, w);
    w = _mm256_abs_epi8(w);
  }
  return sums + (v8i)_mm256_madd_epi16(_mm256_maddubs_epi16(w, v), _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  union { v8i all; int32x4_t half[2]; } s = {sums};
  union { v32u all; int8x16_t half[2]; } w = {codes}, v = {x};
  for (int i = 0; i < 2; i++) s.half[i] = vdotq_s32(s.half[i], w.half[i], v.half[i]);
  return s.all;
#else
  for (int i = 0; i < 32; i++) sums[i / 4] += (int8_t)codes[i] * (int8_t)x[i];
  return sums;
#endif
}

// The same for LANES sums; x holds four bytes for all of them.
typedef uint8_t vcodes __attribute__((vector_size(4 * LANES)));
INLINE vi dot_lanes(vi sums, vcodes codes, vi x, int is_signed) {
#if LANES == 8
  return dot32(sums, codes, (v32u)x, is_signed);
#elif defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
#else
  v32u w[2], v[2];
  v8i s[2];
  __builtin_memcpy(w, &codes, 64), __builtin_memcpy(v, &x, 64), __builtin_memcpy(s, &sums, 64);
  for (int i = 0; i < 2; i++) s[i] = dot32(s[i], w[i], v[i], is_signed);
  __builtin_memcpy(&sums, s, 64);
  return sums;
#endif
}

#if LANES == 16
#define CODE_ROWS 6  // rows of x in codes whose sums stay in registers
#else
#define CODE_ROWS 2
#endif

INLINE v8 eight(float x) { return x - (v8){0}; }
INLINE v8 load8(const float *p) { return *(const v8_u4 *)p; }

INLINE float sum8(v8 x) {
  v4 four = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// Four lanes of each of the i-th two floats.
INLINE v8 halves_of(v8 x, int64_t i) {
  float a = x[2 * i], b = x[2 * i + 1];
  return (v8){a, a, a, a, b, b, b, b};
}

// `count` float16 numbers, `step` bytes apart; zeros beyond them.
INLINE v8 halves_apart(const uint8_t *p, int64_t step, int64_t count) {
  v8h bits = {0};
  for (int64_t i = 0; i < count; i++) bits[i] = *(const u16_u *)(p + i * step);
  return __builtin_convertvector((v8f16)bits, v8);
}

// What each format says of eight units of a row, which begin at p: codes_* the codes of the i-th; scales_* the scales and minima of
// the first `count`. Q6_K has two scales per unit, and -32 times them as minima.
INLINE v32u nibbles_of(const uint8_t *p) {
  v16u c = *(const v16u_u *)p, low = c & 15, high = c >> 4;
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

INLINE v32u fifth_bits(const uint8_t *p) {  // 16 where bit j of the word is set
  uint32_t bits = *(const u32_u *)p;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (v32u)_mm256_maskz_set1_epi8(bits, 16);
#else
  v32u out, place;
  for (int i = 0; i < 32; i++) {
    out[i] = (uint8_t)(bits >> (i / 8 * 8));
    place[i] = (uint8_t)(1 << (i % 8));
  }
  return (v32u)((out & place) != 0) & 16;
#endif
}

INLINE v32u codes_q8_0(const uint8_t *p, int64_t i) { return *(const v32u_u *)(p + 34 * i + 2) ^ SHIFT; }
INLINE v32u codes_q4_0(const uint8_t *p, int64_t i) { return nibbles_of(p + 18 * i + 2); }
INLINE v32u codes_q4_1(const uint8_t *p, int64_t i) { return nibbles_of(p + 20 * i + 4); }
INLINE v32u codes_q5_0(const uint8_t *p, int64_t i) { return nibbles_of(p + 22 * i + 6) | fifth_bits(p + 22 * i + 2); }
INLINE v32u codes_q5_1(const uint8_t *p, int64_t i) { return nibbles_of(p + 24 * i + 8) | fifth_bits(p + 24 * i + 4); }

INLINE v32u codes_int8(const uint8_t *p, int64_t i) { return *(const v32u_u *)(p + 4 + 32 * i) ^ SHIFT; }

INLINE v32u codes_q4_k(const uint8_t *p, int64_t i) {
  v32u c = *(const v32u_u *)(p + 16 + 32 * (i / 2));
  return i % 2 ? c >> 4 : c & 15;
}

INLINE v32u codes_q5_k(const uint8_t *p, int64_t i) {
  v32u c = *(const v32u_u *)(p + 48 + 32 * (i / 2)), high = *(const v32u_u *)(p + 16);
  return (i % 2 ? c >> 4 : c & 15) | ((high >> i & 1) << 4);
}

INLINE v32u codes_q6_k(const uint8_t *p, int64_t i) {
  int64_t run = i / 4, part = i % 4;  // 2 runs of 4 units; a pair of high bits for each
  v32u low = *(const v32u_u *)(p + 64 * run + 32 * (part % 2)), high = *(const v32u_u *)(p + 128 + 32 * run);
  return (part < 2 ? low & 15 : low >> 4) | ((high >> (2 * part) & 3) << 4);
}

#define BLOCKS_WITH_ZERO(name, bytes, zero)                                                                             \
  INLINE void scales_##name(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) {              \
    *scale = halves_apart(p, bytes, count);                                                                             \
    *minimum = *scale * -(float)(zero);                                                                                 \
  }
BLOCKS_WITH_ZERO(q8_0, 34, SHIFT)
BLOCKS_WITH_ZERO(q4_0, 18, 8)
BLOCKS_WITH_ZERO(q5_0, 22, 16)

#define BLOCKS_WITH_MINIMUM(name, bytes)                                                                                \
  INLINE void scales_##name(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) {              \
    *scale = halves_apart(p, bytes, count);                                                                             \
    *minimum = halves_apart(p + 2, bytes, count);                                                                       \
  }
BLOCKS_WITH_MINIMUM(q4_1, 20)
BLOCKS_WITH_MINIMUM(q5_1, 24)

INLINE v8 floats_of(uint64_t bytes) {
  union { uint64_t word; v8u bytes; } x = {bytes};
  return __builtin_convertvector(__builtin_convertvector(x.bytes, v8i), v8);
}

// Eight scales and minima of 6 bits in 12 bytes (their packing: quant/gguf.py).
INLINE void k_scales(const uint8_t *p, v8 *scale, v8 *minimum) {
  uint32_t a = *(const u32_u *)(p + 4), b = *(const u32_u *)(p + 8), c = *(const u32_u *)(p + 12);
  uint32_t scale_high = (c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030), minimum_high = (c >> 4 & 0x0f0f0f0f) | ((b >> 2) & 0x30303030);
  *scale = floats_of((a & 0x3f3f3f3f) | (uint64_t)scale_high << 32) * half_at(p);
  *minimum = floats_of((b & 0x3f3f3f3f) | (uint64_t)minimum_high << 32) * -half_at(p + 2);
}

INLINE void scales_q4_k(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) { k_scales(p, scale, minimum); }
INLINE void scales_q5_k(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) { k_scales(p, scale, minimum); }

INLINE void scales_q6_k(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) {
  float d = half_at(p + 208);
  for (int i = 0; i < 2; i++) scale[i] = __builtin_convertvector(__builtin_convertvector(*(const v8s_u *)(p + 192 + 8 * i), v8i), v8) * d;
}

INLINE void scales_int8(const uint8_t *row, const uint8_t *p, int64_t count, v8 *scale, v8 *minimum) {
  *scale = eight(*(const float_u *)row * 7.874015718698502e-3f);
  *minimum = *scale * -(float)SHIFT;
}

// x in codes, in units of 32 features: x = scale * (128 * code + rest). The number of units is rounded up to 8 in all but
// the codes, with zeros.
typedef struct {
  uint8_t *codes;      // [num_rows, cols], signed
  uint8_t *rests;      // [num_rows, cols], signed; zeros where a unit has none
  float *scales;       // [num_rows, units]
  float *sums;         // [num_rows, units]: of x as the codes have it
  int32_t *offsets;    // [num_rows, 2 * units]: -32 times the sum of half a unit's 128 * code + rest, for Q6_K
  uint8_t *fine;       // [num_rows, units / 8]: which units have rests, the first of eight in the lowest bit
  int32_t *unbounded;  // [num_rows]: 1 where x has an infinite number or NaN: its codes are 0
  float *values;       // null, or [num_rows, cols]: x as the codes have it
} codes_of_x;

INLINE int64_t padded_units(int64_t cols) { return (cols / UNIT + 7) / 8 * 8; }

typedef void (*row_dot)(const uint8_t *row, int64_t row_bytes, const codes_of_x *x, int64_t units, float *y);
typedef void (*unpack_fn)(const uint8_t *row, int64_t first, int64_t units, uint8_t *codes, float *scales, float *minima);

#define UNIT_TIMES_X(name, halves, is_signed)                                                                           \
  {                                                                                                                     \
    v32u w = codes_##name(p, i);                                                                                        \
    v8i dots = dot32((v8i){0}, w, *(const v32u_u *)(x->codes + UNIT * (u + i)), is_signed);                             \
    if (fine) dots = dot32(dots << 7, w, *(const v32u_u *)(x->rests + UNIT * (u + i)), is_signed);                      \
    acc[i % 2] += __builtin_convertvector(dots, v8) * (halves ? halves_of(factor[i / 4], i % 4) : eight(factor[0][i])); \
  }

// add_*, chunk_*: add eight units of a row times x to acc[3]; `count` of them, a constant in all but the last of a row.
// codes_dot_*: two rows of W times one of x. unpack_*: units first ... first + units - 1 of a row as codes, scales and
// minima; `first` is a multiple of 8.
#define DEFINE_INTEGER(name, chunk_bytes, halves, is_signed)                                                            \
  INLINE void add_##name(const uint8_t *row, const uint8_t *p, int64_t count, int fine, const codes_of_x *x, int64_t u, \
                         v8 *acc) {                                                                                     \
    v8 scale[2], minimum, factor[2], by = load8(x->scales + u);                                                         \
    scales_##name(row, p, count, scale, &minimum);                                                                      \
    if (halves) {                                                                                                       \
      factor[0] = scale[0] * __builtin_shufflevector(by, by, 0, 0, 1, 1, 2, 2, 3, 3);                                   \
      factor[1] = scale[1] * __builtin_shufflevector(by, by, 4, 4, 5, 5, 6, 6, 7, 7);                                   \
      for (int i = 0; i < 2; i++)                                                                                       \
        acc[2] += factor[i] * __builtin_convertvector(*(const v8i_u4 *)(x->offsets + 2 * u + 8 * i), v8);               \
    } else {                                                                                                            \
      factor[0] = scale[0] * by;                                                                                        \
      acc[2] += minimum * load8(x->sums + u);                                                                           \
    }                                                                                                                   \
    if (!fine)                                                                                                          \
      for (int i = 0; i <= halves; i++) factor[i] *= 128.0f;                                                            \
    if (count == 8) {                                                                                                   \
      _Pragma("clang loop unroll(full)") for (int64_t i = 0; i < 8; i++) UNIT_TIMES_X(name, halves, is_signed)          \
    } else {                                                                                                            \
      _Pragma("clang loop unroll(disable)") for (int64_t i = 0; i < count; i++) UNIT_TIMES_X(name, halves, is_signed)   \
    }                                                                                                                   \
  }                                                                                                                     \
  INLINE void chunk_##name(const uint8_t *row, const uint8_t *p, int64_t count, const codes_of_x *x, int64_t u, v8 *acc) { \
    if (x->fine[u / 8]) add_##name(row, p, count, 1, x, u, acc);                                                        \
    else add_##name(row, p, count, 0, x, u, acc);                                                                       \
  }                                                                                                                     \
  static void codes_dot_##name(const uint8_t *row, int64_t row_bytes, const codes_of_x *x, int64_t units, float *y) {   \
    v8 a[3] = {0}, b[3] = {0};                                                                                          \
    const uint8_t *second = row + row_bytes, *p = row;                                                                  \
    int64_t u = 0;                                                                                                      \
    for (; u + 8 <= units; u += 8, p += chunk_bytes) {                                                                  \
      for (int64_t ahead = 0; ahead < chunk_bytes; ahead += 64) {                                                       \
        __builtin_prefetch(p + ahead + PREFETCH);                                                                       \
        __builtin_prefetch(p + row_bytes + ahead + PREFETCH);                                                           \
      }                                                                                                                 \
      chunk_##name(row, p, 8, x, u, a);                                                                                 \
      chunk_##name(second, p + row_bytes, 8, x, u, b);                                                                  \
    }                                                                                                                   \
    if (u < units) {                                                                                                    \
      chunk_##name(row, p, units - u, x, u, a);                                                                         \
      chunk_##name(second, p + row_bytes, units - u, x, u, b);                                                          \
    }                                                                                                                   \
    y[0] = sum8(a[0] + a[1] + a[2]);                                                                                    \
    y[1] = sum8(b[0] + b[1] + b[2]);                                                                                    \
  }                                                                                                                     \
  static void unpack_##name(const uint8_t *row, int64_t first, int64_t units, uint8_t *codes, float *scales,            \
                            float *minima) {                                                                            \
    const uint8_t *p = row + first / 8 * chunk_bytes;                                                                   \
    for (int64_t at = 0; at < units; at += 8, p += chunk_bytes) {                                                       \
      int64_t count = units - at < 8 ? units - at : 8;                                                                  \
      v8 scale[2], minimum = {0};                                                                                       \
      scales_##name(row, p, count, scale, &minimum);                                                                    \
      *(v8_u4 *)(scales + (at << (halves))) = scale[0];                                                                 \
      if (halves) *(v8_u4 *)(scales + 2 * at + 8) = scale[1];                                                           \
      else *(v8_u4 *)(minima + at) = minimum;                                                                           \
      if (count == 8)                                                                                                   \
        _Pragma("clang loop unroll(full)") for (int64_t i = 0; i < 8; i++) *(v32u_u *)(codes + UNIT * (at + i)) = codes_##name(p, i); \
      else                                                                                                              \
        for (int64_t i = 0; i < count; i++) *(v32u_u *)(codes + UNIT * (at + i)) = codes_##name(p, i);                  \
    }                                                                                                                   \
  }

DEFINE_INTEGER(q8_0, 272, 0, 1)
DEFINE_INTEGER(q4_0, 144, 0, 0)
DEFINE_INTEGER(q4_1, 160, 0, 0)
DEFINE_INTEGER(q5_0, 176, 0, 0)
DEFINE_INTEGER(q5_1, 192, 0, 0)
DEFINE_INTEGER(q4_k, 144, 0, 0)
DEFINE_INTEGER(q5_k, 176, 0, 0)
DEFINE_INTEGER(q6_k, 210, 1, 0)
DEFINE_INTEGER(int8, 256, 0, 1)

// Formats without an entry have no codes, or none that 8 bits hold (NF4).
static const row_dot row_dots[NUM_FORMATS] = {
    [Q8_0] = codes_dot_q8_0, [Q4_0] = codes_dot_q4_0, [Q4_1] = codes_dot_q4_1, [Q5_0] = codes_dot_q5_0, [Q5_1] = codes_dot_q5_1,
    [Q4_K] = codes_dot_q4_k, [Q5_K] = codes_dot_q5_k, [Q6_K] = codes_dot_q6_k, [INT8] = codes_dot_int8};
static const unpack_fn unpackers[NUM_FORMATS] = {
    [Q8_0] = unpack_q8_0, [Q4_0] = unpack_q4_0, [Q4_1] = unpack_q4_1, [Q5_0] = unpack_q5_0, [Q5_1] = unpack_q5_1,
    [Q4_K] = unpack_q4_k, [Q5_K] = unpack_q5_k, [Q6_K] = unpack_q6_k, [INT8] = unpack_int8};

typedef struct {
  const float *x;  // [num_rows, cols], cols a multiple of 32
  codes_of_x to;
  int64_t num_rows, cols;
  double fine_from;  // units whose largest value is beyond this many root mean squares of their token have rests
} quantize_args;

// The nearest whole numbers, even ones between two.
INLINE vi rounded(vf value) {
  const float magic = 12582912.0f;  // as in vexp
  return (vi)(value + magic) - (vi)splat(magic);
}

// The largest size of a unit of x.
INLINE float most_of(const float *x) {
  vf largest = {0};
  for (int i = 0; i < PER_UNIT; i++) largest = vmax(largest, __builtin_elementwise_abs(load(x + i * LANES)));
  return max_of(largest);
}

// One unit of x: its scale, or 0 where all is 0. Its codes, its rests where it is `fine`, and, unless null, the sums of
// 128 * code + rest of its halves.
INLINE float quantize_unit(const float *x, float most, int fine, uint8_t *codes, uint8_t *rests, int32_t *halves) {
#pragma clang fp contract(off)
  int some = most > 1e-30f;  // below, its inverse would be infinite
  float inverse = some ? 127.0f / most : 0.0f;
  if (halves) halves[0] = halves[1] = 0;
  for (int i = 0; i < PER_UNIT; i++) {
    vf value = load(x + i * LANES) * inverse;
    vi code = rounded(value), rest = fine ? rounded((value - __builtin_convertvector(code, vf)) * 128.0f) : (vi){0};
    *(vsb_u *)(codes + i * LANES) = __builtin_convertvector(code, vsb);
    *(vsb_u *)(rests + i * LANES) = __builtin_convertvector(rest, vsb);
    if (halves) halves[i * LANES / 16] += (int32_t)sum(__builtin_convertvector(code * 128 + rest, vf));
  }
  return some ? most / (127.0f * 128.0f) : 0.0f;
}

// One token.
static void quantize_row(const quantize_args *a, int64_t row) {
  int64_t units = a->cols / UNIT, padded = padded_units(a->cols), at = row * padded;
  const float *x = a->x + row * a->cols;
  const codes_of_x *to = &a->to;
  vf finite = {0}, squares = {0};
  for (int64_t i = 0; i < a->cols; i += LANES) {
    finite += load(x + i) * 0.0f;
    squares += load(x + i) * load(x + i);
  }
  int unbounded = sum(finite) != 0.0f;
  float times = (float)a->fine_from, fine_from = times > 0 ? times * __builtin_sqrtf(sum(squares) / (float)a->cols) : 0;
  to->unbounded[row] = unbounded;
  if (unbounded) {
    __builtin_memset(to->codes + row * a->cols, 0, a->cols);
    __builtin_memset(to->rests + row * a->cols, 0, a->cols);
  }
  for (int64_t u = 0; u < padded; u++) {
    int64_t place = row * a->cols + u * UNIT;
    int32_t halves[2] = {0};
    float scale = 0;
    if (u % 8 == 0) to->fine[(at + u) / 8] = 0;
    if (u < units && !unbounded) {
      float most = most_of(x + u * UNIT);
      int fine = most > fine_from;
      scale = quantize_unit(x + u * UNIT, most, fine, to->codes + place, to->rests + place, halves);
      to->fine[(at + u) / 8] |= (uint8_t)(fine << u % 8);
    }
    to->scales[at + u] = scale;
    to->sums[at + u] = scale * (float)(halves[0] + halves[1]);
    for (int i = 0; i < 2; i++) to->offsets[2 * (at + u) + i] = -32 * halves[i];
    if (to->values && u < units)
      for (int64_t i = 0; i < UNIT; i++) {
        const int8_t *codes = (const int8_t *)to->codes + place, *rests = (const int8_t *)to->rests + place;
        to->values[place + i] = unbounded ? x[u * UNIT + i] : scale * (float)(128 * codes[i] + rests[i]);
      }
  }
}

static void run_quantize_rows(const void *args, pool *p, int64_t thread) {
  const quantize_args *a = args;
  for (int64_t row; (row = next_item(p)) < a->num_rows;) quantize_row(a, row);
}
