// Layers of T tasks on channels-last tensors, float32, one thread. See ops.py for the mathematics.
// Every sum has a fixed order, so the results depend on neither T nor the caller's thread.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#elif defined(__aarch64__)
#define LANES 4
#define WIDE 4
#else
#define LANES 4
#define WIDE 2
#endif
#define ROWS 6     // rows x WIDE vectors of sums are held in registers
#define BLOCK 64   // rows summed in registers before they are added in memory

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

// The first n lanes; n is a constant but in the last channels of a width that LANES does not divide.
INLINE vec load(const float *p, int n) {
  vec x = {0};
  if (n == LANES) memcpy(&x, p, sizeof x);
  else memcpy(&x, p, 4 * n);
  return x;
}
INLINE void store(float *p, vec x, int n) {
  if (n == LANES) memcpy(p, &x, sizeof x);
  else memcpy(p, &x, 4 * n);
}
// Multiply g by the slope of the activation whose output is a; NaN is not "<= 0" and stays.
INLINE vec masked(vec g, vec a, float slope) {
  ivec m = a <= 0;
  return (vec)(((ivec)g & ~m) | ((ivec)(g * slope) & m));
}

// Call F(c, V, n) for tiles of V vectors of n lanes, which cover C channels.
#define TILES(C, F) RANGE(0, C, F)
#define RANGE(first, C, F)                                       \
  for (long c = (first); c < (C);) {                             \
    long left = (C) - c;                                         \
    if (left >= WIDE * LANES) { F(c, WIDE, LANES); c += WIDE * LANES; } \
    else if (left >= 2 * LANES) { F(c, 2, LANES); c += 2 * LANES; } \
    else if (left >= LANES) { F(c, 1, LANES); c += LANES; }      \
    else { F(c, 1, (int)left); c += left; }                      \
  }

