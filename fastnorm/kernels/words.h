/* The few C words that the Cython kernels need: element types, loads and stores.
 *
 * The kernels are compiled once for every element type (-DFN_TYPE_name) and every instruction set
 * level (-march). `stored` is the type in memory, `work` the type of the arithmetic; they differ
 * where elements have 16 bits. */
#ifndef FASTNORM_WORDS_H
#define FASTNORM_WORDS_H

#include <string.h>

#include "short.h"
#include "task.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* The caller's arrays may lie anywhere. */
#define ANYWHERE __attribute__((aligned(1)))

#if defined(FN_TYPE_float64)
typedef double stored ANYWHERE;
typedef double work;
#define FN_TINY 0.0
#else
#if defined(FN_TYPE_float32)
typedef float stored ANYWHERE;
#elif defined(FN_TYPE_float16) || defined(FN_TYPE_bfloat16)
typedef fn_short stored;
#define FN_SHORT 1
#else
#error "no FN_TYPE_... is defined"
#endif
typedef float work;
/* A sum of squares under TINY * count may have lost squares below the smallest normal. */
#define FN_TINY 1e-30
#endif

/* Lanes that a sum is spread over: fixed, so that every vector width gives the same bits. */
#define FN_LANES 32

#if defined(__AVX512F__)
#define FN_VECTOR 64
#elif defined(__AVX__)
#define FN_VECTOR 32
#else
#define FN_VECTOR 16
#endif

/* One register of the working type. Arithmetic on it is the compiler's own. */
typedef work vec __attribute__((vector_size(FN_VECTOR)));
enum { WIDTH = FN_VECTOR / sizeof(work), VECTORS = FN_LANES / WIDTH };
#if defined(__AVX512F__) || defined(__aarch64__)
enum { REGISTERS = 32 };
#else
enum { REGISTERS = 16 };
#endif
#if defined(FN_TYPE_bfloat16)
enum { NARROWED = 2 };
#else
enum { NARROWED = 1 };
#endif

/* An array that is there, which the compiler cannot know: loops that serve one that may not be would
 * ask again and again (0.9 to 1.0 of the time). */
static inline const stored *there(const stored *x)
{
    if (!x) __builtin_unreachable();
    return x;
}

static inline const work *there_weight(const work *x)
{
    if (!x) __builtin_unreachable();
    return x;
}

/* Further along an array that may not be there. */
static inline const stored *past(const stored *x, int64_t n) { return x ? x + n : NULL; }
static inline const work *past_weight(const work *x, int64_t n) { return x ? x + n : NULL; }

static inline vec splat(work value) { return value - (vec){0}; }

#if defined(FN_TYPE_float64)
typedef int64_t whole_vec __attribute__((vector_size(FN_VECTOR)));
#else
typedef int32_t whole_vec __attribute__((vector_size(FN_VECTOR)));
#endif

/* Where mask, a vector comparison, a, else b. */
static inline vec choose(whole_vec mask, vec a, vec b)
{
    return (vec)((mask & (whole_vec)a) | (~mask & (whole_vec)b));
}

/* The gradient dy behind ReLU, in front of it, where its input was z. */
static inline vec through_relu(vec z, vec dy) { return choose(z <= splat(0), splat(0), dy); }

static inline vec load_work(const work *x)
{
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* a + b, on the units that multiply: a*1 + b is rounded once, to the same bits. Sums are bound by
 * additions, and there are processors whose adders would leave the multipliers idle. */
static inline vec plus(vec a, vec b)
{
    const vec one = splat(1);
#if defined(__AVX512F__) && defined(FN_TYPE_float64)
    return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)one, (__m512d)b);
#elif defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)one, (__m512)b);
#elif defined(__FMA__) && defined(FN_TYPE_float64)
    return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)one, (__m256d)b);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)one, (__m256)b);
#else
    (void)one;
    return a + b;
#endif
}

