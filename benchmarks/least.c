/* The least that a kernel does: the loads, stores and arithmetic that a formula asks for, and
 * nothing of what makes one fit for use.
 *
 * Sums are taken about 0 in float32 with fused multiply-adds, in whatever order is fastest: they
 * lose everything where a mean is large. No other element type, stride, mask or level; nothing is
 * checked. A set is mapped while it is in cache, as in fastnorm. Built for AVX-512 by least.py.
 */
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

/* ---- runs: sets of contiguous runs --------------------------------------------------------- */

/* sums += of x and x*x, or of dy and dy*x, over a run. */
INLINE void sum_run(const float *x, const float *dy, int64_t n, float *sums)
{
    vec s[STRIP], q[STRIP];
    int64_t p = 0;
    for (int v = 0; v < STRIP; v++) s[v] = q[v] = splat(0);
    for (; p + STRIP * W <= n; p += STRIP * W)
        for (int v = 0; v < STRIP; v++) {
            const vec a = load(x + p + v * W, ALL), d = dy ? load(dy + p + v * W, ALL) : a;
            s[v] += d;
            q[v] = fma_(d, a, q[v]);
        }
    for (; p < n; p += W) {
        const __mmask16 m = below(n - p);
        const vec a = load(x + p, m), d = dy ? load(dy + p, m) : a;
        s[0] += d;
        q[0] = fma_(d, a, q[0]);
    }
    sums[0] += _mm512_reduce_add_ps((s[0] + s[1]) + (s[2] + s[3]));
    sums[1] += _mm512_reduce_add_ps((q[0] + q[1]) + (q[2] + q[3]));
}

/* y = x*a + c, or dy*d + x*a + c. */
INLINE void map_run(const float *x, const float *dy, float *y, int64_t n, float d, float a, float c,
                    const int stream)
{
    const vec vd = splat(d), va = splat(a), vc = splat(c);
#define MAP(p, m) \
    store(y + p, dy ? fma_(load(dy + p, m), vd, fma_(load(x + p, m), va, vc)) \
                    : fma_(load(x + p, m), va, vc), m, stream)
    EACH_VECTOR(n, MAP);
#undef MAP
}

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

/* Runs [r0, r1) of o of a set: their part of sums[2*k]. */
INLINE void set_sums(const task *t, int64_t b, int64_t g, int64_t r0, int64_t r1, float *sums)
{
    const int64_t channels = t->backward ? t->k : 1, n = t->k * t->i / channels;
    for (int64_t r = r0; r < r1; r++)
        for (int64_t c = 0; c < channels; c++) {
            const int64_t at = ((b * t->o + r) * t->g + g) * t->k * t->i + c * t->i;
            if (t->backward)
                sum_run(t->x + at, t->dy + at, n, sums + 2 * c);
            else
                sum_run(t->x + at, NULL, n, sums);
        }
}

INLINE void set_map(const task *t, int64_t b, int64_t g, int64_t r0, int64_t r1, const float *sums)
{
    const int64_t set = b * t->g + g;
    const double count = (double)(t->o * t->k * t->i);
    float a = 0, c = 0, s = 0, q = 0;
    if (t->backward) {
        for (int64_t k = 0; k < t->k; k++) {
            s += sums[2 * k] * t->weight[g * t->k + k];
            q += sums[2 * k + 1] * t->weight[g * t->k + k];
        }
        backward_terms(t, s, q, t->mean[set], t->rstd[set], count, &a, &c);
    } else {
        found(t, set, sums[0], sums[1], count);
    }
    for (int64_t r = r1 - 1; r >= r0; r--)
        for (int64_t k = 0; k < t->k; k++) {
            const int64_t at = ((b * t->o + r) * t->g + g) * t->k * t->i + k * t->i;
            const float scale = t->rstd[set] * t->weight[g * t->k + k];
            const float shift = t->backward ? c : t->bias[g * t->k + k] - t->mean[set] * scale;
            const float of_x = t->backward ? a : scale;
#define MAP(dy, stream) map_run(t->x + at, dy, t->y + at, t->i, scale, of_x, shift, stream)
            OF_EACH_KIND(t, t->dy + at, MAP);
#undef MAP
        }
}

static void add_parameters(const task *t, int64_t b, int64_t g, const float *sums)
{
    const int64_t set = b * t->g + g;
    for (int64_t k = 0; k < t->k; k++) {
#pragma omp atomic
        t->dbias[g * t->k + k] += sums[2 * k];
#pragma omp atomic
        t->dweight[g * t->k + k] += (sums[2 * k + 1] - t->mean[set] * sums[2 * k]) * t->rstd[set];
    }
}

