/* Sets of contiguous runs. */
#include "least.h"

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

void least_runs(const task *t)
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
