/* What the files of the kernels call of each other, and are called by: their names, which say the
 * element type and the level they are compiled for, and coefficients. */
#ifndef FASTNORM_KERNELS_H
#define FASTNORM_KERNELS_H

#include "words.h"

#define FN_PASTE2(name, type, level) name##_##type##_##level
#define FN_PASTE(name, type, level) FN_PASTE2(name, type, level)
#define rows_forward FN_PASTE(rows_forward, FN_DTYPE, FN_LEVEL)
#define rows_backward FN_PASTE(rows_backward, FN_DTYPE, FN_LEVEL)
#define rows_scratch FN_PASTE(rows_scratch, FN_DTYPE, FN_LEVEL)
#define columns_forward FN_PASTE(columns_forward, FN_DTYPE, FN_LEVEL)
#define columns_backward FN_PASTE(columns_backward, FN_DTYPE, FN_LEVEL)
#define columns_scratch FN_PASTE(columns_scratch, FN_DTYPE, FN_LEVEL)
#define elements_backward FN_PASTE(elements_backward, FN_DTYPE, FN_LEVEL)
#define slabs_forward FN_PASTE(slabs_forward, FN_DTYPE, FN_LEVEL)
#define slabs_backward FN_PASTE(slabs_backward, FN_DTYPE, FN_LEVEL)
#define exact_statistics FN_PASTE(exact_statistics, FN_DTYPE, FN_LEVEL)
#define start_columns FN_PASTE(start_columns, FN_DTYPE, FN_LEVEL)
#define finish_columns FN_PASTE(finish_columns, FN_DTYPE, FN_LEVEL)
#define across_forward FN_PASTE(across_forward, FN_DTYPE, FN_LEVEL)
#define across_backward FN_PASTE(across_backward, FN_DTYPE, FN_LEVEL)
#define across_scratch FN_PASTE(across_scratch, FN_DTYPE, FN_LEVEL)
#define sum_rows FN_PASTE(sum_rows, FN_DTYPE, FN_LEVEL)
#define map_rows_of_places FN_PASTE(map_rows_of_places, FN_DTYPE, FN_LEVEL)
#define put_ends FN_PASTE(put_ends, FN_DTYPE, FN_LEVEL)
#define map_end FN_PASTE(map_end, FN_DTYPE, FN_LEVEL)
#define map_fused FN_PASTE(map_fused, FN_DTYPE, FN_LEVEL)
#define add_terms FN_PASTE(add_terms, FN_DTYPE, FN_LEVEL)
#define sum_valid FN_PASTE(sum_valid, FN_DTYPE, FN_LEVEL)
#define sum_valid_exact FN_PASTE(sum_valid_exact, FN_DTYPE, FN_LEVEL)
#define map_valid FN_PASTE(map_valid, FN_DTYPE, FN_LEVEL)
#define sample_valid FN_PASTE(sample_valid, FN_DTYPE, FN_LEVEL)

/* What the values of a run are mapped with; NULL for a term that is not there:
 *
 *     y = ((x - hi)*scale + shift)*weight + bias   in a forward,
 *     y = x*scale*weight                           where it only scales and hi is NULL,
 *     dx = (x - hi)*scale + shift + dy*dscale      in a backward,
 *
 * dy taken back through a ReLU whose input was (x - hi)*gate_scale + gate_shift. weight and bias are
 * of each place; of the others `which` says whether there is one for all places, for each of
 * several rows, or for each place. */
enum { OF_ALL, OF_ROWS, OF_PLACES };
typedef struct {
    int which;
    const work *hi, *scale, *shift, *dscale, *gate_scale, *gate_shift;
    const work *weight, *bias;
} coefficients;

/* edges.pyx: the line of y that one run ends in and the next begins in. Of its places, [first, n)
 * are kept here until it is whole. */
typedef struct {
    stored *line;
    int64_t first, n;
    stored kept[64];
} edge;
void put_ends(edge *ends, stored *y, int64_t n, const vec *v);
void map_end(const stored *x, const stored *dy, stored *y, int64_t first, int64_t stop,
             const coefficients *c, edge *ends);

/* down.pyx */
void sum_rows(const stored *x, const stored *dy, int64_t rows, int64_t stride, int64_t width,
              const coefficients *c, work *s, work *q, int64_t step, int asking);
void map_rows_of_places(const stored *x, const stored *dy, stored *y, int64_t rows, int64_t stride,
                        int64_t n, const coefficients *c, int stream, int64_t ahead, edge *ends);

/* fused.pyx */
void map_fused(const fn_task *task, int64_t at, int64_t n, int64_t rows, int64_t stride,
               const coefficients *c, edge *ends);
void add_terms(const fn_task *task, int64_t at, int64_t n, stored *kept);

/* elements_backward.pyx */
void elements_backward(void *context);

/* slabs.pyx */
void slabs_forward(void *context);
void slabs_backward(void *context);

/* rows_statistics.pyx */
void exact_statistics(const void *context, int64_t set_, work about, double *mean, double *var);

/* columns_statistics.pyx */
void start_columns(const void *context, int64_t b, int64_t c0, int64_t c1);
void finish_columns(const void *context, int64_t b, int64_t c0, int64_t c1);

/* masks.pyx */
void sum_valid(const fn_task *task, int64_t at, int64_t n, work about, double *sums);
void sum_valid_exact(const fn_task *task, int64_t at, int64_t n, double about, double *sums);
void map_valid(const fn_task *task, int64_t at, int64_t n, const coefficients *c);
work sample_valid(const fn_task *task, int64_t set_, int64_t at, int64_t stride);

#endif
