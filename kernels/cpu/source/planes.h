// Keys and values of a block: decoding to float32 and encoding, as kernels/blocks.py lays them out.
#pragma once
#include "simd.h"

enum plane_kind { PLANE_F32, PLANE_F16, PLANE_BF16, PLANE_FP8, PLANE_INT8, PLANE_INT4 };

typedef struct {
  int64_t kind;
  int64_t groups;        // of head_dim, each with its own scale
  int64_t rotate;        // stored after a Hadamard transform
  int64_t codes_at;      // byte offsets in the record
  int64_t scales_at;
  int64_t minima_at;
} plane;

// e4m3 without its NaN codes, which encoding never makes: the exponent moves up by 120, exactly.
INLINE vf from_fp8(vb code) {
  vu bits = __builtin_convertvector(code, vu);
  vf magnitude = (vf)((bits & 0x7f) << 20) * 0x1p120f;
  return (vf)((vu)magnitude | ((bits & 0x80) << 24));
}

// out [n] = codes * scale + minimum, for the kinds that have one code per byte or more.
INLINE void decode_run(const uint8_t *p, int64_t kind, int64_t n, float scale, float minimum, float *out) {
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) {
    vf x;
    switch (kind) {
      case PLANE_F32: x = load((const float *)p + d); break;
      case PLANE_F16: x = from_half(*(const vhf_u *)(p + 2 * d)); break;
      case PLANE_BF16: x = from_bfloat(*(const vh_u *)(p + 2 * d)); break;
      case PLANE_FP8: x = from_fp8(*(const vb_u *)(p + d)) * scale; break;
      default: x = from_u8(*(const vb_u *)(p + d)) * scale + minimum;
    }
    store(out + d, x);
  }
  for (; d < n; d++) {
    switch (kind) {
      case PLANE_F32: out[d] = ((const float *)p)[d]; break;
      case PLANE_F16: out[d] = half_at(p + 2 * d); break;
      case PLANE_BF16: out[d] = bfloat_at(p + 2 * d); break;
      case PLANE_FP8: out[d] = from_fp8((vb){p[d]})[0] * scale; break;
      default: out[d] = (float)p[d] * scale + minimum;
    }
  }
}

// Dimension j is in the low nibble of byte j, dimension j + dim / 2 in the high one; each group has its own scale.
INLINE void decode_nibbles(const uint8_t *p, int64_t dim, int64_t groups, const uint8_t *scales, const uint8_t *minima,
                           float *out) {
  int64_t half = dim / 2, size = dim / groups;
  if (groups == 1 && half % LANES == 0) {
    nibble_table table = nibbles_times(half_at(scales), half_at(minima));
    for (int64_t d = 0; d < half; d += LANES) {
      vf low, high;
      look_up(table, *(const vb_u *)(p + d), &low, &high);
      store(out + d, low);
      store(out + d + half, high);
    }
    return;
  }
  for (int64_t d = 0; d < dim; d++) {
    int code = d < half ? p[d] & 15 : p[d - half] >> 4;
    out[d] = (float)code * half_at(scales + d / size * 2) + half_at(minima + d / size * 2);
  }
}

INLINE int64_t code_bytes(int64_t kind, int64_t dim) {
  switch (kind) {
    case PLANE_F32: return 4 * dim;
    case PLANE_F16: case PLANE_BF16: return 2 * dim;
    case PLANE_INT4: return dim / 2;
    default: return dim;
  }
}

// out [count][dim] <- tokens first .. first + count - 1 of a record; a rotated plane stays rotated.
INLINE void decode_plane_of(const uint8_t *record, const plane *pl, int64_t kind, int64_t dim, int64_t first, int64_t count,
                            int64_t ahead, float *out) {
  int64_t bytes = code_bytes(kind, dim), groups = kind >= PLANE_INT8 ? pl->groups : 1, size = dim / groups;
  for (int64_t token = first; token < first + count; token++, out += dim) {
    const uint8_t *codes = record + pl->codes_at + token * bytes;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(codes + b + ahead);
    const uint8_t *scales = record + pl->scales_at + 2 * token * groups, *minima = record + pl->minima_at + 2 * token * groups;
    if (kind == PLANE_INT4) {
      decode_nibbles(codes, dim, groups, scales, minima, out);
    } else if (kind == PLANE_INT8) {
      for (int64_t g = 0; g < groups; g++)
        decode_run(codes + g * size, kind, size, half_at(scales + 2 * g), half_at(minima + 2 * g), out + g * size);
    } else {
      decode_run(codes, kind, dim, kind == PLANE_FP8 ? bfloat_at(scales) : 1.0f, 0.0f, out);
    }
  }
}

