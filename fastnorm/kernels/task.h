/* One call, as the kernels see it: checked, with every default filled in. */
#ifndef FASTNORM_TASK_H
#define FASTNORM_TASK_H

#if !defined(__SSE2__)
#include <fenv.h>
#endif
#include <stddef.h>
#include <stdint.h>

#include "fastnorm.h"

enum { FN_STREAM_ALL = 16 };

typedef struct fn_task {
    int64_t b, o, g, k, i, s; /* the geometry of fastnorm.h; s at least 1 */
    int has_mean;          /* 0: the mean is taken as 0 */
    int scaled;            /* no mean and no bias, in a backward no dbias: y = x*rstd*weight */
    int given;             /* statistics are constants: read mean and var, or mean and rstd */
    int fused;             /* a forward maps by map_fused: an activation, a residual or a mask */
    int stream;            /* of FN_STREAM_ALL runs of y, so many pass the caches by */
    int far;               /* what sums read comes from the last level or memory */
    int beyond;            /* all arrays are more than the threads' second-level caches hold */
    int foreseen;          /* the processor asks early enough for rows that follow each other */
    int unseen;            /* but too late for these inputs, from memory or as far away */
    int ahead;             /* values that maps ask for meanwhile lie so far ahead, or 0 */
    const void *x;
    const void *dy; /* NULL in a forward */
    void *y;        /* dx in a backward */
    const void *weight; /* [g][k] in the working type, never NULL */
    const void *bias;
    /* y = activation(affine(x) + residual). A backward turns `upstream`, the caller's dy, into what
     * it is in front of the activation, and puts it at dy (the residual's gradient, or dx for the
     * time being); NULL where there is no activation. */
    int32_t activation;
    /* A backward through ReLU alone: dy is the caller's, and what it is in front of the activation
     * is found in registers, by the sums and by the map. */
    int gated;
    double slope;
    const void *residual;
    const void *upstream;
    /* Rows only. A forward adds these two and puts the sums at x; or dx gets dsum added. */
    const void *terms[2];
    const void *dsum;
    /* Which values count, [b][o][i][s]: where it is 0, they belong to no set and outputs are 0. */
    const uint8_t *mask;
    const int64_t *counts; /* [b], of the mask's (o, i); NULL where they are one */
    double eps;
    double *mean; /* [b][g][s]; forward: outputs, each may be NULL. Backward: inputs */
    double *var;
    double *rstd;
    double *dweight; /* [g][k] or both NULL */
    double *dbias;
    void *scratch;
    int64_t l2; /* bytes of second-level cache that a thread may count on */
    int64_t near; /* of the caches nearer than memory, for each thread */
    int threads;
    fastnorm_parallel_for parallel_for;
    void *user;
} fn_task;

/* The kernels of one element type at one instruction set level. */
typedef struct fn_kernels {
    void (*rows_forward)(const fn_task *);
    void (*rows_backward)(const fn_task *);
    void (*columns_forward)(const fn_task *);
    void (*columns_backward)(const fn_task *);
    size_t (*rows_scratch)(const fn_task *); /* bytes of scratch for either direction */
    size_t (*columns_scratch)(const fn_task *);
    void (*across_forward)(const fn_task *);
    void (*across_backward)(const fn_task *);
    size_t (*across_scratch)(const fn_task *);
} fn_kernels;

/* parallel.c */
typedef void (*fn_body)(void *context, int64_t index);
void fn_parallel_for(const fn_task *task, int64_t n, fn_body body, void *context, int backwards);
int fn_available_threads(void);
#if defined(__SSE2__)
typedef unsigned fn_environment;
#else
typedef fenv_t fn_environment;
#endif
/* From this thread's floating-point environment, which is returned, to the kernels', and back. */
fn_environment fn_enter_environment(void);
void fn_leave_environment(const fn_environment *callers);
size_t fn_serial_bytes(const fn_task *task); /* moved by a call: below, one thread does it all */

/* parameters.c: arrays of any element type of fastnorm.h */
size_t fn_size_of(int32_t dtype);        /* of an element; 0 of none */
int32_t fn_work_dtype(int32_t dtype);    /* of the arithmetic, and the parameters that kernels read */
void fn_get_all(double *values, const void *array, int32_t dtype, int64_t n);
/* The n values, or as many zeros where values is NULL; nowhere where array is. */
void fn_put_all(void *array, int32_t dtype, const double *values, int64_t n);
/* Weights or biases in the working type: as they are where they have it, else a copy; of NULL,
 * `otherwise` everywhere. */
const void *fn_parameters(const void *given, int32_t param_dtype, double otherwise, void *copy,
                          int32_t dtype, const fastnorm_geometry *s);
/* By the mean over b of the batch's statistics, those of sets without a value left out. */
void fn_move_running(void *running, int32_t dtype, const double *batch, int unbiased,
                     double momentum, const fn_task *task);

/* cpu.c: NULL where this processor or build lacks the level */
const fn_kernels *fn_find_kernels(int32_t dtype, int32_t isa);
int64_t fn_l2_bytes(void);
int64_t fn_last_level_bytes(void);
int fn_foresees(void);
int64_t fn_near_bytes(int threads); /* of the caches nearer than memory, for each thread */

#endif
