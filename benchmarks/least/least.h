/* The least that a kernel does: the loads, stores and arithmetic that a formula asks for, and
 * nothing of what makes one fit for use.
 *
 * Sums are taken about 0 in float32 with fused multiply-adds, in whatever order is fastest: they
 * lose everything where a mean is large. No other element type, stride, mask or level; nothing is
 * checked. A set is mapped while it is in cache, as in fastnorm. A loop order is a file, of which
 * least.c picks one. Built for AVX-512 by least.py. */
#ifndef LEAST_H
#define LEAST_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

typedef __m512 vec;
#define INLINE static inline __attribute__((always_inline))
#define ALL 0xffff
enum { W = 16, STRIP = 4, BLOCK = 16, ROWS = 4 };

/* x[b, o, g, k, i, s], as in geometry.py. Parameters have g*k values, mean and rstd b*g*s. */
typedef struct {
    int64_t b, o, g, k, i, s;
    const float *x, *dy;
    float *y;
    const float *weight, *bias;
    float *mean, *rstd;
    float *dweight, *dbias;
    int backward, has_mean, stream, threads;
    int together; /* rows: ROWS or 1, whichever is faster */
} task;

INLINE __mmask16 below(int64_t n) { return n >= W ? ALL : (__mmask16)((1 << n) - 1); }
INLINE vec load(const float *x, __mmask16 m)
{
    return m == ALL ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(m, x);
}
INLINE void store(float *y, vec v, __mmask16 m, int stream)
{
    if (m != ALL)
        _mm512_mask_storeu_ps(y, m, v);
    else if (stream)
        _mm512_stream_ps(y, v);
    else
        _mm512_storeu_ps(y, v);
}
INLINE vec splat(float v) { return _mm512_set1_ps(v); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* One call of body(place, mask) for each vector of n values, the last perhaps a part. */
#define EACH_VECTOR(n, body)                              \
    do {                                                  \
        int64_t p_ = 0;                                   \
        for (; p_ + W <= (n); p_ += W) body(p_, ALL);     \
        if (p_ < (n)) body(p_, below((n) - p_));          \
    } while (0)

/* call(dy, stream) with what the compiler may then leave out. */
#define OF_EACH_KIND(t, dy, call)        \
    do {                                 \
        if ((t)->backward && (t)->stream) \
            call(dy, 1);                 \
        else if ((t)->backward)          \
            call(dy, 0);                 \
        else if ((t)->stream)            \
            call(NULL, 1);               \
        else                             \
            call(NULL, 0);               \
    } while (0)

/* Of dx = dy*w*rstd + x*a + c, from the sums of dy*w and dy*w*x. */
INLINE void backward_terms(const task *t, float s, float q, float mean, float rstd, double count,
                           float *a, float *c)
{
    const double dot = (q - (double)mean * s) * rstd / count;
    *a = (float)(-dot * rstd * rstd);
    *c = (float)((t->has_mean ? -s / count * rstd : 0) - *a * (double)mean);
}

INLINE void found(const task *t, int64_t set, double s, double q, double count)
{
    const double mean = t->has_mean ? s / count : 0;
    t->mean[set] = (float)mean;
    t->rstd[set] = (float)(1 / __builtin_sqrt(q / count - mean * mean + 1e-5));
}

/* 0 of columns: not written for such a shape. */
void least_runs(const task *t);
void least_rows(const task *t);
int least_columns(const task *t);
void least_across(const task *t);

#endif
