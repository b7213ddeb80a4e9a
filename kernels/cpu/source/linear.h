// y = x W^T (+ bias) (+ residual) with W in the bits of its file, for several W that read the same x.
//
// Few rows of x: every row of W is decoded once, straight into dot products. Many rows: W is decoded panel by panel
// into the cache and multiplied there, so that the whole matrix never exists in float32. Where x comes in codes, products
// are of integers (integer.h).
#pragma once
#include "integer.h"

#define MAX_MATRICES 4
#define FEW_ROWS 12  // up to this many rows of x
#define FEW_CODE_ROWS 5  // the same for x in codes
#define NR (2 * LANES)  // columns of a panel: output features
#if LANES == 16
#define MR 12
#else
#define MR 6
#endif
#define KC 256   // depth of a panel: input features; a multiple of every block size
#define SLICE 1024  // input features decoded at a time for few rows
#define AWQ_MOST (16 * AWQ_CHANNELS)  // output features that are one item of work

typedef struct {
  const float *x;         // [num_rows, cols]
  int64_t num_rows;
  int64_t count;          // matrices
  const float *residual;  // null, or [num_rows, rows of the one matrix]
  matrix w[MAX_MATRICES];
  float *y[MAX_MATRICES];          // [num_rows, rows]
  const float *bias[MAX_MATRICES];  // null, or [rows]
  codes_of_x codes;        // all null: products of float32
} linear_args;

// c [rows, vectors * LANES] += a [rows, depth] * b [depth, vectors * LANES]: `rows` and `vectors` (up to 2) are constants
// wherever this is inlined, so that the sums stay in registers.
INLINE void multiply_rows(int rows, int vectors, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                          int64_t depth, float *c, int64_t c_stride, int fresh) {
  vf acc[MR][2];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vectors; j++) acc[i][j] = fresh ? splat(0) : load(c + i * c_stride + j * LANES);
  for (int64_t k = 0; k < depth; k++) {
    vf bk[2];
    for (int j = 0; j < vectors; j++) bk[j] = load(b + k * b_stride + j * LANES);
#pragma clang loop unroll(full)
    for (int i = 0; i < rows; i++) {
      vf ai = splat(a[i * a_stride + k]);
      for (int j = 0; j < vectors; j++) acc[i][j] += ai * bk[j];
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vectors; j++) store(c + i * c_stride + j * LANES, acc[i][j]);
}

// The same for any number of rows.
static void multiply(int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                     float *c, int64_t c_stride, int fresh) {
  int64_t i = 0;
  for (; i + MR <= rows; i += MR)
    multiply_rows(MR, 2, a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride, fresh);
  for (; i + 4 <= rows; i += 4)
    multiply_rows(4, 2, a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride, fresh);
  for (; i < rows; i++)
    multiply_rows(1, 2, a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride, fresh);
}

