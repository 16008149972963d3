/* The memory floor: read the inputs once and write the output once, plain or past the caches. */
#include "floor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx")))

/* Whole 32-byte words of [from, to); the arrays are aligned to 64 bytes. */
WIDE static void part(char *out, const char *a, const char *b, int64_t from, int64_t to, int stream)
{
    for (int64_t at = from; at + 32 <= to; at += 32) {
        __m256 value = _mm256_load_ps((const float *)(a + at));
        if (b) value = _mm256_add_ps(value, _mm256_load_ps((const float *)(b + at)));
        if (stream)
            _mm256_stream_ps((float *)(out + at), value);
        else
            _mm256_store_ps((float *)(out + at), value);
    }
    _mm_sfence();
}
#else
static void part(char *out, const char *a, const char *b, int64_t from, int64_t to, int stream)
{
    (void)stream;
    for (int64_t at = from; at + 4 <= to; at += 4)
        *(float *)(out + at) = *(const float *)(a + at) + (b ? *(const float *)(b + at) : 0);
}
#endif

void floor_move(char *out, const char *a, const char *b, int64_t bytes, int stream, int threads)
{
    const int64_t piece = 1 << 16, pieces = (bytes + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t index = 0; index < pieces; index++) {
        int64_t from = index * piece, to = from + piece < bytes ? from + piece : bytes;
        part(out, a, b, from, to, stream);
    }
}
