// Convolutions and their gradients, tap by tap; winograd.c has those of 3 x 3 filters with stride 1.
#include "kernels.h"

// y[r] += sum_k a[r][k] b[k], for R rows of V vectors; b[k] is at b + k ldb. fresh: = instead of +=.
INLINE void rows(int R, int V, int n, const float *const *a, long K, const float *b, long ldb,
                 float *const *y, int fresh, long c) {
  vec s[ROWS][WIDE];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] = (vec){0};
  for (long k = 0; k < K; k++) {
    vec w[WIDE];
    UNROLL for (int v = 0; v < V; v++) w[v] = load(b + k * ldb + c + v * LANES, n);
    UNROLL for (int r = 0; r < R; r++) {
      float x = a[r][k];
      UNROLL for (int v = 0; v < V; v++) s[r][v] += x * w[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    float *p = y[r] + c + v * LANES;
    store(p, fresh ? s[r][v] : load(p, n) + s[r][v], n);
  }
}
void all_rows(int m, const float *const *a, long K, const float *b, long ldb,
                     float *const *y, int fresh) {
#define ROWS_OF(R, c, V, n) rows(R, V, n, a, K, b, ldb, y, fresh, c)
#define FULL(c, V, n) ROWS_OF(ROWS, c, V, n)
#define ONE(c, V, n) ROWS_OF(1, c, V, n)
  if (m == ROWS) { TILES(ldb, FULL) }
  else for (; m; m--, a++, y++) { TILES(ldb, ONE) }
}

// g[r] += sum_k a[k][r] b[k], for R rows of V vectors and `count` pairs; rows of g are ldg apart.
INLINE void columns(int R, int V, int n, const float *const *a, long at, const float *const *b,
                    int count, float *g, long ldg, long c) {
  vec s[ROWS][WIDE];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] = (vec){0};
  for (int k = 0; k < count; k++) {
    vec w[WIDE];
    const float *x = a[k] + at;
    UNROLL for (int v = 0; v < V; v++) w[v] = load(b[k] + c + v * LANES, n);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] += x[r] * w[v];
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    float *p = g + r * ldg + c + v * LANES;
    store(p, load(p, n) + s[r][v], n);
  }
}
void all_columns(const float *const *a, long C, const float *const *b, int count, float *g,
                        long O) {
  long r = 0;
  for (; r + ROWS <= C; r += ROWS) {
#define MANY(c, V, n) columns(ROWS, V, n, a, r, b, count, g + r * O, O, c)
    TILES(O, MANY)
  }
  for (; r < C; r++) {
#define SINGLE(c, V, n) columns(1, V, n, a, r, b, count, g + r * O, O, c)
    TILES(O, SINGLE)
  }
}