/* Lanes below n; any n. */
#if defined(__AVX512F__)
static inline uint32_t lanes_below(int64_t n)
{
    return n <= 0 ? 0 : n >= WIDTH ? ~0u : (1u << n) - 1;
}
#elif defined(__AVX2__)
static inline whole_vec lanes_below(int64_t n)
{
#if defined(FN_TYPE_float64)
    const whole_vec places = {0, 1, 2, 3};
#else
    const whole_vec places = {0, 1, 2, 3, 4, 5, 6, 7};
#endif
    return places < (int)(n < WIDTH ? n : WIDTH);
}
#endif

/* x[0..n), then `fill`; any n. Reads no byte behind x + n. */
static inline vec load_work_part(const work *x, int64_t n, work fill)
{
#if defined(__AVX512F__)
#if defined(FN_TYPE_float64)
    return (vec)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (__mmask8)lanes_below(n), x);
#else
    return (vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)lanes_below(n), x);
#endif
#elif defined(__AVX2__)
    const whole_vec below = lanes_below(n);
#if defined(FN_TYPE_float64)
    return choose(below, (vec)_mm256_maskload_pd(x, (__m256i)below), splat(fill));
#else
    return choose(below, (vec)_mm256_maskload_ps(x, (__m256i)below), splat(fill));
#endif
#else
    work t[WIDTH];
    for (int j = 0; j < WIDTH; j++) {
        t[j] = fill;
        if (j < n) memcpy(&t[j], x + j, sizeof *t);
    }
    return load_work(t);
#endif
}

#if defined(__SSE2__) && !defined(__AVX512F__)
/* The first bytes of v, an even number of them, at most as many as it has. (AVX2's masked stores
 * take 12 cycles each on AMD, and a call of memcpy would have every register saved.) */
static inline void store_bytes(void *y, int64_t bytes, vec v)
{
    char *to = y;
#if defined(__AVX__)
    __m128i part = _mm256_castsi256_si128((__m256i)v);
    if (bytes & 16) {
        _mm_storeu_si128((void *)to, part);
        part = _mm256_extractf128_si256((__m256i)v, 1);
        to += 16;
    }
#else
    __m128i part = (__m128i)v;
#endif
    if (bytes & 8) {
        _mm_storel_epi64((void *)to, part);
        part = _mm_unpackhi_epi64(part, part);
        to += 8;
    }
    if (bytes & 4) {
        const int32_t word = _mm_cvtsi128_si32(part);
        memcpy(to, &word, sizeof word);
        part = _mm_srli_epi64(part, 32);
        to += 4;
    }
    if (bytes & 2) {
        const int16_t word = (int16_t)_mm_cvtsi128_si32(part);
        memcpy(to, &word, sizeof word);
    }
}
#endif

#if !defined(FN_SHORT)

static inline work widen(stored v) { return v; }
static inline work narrow(work v) { return v; }
static inline work on_grid(work value) { return value; }
static inline vec load(const stored *x) { return load_work((const work *)x); }
static inline void store(stored *y, vec v) { memcpy(y, &v, sizeof v); }

static inline vec load_part(const stored *x, int64_t n, work fill)
{
    return load_work_part((const work *)x, n, fill);
}

/* y[0..n) = v, n <= WIDTH. */
static inline void store_part(stored *y, int64_t n, vec v)
{
#if defined(__AVX512F__)
#if defined(FN_TYPE_float64)
    _mm512_mask_storeu_pd(y, (__mmask8)lanes_below(n), (__m512d)v);
#else
    _mm512_mask_storeu_ps(y, (__mmask16)lanes_below(n), (__m512)v);
#endif
#elif defined(__SSE2__)
    if (n == WIDTH)
        store(y, v);
    else
        store_bytes(y, n * (int64_t)sizeof *y, v);
#else
    memcpy(y, &v, (size_t)n * sizeof *y);
#endif
}

#else
#include "narrow.h"
#endif

/* What of a few values a mask lets count. */
enum { NONE_VALID, SOME_VALID, ALL_VALID };

static inline int valid_among(const uint8_t *mask, int64_t n)
{
    uint8_t any = 0, all = 1;
    for (int64_t j = 0; j < n; j++) {
        const uint8_t valid = mask[j] != 0;
        any |= valid;
        all &= valid;
    }
    return all ? ALL_VALID : any ? SOME_VALID : NONE_VALID;
}

