// Normalisation with activation, its derivatives, and the same with max-pooling.
#include "kernels.h"

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
