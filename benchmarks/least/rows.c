/* A set is one run with a weight for each place. */
#include "least.h"

INLINE __m256 halves(vec v)
{
    return _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
}

/* The sums of four vectors. */
INLINE __m128 fold_four(const vec *v)
{
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(halves(v[0]), halves(v[1])),
                                    _mm256_hadd_ps(halves(v[2]), halves(v[3])));
    return _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
}

INLINE void rows_forward(const task *t, int64_t row, int rows, const int has_mean, const int stream)
{
    const int64_t n = t->k;
    const float *x = t->x + row * n;
    const __m128 count = _mm_set1_ps((float)n);
    float *y = t->y + row * n, scale[ROWS], shift[ROWS];
    vec s[ROWS], q[ROWS], sc[ROWS], sh[ROWS];
    for (int r = 0; r < ROWS; r++) s[r] = q[r] = splat(0);
#define SUM(p, m)                               \
    for (int r = 0; r < rows; r++) {            \
        const vec a = load(x + r * n + p, m);   \
        if (has_mean) s[r] += a;                \
        q[r] = fma_(a, a, q[r]);                \
    }
    if (rows == 1) { /* in four parts, so that no sum waits for another */
        int64_t p = 0;
        for (; p + ROWS * W <= n; p += ROWS * W)
            for (int v = 0; v < ROWS; v++) {
                const vec a = load(x + p + v * W, ALL);
                if (has_mean) s[v] += a;
                q[v] = fma_(a, a, q[v]);
            }
        for (; p < n; p += W) {
            const vec a = load(x + p, below(n - p));
            if (has_mean) s[0] += a;
            q[0] = fma_(a, a, q[0]);
        }
        s[0] = (s[0] + s[1]) + (s[2] + s[3]);
        q[0] = (q[0] + q[1]) + (q[2] + q[3]);
    } else {
        EACH_VECTOR(n, SUM);
    }
#undef SUM
    const __m128 mean = has_mean ? (__m128)(fold_four(s) / count) : _mm_setzero_ps();
    const __m128 rstd = _mm_set1_ps(1) /
                        _mm_sqrt_ps(fold_four(q) / count - mean * mean + _mm_set1_ps(1e-5f));
    _mm_storeu_ps(scale, rstd);
    _mm_storeu_ps(shift, -mean * rstd);
    for (int r = 0; r < rows; r++) {
        t->mean[row + r] = mean[r], t->rstd[row + r] = rstd[r];
        sc[r] = splat(scale[r]), sh[r] = splat(shift[r]);
    }
#define MAP(p, m)                                                             \
    {                                                                         \
        const vec w = load(t->weight + p, m);                                 \
        const vec b = has_mean ? load(t->bias + p, m) : splat(0);             \
        for (int r = 0; r < rows; r++) {                                      \
            const vec a = load(x + r * n + p, m);                             \
            const vec v = has_mean ? fma_(fma_(a, sc[r], sh[r]), w, b)        \
                                   : (vec)(a * sc[r] * w);                    \
            store(y + r * n + p, v, m, stream);                               \
        }                                                                     \
    }
    EACH_VECTOR(n, MAP);
#undef MAP
}

INLINE void rows_backward(const task *t, int64_t row, int rows, float *dweight, float *dbias,
                          const int has_mean, const int stream)
{
    const int64_t n = t->k;
    const float *x = t->x + row * n, *dy = t->dy + row * n;
    float *y = t->y + row * n;
    vec s[ROWS], q[ROWS], rstd[ROWS], shift[ROWS], va[ROWS], vc[ROWS];
    for (int r = 0; r < ROWS; r++) s[r] = q[r] = splat(0);
    for (int r = 0; r < rows; r++) {
        rstd[r] = splat(t->rstd[row + r]);
        shift[r] = splat(-t->mean[row + r] * t->rstd[row + r]);
    }
#define SUM(p, m)                                                                   \
    {                                                                               \
        const vec w = load(t->weight + p, m);                                       \
        vec dw = load(dweight + p, m), db = has_mean ? load(dbias + p, m) : w;   \
        for (int r = 0; r < rows; r++) {                                            \
            const vec a = load(x + r * n + p, m), d = load(dy + r * n + p, m);      \
            const vec dot = d * (has_mean ? fma_(a, rstd[r], shift[r]) : (vec)(a * rstd[r])); \
            dw += dot;                                                              \
            if (has_mean) db += d, s[r] = fma_(d, w, s[r]);                      \
            q[r] = fma_(dot, w, q[r]);                                              \
        }                                                                           \
        store(dweight + p, dw, m, 0);                                               \
        if (has_mean) store(dbias + p, db, m, 0);                                \
    }
    EACH_VECTOR(n, SUM);
#undef SUM
    const __m128 count = _mm_set1_ps((float)n), sum = fold_four(s) / count;
    const __m128 dot = fold_four(q) / count;
    for (int r = 0; r < rows; r++) {
        const float scale = t->rstd[row + r], a = -dot[r] * scale * scale;
        va[r] = splat(a);
        vc[r] = splat((has_mean ? -sum[r] * scale : 0) - a * t->mean[row + r]);
    }
#define MAP(p, m)                                                                      \
    {                                                                                  \
        const vec w = load(t->weight + p, m);                                          \
        for (int r = 0; r < rows; r++) {                                               \
            const vec rest = fma_(load(x + r * n + p, m), va[r], vc[r]);               \
            store(y + r * n + p, fma_(load(dy + r * n + p, m) * w, rstd[r], rest), m,  \
                  stream);                                                          \
        }                                                                              \
    }
    EACH_VECTOR(n, MAP);
#undef MAP
}

/* Rows [row, row + rows), which is 1 or ROWS. */
INLINE void some_rows(const task *t, int64_t row, int rows, float *sums, const int has_mean)
{
#define ROWS_OF(dy, stream)                                                  \
    if (dy)                                                                  \
        rows_backward(t, row, rows, sums, sums + t->k, has_mean, stream);    \
    else                                                                     \
        rows_forward(t, row, rows, has_mean, stream)
    OF_EACH_KIND(t, t->dy, ROWS_OF);
#undef ROWS_OF
}

void least_rows(const task *t)
{
#pragma omp parallel num_threads(t->threads)
    {
        float *sums = calloc((size_t)(2 * t->k), sizeof *sums);
#pragma omp for schedule(static)
        for (int64_t four = 0; four < (t->b + ROWS - 1) / ROWS; four++) {
            const int64_t row = four * ROWS, stop = least_of(t->b, row + ROWS);
            if (t->together == ROWS && stop == row + ROWS && t->has_mean)
                some_rows(t, row, ROWS, sums, 1);
            else if (t->together == ROWS && stop == row + ROWS)
                some_rows(t, row, ROWS, sums, 0);
            else if (t->has_mean)
                for (int64_t r = row; r < stop; r++) some_rows(t, r, 1, sums, 1);
            else
                for (int64_t r = row; r < stop; r++) some_rows(t, r, 1, sums, 0);
        }
        if (t->backward) {
#pragma omp critical
            for (int64_t at = 0; at < t->k; at++) {
                t->dweight[at] += sums[at];
                t->dbias[at] += sums[t->k + at];
            }
        }
        free(sums);
    }
}