/* kept = x where it counts, else `otherwise`. Every value is read: a loop of vectors. */
static inline void keep_valid(const stored *x, const uint8_t *mask, int64_t n, work otherwise,
                              stored *kept)
{
    const stored instead = narrow(otherwise);
    for (int64_t j = 0; j < n; j++) {
        const stored value = x[j];
        kept[j] = mask[j] ? value : instead;
    }
}

/* y = 0 where it does not count. */
static inline void blank(stored *y, const uint8_t *mask, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        const stored value = y[j];
        y[j] = mask[j] ? value : 0;
    }
}

/* store past the caches; y is aligned to 64 bytes. */
static inline void stream(stored *y, vec v)
{
#if defined(FN_SHORT) && defined(__AVX512F__)
    _mm256_stream_si256((void *)y, (__m256i)narrow_all(v));
#elif defined(FN_SHORT) && defined(__AVX__)
    _mm_stream_si128((void *)y, (__m128i)narrow_all(v));
#elif defined(FN_SHORT)
    store(y, v);
#elif defined(__AVX512F__)
    _mm512_stream_si512((void *)y, (__m512i)v);
#elif defined(__AVX__)
    _mm256_stream_si256((void *)y, (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128((void *)y, (__m128i)v);
#else
    store(y, v);
#endif
}

/* Two vectors one behind the other. bfloat16 is rounded in fewer instructions so. */
static inline void store_two(stored *y, vec a, vec b)
{
#if defined(FN_TYPE_bfloat16) && defined(__SSE4_1__)
    if (__builtin_expect(!any_nan(a, b), 1)) {
        const two_shorts both = narrow_numbers(a, b);
        memcpy(y, &both, sizeof both);
        return;
    }
#elif defined(FN_TYPE_float16) && defined(__AVX512F__)
    /* Where lines are straddled, one store takes 0.85 of the time, elsewhere 1.1 times as long. */
    if ((uintptr_t)y % 64 != 0) {
        _mm512_storeu_si512(y, _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)narrow_all(a)),
                                                  (__m256i)narrow_all(b), 1));
        return;
    }
#endif
    store(y, a);
    store(y + WIDTH, b);
}

static inline void stream_two(stored *y, vec a, vec b)
{
#if defined(FN_TYPE_bfloat16) && defined(__AVX__)
    if (__builtin_expect(!any_nan(a, b), 1)) {
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)y, (__m512i)narrow_numbers(a, b));
#else
        _mm256_stream_si256((void *)y, (__m256i)narrow_numbers(a, b));
#endif
        return;
    }
#endif
    stream(y, a);
    stream(y + WIDTH, b);
}

/* The 64 bytes at x, past the caches; y is aligned to 64 bytes. */
static inline void stream_line(stored *y, const stored *x)
{
    vec v;
    for (int at = 0; at < 64; at += FN_VECTOR) {
        memcpy(&v, (const char *)x + at, sizeof v);
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)y, (__m512i)v);
#elif defined(__AVX__)
        _mm256_stream_si256((void *)((char *)y + at), (__m256i)v);
#elif defined(__SSE2__)
        _mm_stream_si128((void *)((char *)y + at), (__m128i)v);
#else
        memcpy((char *)y + at, &v, sizeof v);
#endif
    }
}

/* Ask for a line that is needed soon, in the second-level cache. Any address may be asked for.
 * (Inlined at once: gcc takes a function that only prefetches for one without effect, and where it
 * finds that out before inlining, it drops the calls.) */
static inline __attribute__((always_inline)) void fetch(const stored *x)
{
    __builtin_prefetch(x, 0, 2);
}

