// The first block, a product with constant patches, also with max-pooling.
#include "kernels.h"

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
