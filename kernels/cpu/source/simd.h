// Vectors of LANES floats, written with the compiler's vector extension: one source for AVX2, AVX-512 and NEON.
#pragma once
#include <stdint.h>
#include <stddef.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef int8_t vsb __attribute__((vector_size(LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef _Float16 vhf __attribute__((vector_size(2 * LANES)));

// The same without alignment: blocks of files and records begin anywhere.
typedef vf vf_u __attribute__((aligned(1)));
typedef vi vi_u __attribute__((aligned(1)));
typedef vb vb_u __attribute__((aligned(1)));
typedef vsb vsb_u __attribute__((aligned(1)));
typedef vh vh_u __attribute__((aligned(1)));
typedef vhf vhf_u __attribute__((aligned(1)));
typedef float float_u __attribute__((aligned(1)));
typedef _Float16 half_u __attribute__((aligned(1)));
typedef uint16_t u16_u __attribute__((aligned(1)));
typedef uint32_t u32_u __attribute__((aligned(1)));

INLINE vf load(const float *p) { return *(const vf_u *)p; }
INLINE void store(float *p, vf x) { *(vf_u *)p = x; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf from_u8(vb x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }
INLINE vf from_i8(vsb x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }
INLINE vf from_half(vhf x) { return __builtin_convertvector(x, vf); }
INLINE vf from_bfloat(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
INLINE float half_at(const uint8_t *p) {
#if defined(__F16C__)
  // Through a general register: clang would load 16 bits into the low end of some vector register and so wait for
  // what is computed there, often the sums of the loop (three times slower).
  uint32_t bits = *(const u16_u *)p;
  __asm__("" : "+r"(bits));
  typedef uint32_t words __attribute__((vector_size(16)));
  typedef _Float16 halves __attribute__((vector_size(16)));
  words w = {bits, 0, 0, 0};
  return __builtin_convertvector((halves)w, v8)[0];
#else
  return (float)*(const half_u *)p;
#endif
}

INLINE vf vmax(vf a, vf b) { return __builtin_elementwise_max(a, b); }

INLINE float bfloat_at(const uint8_t *p) {
  union { uint32_t u; float f; } x = {(uint32_t)*(const u16_u *)p << 16};
  return x.f;
}

INLINE float sum(vf x) {
#if LANES == 16
  v8 eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  v8 eight = x;
#endif
  v4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

INLINE float max_of(vf x) {
#if LANES == 16
  v8 eight = __builtin_elementwise_max(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                                       __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  v8 eight = x;
#endif
  v4 four = __builtin_elementwise_max(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  float a = four[0] > four[1] ? four[0] : four[1], b = four[2] > four[3] ? four[2] : four[3];
  return a > b ? a : b;
}

// e^x with a relative error below 3e-7; 0 below -87 (where float32 leaves its normal range), also for -inf.
INLINE vf vexp(vf x) {
  vi inside = x > splat(-87.0f);
  x = vmax(x, splat(-87.0f));
  const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number, left in the low bits
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;  // ln 2 in two parts
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  vi bits = (vi)p + (((vi)shifted) << 23);
  return (vf)(bits & inside);
}

INLINE float exp1(float x) { return vexp(splat(x))[0]; }

// What a nibble becomes: nibble * scale + minimum. Sixteen lanes hold all sixteen values, and a permutation looks them up.
typedef struct {
#if LANES == 16
  vf values;
#else
  float scale, minimum;
#endif
} nibble_table;

INLINE nibble_table nibbles_times(float scale, float minimum) {
#if LANES == 16
  const vf steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (nibble_table){steps * scale + minimum};
#else
  return (nibble_table){scale, minimum};
#endif
}

INLINE void look_up(nibble_table table, vb packed, vf *low, vf *high) {
#if LANES == 16
  vi index = __builtin_convertvector(packed, vi);  // the permutation reads the lowest four bits
  *low = (vf)__builtin_ia32_permvarsf512(table.values, index);
  *high = (vf)__builtin_ia32_permvarsf512(table.values, index >> 4);
#else
  *low = from_u8(packed & 15) * table.scale + table.minimum;
  *high = from_u8(packed >> 4) * table.scale + table.minimum;
#endif
}

// Sixteen values of any kind, looked up by nibbles: NF4's levels (arXiv 2305.14314, appendix E) times an absmax.
typedef struct {
#if LANES == 16
  vf values;
#else
  vf low, high;
#endif
} any_table;

#define NF4_LOW -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
                -0.18477343022823334f, -0.09105003625154495f, 0.0f
#define NF4_HIGH 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,         \
                 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f

INLINE any_table nf4_times(float absmax) {
#if LANES == 16
  const vf levels = {NF4_LOW, NF4_HIGH};
  return (any_table){levels * absmax};
#else
  const vf low = {NF4_LOW}, high = {NF4_HIGH};
  return (any_table){low * absmax, high * absmax};
#endif
}

INLINE vf look_up_any(const any_table *table, vb index) {
  vi at = __builtin_convertvector(index, vi);
#if LANES == 16
  return (vf)__builtin_ia32_permvarsf512(table->values, at);
#elif defined(__AVX2__)
  vf low = __builtin_ia32_permvarsf256(table->low, at), high = __builtin_ia32_permvarsf256(table->high, at);
  vi upper = at > 7;
  return (vf)(((vi)low & ~upper) | ((vi)high & upper));
#else
  vf out;
  for (int i = 0; i < LANES; i++) out[i] = index[i] < 8 ? table->low[index[i]] : table->high[index[i] & 7];
  return out;
#endif
}

// lanes[i] <- the sum of the i-th vector: LANES dot products finished together, of floats and of integers.
#define PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#if LANES == 8
#define DEFINE_SUM_EACH(name, vector)                                                                             \
  INLINE vector name(const vector *rows) {                                                                        \
    vector s[4], t[2]; /* each half of s[i]: sums of neighbouring pairs of rows 2i and 2i + 1 */                  \
    for (int i = 0; i < 4; i++)                                                                                   \
      s[i] = PAIR(rows[2 * i], rows[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +                                      \
             PAIR(rows[2 * i], rows[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);                                       \
    for (int i = 0; i < 2; i++)                                                                                   \
      t[i] = PAIR(s[2 * i], s[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +                                            \
             PAIR(s[2 * i], s[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);                                             \
    return PAIR(t[0], t[1], 0, 1, 2, 3, 8, 9, 10, 11) + PAIR(t[0], t[1], 4, 5, 6, 7, 12, 13, 14, 15);             \
  }
#else
#define DEFINE_SUM_EACH(name, vector)                                                                             \
  INLINE vector name(const vector *rows) {                                                                        \
    vector s[8], t[4], u[2];                                                                                      \
    for (int i = 0; i < 8; i++)                                                                                   \
      s[i] = PAIR(rows[2 * i], rows[2 * i + 1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +      \
             PAIR(rows[2 * i], rows[2 * i + 1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);       \
    for (int i = 0; i < 4; i++)                                                                                   \
      t[i] = PAIR(s[2 * i], s[2 * i + 1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +            \
             PAIR(s[2 * i], s[2 * i + 1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);             \
    for (int i = 0; i < 2; i++)                                                                                   \
      u[i] = PAIR(t[2 * i], t[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +             \
             PAIR(t[2 * i], t[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);            \
    return PAIR(u[0], u[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                             \
           PAIR(u[0], u[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);                        \
  }
#endif
DEFINE_SUM_EACH(sum_each, vf)
DEFINE_SUM_EACH(sum_each_code, vi)
#undef PAIR