static void runs(const task *t)
{
    const int64_t sets = t->b * t->g, width = 2 * (t->backward ? t->k : 1);
    if (sets < 16) { /* each thread a part of every set */
        float *parts = calloc((size_t)(sets * width * t->threads), sizeof *parts);
#pragma omp parallel for num_threads(t->threads) schedule(static, 1)
        for (int64_t part = 0; part < t->threads; part++)
            for (int64_t set = 0; set < sets; set++)
                set_sums(t, set / t->g, set % t->g, t->o * part / t->threads,
                         t->o * (part + 1) / t->threads, parts + (part * sets + set) * width);
        for (int64_t at = 0; at < sets * width; at++)
            for (int64_t part = 1; part < t->threads; part++)
                parts[at] += parts[part * sets * width + at];
        for (int64_t set = 0; t->backward && set < sets; set++)
            add_parameters(t, set / t->g, set % t->g, parts + set * width);
#pragma omp parallel for num_threads(t->threads) schedule(static, 1)
        for (int64_t part = 0; part < t->threads; part++)
            for (int64_t set = sets - 1; set >= 0; set--)
                set_map(t, set / t->g, set % t->g, t->o * part / t->threads,
                        t->o * (part + 1) / t->threads, parts + set * width);
        free(parts);
        return;
    }
#pragma omp parallel for num_threads(t->threads) schedule(static)
    for (int64_t set = 0; set < sets; set++) {
        float sums[width];
        for (int64_t at = 0; at < width; at++) sums[at] = 0;
        set_sums(t, set / t->g, set % t->g, 0, t->o, sums);
        set_map(t, set / t->g, set % t->g, 0, t->o, sums);
        if (t->backward) add_parameters(t, set / t->g, set % t->g, sums);
    }
}

/* ---- rows: a set is one run with a weight for each place ----------------------------------- */

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

static void rows(const task *t)
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

/* ---- columns: neighbours belong to neighbouring channels ----------------------------------- */

INLINE void sum_strip(const float *x, const float *dy, int64_t rows, int64_t stride, float *s,
                      float *q, int vectors)
{
    vec vs[STRIP], vq[STRIP];
    for (int v = 0; v < vectors; v++) vs[v] = load(s + v * W, ALL), vq[v] = load(q + v * W, ALL);
    for (int64_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const vec a = load(x + r * stride + v * W, ALL);
            const vec d = dy ? load(dy + r * stride + v * W, ALL) : a;
            vs[v] += d;
            vq[v] = fma_(d, a, vq[v]);
        }
    for (int v = 0; v < vectors; v++) {
        store(s + v * W, vs[v], ALL, 0);
        store(q + v * W, vq[v], ALL, 0);
    }
}

INLINE void map_strip(const float *x, const float *dy, float *y, int64_t rows, int64_t stride,
                      const float *d, const float *a, const float *c, const int stream, int vectors)
{
    vec vd[STRIP], va[STRIP], vc[STRIP];
    for (int v = 0; v < vectors; v++) {
        vd[v] = dy ? load(d + v * W, ALL) : splat(0);
        va[v] = load(a + v * W, ALL), vc[v] = load(c + v * W, ALL);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const vec rest = fma_(load(x + r * stride + v * W, ALL), va[v], vc[v]);
            store(y + r * stride + v * W,
                  dy ? fma_(load(dy + r * stride + v * W, ALL), vd[v], rest) : rest, ALL, stream);
        }
}

/* `width` values, whole vectors, of each row; s and q, or d, a and c, have as many. */
#define STRIPS(call)                                                  \
    for (int64_t r = 0; r < rows; r += BLOCK) {                       \
        const int64_t some = least_of(BLOCK, rows - r);               \
        for (int64_t at = 0; at < width; at += STRIP * W) {           \
            const int64_t here = r * width + at;                      \
            switch (least_of(STRIP, (width - at) / W)) {              \
            case 1: call(1); break;                                   \
            case 2: call(2); break;                                   \
            case 3: call(3); break;                                   \
            default: call(4);                                         \
            }                                                         \
        }                                                             \
    }

INLINE void sum_columns(const float *x, const float *dy, int64_t rows, int64_t width, float *s,
                        float *q)
{
#define SUM(v) sum_strip(x + here, dy ? dy + here : NULL, some, width, s + at, q + at, v)
    STRIPS(SUM)
#undef SUM
}

INLINE void map_columns(const float *x, const float *dy, float *y, int64_t rows, int64_t width,
                        const float *d, const float *a, const float *c, const int stream)
{
#define MAP(v)                                                                                 \
    map_strip(x + here, dy ? dy + here : NULL, y + here, some, width, d + at, a + at, c + at, \
              stream, v)
    STRIPS(MAP)
#undef MAP
}

/* Rows [from, to) of sample b: sums of `repeat` rows side by side, folded to s and q. */
static void part_sums(const task *t, int64_t from, int64_t to, int64_t repeat, float *s, float *q)
{
    const int64_t columns = t->g * t->k, width = columns * repeat, rows = (to - from) / repeat;
    const float *x = t->x + from * columns;
    float *wide = repeat == 1 ? s : calloc((size_t)(2 * width), sizeof *wide);
    float *wide_q = repeat == 1 ? q : wide + width;
    if (t->backward)
        sum_columns(x, t->dy + from * columns, rows, width, wide, wide_q);
    else
        sum_columns(x, NULL, rows, width, wide, wide_q);
    if (repeat == 1) return;
    for (int64_t at = 0; at < width; at++) {
        s[at % columns] += wide[at];
        q[at % columns] += wide_q[at];
    }
    free(wide);
}

