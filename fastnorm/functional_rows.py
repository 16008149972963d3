"""Layer and RMS norm as functions: of the last axes, or of others that follow each other.

What all functions share, layout but here, is told in functional.py.
"""

from fastnorm import call, geometry
from fastnorm.backends import NO_MEAN, ROWS
from fastnorm.checks import check_fused, check_input, check_ints, check_mask, check_trailing
from fastnorm.device import DeviceArray
from fastnorm.dtypes import TABLE


def _normalized_shape(name, x, normalized_shape, axis):
    """(shape, statistics' shape, channel_order, shape_of) of the axes that are normalized."""
    if axis is None and type(normalized_shape) is int and x.shape[-1:] == (normalized_shape,):
        return (normalized_shape,), x.shape[:-1], None, _last_axis
    if normalized_shape is None:
        if axis is None:
            raise TypeError(
                f"{name}: normalized_shape and axis are None, expected one of them; did you mean"
                " axis=-1?"
            )
        axes = check_ints(name, "axis", axis)
        normalized_shape = [x.shape[a] for a in axes if -x.ndim <= a < x.ndim]
    shape = check_ints(name, "normalized_shape", normalized_shape)
    start = x.ndim - len(shape) if axis is None else _first_axis(name, x, axis, len(shape))
    stop = start + len(shape)
    if not shape or start < 0 or x.shape[start:stop] != shape:
        where = "the trailing axes" if axis is None else f"axis {axis}"
        raise ValueError(f"{name}: normalized_shape is {shape}, expected {where} of x {x.shape}")
    others = x.shape[:start] + x.shape[stop:]
    if stop == x.ndim:
        ndim = len(shape)
        return shape, others, None, lambda view_shape, _: geometry.rows(view_shape, ndim)
    if isinstance(x, DeviceArray):
        raise ValueError(f"{name}: x is on a GPU, where only trailing axes are normalized yet")
    if (start, stop) == (1, 2):
        # The channels of an image; where its memory has them last, they are rows.
        return shape, others, True, lambda view_shape, first: (
            geometry.across(view_shape, 1, 2) if first else geometry.rows(view_shape, 1)
        )
    return shape, others, None, lambda view_shape, _: geometry.across(view_shape, start, stop)


def _last_axis(view_shape, _):
    return geometry.rows(view_shape, 1)


def _first_axis(name, x, axis, count):
    """The first of `count` axes that follow each other."""
    axes = check_ints(name, "axis", axis)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(f"{name}: axis is {axis!r}, expected axes of x {x.shape}")
    axes = [a % x.ndim for a in axes]
    if not axes or axes != list(range(axes[0], axes[0] + count)):
        raise ValueError(
            f"{name}: axis is {axis!r}, expected {count} axes of x {x.shape}, one for each of"
            " normalized_shape, that follow each other"
        )
    return axes[0]


def _only_rows(name, channel_order, shape_of, x, **arrays):
    """Sums before the normalization are taken where the trailing axes are normalized."""
    for what, array in arrays.items():
        if array is not None and shape_of(x.shape, channel_order).s > 1:
            raise ValueError(
                f"{name}: {what} with an axis that is not the last, expected None; add it apart"
            )