// y[r] += sum_k a[r][k] b[k], for R rows of V vectors; b[k] is at b + k ldb.
INLINE void rows(int R, int V, int n, const float *const *a, long K, const float *b, long ldb,
                 float *const *y, long c) {
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
    store(p, load(p, n) + s[r][v], n);
  }
}
static void all_rows(int m, const float *const *a, long K, const float *b, long ldb,
                     float *const *y) {
#define ROWS_OF(R, c, V, n) rows(R, V, n, a, K, b, ldb, y, c)
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
static void all_columns(const float *const *a, long C, const float *const *b, int count, float *g,
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

// A convolution with K x K filters, padding K / 2.
typedef struct { long B, H, W, C, O, K, stride; } shape;
static long out_size(long size, long stride) { return (size + stride - 1) / stride; }

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
    if (++m == ROWS) { all_rows(m, a, F, w, G, y); m = 0; }
  }
  all_rows(m, a, F, w, G, y);
}
typedef float four __attribute__((vector_size(16)));
// w [C,O] -> to [O,C]
static void transpose(const float *w, float *to, long C, long O) {
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
static long smaller(long a, long b) { return a < b ? a : b; }
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
  return convolve(x, w, y, T, shared, s, 1);
}
int conv_input(const float *gy, const float *w, float *gx, long T, int shared, shape s) {
  return convolve(gy, w, gx, T, shared, s, 0);
}
// x [T,B,H,W,C], gy [T,B,H/s,W/s,O] -> gw [T or 1,K,K,C,O], summed over tasks if shared.
int conv_weight(const float *x, const float *gy, float *gw, long T, int shared, shape s) {
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

// Sum over M rows of N vectors TERM[0..N), in blocks.
#define SUM(N, BODY)                                                             \
  vec sum[N][WIDE];                                                              \
  UNROLL for (int q = 0; q < N; q++) UNROLL for (int v = 0; v < V; v++) sum[q][v] = (vec){0}; \
  for (long i0 = 0; i0 < M; i0 += BLOCK) {                                       \
    vec part[N][WIDE];                                                           \
    UNROLL for (int q = 0; q < N; q++) UNROLL for (int v = 0; v < V; v++) part[q][v] = (vec){0}; \
    for (long i = i0; i < M && i < i0 + BLOCK; i++) UNROLL for (int v = 0; v < V; v++) {        \
      long e = i * C + c + v * LANES;                                            \
      BODY                                                                       \
    }                                                                            \
    UNROLL for (int q = 0; q < N; q++) UNROLL for (int v = 0; v < V; v++) sum[q][v] += part[q][v]; \
  }
#define EACH UNROLL for (int v = 0; v < V; v++)
#define AT(p) load((p) + e, n)
#define CHANNEL(p) load((p) + c + v * LANES, n)

// y [M,C] -> a = act(xh g + b), xh = (y - mean) r, r = 1 / sqrt(var + eps)
INLINE void norm_tile(const float *y, const float *g, const float *b, float *a, float *xh, float *r,
                      long M, long C, float eps, float slope, long c, int V, int n) {
  vec mean[WIDE], rate[WIDE];
  { SUM(1, { part[0][v] += AT(y); }) EACH mean[v] = sum[0][v] / (float)M; }
  {
    SUM(1, { vec d = AT(y) - mean[v]; part[0][v] += d * d; })
    EACH {
      vec var = sum[0][v] / (float)M + eps;
      UNROLL for (int l = 0; l < LANES; l++) rate[v][l] = 1 / sqrtf(var[l]);
      store(r + c + v * LANES, rate[v], n);
    }
  }
  for (long i = 0; i < M; i++) EACH {
    long e = i * C + c + v * LANES;
    vec h = (AT(y) - mean[v]) * rate[v], z = h * CHANNEL(g) + CHANNEL(b);
    store(xh + e, h, n);
    store(a + e, masked(z, z, slope), n);
  }
}
void norm(const float *y, const float *g, const float *b, float *a, float *xh, float *r, long T,
          long M, long C, int shared, float eps, float slope) {
  for (long t = 0; t < T; t++) {
    long e = t * M * C, p = t * C, q = shared ? 0 : p;
#define NORM(c, V, n) norm_tile(y + e, g + q, b + q, a + e, xh + e, r + p, M, C, eps, slope, c, V, n)
    TILES(C, NORM)
  }
}
// Cotangents ga of a, gxh of xh and gr of r (both or none) -> gy, gg, gb
INLINE void vjp_tile(const float *ga, const float *gxh, const float *gr, const float *g,
                     const float *a, const float *xh, const float *r, float *gy, float *gg,
                     float *gb, long M, long C, float slope, long c, int V, int n) {
  vec mean[WIDE], along[WIDE];
  if (gxh) {
    SUM(4, {
      vec m = masked(AT(ga), AT(a), slope); vec x = AT(xh); vec h = AT(gxh);
      part[0][v] += m; part[1][v] += m * x; part[2][v] += h; part[3][v] += h * x;
    })
    EACH {
      vec w = CHANNEL(g);
      store(gb + c + v * LANES, sum[0][v], n);
      store(gg + c + v * LANES, sum[1][v], n);
      mean[v] = (sum[0][v] * w + sum[2][v]) / (float)M;
      along[v] = (sum[1][v] * w + sum[3][v] + CHANNEL(r) * CHANNEL(gr)) / (float)M;
    }
  } else {
    SUM(2, {
      vec m = masked(AT(ga), AT(a), slope);
      part[0][v] += m; part[1][v] += m * AT(xh);
    })
    EACH {
      vec w = CHANNEL(g);
      store(gb + c + v * LANES, sum[0][v], n);
      store(gg + c + v * LANES, sum[1][v], n);
      mean[v] = sum[0][v] * w / (float)M;
      along[v] = sum[1][v] * w / (float)M;
    }
  }
  for (long i = 0; i < M; i++) EACH {
    long e = i * C + c + v * LANES;
    vec h = masked(AT(ga), AT(a), slope) * CHANNEL(g);
    if (gxh) h += AT(gxh);
    store(gy + e, CHANNEL(r) * (h - mean[v] - AT(xh) * along[v]), n);
  }
}
void norm_vjp(const float *ga, const float *gxh, const float *gr, const float *g, const float *a,
              const float *xh, const float *r, float *gy, float *gg, float *gb, long T, long M,
              long C, int shared, float slope) {
  for (long t = 0; t < T; t++) {
    long e = t * M * C, p = t * C, q = shared ? 0 : p;
#define VJP(c, V, n) vjp_tile(ga + e, H, G, g + q, a + e, xh + e, r + p, gy + e, gg + p, gb + p, M, C, slope, c, V, n)
    if (gxh) {
      const float *H = gxh + e, *G = gr + p;
      TILES(C, VJP)
    } else {
      const float *H = NULL, *G = NULL;
      TILES(C, VJP)
    }
  }
}
// Cotangents u of gy, ug of gg, ub of gb -> cotangents of ga, xh, r and g
INLINE void second_tile(const float *u, const float *ug, const float *ub, const float *ga,
                        const float *g, const float *a, const float *xh, const float *r, float *da,
                        float *dxh, float *dr, float *dg, long M, long C, float slope, long c,
                        int V, int n) {
  SUM(5, {
    vec m = masked(AT(ga), AT(a), slope); vec x = AT(xh); vec w = AT(u);
    part[0][v] += m; part[1][v] += m * x; part[2][v] += w; part[3][v] += w * x; part[4][v] += w * m;
  })
  vec s[WIDE], shift[WIDE], along[WIDE], p[WIDE], q[WIDE];
  EACH {
    s[v] = CHANNEL(g) * CHANNEL(r);
    vec ds = sum[4][v] - (sum[2][v] * sum[0][v] + sum[3][v] * sum[1][v]) / (float)M;
    store(dr + c + v * LANES, CHANNEL(g) * ds, n);
    store(dg + c + v * LANES, CHANNEL(r) * ds, n);
    shift[v] = CHANNEL(ub) - s[v] * sum[2][v] / (float)M;
    along[v] = CHANNEL(ug) - s[v] * sum[3][v] / (float)M;
    p[v] = along[v];
    q[v] = s[v] * sum[1][v] / (float)M;
  }
  for (long i = 0; i < M; i++) EACH {
    long e = i * C + c + v * LANES;
    vec w = AT(u), x = AT(xh), m = AT(a);
    store(da + e, masked(s[v] * w + shift[v] + along[v] * x, m, slope), n);
    store(dxh + e, p[v] * masked(AT(ga), m, slope) - q[v] * w, n);
  }
}
void norm_second(const float *u, const float *ug, const float *ub, const float *ga, const float *g,
                 const float *a, const float *xh, const float *r, float *da, float *dxh, float *dr,
                 float *dg, long T, long M, long C, int shared, float slope) {
  for (long t = 0; t < T; t++) {
    long e = t * M * C, k = t * C, h = shared ? 0 : k;
#define SECOND(c, V, n) second_tile(u + e, ug + k, ub + k, ga + e, g + h, a + e, xh + e, r + k, da + e, dxh + e, dr + k, dg + k, M, C, slope, c, V, n)
    TILES(C, SECOND)
  }
}

// x [T,M,K] @ w [T or 1,K,O] -> y [T,M,O], then the activation: by its own sign, or by that of `by`.
INLINE void affine_tile(int R, const float *x, long K, const float *w, const float *by, float *y,
                        long O, float slope, long c, int V, int n) {
  vec s[ROWS][WIDE];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] = (vec){0};
  for (long k = 0; k < K; k++) {
    vec b[WIDE];
    UNROLL for (int v = 0; v < V; v++) b[v] = load(w + k * O + c + v * LANES, n);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] += x[r * K + k] * b[v];
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    long e = r * O + c + v * LANES;
    store(y + e, masked(s[r][v], by ? load(by + e, n) : s[r][v], slope), n);
  }
}
void affine(const float *x, const float *w, const float *by, float *y, long T, long M, long K,
            long O, int shared, float slope) {
  for (long t = 0; t < T; t++) {
    const float *b = w + (shared ? 0 : t * K * O);
    long i = t * M, end = i + M;
#define AFFINE(R, c, V, n) affine_tile(R, x + i * K, K, b, by ? by + i * O : NULL, y + i * O, O, slope, c, V, n)
#define AFFINES(c, V, n) AFFINE(ROWS, c, V, n)
#define AFFINE_ONE(c, V, n) AFFINE(1, c, V, n)
    for (; i + ROWS <= end; i += ROWS) { TILES(O, AFFINES) }
    for (; i < end; i++) { TILES(O, AFFINE_ONE) }
  }
}
// gw [T or 1,K,O] = x^T (g masked by the activation's output y)
#define DEEP 10
INLINE void affine_weight_tile(int R, const float *x, long K, const float *g, const float *y,
                               long M, float *gw, long O, float slope, long c, int V, int n) {
  vec s[DEEP][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) s[r][v] = (vec){0};
  for (long i = 0; i < M; i++) UNROLL for (int v = 0; v < V; v++) {
    long e = i * O + c + v * LANES;
    vec m = masked(load(g + e, n), load(y + e, n), slope);
    UNROLL for (int r = 0; r < R; r++) s[r][v] += x[i * K + r] * m;
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    float *p = gw + r * O + c + v * LANES;
    store(p, load(p, n) + s[r][v], n);
  }
}
void affine_weight(const float *x, const float *g, const float *y, float *gw, long T, long M,
                   long K, long O, int shared, float slope) {
  memset(gw, 0, (shared ? 1 : T) * K * O * sizeof(float));
  for (long t = 0; t < T; t++) for (long i0 = 0; i0 < M; i0 += BLOCK) {
    long i = t * M + i0, m = smaller(M - i0, BLOCK), k = 0;
    float *to = gw + (shared ? 0 : t * K * O);
#define WEIGHT(R, c, V, n) affine_weight_tile(R, x + i * K + k, K, g + i * O, y + i * O, m, to + k * O, O, slope, c, V, n)
#define WEIGHTS(R)                                                      \
    for (long c = 0; c < O;) {                                          \
      if (O - c >= 2 * LANES) { WEIGHT(R, c, 2, LANES); c += 2 * LANES; } \
      else if (O - c >= LANES) { WEIGHT(R, c, 1, LANES); c += LANES; }  \
      else { WEIGHT(R, c, 1, (int)(O - c)); c = O; }                    \
    }
    for (; k + DEEP <= K; k += DEEP) { WEIGHTS(DEEP) }
    for (; k < K; k++) { WEIGHTS(1) }
  }
}

