/* fastnorm.h - normalization of float arrays at the speed of memory
 *
 * Copyright (c) 2026, the fastnorm authors. BSD-3-Clause, see LICENSE.
 */
#ifndef FASTNORM_H
#define FASTNORM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================
 * Introduction
 *
 * libfastnorm computes batch, instance, group, layer and RMS normalization, forward and
 * backward, on dense arrays of float32, float64, float16 and bfloat16, channels first or last,
 * and in the same pass a residual, an activation and a mask of what counts.
 * It needs libc and libm, and OpenMP where it was built with it. It needs no Python.
 *
 * What it promises, everywhere:
 *   - every call returns a fastnorm_status; nothing is printed, nothing aborts;
 *   - arguments are checked first: on an error no output byte has changed;
 *   - no state but a table of processor features, filled once when the library loads: any
 *     number of threads may call at once, on buffers of their own;
 *   - the results do not depend on the number of threads nor on the instruction set, nor on the
 *     caller's rounding mode: same input, same bits;
 *   - y may be x, and dx may be dy (or x); no other two buffers may overlap, but for what the
 *     detailed calls say of a residual;
 *   - pointers need the alignment of their element type at most, and less is only slower;
 *   - sizes are int64_t, every product is checked for overflow, and size 0 is no error;
 *   - the caller's OpenMP settings, signal handlers and floating-point environment stay as
 *     they are, and floating-point traps that it has enabled never spring in a call;
 *   - in a child after fork() the library computes with one thread;
 *   - a caller may pass the workspace (then a call allocates nothing) and the thread pool;
 *   - 128 KB of stack are enough for a thread that calls or works in a pool.
 *
 * Arrays are C-contiguous. A channels-first array is (N, C, spatial...), a channels-last one
 * (N, spatial..., C); `spatial` is the product of the spatial axes, 1 where there are none.
 * ====================================================================================== */

/* ---- Version: the one place where it is written -------------------------------------- */

#define FASTNORM_VERSION_MAJOR 0
#define FASTNORM_VERSION_MINOR 1
#define FASTNORM_VERSION_PATCH 0

#if defined(_WIN32)
#define FASTNORM_API
#else
#define FASTNORM_API __attribute__((visibility("default")))
#endif

/* The version of the library that was loaded, as major * 10000 + minor * 100 + patch. */
FASTNORM_API int32_t fastnorm_version(void);

/* ---- Status codes: never renumbered --------------------------------------------------- */

/* What a call returns. */
typedef enum fastnorm_status {
    FASTNORM_OK = 0,
    FASTNORM_NULL_POINTER = 10,         /* a required pointer is NULL */
    FASTNORM_BAD_STRUCT_SIZE = 11,      /* struct_size was not set to sizeof the struct */
    FASTNORM_BAD_DTYPE = 20,            /* not a fastnorm_dtype */
    FASTNORM_BAD_LAYOUT = 21,           /* not a fastnorm_layout */
    FASTNORM_BAD_ISA = 22,              /* not a fastnorm_isa, or this processor lacks it */
    FASTNORM_BAD_FLAGS = 23,            /* unknown flag, or flags that exclude each other */
    FASTNORM_BAD_ACTIVATION = 24,       /* not a fastnorm_activation, or its slope not finite */
    FASTNORM_BAD_FUSION = 25,           /* an array that this geometry or call has no use for */
    FASTNORM_NEGATIVE_SIZE = 30,        /* a size below 0 */
    FASTNORM_SIZE_OVERFLOW = 31,        /* the array would not fit the address space */
    FASTNORM_NOT_DIVISIBLE = 32,        /* channels are not a multiple of groups */
    FASTNORM_TOO_FEW_VALUES = 33,       /* running_var moves on one value per channel */
    FASTNORM_BAD_GEOMETRY = 34,         /* s is above 1, and one of o, g and i too */
    FASTNORM_BAD_EPS = 40,              /* eps or momentum is not a finite number */
    FASTNORM_OVERLAP = 50,              /* an output overlaps another buffer */
    FASTNORM_WORKSPACE_TOO_SMALL = 60,  /* see fastnorm_workspace_size */
    FASTNORM_OUT_OF_MEMORY = 61
} fastnorm_status;

/* A constant English sentence for a status; for an unknown number, one that says so. */
FASTNORM_API const char *fastnorm_status_string(fastnorm_status status);