// The pairs of one tap within one image: positions of inputs and of outputs.
static int pairs(const shape *s, long tap, int *in, int *out) {
  int count = 0;
  long ho = out_size(s->H, s->stride), wo = out_size(s->W, s->stride), pad = s->K / 2;
  for (long i = 0; i < ho; i++) {
    long y = s->stride * i + tap / s->K - pad;
    if (y < 0 || y >= s->H) continue;
    for (long j = 0; j < wo; j++) {
      long x = s->stride * j + tap % s->K - pad;
      if (x < 0 || x >= s->W) continue;
      in[count] = (int)(y * s->W + x);
      out[count++] = (int)(i * wo + j);
    }
  }
  return count;
}
// The pairs of all taps: of tap k, counts[k] inputs at lists + 2 k small, their outputs behind.
typedef struct { int *lists, *counts; long small, large, taps, filter, group; } plan;
static plan plan_of(const shape *s) {
  plan p;
  p.small = out_size(s->H, s->stride) * out_size(s->W, s->stride);
  p.large = s->H * s->W;
  p.taps = s->K * s->K;
  p.filter = s->C * s->O;
  p.group = p.small < BLOCK ? BLOCK / p.small : 1;  // these images stay in the cache for all taps
  p.lists = malloc((2 * p.small + 1) * p.taps * sizeof(int));
  if (!p.lists) return p;
  p.counts = p.lists + 2 * p.small * p.taps;
  for (long k = 0; k < p.taps; k++)
    p.counts[k] = pairs(s, k, p.lists + 2 * k * p.small, p.lists + (2 * k + 1) * p.small);
  return p;
}
// to += from @ w for all pairs of a tap in B images; from has F channels, to has G.
static void apply(const float *from, long F, long size_from, const int *at_from, const float *w,
                  float *to, long G, long size_to, const int *at_to, int count, long B) {
  const float *a[ROWS];
  float *y[ROWS];
  int m = 0;
  for (long b = 0; b < B; b++) for (int p = 0; p < count; p++) {
    a[m] = from + (b * size_from + at_from[p]) * F;
    y[m] = to + (b * size_to + at_to[p]) * G;
    if (++m == ROWS) { all_rows(m, a, F, w, G, y, 0); m = 0; }
  }
  all_rows(m, a, F, w, G, y, 0);
}
typedef float four __attribute__((vector_size(16)));
// w [C,O] -> to [O,C]
void transpose(const float *w, float *to, long C, long O) {
  long i = 0, j;
  for (; i + 4 <= C; i += 4) {
    for (j = 0; j + 4 <= O; j += 4) {
      four a, b, c, d;
      memcpy(&a, w + i * O + j, 16);
      memcpy(&b, w + (i + 1) * O + j, 16);
      memcpy(&c, w + (i + 2) * O + j, 16);
      memcpy(&d, w + (i + 3) * O + j, 16);
      four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      four ba = __builtin_shufflevector(a, b, 2, 6, 3, 7), dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
      b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
      c = __builtin_shufflevector(ba, dc, 0, 1, 4, 5);
      d = __builtin_shufflevector(ba, dc, 2, 3, 6, 7);
      memcpy(to + j * C + i, &a, 16);
      memcpy(to + (j + 1) * C + i, &b, 16);
      memcpy(to + (j + 2) * C + i, &c, 16);
      memcpy(to + (j + 3) * C + i, &d, 16);
    }
    for (; j < O; j++) for (long c = i; c < i + 4; c++) to[j * C + c] = w[c * O + j];
  }
  for (; i < C; i++) for (j = 0; j < O; j++) to[j * C + i] = w[i * O + j];
}
// x [T,B,H,W,C], w [T or 1,K,K,C,O] -> y [T,B,H/s,W/s,O]; forward, or x from y if not.
static int convolve(const float *x, const float *w, float *y, long T, int shared, shape s,
                    int forward) {
  plan p = plan_of(&s);
  long F = forward ? s.C : s.O, G = forward ? s.O : s.C;
  long from = forward ? p.large : p.small, to = forward ? p.small : p.large;
  float *back = forward ? NULL : malloc(p.taps * p.filter * sizeof(float));
  if (!p.lists || (!forward && !back)) { free(p.lists); free(back); return 1; }
  for (long t = 0; t < T; t++) {
    const float *filters = w + (shared ? 0 : t * p.taps * p.filter);
    if (!forward) {
      if (!t || !shared) for (long k = 0; k < p.taps; k++)
        transpose(filters + k * p.filter, back + k * p.filter, s.C, s.O);
      filters = back;
    }
    for (long first = 0; first < s.B; first += p.group) {
      long B = smaller(p.group, s.B - first), image = t * s.B + first;
      memset(y + image * to * G, 0, B * to * G * sizeof(float));
      for (long k = 0; k < p.taps; k++) {
        const int *in = p.lists + 2 * k * p.small, *out = in + p.small;
        apply(x + image * from * F, F, from, forward ? in : out, filters + k * p.filter,
              y + image * to * G, G, to, forward ? out : in, p.counts[k], B);
      }
    }
  }
  free(p.lists); free(back);
  return 0;
}
int conv(const float *x, const float *w, float *y, long T, int shared, shape s) {
  return (is_tiled(&s) ? convolve_tiles : convolve)(x, w, y, T, shared, s, 1);
}
int conv_input(const float *gy, const float *w, float *gx, long T, int shared, shape s) {
  return (is_tiled(&s) ? convolve_tiles : convolve)(gy, w, gx, T, shared, s, 0);
}
// x [T,B,H,W,C], gy [T,B,H/s,W/s,O] -> gw [T or 1,K,K,C,O], summed over tasks if shared.
int conv_weight(const float *x, const float *gy, float *gw, long T, int shared, shape s) {
  if (is_tiled(&s)) return weight_tiles(x, gy, gw, T, shared, s);
  plan p = plan_of(&s);
  const float *a[BLOCK], *b[BLOCK];
  if (!p.lists) return 1;
  memset(gw, 0, (shared ? 1 : T) * p.taps * p.filter * sizeof(float));
  for (long t = 0; t < T; t++) for (long first = 0; first < s.B; first += p.group)
    for (long k = 0; k < p.taps; k++) {
      const int *in = p.lists + 2 * k * p.small, *out = in + p.small;
      float *g = gw + ((shared ? 0 : t * p.taps) + k) * p.filter;
      int m = 0;
      for (long i = first; i < smaller(s.B, first + p.group); i++)
        for (int q = 0; q < p.counts[k]; q++) {
          a[m] = x + ((t * s.B + i) * p.large + in[q]) * s.C;
          b[m] = gy + ((t * s.B + i) * p.small + out[q]) * s.O;
          if (++m == BLOCK) { all_columns(a, s.C, b, m, g, s.O); m = 0; }
        }
      if (m) all_columns(a, s.C, b, m, g, s.O);
    }
  free(p.lists);
  return 0;
}
