/* Sums folded, from lanes to eight and from eight to one double, in an order that no vector width
 * changes: a part of words.h. */
#ifndef FASTNORM_FOLD_H
#define FASTNORM_FOLD_H

enum { FN_ROWS = 8 };

/* Eight doubles, and eight of the working type: passed by pointers, since a vector that is returned
 * has a calling convention for each level. */
#if defined(__AVX512F__)
typedef double eight __attribute__((vector_size(64)));
typedef work eight_work __attribute__((vector_size(8 * sizeof(work))));

static inline void add_eight(eight *sum, const eight *v) { *sum += *v; }

/* wide = v. */
static inline void widen_eight(eight *wide, const eight_work *v)
{
#if defined(FN_TYPE_float64)
    *wide = *v;
#else
    *wide = (eight)_mm512_cvtps_pd((__m256)*v); /* gcc converts four at a time */
#endif
}

/* a[0..n), then 0; n < 8. What is behind is read, and does not count. */
static inline void load_eight_part(eight_work *v, const work *a, int64_t n)
{
    const eight_work place = {0, 1, 2, 3, 4, 5, 6, 7};
    const __typeof__(place < place) counts = place < (work)n;
    memcpy(v, a, sizeof *v);
    *v = (eight_work)(counts & (__typeof__(counts))*v);
}

/* The lanes, folded to eight: pairwise in the working type, which costs what one more value of each
 * would, and a third of the instructions of widening all of them first. */
static inline void fold_to_eight(eight_work *folded, const vec *lanes)
{
#if defined(FN_TYPE_float64)
    *folded = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
#else
    /* Out of registers: 1.3 times as long a fold otherwise. */
    const __m512d both = (__m512d)(lanes[0] + lanes[1]);
    *folded = (eight_work)_mm512_castpd512_pd256(both)
              + (eight_work)_mm512_extractf64x4_pd(both, 1);
#endif
}

/* The sum of eight, pairwise. */
static inline double fold_eight(const eight *v)
{
    typedef double four __attribute__((vector_size(32)));
    const four sum = (four)_mm512_castpd512_pd256((__m512d)*v)
                     + (four)_mm512_extractf64x4_pd((__m512d)*v, 1);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
#else
/* In whole registers: vectors wider than one gcc takes through memory and general registers. */
typedef double double_vec __attribute__((vector_size(FN_VECTOR)));
enum { DOUBLES = FN_VECTOR / sizeof(double), PARTS = 8 / WIDTH };
typedef struct { double_vec part[8 / DOUBLES]; } eight;
typedef struct { vec part[PARTS]; } eight_work;

static inline void add_eight(eight *sum, const eight *v)
{
    for (int j = 0; j < 8 / DOUBLES; j++) sum->part[j] += v->part[j];
}

static inline void widen_eight(eight *wide, const eight_work *v)
{
#if defined(FN_TYPE_float64)
    memcpy(wide, v, sizeof *wide);
#elif defined(__AVX__)
    wide->part[0] = (double_vec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v->part[0]));
    wide->part[1] = (double_vec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v->part[0], 1));
#elif defined(__SSE2__)
    for (int j = 0; j < PARTS; j++) {
        const __m128 values = (__m128)v->part[j];
        wide->part[2 * j] = (double_vec)_mm_cvtps_pd(values);
        wide->part[2 * j + 1] = (double_vec)_mm_cvtps_pd(_mm_movehl_ps(values, values));
    }
#else
    typedef work half __attribute__((vector_size(FN_VECTOR / 2)));
    half values[8 / DOUBLES];
    memcpy(values, v, sizeof values);
    for (int j = 0; j < 8 / DOUBLES; j++)
        wide->part[j] = __builtin_convertvector(values[j], double_vec);
#endif
}

static inline void load_eight_part(eight_work *v, const work *a, int64_t n)
{
    for (int j = 0; j < PARTS; j++)
        v->part[j] = (vec)(lanes_below(n - j * WIDTH) & (whole_vec)load_work(a + j * WIDTH));
}

static inline void fold_to_eight(eight_work *folded, const vec *lanes)
{
    for (int j = 0; j < PARTS; j++)
        folded->part[j] = (lanes[j] + lanes[2 * PARTS + j])
                          + (lanes[PARTS + j] + lanes[3 * PARTS + j]);
}