/* ---- Types ----------------------------------------------------------------------------- */

/* Arithmetic is in float32 for all but float64, and sums are in float64 where they are long. */
typedef enum fastnorm_dtype {
    FASTNORM_FLOAT32 = 1,
    FASTNORM_FLOAT64 = 2,
    FASTNORM_FLOAT16 = 3, /* IEEE binary16 */
    FASTNORM_BFLOAT16 = 4 /* the upper half of a float32 */
} fastnorm_dtype;

/* What a detailed call applies last, named as in PyTorch. */
typedef enum fastnorm_activation {
    FASTNORM_NO_ACTIVATION = 0,
    FASTNORM_RELU = 1,
    FASTNORM_LEAKY_RELU = 2, /* z where z > 0, else negative_slope*z */
    FASTNORM_SILU = 3,       /* z/(1 + exp(-z)) */
    FASTNORM_GELU = 4,       /* z*(1 + erf(z/sqrt(2)))/2 */
    FASTNORM_GELU_TANH = 5   /* z*(1 + tanh(sqrt(2/pi)*(z + 0.044715*z^3)))/2 */
} fastnorm_activation;

/* Where the channels are: behind the batch, or last. */
typedef enum fastnorm_layout { FASTNORM_NCHW = 1, FASTNORM_NHWC = 2 } fastnorm_layout;

/* Levels of x86-64; on another processor only FASTNORM_ISA_BEST. */
typedef enum fastnorm_isa {
    FASTNORM_ISA_BEST = 0, /* what the processor has, at most $FASTNORM_ISA (v2, v3 or v4) */
    FASTNORM_ISA_V2 = 2,
    FASTNORM_ISA_V3 = 3,
    FASTNORM_ISA_V4 = 4
} fastnorm_isa;

/* A thread pool: call body(context, index) for every index in [0, n), in any order, on any
 * threads, and return when all are done. `user` is fastnorm_options.parallel_for_user. */
typedef void (*fastnorm_parallel_for)(void *user, int64_t n,
                                      void (*body)(void *context, int64_t index), void *context);

/* How a call runs. NULL in place of it means all defaults; so does a zeroed one with
 * struct_size set. It never changes a result. */
typedef struct fastnorm_options {
    size_t struct_size;    /* sizeof(fastnorm_options) */
    int32_t num_threads;   /* at most so many; 0: as many as the processors this process has */
    int32_t isa;           /* a fastnorm_isa */
    void *workspace;       /* NULL: the call allocates and frees what it needs */
    size_t workspace_size; /* bytes at workspace */
    fastnorm_parallel_for parallel_for; /* NULL: the library's own threads */
    void *parallel_for_user;
} fastnorm_options;

/* ======================================================================================
 * Simple calls
 *
 * x, y, dy, dx are arrays of `dtype`; weight, bias, dweight, dbias have the same type and
 * `channels` (for layer and RMS norm: `columns`) elements. mean and rstd are float64
 * whatever dtype is: one per channel for batch norm, (n, channels) for instance norm,
 * (n, groups) for group norm, one per row for layer and RMS norm. rstd = 1/sqrt(var + eps),
 * var the population variance.
 *
 * weight, bias, mean, rstd, dweight and dbias may be NULL: no weight is 1, no bias 0, and an
 * output that is NULL is not computed. In a backward, mean and rstd are the forward's, and
 * required (RMS norm has no mean).
 * ====================================================================================== */

/* Ioffe and Szegedy 2015, algorithm 1: statistics of each channel over n and spatial. */
FASTNORM_API fastnorm_status fastnorm_batch_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options);

/* The same with statistics that are known: algorithm 2. running_* have `dtype`. */
FASTNORM_API fastnorm_status fastnorm_batch_norm_inference(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *running_mean, const void *running_var,
    const void *weight, const void *bias, double eps,
    void *y, const fastnorm_options *options);

/* Gradients of fastnorm_batch_norm; with the formula of fastnorm_backward. */
FASTNORM_API fastnorm_status fastnorm_batch_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options);

/* Ulyanov et al. 2016: statistics of each (sample, channel) over spatial. */
FASTNORM_API fastnorm_status fastnorm_instance_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options);

/* Gradients of fastnorm_instance_norm. */
FASTNORM_API fastnorm_status fastnorm_instance_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options);

