#ifndef FASTNORM_BENCH_FLOOR_H
#define FASTNORM_BENCH_FLOOR_H
#include <stdint.h>
/* out = a, or a + b where b is not NULL; the same at `also` where that is not NULL. 64-byte aligned
 * arrays of `bytes` bytes. */
void floor_move(char *out, char *also, const char *a, const char *b, int64_t bytes, int stream,
                int threads);
/* Two passes: read a and b, then floor_move, from the end, as what was read last is in cache. */
void floor_twice(char *out, char *also, const char *a, const char *b, int64_t bytes, int stream,
                 int threads);
#endif