/* d, a, c of every column from sums s, q; the gradients of the parameters. */
static void column_terms(const task *t, int64_t b, int64_t repeat, const float *s, const float *q,
                         float *d, float *a, float *c, int parameters)
{
    const int64_t columns = t->g * t->k;
    const double count = (double)(t->o * t->k);
    for (int64_t g = 0; g < t->g; g++) {
        const int64_t set = b * t->g + g;
        double total = 0, total_q = 0;
        float scale = 0, shift = 0;
        for (int64_t at = g * t->k; at < (g + 1) * t->k; at++) {
            total += t->backward ? s[at] * t->weight[at] : s[at];
            total_q += t->backward ? q[at] * t->weight[at] : q[at];
        }
        if (t->backward)
            backward_terms(t, (float)total, (float)total_q, t->mean[set], t->rstd[set], count,
                           &scale, &shift);
        else
            found(t, set, total, total_q, count);
        for (int64_t at = g * t->k; at < (g + 1) * t->k; at++) {
            const float mean = t->mean[set], rstd = t->rstd[set];
            d[at] = rstd * t->weight[at];
            a[at] = t->backward ? scale : d[at];
            c[at] = t->backward ? shift : t->bias[at] - mean * d[at];
            if (t->backward && parameters) {
#pragma omp atomic
                t->dbias[at] += s[at];
#pragma omp atomic
                t->dweight[at] += (q[at] - mean * s[at]) * rstd;
            }
        }
    }
    for (int64_t at = columns; at < columns * repeat; at++)
        d[at] = d[at - columns], a[at] = a[at - columns], c[at] = c[at - columns];
}

static void part_map(const task *t, int64_t from, int64_t to, int64_t repeat, const float *d,
                     const float *a, const float *c)
{
    const int64_t columns = t->g * t->k, chunk = 256 * repeat;
    /* From the end, which the sums have left in cache. */
    for (int64_t stop = to; stop > from; stop -= least_of(chunk, stop - from)) {
        const int64_t start = stop - least_of(chunk, stop - from), at = start * columns;
        const int64_t rows = (stop - start) / repeat, width = columns * repeat;
#define MAP(dy, stream) map_columns(t->x + at, dy, t->y + at, rows, width, d, a, c, stream)
        OF_EACH_KIND(t, t->dy + at, MAP);
#undef MAP
    }
}

static int columns(const task *t)
{
    const int64_t columns = t->g * t->k, repeat = columns % W ? W : 1;
    const int64_t parts = t->b >= t->threads ? 1 : t->threads, steps = t->o / repeat;
    if (t->o % repeat) return 0;
    float *sums = calloc((size_t)(2 * columns * t->b * parts), sizeof *sums);
#pragma omp parallel num_threads(t->threads)
    {
        float *d = malloc((size_t)(3 * columns * repeat) * sizeof *d);
        float *a = d + columns * repeat, *c = a + columns * repeat;
#pragma omp for schedule(static, 1)
        for (int64_t unit = 0; unit < t->b * parts; unit++) {
            const int64_t b = unit / parts, part = unit % parts;
            float *s = sums + unit * 2 * columns;
            part_sums(t, b * t->o + steps * part / parts * repeat,
                      b * t->o + steps * (part + 1) / parts * repeat, repeat, s, s + columns);
            if (parts == 1) {
                column_terms(t, b, repeat, s, s + columns, d, a, c, 1);
                part_map(t, b * t->o, (b + 1) * t->o, repeat, d, a, c);
            }
        }
        if (parts > 1) {
#pragma omp single
            for (int64_t unit = 0; unit < t->b * parts; unit++)
                for (int64_t at = 0; unit % parts && at < 2 * columns; at++)
                    sums[(unit - unit % parts) * 2 * columns + at] += sums[unit * 2 * columns + at];
#pragma omp for schedule(static, 1)
            for (int64_t unit = 0; unit < t->b * parts; unit++) {
                const int64_t b = unit / parts, part = unit % parts;
                const float *s = sums + b * parts * 2 * columns;
                column_terms(t, b, repeat, s, s + columns, d, a, c, part == 0);
                part_map(t, b * t->o + steps * part / parts * repeat,
                         b * t->o + steps * (part + 1) / parts * repeat, repeat, d, a, c);
            }
        }
        free(d);
    }
    free(sums);
    return 1;
}

/* ---- across: neighbours belong to neighbouring sets ---------------------------------------- */

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

static void across(const task *t)
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

/* 1, or 0 where it was not written for such a shape. */
int least(const task *t)
{
    int done = 1;
    for (int64_t at = 0; t->backward && at < t->g * t->k; at++) t->dweight[at] = t->dbias[at] = 0;
    if (t->stream && (t->s > 1 ? t->s : t->i > 1 ? t->i : t->g * t->k) % W) return 0;
    if (t->s > 1)
        across(t);
    else if (t->o == 1 && t->i == 1)
        rows(t);
    else if (t->i > 1)
        runs(t);
    else
        done = columns(t);
    _mm_sfence();
    return done;
}
