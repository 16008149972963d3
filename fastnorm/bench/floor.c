/* The memory floor: read the inputs once and write the output once. */
#include "floor.h"

#include <stddef.h>

/* Bytes ahead that inputs are asked for: further than processors look by themselves. */
enum { AHEAD = 8192 };

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx")))

static inline void ask(const char *a, const char *b, int64_t at)
{
    if (at % 64 != 0) return;
    __builtin_prefetch(a + at + AHEAD, 0, 2);
    if (b) __builtin_prefetch(b + at + AHEAD, 0, 2);
}

/* Whole 32-byte words of [from, to); the arrays are aligned to 64 bytes. */
WIDE static void part(char *out, char *also, const char *a, const char *b, int64_t from, int64_t to,
                      int how)
{
    const int stream = how != FLOOR_PLAIN;
    for (int64_t at = from; at + 32 <= to; at += 32) {
        if (how == FLOOR_AHEAD) ask(a, b, at);
        __m256 value = _mm256_load_ps((const float *)(a + at));
        if (b) value = _mm256_add_ps(value, _mm256_load_ps((const float *)(b + at)));
        if (stream)
            _mm256_stream_ps((float *)(out + at), value);
        else
            _mm256_store_ps((float *)(out + at), value);
        if (also && stream)
            _mm256_stream_ps((float *)(also + at), value);
        else if (also)
            _mm256_store_ps((float *)(also + at), value);
    }
    _mm_sfence();
}

WIDE static float sum(const char *a, int64_t from, int64_t to, int how)
{
    __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                       _mm256_setzero_ps()};
    for (int64_t at = from; at + 128 <= to; at += 128)
        for (int j = 0; j < 4; j++) {
            if (how == FLOOR_AHEAD) ask(a, NULL, at + 32 * j);
            total[j] = _mm256_add_ps(total[j], _mm256_load_ps((const float *)(a + at + 32 * j)));
        }
    return _mm256_cvtss_f32(
        _mm256_add_ps(_mm256_add_ps(total[0], total[1]), _mm256_add_ps(total[2], total[3])));
}
#else
static void part(char *out, char *also, const char *a, const char *b, int64_t from, int64_t to,
                 int how)
{
    (void)how;
    for (int64_t at = from; at + 4 <= to; at += 4) {
        *(float *)(out + at) = *(const float *)(a + at) + (b ? *(const float *)(b + at) : 0);
        if (also) *(float *)(also + at) = *(float *)(out + at);
    }
}

static float sum(const char *a, int64_t from, int64_t to, int how)
{
    float total = 0;
    (void)how;
    for (int64_t at = from; at + 4 <= to; at += 4) total += *(const float *)(a + at);
    return total;
}
#endif

enum { PIECE = 1 << 16 };

void floor_move(char *out, char *also, const char *a, const char *b, int64_t bytes, int how,
                int threads)
{
    const int64_t pieces = (bytes + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t index = 0; index < pieces; index++) {
        int64_t from = index * PIECE, to = from + PIECE < bytes ? from + PIECE : bytes;
        part(out, also, a, b, from, to, how);
    }
}

void floor_twice(char *out, char *also, const char *a, const char *b, int64_t bytes, int how,
                 int threads)
{
    const int64_t pieces = (bytes + PIECE - 1) / PIECE;
    float total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(+ : total)
    for (int64_t index = 0; index < pieces; index++) {
        int64_t from = index * PIECE, to = from + PIECE < bytes ? from + PIECE : bytes;
        total += sum(a, from, to, how) + (b ? sum(b, from, to, how) : 0);
    }
    /* Each thread's own share of the pieces, backwards: iterations are dealt out as above. */
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        int64_t first = pieces * thread / threads, index = pieces * (thread + 1) / threads;
        while (index-- > first) {
            int64_t from = index * PIECE, to = from + PIECE < bytes ? from + PIECE : bytes;
            part(out, also, a, b, from, to, how);
        }
    }
    *(volatile float *)out = total; /* or the sums would not be taken */
}
