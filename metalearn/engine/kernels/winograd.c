// Convolutions with 3 x 3 filters and stride 1 by tiles of 2 x 2 outputs, for each of which 16
// products of channels replace 36 (Winograd's minimal filtering; Lavin and Gray 2016):
// y = A' [(G w G') * (B' x B)] A, along both axes of an image, with
// B' = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1], G = [1 0 0; .5 .5 .5; .5 -.5 .5; 0 0 1],
// A' = [1 1 1 0; 0 1 -1 -1].
#include "kernels.h"

#define TAPS 16
#define AT_ONCE 48                         // tiles whose products stay in the cache
#define STEP(C) (AT_ONCE * (C) + LANES)    // between taps, not a multiple of the cache's size
#define COLUMNS(k) UNROLL for (int k = 0; k < 4; k++)

static long half(long size) { return (size + 1) / 2; }

int is_tiled(const shape *s) {
  long tiles = half(s->H) * half(s->W), inside = (3 * s->H - 2) * (3 * s->W - 2);  // taps
  return s->K == 3 && s->stride == 1 && s->C >= LANES && s->O >= LANES && tiles > 4 &&
         (TAPS + 4) * tiles < inside;  // 4 for the sums
}

// The size x size pixels from the corner of a tile, moved by -pad; `outside` for those that the
// image does not have.
static void pixels(const float *x, long C, const shape *s, long tile, int size, int pad,
                   const float *outside, const float **p) {
  long wide = half(s->W), tiles = half(s->H) * wide;
  long top = tile % tiles / wide * 2 - pad, left = tile % wide * 2 - pad;
  x += tile / tiles * s->H * s->W * C;
  for (int k = 0; k < size * size; k++) {
    long i = top + k / size, j = left + k % size;
    int inside = i >= 0 && i < s->H && j >= 0 && j < s->W;
    p[k] = inside ? x + (i * s->W + j) * C : outside;
  }
}

// Transforms of n channels from c on; the 16 values of a tile are `step` apart. In the macros, k and
// `by` say which of them are a row or a column. B' x B: 4 x 4 pixels -> v
INLINE void inputs(const float *const *x, float *v, long step, long c, int n) {
  vec d[TAPS];
  UNROLL for (int k = 0; k < TAPS; k++) d[k] = load(x[k] + c, n);
#define INPUTS(k, by) { \
    vec a = d[k], b = d[k + by], e = d[k + 2 * by], f = d[k + 3 * by]; \
    d[k] = a - e; d[k + by] = b + e; d[k + 2 * by] = e - b; d[k + 3 * by] = b - f; \
  }
  COLUMNS(k) INPUTS(k, 4)
  COLUMNS(k) INPUTS(4 * k, 1)
  UNROLL for (int k = 0; k < TAPS; k++) store(v + k * step + c, d[k], n);
}
// A' m A: m -> 2 x 2 pixels
INLINE void outputs(const float *m, long step, float *const *y, long c, int n) {
  vec d[TAPS];
  UNROLL for (int k = 0; k < TAPS; k++) d[k] = load(m + k * step + c, n);
#define OUTPUTS(k, by) { \
    vec b = d[k + by], e = d[k + 2 * by]; \
    d[k] += b + e; d[k + by] = b - e - d[k + 3 * by]; \
  }
  COLUMNS(k) OUTPUTS(k, 4)
  OUTPUTS(0, 1)
  OUTPUTS(4, 1)
  UNROLL for (int k = 0; k < 4; k++) store(y[k] + c, d[k / 2 * 4 + k % 2], n);
}
// The transpose of `outputs`: 2 x 2 pixels -> q
INLINE void gradients(const float *const *gy, float *q, long step, long c, int n) {
  vec d[TAPS];
  UNROLL for (int k = 0; k < 4; k++) d[k / 2 * 4 + k % 2] = load(gy[k] + c, n);
#define GRADIENTS(k, by) { \
    vec a = d[k], b = d[k + by]; \
    d[k + by] = a + b; d[k + 2 * by] = a - b; d[k + 3 * by] = -b; \
  }
  GRADIENTS(0, 4)
  GRADIENTS(1, 4)
  COLUMNS(k) GRADIENTS(4 * k, 1)
  UNROLL for (int k = 0; k < TAPS; k++) store(q + k * step + c, d[k], n);
}
// G w G': w [3,3,step] -> u [4,4,step]
INLINE void filters(const float *w, float *u, long step, long c, int n) {
  vec d[TAPS];
  UNROLL for (int k = 0; k < 9; k++) d[k / 3 * 4 + k % 3] = load(w + k * step + c, n);
#define FILTERS(k, by) { \
    vec a = d[k] + d[k + 2 * by], b = d[k + by]; \
    d[k + 3 * by] = d[k + 2 * by]; d[k + by] = (a + b) * 0.5f; d[k + 2 * by] = (a - b) * 0.5f; \
  }
  UNROLL for (int k = 0; k < 3; k++) FILTERS(k, 4)
  COLUMNS(k) FILTERS(4 * k, 1)
  UNROLL for (int k = 0; k < TAPS; k++) store(u + k * step + c, d[k], n);
}
// The transpose of `filters`: u [4,4,step] -> gw [3,3,step]
INLINE void filter_gradients(const float *u, float *gw, long step, long c, int n) {
  vec d[TAPS];
  UNROLL for (int k = 0; k < TAPS; k++) d[k] = load(u + k * step + c, n);
#define FILTER_GRADIENTS(k, by) { \
    vec a = (d[k + by] + d[k + 2 * by]) * 0.5f, b = (d[k + by] - d[k + 2 * by]) * 0.5f; \
    d[k] += a; d[k + by] = b; d[k + 2 * by] = a + d[k + 3 * by]; \
  }
  COLUMNS(k) FILTER_GRADIENTS(k, 4)
  UNROLL for (int k = 0; k < 3; k++) FILTER_GRADIENTS(4 * k, 1)
  UNROLL for (int k = 0; k < 9; k++) store(gw + k * step + c, d[k / 3 * 4 + k % 3], n);
}
// Call a transform for all C channels.
#define CHANNELS(C, TRANSFORM, ...) { \
    long c = 0; \
    for (; c + LANES <= (C); c += LANES) TRANSFORM(__VA_ARGS__, c, LANES); \
    if (c < (C)) TRANSFORM(__VA_ARGS__, c, (int)((C) - c)); \
  }

