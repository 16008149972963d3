/* The few C words that the Cython kernels need: element types and stores.
 *
 * The kernels are compiled once for every element type (-DFN_DTYPE) and every instruction set
 * level (-march), with their public names renamed by FN_NAME. `stored` is the type in memory,
 * `work` the type of the arithmetic. */
#ifndef FASTNORM_WORDS_H
#define FASTNORM_WORDS_H

#include "task.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if FN_DTYPE == 32
typedef float stored;
typedef float work;
/* A sum of squares under TINY * count may have lost squares below the smallest normal. */
#define FN_TINY 1e-30
#elif FN_DTYPE == 64
typedef double stored;
typedef double work;
#define FN_TINY 0.0
#else
#error "FN_DTYPE must be 32 or 64"
#endif

#define FN_LANES 32

static inline work widen(stored v) { return (work)v; }
static inline stored narrow(work v) { return (stored)v; }

/* Further along an array that may not be there. */
static inline const stored *past(const stored *x, int64_t n) { return x ? x + n : NULL; }
static inline const work *past_weight(const work *x, int64_t n) { return x ? x + n : NULL; }

/* y[0..LANES) = t, past the caches. y is aligned to 64 bytes. */
static inline void stream_lanes(stored *y, const work *t)
{
#if defined(__AVX512F__)
    for (size_t at = 0; at < FN_LANES * sizeof(stored); at += 64)
        _mm512_stream_si512((void *)((char *)y + at), _mm512_loadu_si512((const char *)t + at));
#elif defined(__AVX__)
    for (size_t at = 0; at < FN_LANES * sizeof(stored); at += 32)
        _mm256_stream_si256((__m256i *)((char *)y + at),
                            _mm256_loadu_si256((const __m256i *)((const char *)t + at)));
#elif defined(__SSE2__)
    for (size_t at = 0; at < FN_LANES * sizeof(stored); at += 16)
        _mm_stream_si128((__m128i *)((char *)y + at),
                         _mm_loadu_si128((const __m128i *)((const char *)t + at)));
#else
    for (int j = 0; j < FN_LANES; j++) y[j] = narrow(t[j]);
#endif
}

/* Streamed stores of this thread are seen by the others after this. */
static inline void stream_end(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Elements of y before its first 64-byte boundary; -1 where no element starts on one. */
static inline int64_t until_aligned(const stored *y)
{
    uintptr_t past = (uintptr_t)y & 63;
    if (past % sizeof(stored) != 0) return -1;
    return past ? (int64_t)((64 - past) / sizeof(stored)) : 0;
}

#define FN_PASTE2(name, type, level) name##_##type##_##level
#define FN_PASTE(name, type, level) FN_PASTE2(name, type, level)
#define rows_forward FN_PASTE(rows_forward, FN_DTYPE, FN_LEVEL)
#define rows_backward FN_PASTE(rows_backward, FN_DTYPE, FN_LEVEL)
#define rows_scratch FN_PASTE(rows_scratch, FN_DTYPE, FN_LEVEL)
#define columns_forward FN_PASTE(columns_forward, FN_DTYPE, FN_LEVEL)
#define columns_backward FN_PASTE(columns_backward, FN_DTYPE, FN_LEVEL)
#define columns_scratch FN_PASTE(columns_scratch, FN_DTYPE, FN_LEVEL)

#endif
