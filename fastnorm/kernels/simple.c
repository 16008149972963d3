/* The simple calls of fastnorm.h, and the C twin of geometry.py: the only C file that knows
 * NCHW and NHWC. */
#include <string.h>

#include "task.h"

static fastnorm_status check(fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
                             int64_t groups)
{
    int64_t product;
    if (layout != FASTNORM_NCHW && layout != FASTNORM_NHWC) return FASTNORM_BAD_LAYOUT;
    if (n < 0 || channels < 0 || spatial < 0 || groups < 0) return FASTNORM_NEGATIVE_SIZE;
    if (groups == 0 ? channels != 0 : channels % groups != 0) return FASTNORM_NOT_DIVISIBLE;
    if (__builtin_mul_overflow(n, spatial, &product)) return FASTNORM_SIZE_OVERFLOW;
    return FASTNORM_OK;
}

/* Statistics over the whole batch. */
static fastnorm_geometry batch_geometry(fastnorm_layout layout, int64_t n, int64_t channels,
                                        int64_t spatial)
{
    fastnorm_geometry nchw = {1, n, channels, 1, spatial, 1};
    fastnorm_geometry nhwc = {1, n * spatial, channels, 1, 1, 1};
    return layout == FASTNORM_NCHW ? nchw : nhwc;
}

/* Statistics for each sample: groups == channels is instance norm. */
static fastnorm_geometry group_geometry(fastnorm_layout layout, int64_t n, int64_t channels,
                                        int64_t spatial, int64_t groups)
{
    int64_t size = groups ? channels / groups : 0;
    fastnorm_geometry nchw = {n, 1, groups, size, spatial, 1};
    fastnorm_geometry nhwc = {n, spatial, groups, size, 1, 1};
    return layout == FASTNORM_NCHW ? nchw : nhwc;
}

fastnorm_status fastnorm_mask_of_lengths(int64_t n, int64_t length, const int64_t *lengths,
                                         uint8_t *mask)
{
    int64_t product;
    if (n < 0 || length < 0) return FASTNORM_NEGATIVE_SIZE;
    if (__builtin_mul_overflow(n, length, &product)) return FASTNORM_SIZE_OVERFLOW;
    if ((n && !lengths) || (product && !mask)) return FASTNORM_NULL_POINTER;
    for (int64_t j = 0; j < n; j++) {
        if (lengths[j] < 0) return FASTNORM_NEGATIVE_SIZE;
        if (lengths[j] > length) return FASTNORM_SIZE_OVERFLOW;
    }
    for (int64_t j = 0; product && j < n; j++) {
        memset(mask + j * length, 1, (size_t)lengths[j]);
        memset(mask + j * length + lengths[j], 0, (size_t)(length - lengths[j]));
    }
    return FASTNORM_OK;
}

static fastnorm_status forward(fastnorm_geometry geometry, fastnorm_dtype dtype, int32_t flags,
                               const void *x, const void *running_mean, const void *running_var,
                               const void *weight, const void *bias, double eps, void *y,
                               double *mean, double *rstd, const fastnorm_options *options)
{
    fastnorm_forward_args args = {.struct_size = sizeof args, .dtype = dtype, .flags = flags,
                                  .eps = eps, .x = x, .y = y, .weight = weight, .bias = bias,
                                  .running_mean = (void *)running_mean,
                                  .running_var = (void *)running_var, .mean = mean, .rstd = rstd};
    return fastnorm_forward(&geometry, &args, options);
}

static fastnorm_status backward(fastnorm_geometry geometry, fastnorm_dtype dtype, int32_t flags,
                                const void *dy, const void *x, const void *weight,
                                const double *mean, const double *rstd, void *dx, void *dweight,
                                void *dbias, const fastnorm_options *options)
{
    fastnorm_backward_args args = {.struct_size = sizeof args, .dtype = dtype, .flags = flags,
                                   .dy = dy, .x = x, .weight = weight, .mean = mean, .rstd = rstd,
                                   .dx = dx, .dweight = dweight, .dbias = dbias};
    return fastnorm_backward(&geometry, &args, options);
}

fastnorm_status fastnorm_batch_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options)
{
    fastnorm_status status = check(layout, n, channels, spatial, 1);
    if (status != FASTNORM_OK) return status;
    return forward(batch_geometry(layout, n, channels, spatial), dtype, 0, x, NULL, NULL, weight,
                   bias, eps, y, mean, rstd, options);
}

