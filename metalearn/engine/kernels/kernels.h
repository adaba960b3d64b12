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

// A convolution with K x K filters, padding K / 2.
typedef struct { long B, H, W, C, O, K, stride; } shape;
static inline long out_size(long size, long stride) { return (size + stride - 1) / stride; }
static inline long smaller(long a, long b) { return a < b ? a : b; }

#pragma GCC visibility push(hidden)
// convolutions.c
void all_rows(int m, const float *const *a, long K, const float *b, long ldb, float *const *y, int fresh);
void all_columns(const float *const *a, long C, const float *const *b, int count, float *g, long O);
void transpose(const float *w, float *to, long C, long O);
// winograd.c
int is_tiled(const shape *s);
int convolve_tiles(const float *x, const float *w, float *y, long T, int shared, shape s, int forward);
int weight_tiles(const float *x, const float *gy, float *gw, long T, int shared, shape s);
#pragma GCC visibility pop

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