// Max-pooling over 2 x 2 windows, before the activation, which is monotone. Comparisons ignore NaN,
// but the statistics do not, so a NaN still reaches every output of its channel.
typedef uint8_t bvec __attribute__((vector_size(LANES)));
INLINE ivec load_index(const uint8_t *p, int n) {
  bvec b = {0};
  if (n == LANES) memcpy(&b, p, sizeof b);
  else memcpy(&b, p, n);
  return __builtin_convertvector(b, ivec);
}
INLINE void store_index(uint8_t *p, ivec x, int n) {
  bvec b = __builtin_convertvector(x, bvec);
  if (n == LANES) memcpy(p, &b, sizeof b);
  else memcpy(p, &b, n);
}
INLINE vec where(ivec m, vec a, vec b) { return (vec)(((ivec)a & m) | ((ivec)b & ~m)); }
INLINE void larger(vec u, int k, vec *best, ivec *at) {
  ivec m = u > *best;
  *best = where(m, u, *best);
  *at = (m & k) | (~m & *at);
}
// For channels first to end: y [B,H,W,C] -> a = act(xh g + b) pooled, y where it is from (p), which of the 4 (index), mean, var
INLINE void norm_pool_tile(const float *y, const float *g, const float *b, float *a, float *p,
                           uint8_t *index, float *mean_at, float *var_at, shape s, float eps,
                           float slope, long c, int V, int n) {
  long C = s.C, M = s.B * s.H * s.W, h = s.H / 2, w = s.W / 2, e = c;
  vec mean[WIDE], rate[WIDE], sign[WIDE];
  { SUM(1, { part[0][v] += AT(y); }) EACH mean[v] = sum[0][v] / (float)M; }
  {
    SUM(1, { vec d = AT(y) - mean[v]; part[0][v] += d * d; })
    EACH {
      vec var = sum[0][v] / (float)M;
      store(mean_at + c + v * LANES, mean[v], n);
      store(var_at + c + v * LANES, var, n);
      UNROLL for (int l = 0; l < LANES; l++) rate[v][l] = 1 / sqrtf(var[l] + eps);
      sign[v] = where(CHANNEL(g) >= 0, (vec){0} + 1, (vec){0} - 1);
    }
  }
  for (long i = 0; i < s.B * h; i++) for (long j = 0; j < w; j++, e += C) EACH {
    const float *q = y + ((i / h * s.H + i % h * 2) * s.W + 2 * j) * C + c + v * LANES;
    vec best = load(q, n) * sign[v];
    ivec at = {0};
    larger(load(q + C, n) * sign[v], 1, &best, &at);
    larger(load(q + s.W * C, n) * sign[v], 2, &best, &at);
    larger(load(q + s.W * C + C, n) * sign[v], 3, &best, &at);
    best *= sign[v];
    vec z = (best - mean[v]) * rate[v] * CHANNEL(g) + CHANNEL(b);
    store(p + e + v * LANES, best, n);
    store(a + e + v * LANES, masked(z, z, slope), n);
    store_index(index + e + v * LANES, at, n);
  }
}
void norm_pool(const float *y, const float *g, const float *b, float *a, float *p, uint8_t *index,
               float *mean, float *var, long T, int shared, shape s, long first, long end,
               float eps, float slope) {
  long large = s.B * s.H * s.W * s.C, small = s.B * (s.H / 2) * (s.W / 2) * s.C;
  for (long t = 0; t < T; t++) {
    long e = t * small, k = t * s.C, q = shared ? 0 : k;
#define NORM_POOL(c, V, n) norm_pool_tile(y + t * large, g + q, b + q, a + e, p + e, index + e, mean + k, var + k, s, eps, slope, c, V, n)
    RANGE(first, end, NORM_POOL)
  }
}
// Cotangents ga of a, gm of mean and gv of var -> gy, gg, gb
INLINE void pool_vjp_tile(const float *ga, const float *gm, const float *gv, const float *g,
                          const float *y, const float *a, const float *p, const uint8_t *index,
                          const float *mean_at, const float *var_at, float *gy, float *gg,
                          float *gb, shape s, float eps, float slope, long c, int V, int n) {
  long C = s.C, h = s.H / 2, w = s.W / 2, M = s.B * h * w, row = s.W * C, at = c;
  float N = (float)(s.B * s.H * s.W);
  vec mean[WIDE], scale[WIDE], shift[WIDE], along[WIDE];
  EACH mean[v] = CHANNEL(mean_at);
  SUM(2, {
    vec m = masked(AT(ga), AT(a), slope);
    part[0][v] += m; part[1][v] += m * (AT(p) - mean[v]);
  })
  EACH {
    vec rate = CHANNEL(var_at);
    UNROLL for (int l = 0; l < LANES; l++) rate[l] = 1 / sqrtf(rate[l] + eps);
    store(gb + c + v * LANES, sum[0][v], n);
    store(gg + c + v * LANES, sum[1][v] * rate, n);
    scale[v] = CHANNEL(g) * rate;
    shift[v] = (CHANNEL(gm) - scale[v] * sum[0][v]) / N;
    along[v] = (2 * CHANNEL(gv) - scale[v] * sum[1][v] * rate * rate) / N;
  }
#define DENSE(o) (shift[v] + along[v] * (load(y + (o), n) - mean[v]))
  for (long i = 0; i < s.B * s.H; i++) {
    long line = i % s.H, j = 0;
    if (line % 2 == 0 && line / 2 < h) for (; j < w; j++, at += C) EACH {
      long e = at + v * LANES, o = (i * s.W + 2 * j) * C + c + v * LANES;
      vec m = masked(load(ga + e, n), load(a + e, n), slope) * scale[v], zero = {0};
      ivec k = load_index(index + e, n);
      store(gy + o, DENSE(o) + where(k == 0, m, zero), n);
      store(gy + o + C, DENSE(o + C) + where(k == 1, m, zero), n);
      store(gy + o + row, DENSE(o + row) + where(k == 2, m, zero), n);
      store(gy + o + row + C, DENSE(o + row + C) + where(k == 3, m, zero), n);
    }
    for (j = line < 2 * h ? 2 * w : 0; j < s.W; j++) EACH {
      long o = (i * s.W + j) * C + c + v * LANES;
      store(gy + o, DENSE(o), n);
    }
  }
}
void norm_pool_vjp(const float *ga, const float *gm, const float *gv, const float *g,
                   const float *y, const float *a, const float *p, const uint8_t *index,
                   const float *mean, const float *var, float *gy, float *gg, float *gb, long T,
                   int shared, shape s, long first, long end, float eps, float slope) {
  long large = s.B * s.H * s.W * s.C, small = s.B * (s.H / 2) * (s.W / 2) * s.C;
  for (long t = 0; t < T; t++) {
    long e = t * small, k = t * s.C, f = t * large;
#define POOL_VJP(c, V, n) pool_vjp_tile(ga + e, gm + k, gv + k, g + (shared ? 0 : k), y + f, a + e, p + e, index + e, mean + k, var + k, gy + f, gg + k, gb + k, s, eps, slope, c, V, n)
    RANGE(first, end, POOL_VJP)
  }
}
// x [T,B H W,K] @ w [T or 1,K,O], pooled -> a after the activation, and which of the 4 (index)
INLINE void affine_pool_tile(const float *x, long K, long W, const float *w, float *a,
                             uint8_t *index, long O, float slope, long c, int V, int n) {
  vec sum[4][WIDE];
  UNROLL for (int q = 0; q < 4; q++) EACH sum[q][v] = (vec){0};
  for (long k = 0; k < K; k++) EACH {
    vec b = load(w + k * O + c + v * LANES, n);
    UNROLL for (int q = 0; q < 4; q++) sum[q][v] += x[(q / 2 * W + q % 2) * K + k] * b;
  }
  EACH {
    ivec at = {0};
    UNROLL for (int q = 1; q < 4; q++) larger(sum[q][v], q, &sum[0][v], &at);
    store(a + c + v * LANES, masked(sum[0][v], sum[0][v], slope), n);
    store_index(index + c + v * LANES, at, n);
  }
}
void affine_pool(const float *x, const float *w, float *a, uint8_t *index, long T, int shared,
                 shape s, float slope) {
  long h = s.H / 2, wide = s.W / 2, K = s.C, O = s.O;
  for (long t = 0; t < T; t++) for (long i = 0; i < s.B * h; i++) for (long j = 0; j < wide; j++) {
    const float *from = x + (((t * s.B + i / h) * s.H + i % h * 2) * s.W + 2 * j) * K;
#define AFFINE_POOL(c, V, n) affine_pool_tile(from, K, s.W, w + (shared ? 0 : t * K * O), a, index, O, slope, c, V, n)
    TILES(O, AFFINE_POOL)
    a += O; index += O;
  }
}
// gw [T or 1,K,O] = x^T (g where the pooling took its value, masked by the activation's output a)
INLINE void pool_weight_tile(int R, const float *x, const float *g, const float *a,
                             const uint8_t *index, shape s, long first, long count, float *gw,
                             float slope, long c, int V, int n) {
  long h = s.H / 2, w = s.W / 2, O = s.O;
  vec sum[DEEP][2];
  UNROLL for (int r = 0; r < R; r++) EACH sum[r][v] = (vec){0};
  for (long i = first; i < first + count; i++) {
    const float *from = x + ((i / w / h * s.H + i / w % h * 2) * s.W + i % w * 2) * s.C;
    EACH {
      long e = i * O + c + v * LANES;
      vec m = masked(load(g + e, n), load(a + e, n), slope), zero = {0};
      ivec k = load_index(index + e, n);
      UNROLL for (int q = 0; q < 4; q++) {
        vec own = where(k == q, m, zero);
        UNROLL for (int r = 0; r < R; r++) sum[r][v] += from[(q / 2 * s.W + q % 2) * s.C + r] * own;
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) EACH {
    float *p = gw + r * O + c + v * LANES;
    store(p, load(p, n) + sum[r][v], n);
  }
}
void affine_pool_weight(const float *x, const float *g, const float *a, const uint8_t *index,
                        float *gw, long T, int shared, shape s, float slope) {
  long h = s.H / 2, w = s.W / 2, K = s.C, O = s.O, M = s.B * h * w;
  memset(gw, 0, (shared ? 1 : T) * K * O * sizeof(float));
  for (long t = 0; t < T; t++) for (long i = 0; i < M; i += BLOCK) {
    const float *from = x + t * s.B * s.H * s.W * K;
    float *to = gw + (shared ? 0 : t * K * O);
    long m = smaller(M - i, BLOCK), k = 0, e = t * M * O;
#undef WEIGHT
#define WEIGHT(R, c, V, n) pool_weight_tile(R, from + k, g + e, a + e, index + e, s, i, m, to + k * O, slope, c, V, n)
    for (; k + DEEP <= K; k += DEEP) { WEIGHTS(DEEP) }
    for (; k < K; k++) { WEIGHTS(1) }
  }
}

// x [N,H,W,C] -> y [N,H/s,W/s,K K C + 1]: the K x K surroundings of each output, and a 1
void patches(const float *x, float *y, shape s) {
  long ho = out_size(s.H, s.stride), wo = out_size(s.W, s.stride), pad = s.K / 2;
  for (long b = 0; b < s.B; b++) for (long i = 0; i < ho; i++) for (long j = 0; j < wo; j++) {
    long left = s.stride * j - pad, first = left < 0 ? -left : 0, last = smaller(s.K, s.W - left);
    for (long ky = 0; ky < s.K; ky++, y += s.K * s.C) {
      long u = s.stride * i + ky - pad;
      int inside = u >= 0 && u < s.H;
      const float *from = x + ((b * s.H + u) * s.W + left) * s.C;
      for (long c = 0; c < s.K * s.C; c++)
        y[c] = inside && c >= first * s.C && c < last * s.C ? from[c] : 0;
    }
    *y++ = 1;
  }
}
// x [T,M,K] -> mean [T,K] and covariance [T,K,K], in float64
typedef double dvec __attribute__((vector_size(4 * LANES)));
#define HALF (LANES / 2)
int moments(const float *x, double *mean, double *cov, long T, long M, long K) {
  long P = (K + 7) / 8 * 8;
  double *sums = malloc((P + BLOCK) * P * sizeof(double)), *part = sums + P * P;
  if (!sums) return 1;
  for (long t = 0; t < T; t++, mean += K, cov += K * K) {
    const float *from = x + t * M * K;
    for (long k = 0; k < P; k++) sums[k] = 0;
    for (long i = 0; i < M; i++) for (long k = 0; k < K; k++) sums[k] += from[i * K + k];
    for (long k = 0; k < K; k++) mean[k] = sums[k] / M;
    memset(sums, 0, (P + BLOCK) * P * sizeof(double));
    for (long i0 = 0; i0 < M; i0 += BLOCK) {
      long m = smaller(M - i0, BLOCK);
      for (long i = 0; i < m; i++)
        for (long k = 0; k < K; k++) part[i * P + k] = from[(i0 + i) * K + k] - mean[k];
      for (long k = 0; k < K; k += 4) for (long l = k / HALF * HALF; l < P; l += HALF) {
        dvec s[4] = {{0}, {0}, {0}, {0}}, row;
        for (long i = 0; i < m; i++) {
          memcpy(&row, part + i * P + l, sizeof row);
          UNROLL for (int q = 0; q < 4; q++) s[q] += part[i * P + k + q] * row;
        }
        UNROLL for (int q = 0; q < 4; q++) {
          memcpy(&row, sums + (k + q) * P + l, sizeof row);
          row += s[q];
          memcpy(sums + (k + q) * P + l, &row, sizeof row);
        }
      }
    }
    for (long k = 0; k < K; k++) for (long l = k; l < K; l++)
      cov[k * K + l] = cov[l * K + k] = sums[k * P + l] / M;
  }
  free(sums);
  return 0;
}
