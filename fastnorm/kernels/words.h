/* The few C words that the Cython kernels need: element types, loads and stores.
 *
 * The kernels are compiled once for every element type (-DFN_TYPE_name) and every instruction set
 * level (-march). `stored` is the type in memory, `work` the type of the arithmetic; they differ
 * where elements have 16 bits. */
#ifndef FASTNORM_WORDS_H
#define FASTNORM_WORDS_H

#include <math.h>
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
/* Places of a strip, or of a slab, whose coefficients and sums a kernel keeps on the stack: six to
 * twelve arrays of them, which with all else stay below what fastnorm.h promises. */
enum { PLACES = 4096 / sizeof(work) };
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

/* A vector by its value: copied from its address, it keeps an array of them in memory (with 16
 * registers backwards down columns took 1.05 to 1.1 times as long). */
static inline void store_work(work *y, vec v) { memcpy(y, &v, sizeof v); }

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

/* Whether a product of two stored values is exact in the working type. A fused multiply-add of them
 * gives the bits of a multiplication and an addition then. */
#if defined(FN_SHORT)
enum { EXACT = 1 };
#else
enum { EXACT = 0 };
#endif

/* a*b + c, rounded once, of stored values a and b where these are EXACT. */
static inline vec plus_product(vec a, vec b, vec c)
{
#if !defined(FN_SHORT)
    return plus(a * b, c);
#elif defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    vec sum = a * b + c;
#if defined(FN_TYPE_bfloat16)
    /* Below the normal numbers products are not exact. */
    const whole_vec tiny = ((whole_vec)(a * b) & 0x7fffffff) < 0x800000;
    const whole_vec lost = tiny & (a != splat(0)) & (b != splat(0));
    int any = 0;
    for (int j = 0; j < WIDTH; j++) any |= lost[j];
    for (int j = 0; any && j < WIDTH; j++) sum[j] = fmaf(a[j], b[j], c[j]);
#endif
    return sum;
#endif
}

/* Whether all of some vectors are 0, and not -0. */
static inline int all_zero(const vec *v, int vectors)
{
    whole_vec bits = (whole_vec)v[0];
    for (int j = 1; j < vectors; j++) bits |= (whole_vec)v[j];
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)bits, (__m512i)bits) == 0;
#elif defined(__AVX__)
    return _mm256_testz_si256((__m256i)bits, (__m256i)bits);
#else
    int any = 0;
    for (int j = 0; j < WIDTH; j++) any |= bits[j] != 0;
    return !any;
#endif
}

/* Whether a[0..n) are all 0. */
static inline int zeros(const work *a, int64_t n)
{
    int any = 0;
    for (int64_t j = 0; j < n; j++) any |= a[j] != 0;
    return !any;
}

/* Lanes below n; any n. */
#if defined(__AVX512F__)
static inline uint32_t lanes_below(int64_t n)
{
    return n <= 0 ? 0 : n >= WIDTH ? ~0u : (1u << n) - 1;
}
#else
static inline whole_vec lanes_below(int64_t n)
{
    whole_vec place;
    for (int j = 0; j < WIDTH; j++) place[j] = j;
    return place < (int)(n < WIDTH ? n : WIDTH);
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
static inline void store(stored *y, vec v) { store_work((work *)y, v); }

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

/* A register as it is, past the caches; y is aligned to it. */
static inline void stream_bits(void *y, vec v)
{
#if defined(__AVX512F__)
    _mm512_stream_si512(y, (__m512i)v);
#elif defined(__AVX__)
    _mm256_stream_si256(y, (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128(y, (__m128i)v);
#else
    memcpy(y, &v, sizeof v);
#endif
}

/* store past the caches; y is aligned to 64 bytes. */
static inline void stream(stored *y, vec v)
{
#if !defined(FN_SHORT)
    stream_bits(y, v);
#elif defined(__AVX512F__)
    _mm256_stream_si256((void *)y, (__m256i)narrow_all(v));
#elif defined(__AVX__)
    _mm_stream_si128((void *)y, (__m128i)narrow_all(v));
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
        stream_bits(y, (vec)narrow_numbers(a, b));
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
        stream_bits((char *)y + at, v);
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

#include "fold.h"

/* Elements of y before its first 64-byte boundary; -1 where no element starts on one. */
static inline int64_t until_aligned(const stored *y)
{
    uintptr_t past = (uintptr_t)y & 63;
    if (past % sizeof(stored) != 0) return -1;
    return past ? (int64_t)((64 - past) / sizeof(stored)) : 0;
}

#endif