// to [cols][to_stride] <- from [rows][from_stride], transposed.
INLINE void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t cols, float *to, int64_t to_stride) {
  const int T = 8;
  typedef v8 v8_u __attribute__((aligned(4)));
  int64_t r = 0;
  for (; r + T <= rows; r += T) {
    int64_t c = 0;
    for (; c + T <= cols; c += T) {
      v8 a[8], b[8];
      for (int i = 0; i < 8; i++) a[i] = *(const v8_u *)(from + (r + i) * from_stride + c);
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(x, y) __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(x, y) __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
      for (int i = 0; i < 4; i++) {
        b[2 * i] = LOW(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = HIGH(a[2 * i], a[2 * i + 1]);
      }
      for (int i = 0; i < 2; i++) {
        a[4 * i] = LOW2(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = HIGH2(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = LOW2(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = HIGH2(b[4 * i + 1], b[4 * i + 3]);
      }
      for (int i = 0; i < 4; i++) {
        *(v8_u *)(to + (c + i) * to_stride + r) = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(v8_u *)(to + (c + i + 4) * to_stride + r) = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
#undef LOW
#undef HIGH
#undef LOW2
#undef HIGH2
    }
    for (; c < cols; c++)
      for (int i = 0; i < T; i++) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
  }
  for (; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) to[c * to_stride + r] = from[r * from_stride + c];
}

// panel [count][NR] <- columns first .. first + count - 1 of rows `row` .. row + NR - 1; rows beyond the last are 0.
static void pack_panel(const matrix *w, int64_t row, int64_t first, int64_t count, float *panel) {
  if (w->format == AWQ) {
    awq_decode(w, row / 8, NR, first, count, panel, NR);
    return;
  }
  float decoded[8][KC];
  for (int64_t r = 0; r < NR; r += 8) {
    for (int64_t i = 0; i < 8; i++) {
      if (row + r + i < w->rows) {
        decode_row(w, row + r + i, first, count, decoded[i]);
      } else {
        for (int64_t c = 0; c < count; c++) decoded[i][c] = 0.0f;
      }
    }
    transpose(decoded[0], KC, 8, count, panel + r, NR);
  }
}

INLINE float start_value(const linear_args *a, int64_t which, int64_t row, int64_t out) {
  float value = a->bias[which] ? a->bias[which][out] : 0.0f;
  if (a->residual) value += a->residual[row * a->w[which].rows + out];
  return value;
}

// y of `width` output features from `row` on: what their products are added to.
static void begin_panel(const linear_args *a, int64_t which, int64_t row, int64_t width) {
  for (int64_t i = 0; i < a->num_rows; i++)
    for (int64_t j = 0; j < width; j++) a->y[which][i * a->w[which].rows + row + j] = start_value(a, which, i, row + j);
}

// One panel of output features for all rows of x.
static void linear_panel(const linear_args *a, int64_t which, int64_t row) {
  const matrix *w = &a->w[which];
  float *y = a->y[which];
  float panel[KC * NR] __attribute__((aligned(64)));
  int64_t width = w->rows - row < NR ? w->rows - row : NR;
  int plain = !a->bias[which] && !a->residual && width == NR;
  if (!plain) begin_panel(a, which, row, width);
  for (int64_t first = 0; first < w->cols; first += KC) {
    int64_t depth = w->cols - first < KC ? w->cols - first : KC;
    pack_panel(w, row, first, depth, panel);
    if (width == NR) {
      multiply(a->num_rows, a->x + first, w->cols, panel, NR, depth, y + row, w->rows, plain && first == 0);
      continue;
    }
    for (int64_t i = 0; i < a->num_rows; i += MR) {
      int64_t rows = a->num_rows - i < MR ? a->num_rows - i : MR;
      float tile[MR * NR];
      multiply(rows, a->x + i * w->cols + first, w->cols, panel, NR, depth, tile, NR, 1);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j++) y[(i + r) * w->rows + row + j] += tile[r * NR + j];
    }
  }
}

// Rows first .. last - 1 of W for one row of x, the `token`-th.
static void linear_one_row(const linear_args *a, int64_t which, int64_t first, int64_t last, int64_t token) {
  const matrix *w = &a->w[which];
  const float *x = a->x + token * w->cols;
  int64_t units = w->cols / UNIT;
  for (int64_t row = first; row < last; row += ROWS_AT_ONCE) {
    const uint8_t *data = w->data + row * w->row_bytes;
    int64_t second = row + 1 < last;
    float y[2] = {0, 0};
    dots[w->format](data, second ? w->row_bytes : 0, x, units, y);
    for (int64_t r = 0; r <= second; r++) {
      for (int64_t col = units * UNIT; col < w->cols; col++) y[r] += dense_at(w, data + r * w->row_bytes, col) * x[col];
      a->y[which][token * w->rows + row + r] = y[r] + start_value(a, which, token, row + r);
    }
  }
}

// Rows first .. last - 1 of W for a few rows of x: each is decoded once.
static void linear_few_rows(const linear_args *a, int64_t which, int64_t first, int64_t last) {
  const matrix *w = &a->w[which];
  float decoded[SLICE];
  for (int64_t row = first; row < last; row++) {
    float y[FEW_ROWS] = {0};
    for (int64_t at = 0; at < w->cols; at += SLICE) {
      int64_t count = w->cols - at < SLICE ? w->cols - at : SLICE, whole = count / LANES * LANES;
      decode_row(w, row, at, count, decoded);
      for (int64_t i = 0; i < a->num_rows; i++) {
        const float *x = a->x + i * w->cols + at;
        vf acc[2] = {0};
        int64_t k = 0;
        for (; k + 2 * LANES <= whole; k += 2 * LANES)
          for (int j = 0; j < 2; j++) acc[j] += load(decoded + k + j * LANES) * load(x + k + j * LANES);
        if (k < whole) acc[0] += load(decoded + k) * load(x + k);
        y[i] += sum(acc[0] + acc[1]);
        for (k = whole; k < count; k++) y[i] += decoded[k] * x[k];
      }
    }
    for (int64_t i = 0; i < a->num_rows; i++) a->y[which][i * w->rows + row] = y[i] + start_value(a, which, i, row);
  }
}

// Output features first .. last - 1 of an AWQ matrix for the `token`-th row of x.
static void linear_awq(const linear_args *a, int64_t which, int64_t first, int64_t last, const float *x, int64_t token) {
  const matrix *w = &a->w[which];
  float y[AWQ_MOST];
  awq_dot(w, first, last - first, x + token * w->cols, y);
  for (int64_t out = first; out < last; out++)
    a->y[which][token * w->rows + out] = y[out - first] + start_value(a, which, token, out);
}

// Whether products with W are of integers.
INLINE int in_codes(const linear_args *a, const matrix *w) {
  return a->codes.codes && (w->format == AWQ ? w->group % UNIT == 0 : row_dots[w->format] != 0);
}

// x from its `row`-th token and `unit`-th unit on.
INLINE codes_of_x codes_from(const linear_args *a, int64_t cols, int64_t row, int64_t unit) {
  int64_t padded = padded_units(cols), at = row * padded + unit;
  int64_t code = row * cols + unit * UNIT;
  return (codes_of_x){a->codes.codes + code,     a->codes.rests + code, a->codes.scales + at,     a->codes.sums + at,
                      a->codes.offsets + 2 * at, a->codes.fine + at / 8, a->codes.unbounded + row, 0};
}

// Rows first .. last - 1 of W for a few rows of x in codes: W comes from memory once, then from the cache.
static void codes_few_rows(const linear_args *a, int64_t which, int64_t first, int64_t last) {
  const matrix *w = &a->w[which];
  for (int64_t row = first; row < last; row += ROWS_AT_ONCE) {
    const uint8_t *data = w->data + row * w->row_bytes;
    int64_t second = row + 1 < last;
    for (int64_t i = 0; i < a->num_rows; i++) {
      float y[2];
      codes_of_x x = codes_from(a, w->cols, i, 0);
      row_dots[w->format](data, second ? w->row_bytes : 0, &x, w->cols / UNIT, y);
      for (int64_t r = 0; r <= second; r++) a->y[which][i * w->rows + row + r] = y[r] + start_value(a, which, i, row + r);
    }
  }
}

// NR rows of W as codes: four input features of a row side by side.
typedef struct {
  uint8_t codes[KC / 4][NR][4] __attribute__((aligned(64)));
  float scales[KC / 16][NR], minima[KC / 32][NR];  // of units; Q6_K: scales of half units, no minima
} code_panel;

// AWQ: a word holds an input feature of eight rows.
static void pack_awq(const matrix *w, int64_t row, int64_t first, int64_t count, code_panel *panel) {
  int64_t words = w->rows / 8;
  for (int64_t c = 0; c < NR; c += LANES) {
    int64_t at = (row + c) / 8, there = at < words ? words - at : 0;
    const int32_t *q = (const int32_t *)w->data + first * words + at;
    for (int64_t k = 0; k < count; k++, q += words) {
      vi codes = (awq_bits(q, there) & 15) << (8 * (k % 4)), *to = (vi *)panel->codes[k / 4][c];
      *to = k % 4 ? *to | codes : codes;
    }
    for (int64_t u = 0; u < count / UNIT; u++) {
      int64_t group = (first + u * UNIT) / w->group;
      vf scale = awq_scales(w->scales + 2 * (group * w->rows + row + c), there);
      store(panel->scales[u] + c, scale);
      store(panel->minima[u] + c, -awq_codes((const int32_t *)w->zeros + group * words + at, there) * scale);
    }
  }
}

static void pack_codes(const matrix *w, int64_t row, int64_t first, int64_t count, code_panel *panel) {
  if (w->format == AWQ) {
    pack_awq(w, row, first, count, panel);
    return;
  }
  uint8_t codes[8][KC] __attribute__((aligned(64)));
  float scales[8][KC / 16], minima[8][KC / 32];
  int64_t units = count / UNIT, num_scales = w->format == Q6_K ? 2 * units : units;
  for (int64_t r = 0; r < NR; r += 8) {
    for (int64_t i = 0; i < 8; i++) {
      if (row + r + i < w->rows) {
        unpackers[w->format](w->data + (row + r + i) * w->row_bytes, first / UNIT, units, codes[i], scales[i], minima[i]);
      } else {
        __builtin_memset(codes[i], 0, KC);
        __builtin_memset(scales[i], 0, sizeof(scales[i]));
        __builtin_memset(minima[i], 0, sizeof(minima[i]));
      }
    }
    transpose((const float *)codes, KC / 4, 8, count / 4, (float *)panel->codes + r, NR);
    transpose(scales[0], KC / 16, 8, num_scales, panel->scales[0] + r, NR);
    if (w->format != Q6_K) transpose(minima[0], KC / 32, 8, units, panel->minima[0] + r, NR);
  }
}

// acc [rows, NR] += one part (a unit, or half of one) of a plane of x, its codes or its rests, times a panel. All ints but
// `part` are constants wherever this is inlined, so that the sums stay in registers.
INLINE void multiply_part(int rows, int halves, int is_signed, int rests, const codes_of_x *x, int64_t cols, int64_t stride,
                          const code_panel *panel, int64_t part, vf acc[CODE_ROWS][2]) {
  const int steps = UNIT / 4 >> halves;
  const uint8_t *w = panel->codes[part * steps][0], *codes = (rests ? x->rests : x->codes) + 4 * part * steps;
  vi dots[CODE_ROWS][2];
#pragma clang loop unroll(full)
  for (int i = 0; i < rows; i++) {
    vi offset = {0};
    if (halves) offset += x->offsets[2 * i * stride + part];
    dots[i][0] = dots[i][1] = rests ? offset & 127 : offset >> 7;
  }
#pragma clang loop unroll(full)
  for (int k = 0; k < steps; k++) {
    vcodes w0 = *(const vcodes *)(w + 4 * NR * k), w1 = *(const vcodes *)(w + 4 * NR * k + 4 * LANES);
#pragma clang loop unroll(full)
    for (int i = 0; i < rows; i++) {
      vi xi = *(const i32_u *)(codes + i * cols + 4 * k) - (vi){0};
      dots[i][0] = dot_lanes(dots[i][0], w0, xi, is_signed);
      dots[i][1] = dot_lanes(dots[i][1], w1, xi, is_signed);
    }
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < 2; j++) {
    vf scale = load(panel->scales[part] + j * LANES), minimum = halves ? splat(0) : load(panel->minima[part] + j * LANES);
    if (!rests) scale *= 128.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < rows; i++) {
      acc[i][j] += __builtin_convertvector(dots[i][j], vf) * (scale * x->scales[i * stride + (part >> halves)]);
      if (!halves && !rests) acc[i][j] += minimum * x->sums[i * stride + part];
    }
  }
}

// c [rows, NR] += x [rows, units] times a panel of up to KC columns.
INLINE void multiply_codes(int rows, int halves, int is_signed, const codes_of_x *x, int64_t cols, int64_t stride,
                           const code_panel *panel, int64_t units, float *c, int64_t c_stride, int fresh) {
  unsigned fine = 0;
  vf acc[CODE_ROWS][2];
  for (int i = 0; i < rows; i++) {
    fine |= x->fine[i * stride / 8];
    for (int j = 0; j < 2; j++) acc[i][j] = fresh ? splat(0) : load(c + i * c_stride + j * LANES);
  }
  for (int64_t part = 0; part < units << halves; part++)
    multiply_part(rows, halves, is_signed, 0, x, cols, stride, panel, part, acc);
  for (; fine; fine &= fine - 1)
    for (int64_t h = 0; h <= halves; h++)
      multiply_part(rows, halves, is_signed, 1, x, cols, stride, panel, (__builtin_ctz(fine) << halves) + h, acc);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < 2; j++) store(c + i * c_stride + j * LANES, acc[i][j]);
}

// y [rows first .. first + count - 1] += those tokens times a panel, from column `unit` on.
INLINE void multiply_tokens(int halves, int is_signed, const linear_args *a, int64_t cols, int64_t first, int64_t count,
                            int64_t unit, const code_panel *panel, int64_t units, float *c, int64_t c_stride, int fresh) {
  int64_t i = 0, stride = padded_units(cols);
#define ROWS_OF_TILE(rows)                                                                                             \
  for (; i + (rows) <= count; i += (rows)) {                                                                   \
    codes_of_x x = codes_from(a, cols, first + i, unit);                                                       \
    for (int64_t r = i + (rows); r < i + 2 * (rows) && r < count; r++) { /* what the next tile reads */        \
      for (int64_t at = 0; at < units * UNIT; at += 64)                                                        \
        __builtin_prefetch(a->codes.codes + (first + r) * cols + unit * UNIT + at);                            \
      for (int64_t at = 0; at < NR; at += 16) __builtin_prefetch(c + r * c_stride + at);                       \
    }                                                                                                          \
    multiply_codes(rows, halves, is_signed, &x, cols, stride, panel, units, c + i * c_stride, c_stride, fresh); \
  }
  ROWS_OF_TILE(CODE_ROWS)
  ROWS_OF_TILE(2)
  ROWS_OF_TILE(1)
#undef ROWS_OF_TILE
}

// One panel of output features for all rows of x in codes.
static void codes_panel(const linear_args *a, int64_t which, int64_t row) {
  const matrix *w = &a->w[which];
  float *y = a->y[which];
  code_panel panel;
  int64_t width = w->rows - row < NR ? w->rows - row : NR;
  int plain = !a->bias[which] && !a->residual && width == NR;
  if (!plain) begin_panel(a, which, row, width);
  for (int64_t first = 0; first < w->cols; first += KC) {
    int64_t depth = w->cols - first < KC ? w->cols - first : KC;
    pack_codes(w, row, first, depth, &panel);
    int64_t at_once = width == NR ? a->num_rows : CODE_ROWS;
    for (int64_t i = 0; i < a->num_rows; i += at_once) {
      int64_t rows = a->num_rows - i < at_once ? a->num_rows - i : at_once;
      float tile[CODE_ROWS * NR], *to = width == NR ? y + row : tile;
      int64_t stride = width == NR ? w->rows : NR;
      int fresh = width < NR || (plain && first == 0);
#define MULTIPLY(halves, is_signed) \
  multiply_tokens(halves, is_signed, a, w->cols, i, rows, first / UNIT, &panel, depth / UNIT, to, stride, fresh)
      if (w->format == Q6_K) MULTIPLY(1, 0);
      else if (w->format == Q8_0 || w->format == INT8) MULTIPLY(0, 1);
      else MULTIPLY(0, 0);
#undef MULTIPLY
      if (width < NR)
        for (int64_t r = 0; r < rows; r++)
          for (int64_t j = 0; j < width; j++) y[(i + r) * w->rows + row + j] += tile[r * NR + j];
    }
  }
}

// Whether W is decoded panel by panel.
INLINE int by_panels(const linear_args *a, const matrix *w) {
  if (w->format == AWQ) return a->num_rows > 1;
  return a->num_rows > (in_codes(a, w) ? FEW_CODE_ROWS : FEW_ROWS);
}

// Rows first .. last - 1 of W for x in codes; tokens that have none are multiplied in float32. One token meets AWQ's codes
// as the float32 numbers that its own codes stand for: a word holds one input feature, not four to be summed.
static void linear_codes(const linear_args *a, int64_t which, int64_t first, int64_t last) {
  const matrix *w = &a->w[which];
  int awq = w->format == AWQ;
  if (awq && a->num_rows == 1) {
    linear_awq(a, which, first, last, a->codes.values, 0);
    return;
  }
  if (by_panels(a, w)) codes_panel(a, which, first);
  else codes_few_rows(a, which, first, last);
  for (int64_t i = 0; i < a->num_rows; i++) {
    if (!a->codes.unbounded[i]) continue;
    if (awq) linear_awq(a, which, first, last, a->x, i);
    else linear_one_row(a, which, first, last, i);
  }
}

// Rows of W that are one item of work.
INLINE int64_t rows_per_item(const linear_args *a, const matrix *w, int64_t threads) {
  if (by_panels(a, w)) return NR;
  if (w->format == AWQ) {
    // Its rows are input features: the wider an item, the longer the runs of memory that it reads.
    int64_t rows = w->rows / threads / AWQ_CHANNELS * AWQ_CHANNELS;
    return rows < AWQ_CHANNELS ? AWQ_CHANNELS : rows > AWQ_MOST ? AWQ_MOST : rows;
  }
  int64_t rows = w->rows / (4 * threads) / 8 * 8;
  return rows < 16 ? 16 : rows > 512 ? 512 : rows;
}

static void run_linear(const void *args, pool *p, int64_t thread) {
  const linear_args *a = args;
  for (;;) {
    int64_t item = next_item(p), which = 0;
    for (; which < a->count; which++) {
      int64_t per_item = rows_per_item(a, &a->w[which], p->num_threads);
      int64_t items = (a->w[which].rows + per_item - 1) / per_item;
      if (item < items) break;
      item -= items;
    }
    if (which == a->count) return;
    const matrix *w = &a->w[which];
    int64_t per_item = rows_per_item(a, w, p->num_threads), first = item * per_item;
    int64_t last = first + per_item < w->rows ? first + per_item : w->rows;
    if (in_codes(a, w)) linear_codes(a, which, first, last);
    else if (by_panels(a, w)) linear_panel(a, which, first);
    else if (w->format == AWQ) linear_awq(a, which, first, last, a->x, 0);
    else if (a->num_rows == 1) linear_one_row(a, which, first, last, 0);
    else linear_few_rows(a, which, first, last);
  }
}