/* Wu and He 2018: statistics of each (sample, group) over channels/groups and spatial. */
FASTNORM_API fastnorm_status fastnorm_group_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    int64_t groups, const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options);

/* Gradients of fastnorm_group_norm. */
FASTNORM_API fastnorm_status fastnorm_group_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    int64_t groups, const void *dy, const void *x, const void *weight, const double *mean,
    const double *rstd, void *dx, void *dweight, void *dbias, const fastnorm_options *options);

/* Ba et al. 2016: statistics of each row. */
FASTNORM_API fastnorm_status fastnorm_layer_norm(
    fastnorm_dtype dtype, int64_t rows, int64_t columns,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options);

/* Gradients of fastnorm_layer_norm. */
FASTNORM_API fastnorm_status fastnorm_layer_norm_backward(
    fastnorm_dtype dtype, int64_t rows, int64_t columns,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options);

/* Zhang and Sennrich 2019: y = x * rstd * weight, rstd = 1/sqrt(mean(x*x) + eps). */
FASTNORM_API fastnorm_status fastnorm_rms_norm(
    fastnorm_dtype dtype, int64_t rows, int64_t columns, const void *x, const void *weight,
    double eps, void *y, double *rstd, const fastnorm_options *options);

/* Gradients of fastnorm_rms_norm. */
FASTNORM_API fastnorm_status fastnorm_rms_norm_backward(
    fastnorm_dtype dtype, int64_t rows, int64_t columns, const void *dy, const void *x,
    const void *weight, const double *rstd, void *dx, void *dweight,
    const fastnorm_options *options);

/* ======================================================================================
 * Detailed calls: everything above is one of these two, on one view of the input,
 *
 *     x[b][o][g][k][i]    statistics over o, k and i: one for each (b, g)
 *                         weight and bias: one for each (g, k)
 *
 *                              b         o                g   k    i
 *     batch norm, NCHW         1         n                c   1    spatial
 *     batch norm, NHWC         1         n*spatial        c   1    1
 *     instance norm, NCHW      n         1                c   1    spatial
 *     instance norm, NHWC      n         spatial          c   1    1
 *     group norm, NCHW         n         1                G   c/G  spatial
 *     group norm, NHWC         n         spatial          G   c/G  1
 *     layer norm, RMS norm     rows      1                1   D    1
 *
 * Every other assignment computes too: a new norm is a new geometry.
 * ====================================================================================== */

/* The sizes of the view; every product of them must fit the address space. */
typedef struct fastnorm_geometry {
    int64_t b, o, g, k, i;
    /* Sets side by side: neighbouring values are those of s sets in turn, x[b][o][g][k][i][s], with
     * statistics for each (b, g, s). 0 is 1, and more only where o, g and i are 1: layer norm over
     * an axis that others follow, such as the channels of NCHW, is {n, 1, 1, c, 1, spatial}. */
    int64_t s;
} fastnorm_geometry;

/* How the statistics are taken; or'ed. */
typedef enum fastnorm_flags {
    FASTNORM_NO_MEAN = 1,     /* the mean is taken as 0, as RMS norm does */
    FASTNORM_GIVEN_STATISTICS = 2, /* forward: normalize with running_mean and running_var (b must
                                 be 1); backward: mean and rstd are constants, dx = dy*rstd*weight */
    FASTNORM_BIASED_RUNNING_VAR = 4 /* running_var moves by the population variance (Keras,
                                 ONNX), not by the unbiased one (PyTorch) */
} fastnorm_flags;

/* What a forward reads and writes. Zeroed memory with struct_size set is a start. */
typedef struct fastnorm_forward_args {
    size_t struct_size;  /* sizeof(fastnorm_forward_args) */
    int32_t dtype;       /* of x and y */
    int32_t param_dtype; /* of weight, bias, running_mean, running_var; 0: dtype */
    int32_t flags;       /* of fastnorm_flags, or'ed */
    int32_t activation;  /* a fastnorm_activation */
    double negative_slope;
    double eps;
    double momentum;     /* running = (1 - momentum)*running + momentum*batch */
    const void *x;
    void *y;
    const void *weight;
    const void *bias;
    void *running_mean;  /* [g]. Updated in place with the mean over b of the statistics, */
    void *running_var;   /* unless FASTNORM_GIVEN_STATISTICS. Each may be NULL */
    double *mean;        /* [b][g][s], outputs, each may be NULL */
    double *var;
    double *rstd;
    const void *residual; /* like x, or NULL */
    void *sum;            /* like x, or NULL: see fastnorm_forward */
    const uint8_t *mask;  /* [b][o][i][s], or NULL: see below */
} fastnorm_forward_args;