fastnorm_status fastnorm_batch_norm_inference(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *running_mean, const void *running_var,
    const void *weight, const void *bias, double eps,
    void *y, const fastnorm_options *options)
{
    fastnorm_status status = check(layout, n, channels, spatial, 1);
    if (status != FASTNORM_OK) return status;
    return forward(batch_geometry(layout, n, channels, spatial), dtype, FASTNORM_GIVEN_STATISTICS,
                   x, running_mean, running_var, weight, bias, eps, y, NULL, NULL, options);
}

fastnorm_status fastnorm_batch_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options)
{
    fastnorm_status status = check(layout, n, channels, spatial, 1);
    if (status != FASTNORM_OK) return status;
    return backward(batch_geometry(layout, n, channels, spatial), dtype, 0, dy, x, weight, mean,
                    rstd, dx, dweight, dbias, options);
}

fastnorm_status fastnorm_group_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    int64_t groups, const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options)
{
    fastnorm_status status = check(layout, n, channels, spatial, groups);
    if (status != FASTNORM_OK) return status;
    return forward(group_geometry(layout, n, channels, spatial, groups), dtype, 0, x, NULL, NULL,
                   weight, bias, eps, y, mean, rstd, options);
}

fastnorm_status fastnorm_group_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    int64_t groups, const void *dy, const void *x, const void *weight, const double *mean,
    const double *rstd, void *dx, void *dweight, void *dbias, const fastnorm_options *options)
{
    fastnorm_status status = check(layout, n, channels, spatial, groups);
    if (status != FASTNORM_OK) return status;
    return backward(group_geometry(layout, n, channels, spatial, groups), dtype, 0, dy, x, weight,
                    mean, rstd, dx, dweight, dbias, options);
}

fastnorm_status fastnorm_instance_norm(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options)
{
    return fastnorm_group_norm(dtype, layout, n, channels, spatial, channels, x, weight, bias, eps,
                               y, mean, rstd, options);
}

fastnorm_status fastnorm_instance_norm_backward(
    fastnorm_dtype dtype, fastnorm_layout layout, int64_t n, int64_t channels, int64_t spatial,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options)
{
    return fastnorm_group_norm_backward(dtype, layout, n, channels, spatial, channels, dy, x,
                                        weight, mean, rstd, dx, dweight, dbias, options);
}

static fastnorm_geometry row_geometry(int64_t rows, int64_t columns)
{
    fastnorm_geometry geometry = {rows, 1, 1, columns, 1, 1};
    return geometry;
}

fastnorm_status fastnorm_layer_norm(
    fastnorm_dtype dtype, int64_t rows, int64_t columns,
    const void *x, const void *weight, const void *bias, double eps,
    void *y, double *mean, double *rstd, const fastnorm_options *options)
{
    return forward(row_geometry(rows, columns), dtype, 0, x, NULL, NULL, weight, bias, eps, y, mean,
                   rstd, options);
}

fastnorm_status fastnorm_layer_norm_backward(
    fastnorm_dtype dtype, int64_t rows, int64_t columns,
    const void *dy, const void *x, const void *weight, const double *mean, const double *rstd,
    void *dx, void *dweight, void *dbias, const fastnorm_options *options)
{
    return backward(row_geometry(rows, columns), dtype, 0, dy, x, weight, mean, rstd, dx, dweight,
                    dbias, options);
}

fastnorm_status fastnorm_rms_norm(
    fastnorm_dtype dtype, int64_t rows, int64_t columns, const void *x, const void *weight,
    double eps, void *y, double *rstd, const fastnorm_options *options)
{
    return forward(row_geometry(rows, columns), dtype, FASTNORM_NO_MEAN, x, NULL, NULL, weight, NULL,
                   eps, y, NULL, rstd, options);
}

fastnorm_status fastnorm_rms_norm_backward(
    fastnorm_dtype dtype, int64_t rows, int64_t columns, const void *dy, const void *x,
    const void *weight, const double *rstd, void *dx, void *dweight,
    const fastnorm_options *options)
{
    return backward(row_geometry(rows, columns), dtype, FASTNORM_NO_MEAN, dy, x, weight, NULL, rstd,
                    dx, dweight, NULL, options);
}