static float *space(long count) {
  return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
}

// As `convolve` in convolutions.c
int convolve_tiles(const float *x, const float *w, float *y, long T, int shared, shape s,
                   int forward) {
  long F = forward ? s.C : s.O, G = forward ? s.O : s.C, filter = F * G, widest = F < G ? G : F;
  long tiles = s.B * half(s.H) * half(s.W), image = s.H * s.W;
  float *u = space(TAPS * (filter + STEP(F) + STEP(G)) + widest + 9 * filter);
  if (!u) return 1;
  float *v = u + TAPS * filter, *m = v + TAPS * STEP(F), *outside = m + TAPS * STEP(G);
  float *back = outside + widest;
  for (long t = 0; t < T; t++, x += s.B * image * F, y += s.B * image * G) {
    if (!t || !shared) {
      const float *own = w + t * 9 * filter;
      if (!forward) {
        for (int k = 0; k < 9; k++) transpose(own + (8 - k) * filter, back + k * filter, s.C, s.O);
        own = back;
      }
      CHANNELS(filter, filters, own, u, filter)
    }
    for (long first = 0; first < tiles; first += AT_ONCE) {
      int count = (int)smaller(AT_ONCE, tiles - first);
      const float *p[TAPS], *a[ROWS];
      float *to[ROWS];
      memset(outside, 0, F * sizeof(float));
      for (int i = 0; i < count; i++) {
        pixels(x, F, &s, first + i, 4, 1, outside, p);
        CHANNELS(F, inputs, p, v + i * F, STEP(F))
      }
      for (int k = 0; k < TAPS; k++) for (int i = 0; i < count; i += ROWS) {
        int rest = (int)smaller(ROWS, count - i);
        for (int r = 0; r < rest; r++) {
          a[r] = v + k * STEP(F) + (i + r) * F;
          to[r] = m + k * STEP(G) + (i + r) * G;
        }
        all_rows(rest, a, F, u + k * filter, G, to, 1);
      }
      for (int i = 0; i < count; i++) {
        pixels(y, G, &s, first + i, 2, 0, outside, p);
        CHANNELS(G, outputs, m + i * G, STEP(G), (float *const *)p)
      }
    }
  }
  free(u);
  return 0;
}
// As `conv_weight` in convolutions.c
int weight_tiles(const float *x, const float *gy, float *gw, long T, int shared, shape s) {
  long filter = s.C * s.O, widest = s.C < s.O ? s.O : s.C;
  long tiles = s.B * half(s.H) * half(s.W), image = s.H * s.W;
  float *u = space(TAPS * (filter + STEP(s.C) + STEP(s.O)) + widest);
  if (!u) return 1;
  float *v = u + TAPS * filter, *q = v + TAPS * STEP(s.C), *outside = q + TAPS * STEP(s.O);
  memset(outside, 0, widest * sizeof(float));
  for (long t = 0; t < T; t++, x += s.B * image * s.C, gy += s.B * image * s.O) {
    if (!t || !shared) memset(u, 0, TAPS * filter * sizeof(float));
    for (long first = 0; first < tiles; first += AT_ONCE) {
      int count = (int)smaller(AT_ONCE, tiles - first);
      const float *p[TAPS], *a[AT_ONCE], *b[AT_ONCE];
      for (int i = 0; i < count; i++) {
        pixels(x, s.C, &s, first + i, 4, 1, outside, p);
        CHANNELS(s.C, inputs, p, v + i * s.C, STEP(s.C))
        pixels(gy, s.O, &s, first + i, 2, 0, outside, p);
        CHANNELS(s.O, gradients, p, q + i * s.O, STEP(s.O))
      }
      for (int k = 0; k < TAPS; k++) {
        for (int i = 0; i < count; i++) {
          a[i] = v + k * STEP(s.C) + i * s.C;
          b[i] = q + k * STEP(s.O) + i * s.O;
        }
        all_columns(a, s.C, b, count, u + k * filter, s.O);
      }
    }
    if (!shared || t == T - 1)
      CHANNELS(filter, filter_gradients, u, gw + (shared ? 0 : t * 9 * filter), filter)
  }
  free(u);
  return 0;
}
