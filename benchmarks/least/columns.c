/* Neighbours belong to neighbouring channels. */
#include "least.h"

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

int least_columns(const task *t)
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