def layer_norm(
    x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, out=None, return_stats=False,
    backend=None, num_threads=None, residual=None, out_sum=None, activation=None,
    negative_slope=0.01, approximate="none", axis=None, mask=None, lengths=None,
):
    """Normalize over the trailing axes, or over others.

    Formula, with sum = x + residual (rounded to x's dtype):
        y = activation((sum - mean) / sqrt(var + eps) * weight + bias)

    Args:
        x: (*leading, *normalized_shape), a float type (see fastnorm.dtypes).
        normalized_shape: an int or a sequence of ints; None where axis tells which.
        weight, bias: of shape normalized_shape, or None for 1 and 0.
        out_sum: receives the sum; may be x or residual.
        axis: the axes that are normalized, in place of the last: one, or several that follow each
            other. axis=1 normalizes the channels of (N, C, *spatial) at every place, as it lies,
            without a transpose. No residual then, unless they are the last axes.

    Returns:
        y like x; with a residual (y, sum). With return_stats also the Statistics of the leading
        shape, last.

    Source:
        Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    if axis is mask is lengths is None:
        y = call.whole_forward(
            ROWS, x, out, None, normalized_shape, weight, bias, eps, None, None, 0.0, 0,
            return_stats, backend, num_threads, activation, negative_slope, approximate, residual,
            out_sum,
        )
        if y is not None:
            return y
    name = "layer_norm"
    x = check_input(name, x)
    shape, others, order, shape_of = _normalized_shape(name, x, normalized_shape, axis)
    check_trailing(name, x, shape, weight=weight, bias=bias)
    after = activation, negative_slope, approximate
    _only_rows(name, order, shape_of, x, residual=residual)
    valid = check_mask(name, x, mask, lengths, order, others)
    return call.forward(
        name, x, out, order, shape_of, weight, bias, eps, others, return_stats, 0, backend,
        num_threads, fused=_with_sum(name, x, residual, out_sum, valid, *after),
        with_sum=True, out_sum=out_sum,
    )


def _with_sum(name, x, residual, out_sum, valid, *after):
    if out_sum is not None and residual is None:
        raise ValueError(f"{name}: out_sum without residual, expected both or none")
    return check_fused(name, x, *after, residual, valid=valid)


def layer_norm_backward(
    dy, x, stats, normalized_shape=None, weight=None, *, out=None, backend=None, num_threads=None,
    dsum=None, bias=None, activation=None, negative_slope=0.01, approximate="none", axis=None,
    mask=None, lengths=None,
):
    """Gradients of layer_norm; the formula of batch_norm_backward with means over a row.

    Args:
        dy, x: (*leading, *normalized_shape), of one dtype; x is the sum where there was a residual.
        stats: Statistics of the leading shape from the forward.
        dsum: what else arrived at the sum as a gradient, like x: added to dx.
        axis: the forward's.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape normalized_shape. dx is the gradient of
        the forward's x and of its residual.
    """
    if axis is mask is lengths is None:
        gradients = call.whole_backward(
            ROWS, dy, x, stats, None, normalized_shape, weight, bias, out, 0, backend, num_threads,
            activation, negative_slope, approximate, None, None, dsum,
        )
        if gradients is not None:
            return gradients
    name = "layer_norm_backward"
    x = check_input(name, x)
    shape, others, order, shape_of = _normalized_shape(name, x, normalized_shape, axis)
    check_trailing(name, x, shape, weight=weight, bias=bias)
    _only_rows(name, order, shape_of, x, dsum=dsum)
    fused = check_fused(
        name, x, activation, negative_slope, approximate, None, bias, dsum,
        check_mask(name, x, mask, lengths, order, others),
    )
    return call.backward(
        name, dy, x, stats, weight, out, order, shape_of, others, shape, 0, backend, num_threads,
        True, fused,
    )


def rms_norm(
    x, normalized_shape=None, weight=None, eps=None, *, out=None, return_stats=False, backend=None,
    num_threads=None, residual=None, out_sum=None, activation=None, negative_slope=0.01,
    approximate="none", axis=None, mask=None, lengths=None,
):
    """Divide by the root of the mean square over the trailing axes, or over others.

    Formula, with sum = x + residual (rounded to x's dtype):
        y = activation(sum / sqrt(mean(sum*sum) + eps) * weight)

    Args:
        x: (*leading, *normalized_shape), a float type (see fastnorm.dtypes).
        normalized_shape: an int or a sequence of ints; None where axis tells which.
        weight: of shape normalized_shape, or None for 1.
        eps: None is the machine epsilon of x's dtype.
        out_sum: receives the sum; may be x or residual.
        axis: the axes that are normalized, in place of the last: one, or several that follow each
            other. axis=1 normalizes the channels of (N, C, *spatial) at every place, as it lies,
            without a transpose. No residual then, unless they are the last axes.

    Returns:
        y like x; with a residual (y, sum). With return_stats also the Statistics of the leading
        shape, last: mean 0, var the mean square.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    if axis is mask is lengths is None:
        y = call.whole_forward(
            ROWS, x, out, None, normalized_shape, weight, None, eps, None, None, 0.0, NO_MEAN,
            return_stats, backend, num_threads, activation, negative_slope, approximate, residual,
            out_sum,
        )
        if y is not None:
            return y
    name = "rms_norm"
    x = check_input(name, x)
    shape, others, order, shape_of = _normalized_shape(name, x, normalized_shape, axis)
    check_trailing(name, x, shape, weight=weight)
    if eps is None:
        eps = x.eps if isinstance(x, DeviceArray) else TABLE[x.dtype].eps
    after = activation, negative_slope, approximate
    _only_rows(name, order, shape_of, x, residual=residual)
    valid = check_mask(name, x, mask, lengths, order, others)
    return call.forward(
        name, x, out, order, shape_of, weight, None, eps, others, return_stats, NO_MEAN, backend,
        num_threads, fused=_with_sum(name, x, residual, out_sum, valid, *after),
        with_sum=True, out_sum=out_sum,
    )


def rms_norm_backward(
    dy, x, stats, normalized_shape=None, weight=None, *, out=None, backend=None, num_threads=None,
    dsum=None, activation=None, negative_slope=0.01, approximate="none", axis=None, mask=None,
    lengths=None,
):
    """Gradients of rms_norm.

    Formula, with xhat = x*rstd, dz = dy*activation'(xhat*weight) and gy = dz*weight:
        dx = rstd * (gy - xhat*mean(gy*xhat)) + dsum, dweight = sum over rows of dz*xhat

    Args:
        dy, x: (*leading, *normalized_shape), of one dtype; x is the sum where there was a residual.
        stats: Statistics of the leading shape from the forward.
        dsum: what else arrived at the sum as a gradient, like x: added to dx.
        axis: the forward's.

    Returns:
        Gradients(dx, dweight, None), dweight of shape normalized_shape.
    """
    if axis is mask is lengths is None:
        gradients = call.whole_backward(
            ROWS, dy, x, stats, None, normalized_shape, weight, None, out, NO_MEAN, backend,
            num_threads, activation, negative_slope, approximate, None, None, dsum,
        )
        if gradients is not None:
            return gradients
    name = "rms_norm_backward"
    x = check_input(name, x)
    shape, others, order, shape_of = _normalized_shape(name, x, normalized_shape, axis)
    check_trailing(name, x, shape, weight=weight)
    _only_rows(name, order, shape_of, x, dsum=dsum)
    fused = check_fused(
        name, x, activation, negative_slope, approximate, dsum=dsum,
        valid=check_mask(name, x, mask, lengths, order, others),
    )
    return call.backward(
        name, dy, x, stats, weight, out, order, shape_of, others, shape, NO_MEAN, backend,
        num_threads, False, fused,
    )
