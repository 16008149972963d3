#ifndef FASTNORM_BENCH_FLOOR_H
#define FASTNORM_BENCH_FLOOR_H
#include <stdint.h>
/* How bytes are moved: by plain stores, past the caches, or so while inputs are asked for early. */
enum { FLOOR_PLAIN, FLOOR_STREAMING, FLOOR_AHEAD };
/* out = a, or a + b where b is not NULL; the same at `also` where that is not NULL. 64-byte aligned
 * arrays of `bytes` bytes. */
void floor_move(char *out, char *also, const char *a, const char *b, int64_t bytes, int how,
                int threads);
/* Two passes: read a and b, then floor_move, from the end, as what was read last is in cache. */
void floor_twice(char *out, char *also, const char *a, const char *b, int64_t bytes, int how,
                 int threads);
#endif