// `ahead` bytes from here lies the record that is read next.
static void decode_plane(const uint8_t *record, const plane *pl, int64_t dim, int64_t first, int64_t count, int64_t ahead,
                         float *out) {
#define OF_KIND(kind)                                                             \
  case kind:                                                                      \
    if (dim == 64) decode_plane_of(record, pl, kind, 64, first, count, ahead, out);       \
    else if (dim == 128) decode_plane_of(record, pl, kind, 128, first, count, ahead, out); \
    else decode_plane_of(record, pl, kind, dim, first, count, ahead, out);                \
    break;
  switch (pl->kind) {
    OF_KIND(PLANE_F32)
    OF_KIND(PLANE_F16)
    OF_KIND(PLANE_BF16)
    OF_KIND(PLANE_FP8)
    OF_KIND(PLANE_INT8)
    OF_KIND(PLANE_INT4)
  }
#undef OF_KIND
}

// The normalised Walsh-Hadamard transform of x [dim], in blocks of the largest power of two that divides dim.
static void hadamard(float *x, int64_t dim) {
  int64_t size = dim & -dim;
  for (int64_t width = 1; width < size; width *= 2)
    for (int64_t i = 0; i < dim; i += 2 * width)
      for (int64_t j = i; j < i + width; j++) {
        float a = x[j], b = x[j + width];
        x[j] = a + b;
        x[j + width] = a - b;
      }
  float root = __builtin_sqrtf((float)size);
  for (int64_t i = 0; i < dim; i++) x[i] /= root;
}

INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE float as_half(float x) { return (float)(_Float16)clamp(x, -65504.0f, 65504.0f); }
INLINE void put_half(uint8_t *p, float x) { *(half_u *)p = (_Float16)x; }

INLINE uint16_t as_bfloat(float x) {  // round to nearest, ties to even; x is finite
  union { float f; uint32_t u; } bits = {x};
  return (uint16_t)((bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

// The e4m3 code nearest to x, ties to even; |x| is at most 448.
INLINE uint8_t as_fp8(float x) {
  union { float f; uint32_t u; } bits = {x};
  uint32_t sign = bits.u >> 24 & 0x80, magnitude = bits.u & 0x7fffffff;
  if (magnitude < 0x3c800000) {  // below 2^-6: subnormal, in steps of 2^-9
    union { uint32_t u; float f; } m = {magnitude};
    return (uint8_t)(sign | (uint32_t)__builtin_roundevenf(m.f * 512.0f));
  }
  magnitude += 0x7ffff + (magnitude >> 20 & 1);
  return (uint8_t)(sign | ((magnitude >> 20) - (120u << 3)));
}

// Write token `token` of a plane into its record; x [dim] is overwritten.
static void encode_token(uint8_t *record, const plane *pl, int64_t dim, int64_t token, float *x) {
  uint8_t *codes = record + pl->codes_at + token * code_bytes(pl->kind, dim);
  if (pl->rotate) hadamard(x, dim);
  switch (pl->kind) {
    case PLANE_F32:
      for (int64_t d = 0; d < dim; d++) ((float *)codes)[d] = clamp(x[d], -0x1.fffffep127f, 0x1.fffffep127f);
      return;
    case PLANE_F16:
      for (int64_t d = 0; d < dim; d++) put_half(codes + 2 * d, clamp(x[d], -65504.0f, 65504.0f));
      return;
    case PLANE_BF16:
      for (int64_t d = 0; d < dim; d++) *(u16_u *)(codes + 2 * d) = as_bfloat(clamp(x[d], -0x1.fep127f, 0x1.fep127f));
      return;
    case PLANE_FP8: {
      float top = 0;
      for (int64_t d = 0; d < dim; d++) {
        float size = __builtin_fabsf(x[d]);
        top = size > top ? size : top;
      }
      uint16_t stored = as_bfloat(top / 448.0f);
      *(u16_u *)(record + pl->scales_at + 2 * token) = stored;
      float scale = bfloat_at((const uint8_t *)&stored);
      if (scale == 0) scale = 1;
      for (int64_t d = 0; d < dim; d++) codes[d] = as_fp8(clamp(x[d] / scale, -448.0f, 448.0f));
      return;
    }
  }
  int64_t size = dim / pl->groups, half = dim / 2;
  float steps = pl->kind == PLANE_INT4 ? 15.0f : 255.0f;
  for (int64_t g = 0; g < pl->groups; g++) {
    float *part = x + g * size, low = part[0], high = part[0];
    for (int64_t d = 1; d < size; d++) {
      low = part[d] < low ? part[d] : low;
      high = part[d] > high ? part[d] : high;
    }
    low = as_half(low);
    float scale = as_half((high - low) / steps);
    int64_t at = 2 * (token * pl->groups + g);
    put_half(record + pl->scales_at + at, scale);
    put_half(record + pl->minima_at + at, low);
    if (scale == 0) scale = 1;
    for (int64_t d = 0; d < size; d++) part[d] = clamp(__builtin_roundevenf((part[d] - low) / scale), 0.0f, steps);
  }
  if (pl->kind == PLANE_INT8)
    for (int64_t d = 0; d < dim; d++) codes[d] = (uint8_t)x[d];
  else
    for (int64_t d = 0; d < half; d++) codes[d] = (uint8_t)((uint32_t)x[d] | (uint32_t)x[d + half] << 4);
}