static inline double fold_eight(const eight *v)
{
#if defined(__AVX__)
    const __m256d sum = (__m256d)(v->part[0] + v->part[1]);
    const __m128d pair = _mm256_castpd256_pd128(sum) + _mm256_extractf128_pd(sum, 1);
#else
    const double_vec pair = (v->part[0] + v->part[2]) + (v->part[1] + v->part[3]);
#endif
    return pair[0] + pair[1];
}
#endif

/* total = lanes, or total + lanes, in double. */
static inline void flush_lanes(const vec *lanes, double *total, int add)
{
    work t[FN_LANES];
    memcpy(t, lanes, sizeof t);
    for (int j = 0; j < FN_LANES; j++) total[j] = add ? total[j] + (double)t[j] : (double)t[j];
}

/* The sum of a[0..n) in double. Up to eight values behind are read, and do not count. */
static inline double sum_work(const work *a, int64_t n)
{
    eight total, wide;
    eight_work v;
    memset(&total, 0, sizeof total);
    for (; n >= 8; n -= 8, a += 8) {
        memcpy(&v, a, sizeof v);
        widen_eight(&wide, &v);
        add_eight(&total, &wide);
    }
    load_eight_part(&v, a, n);
    widen_eight(&wide, &v);
    add_eight(&total, &wide);
    return fold_eight(&total);
}

/* The sum of the lanes, plus `total` in double where it is not NULL. */
static inline double fold_lanes(const vec *lanes, const double *total)
{
    eight sum, before;
    eight_work folded;
    fold_to_eight(&folded, lanes);
    widen_eight(&sum, &folded);
    for (int part = 0; total && part < FN_LANES / 8; part++) {
        memcpy(&before, total + 8 * part, sizeof before);
        add_eight(&sum, &before);
    }
    return fold_eight(&sum);
}

/* The sums of up to FN_ROWS sets at once, each folded to eight; 0 for those not there. The same
 * additions, with the rows side by side: a row's fold alone is mostly waiting. */
static inline void fold_rows(const eight_work *folded, int64_t rows, double *sums)
{
#if defined(__AVX512F__)
    __m512d v[FN_ROWS];
    for (int r = 0; r < FN_ROWS; r++) {
        eight sum = {0};
        if (r < rows) widen_eight(&sum, folded + r);
        v[r] = (__m512d)sum;
    }
    for (int r = 0; r < 4; r++)
        v[r] = _mm512_add_pd(_mm512_shuffle_f64x2(v[r], v[r + 4], 0x44),
                             _mm512_shuffle_f64x2(v[r], v[r + 4], 0xee));
    for (int r = 0; r < 2; r++)
        v[r] = _mm512_add_pd(_mm512_shuffle_f64x2(v[r], v[r + 2], 0x88),
                             _mm512_shuffle_f64x2(v[r], v[r + 2], 0xdd));
    v[0] = _mm512_add_pd(_mm512_unpacklo_pd(v[0], v[1]), _mm512_unpackhi_pd(v[0], v[1]));
    _mm512_storeu_pd(sums, _mm512_shuffle_f64x2(v[0], v[0], 0xd8));
#elif defined(__AVX__)
    __m256d v[FN_ROWS];
    for (int r = 0; r < FN_ROWS; r++) {
        eight sum;
        v[r] = _mm256_setzero_pd();
        if (r >= rows) continue;
        widen_eight(&sum, folded + r);
        v[r] = (__m256d)(sum.part[0] + sum.part[1]);
    }
    for (int r = 0; r < FN_ROWS; r += 4) {
        for (int j = r; j < r + 2; j++)
            v[j] = _mm256_add_pd(_mm256_permute2f128_pd(v[j], v[j + 2], 0x20),
                                 _mm256_permute2f128_pd(v[j], v[j + 2], 0x31));
        _mm256_storeu_pd(sums + r, _mm256_hadd_pd(v[r], v[r + 1]));
    }
#else
    for (int64_t r = 0; r < FN_ROWS; r++) {
        eight sum;
        sums[r] = 0;
        if (r >= rows) continue;
        widen_eight(&sum, folded + r);
        sums[r] = fold_eight(&sum);
    }
#endif
}

#endif