/* Streamed stores of this thread are seen by the others after this. */
static inline void stream_end(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* total = lanes, or total + lanes, in double. */
static inline void flush_lanes(const vec *lanes, double *total, int add)
{
    work t[FN_LANES];
    memcpy(t, lanes, sizeof t);
    for (int j = 0; j < FN_LANES; j++) total[j] = add ? total[j] + (double)t[j] : (double)t[j];
}

typedef double eight __attribute__((vector_size(64)));
typedef double four __attribute__((vector_size(32)));

typedef work eight_work __attribute__((vector_size(8 * sizeof(work))));

/* wide = v. (By pointers: a vector that is returned has a calling convention for each level.) */
static inline void widen_eight(eight *wide, const eight_work *v)
{
#if defined(__AVX512F__) && !defined(FN_TYPE_float64)
    *wide = (eight)_mm512_cvtps_pd((__m256)*v); /* gcc converts four at a time */
#else
    *wide = __builtin_convertvector(*v, eight);
#endif
}

/* The lanes, folded to eight: pairwise in the working type, which costs what one more value of each
 * would, and a third of the instructions of widening all of them first. */
static inline void fold_to_eight(eight_work *folded, const vec *lanes)
{
    eight_work low, high;
#if defined(__AVX512F__) && defined(FN_TYPE_float64)
    low = lanes[0] + lanes[2];
    high = lanes[1] + lanes[3];
#elif defined(__AVX512F__)
    /* Out of registers: 1.3 times as long a fold otherwise. */
    const __m512d both = (__m512d)(lanes[0] + lanes[1]);
    low = (eight_work)_mm512_castpd512_pd256(both);
    high = (eight_work)_mm512_extractf64x4_pd(both, 1);
#else
    eight_work part[FN_LANES / 8];
    memcpy(part, lanes, sizeof part);
    low = part[0] + part[2];
    high = part[1] + part[3];
#endif
    *folded = low + high;
}

/* The sum of eight, pairwise. */
static inline double fold_eight(const eight *v)
{
    four low, high;
#if defined(__AVX512F__)
    low = (four)_mm512_castpd512_pd256((__m512d)*v);
    high = (four)_mm512_extractf64x4_pd((__m512d)*v, 1);
#else
    memcpy(&low, v, sizeof low);
    memcpy(&high, (const double *)v + 4, sizeof high);
#endif
    low += high;
    return (low[0] + low[2]) + (low[1] + low[3]);
}

/* The sum of a[0..n) in double. Up to eight values behind are read, and do not count. */
static inline double sum_work(const work *a, int64_t n)
{
    const eight_work place = {0, 1, 2, 3, 4, 5, 6, 7};
    eight total = {0}, wide;
    eight_work v;
    for (; n >= 8; n -= 8, a += 8) {
        memcpy(&v, a, sizeof v);
        widen_eight(&wide, &v);
        total += wide;
    }
    memcpy(&v, a, sizeof v);
    __typeof__(place < place) counts = place < (work)n;
    v = (eight_work)(counts & (__typeof__(counts))v);
    widen_eight(&wide, &v);
    total += wide;
    return fold_eight(&total);
}

/* The sum of the lanes, plus `total` in double where it is not NULL, in an order that no vector
 * width changes. */
static inline double fold_lanes(const vec *lanes, const double *total)
{
    eight sum, before;
    eight_work folded;
    fold_to_eight(&folded, lanes);
    widen_eight(&sum, &folded);
    for (int part = 0; total && part < FN_LANES / 8; part++) {
        memcpy(&before, total + 8 * part, sizeof before);
        sum += before;
    }
    return fold_eight(&sum);
}

enum { FN_ROWS = 8 };

/* The sums of up to FN_ROWS sets at once, each folded to eight; 0 for those not there. */
static inline void fold_rows(const eight_work *folded, int64_t rows, double *sums)
{
#if defined(__AVX512F__)
    /* The same additions, with the rows side by side: a row's fold alone is mostly waiting. */
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
#else
    for (int64_t r = 0; r < FN_ROWS; r++) {
        eight sum = {0};
        if (r < rows) widen_eight(&sum, folded + r);
        sums[r] = fold_eight(&sum);
    }
#endif
}

/* Elements of y before its first 64-byte boundary; -1 where no element starts on one. */
static inline int64_t until_aligned(const stored *y)
{
    uintptr_t past = (uintptr_t)y & 63;
    if (past % sizeof(stored) != 0) return -1;
    return past ? (int64_t)((64 - past) / sizeof(stored)) : 0;
}

#endif
