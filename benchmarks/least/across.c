/* Neighbours belong to neighbouring sets. */
#include "least.h"

INLINE void across_forward(const task *t, int64_t b, int64_t at, int vectors,
                           const __mmask16 tail, const int stream)
{
    const float *x = t->x + b * t->k * t->s + at;
    float *y = t->y + b * t->k * t->s + at;
    vec s[STRIP], q[STRIP];
    for (int v = 0; v < vectors; v++) s[v] = q[v] = splat(0);
    for (int64_t k = 0; k < t->k; k++)
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = v < vectors - 1 ? ALL : tail;
            const vec a = load(x + k * t->s + v * W, m);
            s[v] += a;
            q[v] = fma_(a, a, q[v]);
        }
    for (int v = 0; v < vectors; v++) {
        const __mmask16 m = v < vectors - 1 ? ALL : tail;
        const vec mean = s[v] / splat((float)t->k);
        const vec var = q[v] / splat((float)t->k) - mean * mean;
        const vec rstd = splat(1) / _mm512_sqrt_ps(var + splat(1e-5f));
        store(t->mean + b * t->s + at + v * W, mean, m, 0);
        store(t->rstd + b * t->s + at + v * W, rstd, m, 0);
        q[v] = rstd, s[v] = -mean * rstd;
    }
    for (int64_t k = 0; k < t->k; k++) {
        const vec w = splat(t->weight[k]), c = splat(t->bias[k]);
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = v < vectors - 1 ? ALL : tail;
            const vec a = load(x + k * t->s + v * W, m);
            store(y + k * t->s + v * W, fma_(fma_(a, q[v], s[v]), w, c), m, stream);
        }
    }
}

INLINE void across_backward(const task *t, int64_t b, int64_t at, int vectors, vec *sums,
                            const __mmask16 tail, const int stream)
{
    const float *x = t->x + b * t->k * t->s + at, *dy = t->dy + b * t->k * t->s + at;
    float *y = t->y + b * t->k * t->s + at;
    vec s[STRIP], q[STRIP], rstd[STRIP], shift[STRIP];
    for (int v = 0; v < vectors; v++) {
        const __mmask16 m = v < vectors - 1 ? ALL : tail;
        s[v] = q[v] = splat(0);
        rstd[v] = load(t->rstd + b * t->s + at + v * W, m);
        shift[v] = -load(t->mean + b * t->s + at + v * W, m) * rstd[v];
    }
    for (int64_t k = 0; k < t->k; k++) {
        const vec w = splat(t->weight[k]);
        vec dw = sums[2 * k], db = sums[2 * k + 1];
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = v < vectors - 1 ? ALL : tail;
            const vec d = load(dy + k * t->s + v * W, m);
            const vec dot = d * fma_(load(x + k * t->s + v * W, m), rstd[v], shift[v]);
            db += d, dw += dot;
            s[v] = fma_(d, w, s[v]);
            q[v] = fma_(dot, w, q[v]);
        }
        sums[2 * k] = dw, sums[2 * k + 1] = db;
    }
    for (int v = 0; v < vectors; v++) {
        const vec dot = q[v] / splat((float)t->k) * -rstd[v];
        s[v] = fma_(shift[v], dot, s[v] / splat(-(float)t->k) * rstd[v]);
        q[v] = dot * rstd[v];
    }
    for (int64_t k = 0; k < t->k; k++) {
        const vec w = splat(t->weight[k]);
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = v < vectors - 1 ? ALL : tail;
            const vec d = load(dy + k * t->s + v * W, m);
            const vec rest = fma_(load(x + k * t->s + v * W, m), q[v], s[v]);
            store(y + k * t->s + v * W, fma_(d * w, rstd[v], rest), m, stream);
        }
    }
}

/* Places [at, at + n) of a sample; whole vectors are told apart. */
static void across_strip(const task *t, int64_t b, int64_t at, int64_t n, vec *sums)
{
    const int vectors = (int)((n + W - 1) / W);
    const __mmask16 tail = below(n - (vectors - 1) * W);
#define PLACES(v, tail, stream)                                 \
    if (t->backward)                                            \
        across_backward(t, b, at, v, sums, tail, stream);       \
    else                                                        \
        across_forward(t, b, at, v, tail, stream)
#define STRIP_OF(v)                    \
    case v:                            \
        if (tail == ALL && t->stream) { \
            PLACES(v, ALL, 1);         \
        } else if (tail == ALL) {      \
            PLACES(v, ALL, 0);         \
        } else {                       \
            PLACES(v, tail, 0);        \
        }                              \
        break
    switch (vectors) {
        STRIP_OF(1);
        STRIP_OF(2);
        STRIP_OF(3);
        STRIP_OF(4);
    }
}

void least_across(const task *t)
{
    const int64_t blocks = (t->s + STRIP * W - 1) / (STRIP * W);
#pragma omp parallel num_threads(t->threads)
    {
        vec *sums = t->backward ? aligned_alloc(64, (size_t)(2 * t->k) * sizeof *sums) : NULL;
        for (int64_t at = 0; t->backward && at < 2 * t->k; at++) sums[at] = splat(0);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < t->b * blocks; unit++) {
            const int64_t b = unit / blocks, at = unit % blocks * STRIP * W;
            const int64_t n = least_of(STRIP * W, t->s - at);
            across_strip(t, b, at, n, sums);
        }
        if (t->backward) {
#pragma omp critical
            for (int64_t k = 0; k < t->k; k++) {
                t->dweight[k] += _mm512_reduce_add_ps(sums[2 * k]);
                t->dbias[k] += _mm512_reduce_add_ps(sums[2 * k + 1]);
            }
            free(sums);
        }
    }
}
