// RMSNorm, rotary embedding, the SiLU gate and the embedding lookup.
#pragma once
#include "pool.h"
#include "weights.h"

#define ROWS_PER_ITEM 16

typedef struct {
  const float *x, *weight;  // [rows, cols], [cols]
  float *y;
  int64_t rows, cols;
  double eps;
} rms_norm_args;

static void run_rms_norm(const void *args, pool *p, int64_t thread) {
  const rms_norm_args *a = args;
  for (int64_t first; (first = next_item(p) * ROWS_PER_ITEM) < a->rows;) {
    for (int64_t row = first; row < first + ROWS_PER_ITEM && row < a->rows; row++) {
      const float *x = a->x + row * a->cols;
      float *y = a->y + row * a->cols;
      vf squares = {0};
      float rest = 0;
      int64_t i = 0;
      for (; i + LANES <= a->cols; i += LANES) squares += load(x + i) * load(x + i);
      for (; i < a->cols; i++) rest += x[i] * x[i];
      float mean = (sum(squares) + rest) / (float)a->cols + (float)a->eps;
      float scale = 1.0f / __builtin_sqrtf(mean);
      for (i = 0; i + LANES <= a->cols; i += LANES) store(y + i, load(x + i) * scale * load(a->weight + i));
      for (; i < a->cols; i++) y[i] = x[i] * scale * a->weight[i];
    }
  }
}

typedef struct {
  const float *x;         // [tokens, heads, head_dim]
  const float *cos, *sin;  // [tokens, head_dim / 2]
  float *y;
  int64_t tokens, heads, head_dim;
} rope_args;

static void run_rope(const void *args, pool *p, int64_t thread) {
  const rope_args *a = args;
  int64_t half = a->head_dim / 2;
  for (int64_t first; (first = next_item(p) * ROWS_PER_ITEM) < a->tokens;) {
    for (int64_t t = first; t < first + ROWS_PER_ITEM && t < a->tokens; t++) {
      const float *c = a->cos + t * half, *s = a->sin + t * half;
      for (int64_t h = 0; h < a->heads; h++) {
        const float *x = a->x + (t * a->heads + h) * a->head_dim;
        float *y = a->y + (t * a->heads + h) * a->head_dim;
        for (int64_t d = 0; d < half; d++) {
          float lo = x[d], hi = x[d + half];
          y[d] = lo * c[d] - hi * s[d];
          y[d + half] = hi * c[d] + lo * s[d];
        }
      }
    }
  }
}

typedef struct {
  const float *gate, *up;
  float *y;
  int64_t count;
} silu_args;

#define SILU_PER_ITEM 1024

static void run_silu_mul(const void *args, pool *p, int64_t thread) {
  const silu_args *a = args;
  for (int64_t first; (first = next_item(p) * SILU_PER_ITEM) < a->count;) {
    int64_t last = first + SILU_PER_ITEM < a->count ? first + SILU_PER_ITEM : a->count, i = first;
    for (; i + LANES <= last; i += LANES) {
      vf g = load(a->gate + i);
      // g / (1 + e^-g); vexp holds e^-g to e^88 at most, where g is 0 to within float32
      vf e = vexp(__builtin_elementwise_min(-g, splat(88.0f)));
      store(a->y + i, g / (1.0f + e) * load(a->up + i));
    }
    for (; i < last; i++) {
      float g = a->gate[i], e = exp1(-g < 88.0f ? -g : 88.0f);
      a->y[i] = g / (1.0f + e) * a->up[i];
    }
  }
}

typedef struct {
  matrix w;            // [vocab, cols], not AWQ
  const int64_t *ids;  // [count], each below w.rows
  float *y;            // [count, cols]
  int64_t count;
} embed_args;

static void run_embed(const void *args, pool *p, int64_t thread) {
  const embed_args *a = args;
  for (int64_t i; (i = next_item(p)) < a->count;) decode_row(&a->w, a->ids[i], 0, a->w.cols, a->y + i * a->w.cols);
}