/* What a backward reads and writes. */
typedef struct fastnorm_backward_args {
    size_t struct_size;  /* sizeof(fastnorm_backward_args) */
    int32_t dtype;       /* of dy, x and dx */
    int32_t param_dtype; /* of weight, dweight, dbias; 0: dtype */
    int32_t flags;
    int32_t activation;  /* the forward's */
    double negative_slope;
    const void *dy;
    const void *x;
    const void *weight;
    const double *mean;  /* [b][g][s]; NULL with FASTNORM_NO_MEAN */
    const double *rstd;  /* [b][g][s] */
    void *dx;
    void *dweight;       /* [g][k], may be NULL */
    void *dbias;         /* [g][k], may be NULL */
    const void *bias;     /* with an activation, the forward's bias and residual; else unused */
    const void *residual;
    void *dresidual;      /* like x, or NULL: see fastnorm_backward */
    const void *dsum;     /* like x, or NULL; only where o, i and s are 1 */
    const uint8_t *mask;  /* the forward's */
} fastnorm_backward_args;

/* A mask says with a byte for each (b, o, i, s) which values count: those whose byte is not 0. The
 * others, padding, belong to no set, whatever they hold, NaN too: neither statistics nor gradients
 * of parameters meet them, and y, sum, dx and dresidual are 0 there. A set without values has
 * statistics of 0 (rstd too) and moves no running statistic; a single value moves running_var by 0.
 * For an array (N, C, spatial...) or (N, spatial..., C) it is an array (N, spatial...). */

/* The mask of padded sequences: (n, length) bytes, 1 for the first lengths[j] of row j and else 0.
 * A length below 0 is FASTNORM_NEGATIVE_SIZE, one above `length` FASTNORM_SIZE_OVERFLOW. */
FASTNORM_API fastnorm_status fastnorm_mask_of_lengths(int64_t n, int64_t length,
                                                      const int64_t *lengths, uint8_t *mask);

/* y = activation((x - mean)*rstd*weight + bias + residual). Statistics of an empty set are 0.
 *
 * Where `sum` is not NULL (o, i and s must be 1, statistics not given), the residual is added before
 * instead: sum = x + residual, rounded to dtype, is normalized in the place of x. It may be x or
 * the residual; y may be either too, but not sum. */
FASTNORM_API fastnorm_status fastnorm_forward(const fastnorm_geometry *geometry,
                                              const fastnorm_forward_args *args,
                                              const fastnorm_options *options);

/* With xhat = (x - mean)*rstd, gy = dy*weight and means over (o, k, i):
 *     dx = rstd*(gy - mean(gy) - xhat*mean(gy*xhat))
 *     dweight[g][k] = sum over (b, o, i) of dy*xhat,  dbias[g][k] = the same sum of dy
 *
 * With an activation, dy stands in these for dz = dy*activation'(z), z the activation's input, which
 * is computed again from x, mean, rstd, weight, bias and residual. dz is also the residual's
 * gradient: it is written to dresidual, which may be dy or residual (without an activation it is dy
 * itself, and dresidual must be NULL). Without dresidual, dx holds dz for a while, and must be
 * neither x nor dsum. dz is rounded to dtype in either case.
 *
 * A forward with `sum` has its sum as x here. dsum, what else arrived at the sum as a gradient, is
 * added to dx, which is then the gradient of x and of the residual; dx may else be dsum. */
FASTNORM_API fastnorm_status fastnorm_backward(const fastnorm_geometry *geometry,
                                               const fastnorm_backward_args *args,
                                               const fastnorm_options *options);

/* Bytes that a workspace must have for any forward or backward on this geometry. */
FASTNORM_API fastnorm_status fastnorm_workspace_size(const fastnorm_geometry *geometry,
                                                     fastnorm_dtype dtype, size_t *bytes);

/* The level that FASTNORM_ISA_BEST stands for, by name: "v2", "v3", "v4" or "baseline". */
FASTNORM_API const char *fastnorm_isa_name(void);

#ifdef __cplusplus
}
#endif
#endif /* FASTNORM_H */
