"""The normalizations as functions: check, find the geometry, call a backend.

Every argument is checked, by checks.py, before anything is written. Names, order and defaults
follow torch.nn.functional. Arrays are NumPy's, or any library's on a GPU (see device.py), and
results are of the same kind. Shapes below are for layout="NCHW"; with "NHWC" the channels are the
last axis. In all of them:

    layout        "NCHW" or "channels_first": channels at axis 1, at any rank; "NHWC" or
                  "channels_last": channels at the last axis. It is the order of the shape; an
                  array whose memory has the other order is computed as it lies, and its result
                  lies the same way.
    out           receives the result and is returned: an array of x's shape and dtype, which
                  may be x itself
    return_stats  also return the Statistics, which the backward needs
    backend       None (the first that can), "native", "numba" or "reference"; "cuda" for arrays
                  on a GPU
    num_threads   None (as set_num_threads says), 0 (all processors) or a number
    activation    applied last: None, "relu", "leaky_relu" (with negative_slope), "silu", or "gelu"
                  (approximate="none" or "tanh"), named as in torch.nn.functional
    residual      an array like x that is added before the activation (by layer_norm and rms_norm:
                  to x, before they normalize). It and the activation cost no pass of their own.
                  Not on a GPU yet.

A backward is given the forward's bias, residual and activation, and finds the activation's input
again from x: nothing else has to be kept. The gradient in front of the activation is rounded to x's
dtype; where there is no residual whose gradient it is, out holds it for a while, and must not be x.
    Raises        TypeError for a wrong type or dtype, ValueError for a wrong shape or value
"""

import numpy as np

from fastnorm import backends, config, geometry, on_device
from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS, NO_MEAN, NOTHING, Fused
from fastnorm.checks import (
    channels_first,
    check_channels,
    check_fused,
    check_input,
    check_number,
    check_out,
    check_trailing,
    check_writable,
    seen,
)
from fastnorm.device import DeviceArray
from fastnorm.dtypes import TABLE
from fastnorm.results import Gradients, GradientsWithResidual, Statistics

CONVENTIONS = ("torch", "keras")

# Most calls have nothing to look at closely, which compiled code sees sooner.
_plain = getattr(backends.load("native"), "plain", lambda *_: False)


def _in_one_type(*parameters):
    """The parameters as C-contiguous arrays of one dtype: float64 where they differ."""
    dtype = None
    ready = True
    for parameter in parameters:
        if parameter is not None:
            ready = ready and parameter.flags.c_contiguous and dtype in (None, parameter.dtype)
            dtype = parameter.dtype if dtype in (None, parameter.dtype) else np.dtype(np.float64)
    if ready:
        return parameters
    return tuple(None if p is None else np.ascontiguousarray(p, dtype) for p in parameters)


# ---- the two calls that all functions come down to ------------------------------------------


def _forward(
    name, x, out, channel_order, shape_of, weight, bias, eps, stats_shape, return_stats, flags,
    backend, num_threads, running=(None, None), momentum=0.0, fused=NOTHING, with_sum=False,
    out_sum=None,
):
    """Check what is common, compute y, and pack the result.

    channel_order is (layout is channels first) for arrays with a channel axis, else None;
    shape_of(shape, first) gives the geometry of a C-contiguous array. with_sum: the residual is
    added first, and the sum handed out.
    """
    eps = check_number(name, "eps", eps)
    num_threads = config.check_threads(name, num_threads)
    if isinstance(x, DeviceArray):
        return on_device.forward(
            name, x, out, channel_order, shape_of, weight, bias, eps, stats_shape, return_stats,
            flags, backend, running, momentum,
        )
    engine = config.choose(name, backend, x.dtype)
    parameters = (weight, bias, *running)
    total, residual = None, fused.residual
    if _plain(x, out, parameters, (residual,)) and (
        out_sum is None or _plain(x, out_sum, (*parameters, out), (residual,))
    ):
        view, first, is_out = x, channel_order, out is not None
        y = out if is_out else np.empty(x.shape, x.dtype)
        if with_sum and residual is not None:
            is_out_sum = out_sum is not None
            total = out_sum if is_out_sum else np.empty(x.shape, x.dtype)
            fused = Fused(fused.activation, fused.slope, residual, total)
    else:
        names = ("weight", "bias", "running_mean", "running_var")
        others = tuple(zip(names, parameters, strict=True))
        same = (("x", x), ("residual", residual))
        if out is not None:
            check_out(name, out, x, same, others)
        if out_sum is not None:
            check_out(name, out_sum, x, same, (*others, ("out", out)), "out_sum")
        view, first = geometry.as_it_lies(x, channel_order)
        y, is_out = _place(view, first, out, channel_order)
        parameters = _in_one_type(*parameters)
        if residual is not None:
            if with_sum:
                total, is_out_sum = _place(view, first, out_sum, channel_order)
            residual = _laid(residual, channel_order, first)
            fused = Fused(fused.activation, fused.slope, residual, total)
    sizes = shape_of(view.shape, first)
    mean = var = rstd = None
    moves = not flags & GIVEN_STATISTICS and (running[0] is not None or running[1] is not None)
    if return_stats or (moves and sizes.b > 1):
        mean, var, rstd = np.empty((3, sizes.b * sizes.g))
    engine.forward(
        sizes, view, y, parameters[0], parameters[1], eps, mean, var, rstd, parameters[2],
        parameters[3], momentum, flags, num_threads, fused,
    )
    if moves:
        for asked, moved in zip(running, parameters[2:], strict=True):
            if asked is not moved:
                asked[...] = moved
    results = (_hand_out(y, first, out, is_out, channel_order),)
    if total is not None:
        results += (_hand_out(total, first, out_sum, is_out_sum, channel_order),)
    if return_stats:
        given = bool(flags & GIVEN_STATISTICS)
        results += (Statistics(*(a.reshape(stats_shape) for a in (mean, var, rstd)), given),)
    return results if len(results) > 1 else results[0]


def _laid(array, channel_order, first):
    """An array like x as its view lies; a copy where it lies otherwise."""
    if channel_order is not None:
        array = geometry.as_asked(array, channel_order, first)
    return np.ascontiguousarray(array)


def _place(view, first, out, channel_order):
    """An array like view for the backend to write, and whether it is out's own memory."""
    if out is not None:
        lying, out_first = geometry.lying(out, channel_order)
        if lying is not None and out_first == first:
            return lying, True
    return np.empty(view.shape, view.dtype), False


def _hand_out(y, first, out, is_out, channel_order):
    """y in the axis order that was asked for, in the caller's array where there is one."""
    if is_out:
        return out
    if channel_order is not None:
        y = geometry.as_asked(y, first, channel_order)
    if out is None:
        return y
    out[...] = y
    return out


def _backward(
    name, dy, x, stats, weight, out, channel_order, shape_of, stats_shape, param_shape, flags,
    backend, num_threads, with_bias=True, fused=NOTHING, out_residual=None,
):
    dy = check_input(name, dy, "dy", like=x)
    num_threads = config.check_threads(name, num_threads)
    if isinstance(x, DeviceArray):
        return on_device.backward(
            name, dy, x, stats, weight, out, channel_order, shape_of, stats_shape, param_shape,
            flags, backend, with_bias,
        )
    engine = config.choose(name, backend, x.dtype)
    mean, rstd = (_statistic(name, stats, what, stats_shape) for what in ("mean", "rstd"))
    param_dtype = x.dtype if weight is None else weight.dtype
    # dz is written before dx is: into the residual's gradient, or in the place of dx.
    early = (x, fused.dsum) if fused.activation and fused.residual is None else ()
    plain = fused.residual is None and out_residual is None and _plain(
        x, out, (weight, fused.bias, *early), (dy, fused.dsum)
    )
    if not plain:
        _check_gradients_out(name, dy, x, weight, out, out_residual, fused)
    if getattr(stats, "given", False):
        flags |= GIVEN_STATISTICS
    if plain:
        view, grad, first, is_out = x, dy, channel_order, out is not None
        dx = out if is_out else np.empty(x.shape, x.dtype)
    else:
        view, first = geometry.as_it_lies(x, channel_order)
        grad = _laid(dy, channel_order, first)
        dx, is_out = _place(view, first, out, channel_order)
        weight, bias = _in_one_type(weight, fused.bias)
        if weight is None and bias is not None and bias.dtype != param_dtype:
            bias = bias.astype(np.float64)  # in which dweight and dbias then are, until the end
        fused, hand_out_residual = _fused_gradients(
            fused._replace(bias=bias), dy, view, first, out_residual, channel_order
        )
    sizes = shape_of(view.shape, first)
    parameter = fused.bias if weight is None else weight
    dweight = np.empty(param_shape, x.dtype if parameter is None else parameter.dtype)
    dbias = np.empty_like(dweight) if with_bias else None
    engine.backward(
        sizes, grad, view, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused
    )
    dx = _hand_out(dx, first, out, is_out, channel_order)
    dweight = dweight.astype(param_dtype, copy=False)
    dbias = dbias.astype(param_dtype, copy=False) if with_bias else None
    if fused.residual is None:
        return Gradients(dx, dweight, dbias)
    return GradientsWithResidual(dx, dweight, dbias, hand_out_residual())


def _check_gradients_out(name, dy, x, weight, out, out_residual, fused):
    others = (("weight", weight), ("bias", fused.bias))
    same = (("dy", dy), ("residual", fused.residual))
    if out_residual is not None:
        if fused.residual is None:
            raise ValueError(f"{name}: out_residual without residual, expected both or none")
        check_out(
            name, out_residual, x, same, (*others, ("x", x), ("out", out)), "out_residual"
        )
    if out is None:
        return
    # Who is read after out is first written must be apart from it.
    if fused.activation and fused.residual is None:
        others += (("x", x), ("dsum", fused.dsum))
    elif fused.residual is not None and not fused.activation and out_residual is None:
        others += (("dy, which is the residual's gradient", dy),)
        same = same[1:]
    check_out(name, out, x, (*same, ("x", x), ("dsum", fused.dsum)), others)


def _fused_gradients(fused, dy, view, first, out_residual, channel_order):
    """Fused as a backend takes it, and what hands the residual's gradient out afterwards."""
    laid = {
        what: _laid(getattr(fused, what), channel_order, first)
        for what in ("residual", "dsum")
        if getattr(fused, what) is not None
    }
    fused = fused._replace(**laid)
    if fused.residual is None:
        return fused, None
    if fused.activation:
        dresidual, is_out = _place(view, first, out_residual, channel_order)
        return fused._replace(dresidual=dresidual), lambda: _hand_out(
            dresidual, first, out_residual, is_out, channel_order
        )
    # Without an activation it is dy.
    if out_residual is not None:
        out_residual[...] = dy
        return fused, lambda: out_residual
    return fused, lambda: dy


def _statistic(name, stats, what, shape):
    array = getattr(stats, what, None)
    if array is None:
        raise TypeError(
            f"{name}: stats is a {type(stats).__name__}, expected the Statistics that the forward"
            " returns with return_stats=True"
        )
    array = np.asarray(array, np.float64, order="C")
    if array.shape != shape:
        raise ValueError(
            f"{name}: stats.{what} has shape {array.shape}, expected {shape};"
            " do they come from another input or another normalization?"
        )
    return array


# ---- batch norm ----------------------------------------------------------------------------


def batch_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, *, layout="NCHW", out=None, return_stats=False, backend=None, num_threads=None,
    convention="torch", residual=None, activation=None, negative_slope=0.01, approximate="none",
):
    """Normalize each channel over the batch and the spatial axes.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    mean and var (the population variance) are those of the channel's N*S values in training,
    else running_mean and running_var. In training the running statistics, each optional, are
    updated in place:

        "torch":  running = (1 - momentum)*running + momentum*batch, with the unbiased variance
        "keras":  running = momentum*running + (1 - momentum)*batch, with the population
                  variance, as Keras, ONNX and d2l have it

    Args:
        x: (N, C, *spatial), a float type (see fastnorm.dtypes).
        running_mean, running_var: (C,), required outside training.
        weight, bias: (C,), or None for 1 and 0.
        training: whether to use and record the statistics of x.
        momentum: see above.
        eps: added to the variance; in training above 0.
        convention: "torch" or "keras".

    Returns:
        y like x, or (y, Statistics of shape (C,)). An empty batch gives an empty result and
        leaves the running statistics alone.

    Raises:
        ValueError: also for one value per channel in training, and for running statistics
            that are missing outside training.

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """
    name = "batch_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(
        name, x, layout, first, running_mean=running_mean, running_var=running_var, weight=weight,
        bias=bias,
    )
    momentum = check_number(name, "momentum", momentum)
    flags = 0
    if convention not in CONVENTIONS:
        raise ValueError(f"{name}: convention is {convention!r}, expected 'torch' or 'keras'")
    if convention == "keras":
        momentum = 1.0 - momentum
        flags = BIASED_RUNNING_VAR
    if training:
        _check_training(name, x, channels, eps, weight, bias, running_mean, running_var)
    else:
        flags = GIVEN_STATISTICS
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"{name}: {missing} is None, expected an array of shape ({channels},) outside"
                " training; did you mean training=True?"
            )
    return _forward(
        name, x, out, first, geometry.batch, weight, bias, eps, (channels,), return_stats, flags,
        backend, num_threads, (running_mean, running_var), momentum,
        check_fused(name, x, activation, negative_slope, approximate, residual),
    )


def _check_training(name, x, sets, eps, weight, bias, running_mean, running_var):
    if check_number(name, "eps", eps) <= 0:
        raise ValueError(f"{name}: eps is {eps!r}, expected more than 0 in training")
    if x.size and x.size == sets:
        raise ValueError(
            f"{name}: x has shape {x.shape}, one value for each channel, expected more than one in"
            " training; did you mean training=False?"
        )
    if isinstance(x, DeviceArray):
        weight, bias, running_mean, running_var = (
            None if array is None else seen(array, x)
            for array in (weight, bias, running_mean, running_var)
        )
    others = (("x", x), ("weight", weight), ("bias", bias))
    if running_mean is not None:
        check_writable(
            name, "running_mean", running_mean, *others, ("running_var", running_var)
        )
    if running_var is not None:
        check_writable(name, "running_var", running_var, *others)


def batch_norm_backward(
    dy, x, stats, weight=None, *, layout="NCHW", out=None, backend=None, num_threads=None,
    bias=None, residual=None, out_residual=None, activation=None, negative_slope=0.01,
    approximate="none",
):
    """Gradients of batch_norm.

    Formula, with xhat = (x - mean)*rstd, dz = dy*activation'(xhat*weight + bias + residual),
    gy = dz*weight and means over a channel's values:
        dx = rstd * (gy - mean(gy) - xhat*mean(gy*xhat))
        dweight = sum(dz*xhat), dbias = sum(dz), dresidual = dz

    Where stats are running statistics, they are constants and dx = rstd*gy.

    Args:
        dy, x: (N, C, *spatial), of one dtype; x is the forward's input.
        stats: Statistics of shape (C,) from batch_norm(..., return_stats=True).
        weight, bias, residual, activation, negative_slope, approximate: as in the forward.
        out: receives dx; may be dy or x.
        out_residual: receives dresidual; may be dy or residual.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape (C,), whether or not there is a
        weight or a bias. With a residual GradientsWithResidual(dx, dweight, dbias, dresidual);
        without an activation dresidual is dy.
    """
    name = "batch_norm_backward"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight=weight, bias=bias)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual, bias)
    return _backward(
        name, dy, x, stats, weight, out, first, geometry.batch, (channels,), (channels,), 0,
        backend, num_threads, True, fused, out_residual,
    )


# ---- group and instance norm ----------------------------------------------------------------


def _groups(name, x, num_groups, first):
    channels = x.shape[geometry.channel_axis(first)]
    if isinstance(num_groups, bool) or not hasattr(num_groups, "__index__"):
        raise TypeError(f"{name}: num_groups is {num_groups!r}, expected an int")
    groups = int(num_groups)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{name}: num_groups is {groups}, expected a divisor of the {channels} channels of x"
            f" {x.shape}"
        )
    return groups, lambda shape, lies_first: geometry.group(shape, lies_first, groups)


def group_norm(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, layout="NCHW", out=None,
    return_stats=False, backend=None, num_threads=None, residual=None, activation=None,
    negative_slope=0.01, approximate="none",
):
    """Normalize each sample's groups of neighbouring channels over channels and space.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Args:
        x: (N, C, *spatial), a float type (see fastnorm.dtypes).
        num_groups: G, a divisor of C.
        weight, bias: (C,), or None for 1 and 0.

    Returns:
        y like x, or (y, Statistics of shape (N, G)).

    Source:
        Wu and He, "Group Normalization", 2018.
    """
    name = "group_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    check_channels(name, x, layout, first, weight=weight, bias=bias)
    groups, shape_of = _groups(name, x, num_groups, first)
    return _forward(
        name, x, out, first, shape_of, weight, bias, eps, (x.shape[0], groups), return_stats, 0,
        backend, num_threads,
        fused=check_fused(name, x, activation, negative_slope, approximate, residual),
    )


def group_norm_backward(
    dy, x, stats, num_groups, weight=None, *, layout="NCHW", out=None, backend=None,
    num_threads=None, bias=None, residual=None, out_residual=None, activation=None,
    negative_slope=0.01, approximate="none",
):
    """Gradients of group_norm; the formula of batch_norm_backward with means over a group.

    Args:
        dy, x: (N, C, *spatial), of one dtype.
        stats: Statistics of shape (N, G) from the forward.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape (C,), with a residual
        GradientsWithResidual.
    """
    name = "group_norm_backward"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight=weight, bias=bias)
    groups, shape_of = _groups(name, x, num_groups, first)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual, bias)
    return _backward(
        name, dy, x, stats, weight, out, first, shape_of, (x.shape[0], groups), (channels,), 0,
        backend, num_threads, True, fused, out_residual,
    )


def instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5, *, layout="NCHW", out=None, return_stats=False, backend=None,
    num_threads=None, residual=None, activation=None, negative_slope=0.01, approximate="none",
):
    """Normalize each channel of each sample over its spatial axes.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    With use_input_stats the running statistics, each optional, move by the mean over the batch
    of the samples' means and unbiased variances. Without, they normalize, as in batch_norm.

    Args:
        x: (N, C, *spatial), a float type (see fastnorm.dtypes).
        running_mean, running_var, weight, bias: (C,) or None.

    Returns:
        y like x, or (y, Statistics of shape (N, C)); (C,) without use_input_stats.

    Raises:
        ValueError: also for one value per channel and sample with use_input_stats.

    Source:
        Ulyanov et al., "Instance Normalization", 2016.
    """
    name = "instance_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(
        name, x, layout, first, running_mean=running_mean, running_var=running_var, weight=weight,
        bias=bias,
    )
    momentum = check_number(name, "momentum", momentum)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(
                f"{name}: running_mean or running_var is None, expected arrays of shape"
                f" ({channels},) with use_input_stats=False"
            )
        return _forward(
            name, x, out, first, geometry.batch, weight, bias, eps, (channels,), return_stats,
            GIVEN_STATISTICS, backend, num_threads, (running_mean, running_var), fused=fused,
        )
    _check_training(name, x, x.shape[0] * channels, eps, weight, bias, running_mean, running_var)
    _, shape_of = _groups(name, x, channels, first) if channels else (0, geometry.batch)
    return _forward(
        name, x, out, first, shape_of, weight, bias, eps, (x.shape[0], channels), return_stats, 0,
        backend, num_threads, (running_mean, running_var), momentum, fused,
    )


def instance_norm_backward(
    dy, x, stats, weight=None, *, layout="NCHW", out=None, backend=None, num_threads=None,
    bias=None, residual=None, out_residual=None, activation=None, negative_slope=0.01,
    approximate="none",
):
    """Gradients of instance_norm; the formula of batch_norm_backward with means over space.

    Args:
        dy, x: (N, C, *spatial), of one dtype.
        stats: Statistics from the forward: of shape (N, C), or (C,) where they were running
            ones.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape (C,), with a residual
        GradientsWithResidual.
    """
    name = "instance_norm_backward"
    if getattr(stats, "given", False):
        return batch_norm_backward(
            dy, x, stats, weight, layout=layout, out=out, backend=backend, num_threads=num_threads,
            bias=bias, residual=residual, out_residual=out_residual, activation=activation,
            negative_slope=negative_slope, approximate=approximate,
        )
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight=weight, bias=bias)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual, bias)
    _, shape_of = _groups(name, x, channels, first) if channels else (0, geometry.batch)
    return _backward(
        name, dy, x, stats, weight, out, first, shape_of, (x.shape[0], channels), (channels,), 0,
        backend, num_threads, True, fused, out_residual,
    )


# ---- layer and RMS norm ----------------------------------------------------------------------


def _normalized_shape(name, x, normalized_shape):
    try:
        if hasattr(normalized_shape, "__index__"):
            shape = (int(normalized_shape),)
        else:
            shape = tuple(int(size.__index__()) for size in normalized_shape)
    except (TypeError, AttributeError):
        raise TypeError(
            f"{name}: normalized_shape is {normalized_shape!r}, expected an int or several"
        ) from None
    if not shape or x.shape[-len(shape):] != shape:
        raise ValueError(
            f"{name}: normalized_shape is {shape}, expected the trailing axes of x {x.shape}"
        )
    ndim = len(shape)
    return shape, x.shape[:-ndim], lambda view_shape, _: geometry.rows(view_shape, ndim)


def layer_norm(
    x, normalized_shape, weight=None, bias=None, eps=1e-5, *, out=None, return_stats=False,
    backend=None, num_threads=None, residual=None, out_sum=None, activation=None,
    negative_slope=0.01, approximate="none",
):
    """Normalize over the trailing axes.

    Formula, with sum = x + residual (rounded to x's dtype):
        y = activation((sum - mean) / sqrt(var + eps) * weight + bias)

    Args:
        x: (*leading, *normalized_shape), a float type (see fastnorm.dtypes).
        normalized_shape: an int or a sequence of ints.
        weight, bias: of shape normalized_shape, or None for 1 and 0.
        out_sum: receives the sum; may be x or residual.

    Returns:
        y like x; with a residual (y, sum). With return_stats also the Statistics of the leading
        shape, last.

    Source:
        Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    name = "layer_norm"
    x = check_input(name, x)
    shape, leading, shape_of = _normalized_shape(name, x, normalized_shape)
    check_trailing(name, x, shape, weight=weight, bias=bias)
    after = activation, negative_slope, approximate
    return _forward(
        name, x, out, None, shape_of, weight, bias, eps, leading, return_stats, 0, backend,
        num_threads, fused=_with_sum(name, x, residual, out_sum, *after), with_sum=True,
        out_sum=out_sum,
    )


def _with_sum(name, x, residual, out_sum, *after):
    if out_sum is not None and residual is None:
        raise ValueError(f"{name}: out_sum without residual, expected both or none")
    return check_fused(name, x, *after, residual)


def layer_norm_backward(
    dy, x, stats, normalized_shape, weight=None, *, out=None, backend=None, num_threads=None,
    dsum=None, bias=None, activation=None, negative_slope=0.01, approximate="none",
):
    """Gradients of layer_norm; the formula of batch_norm_backward with means over a row.

    Args:
        dy, x: (*leading, *normalized_shape), of one dtype; x is the sum where there was a residual.
        stats: Statistics of the leading shape from the forward.
        dsum: what else arrived at the sum as a gradient, like x: added to dx.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape normalized_shape. dx is the gradient of
        the forward's x and of its residual.
    """
    name = "layer_norm_backward"
    x = check_input(name, x)
    shape, leading, shape_of = _normalized_shape(name, x, normalized_shape)
    check_trailing(name, x, shape, weight=weight, bias=bias)
    fused = check_fused(name, x, activation, negative_slope, approximate, None, bias, dsum)
    return _backward(
        name, dy, x, stats, weight, out, None, shape_of, leading, shape, 0, backend, num_threads,
        True, fused,
    )


def rms_norm(
    x, normalized_shape, weight=None, eps=None, *, out=None, return_stats=False, backend=None,
    num_threads=None, residual=None, out_sum=None, activation=None, negative_slope=0.01,
    approximate="none",
):
    """Divide by the root of the mean square over the trailing axes.

    Formula, with sum = x + residual (rounded to x's dtype):
        y = activation(sum / sqrt(mean(sum*sum) + eps) * weight)

    Args:
        x: (*leading, *normalized_shape), a float type (see fastnorm.dtypes).
        normalized_shape: an int or a sequence of ints.
        weight: of shape normalized_shape, or None for 1.
        eps: None is the machine epsilon of x's dtype.
        out_sum: receives the sum; may be x or residual.

    Returns:
        y like x; with a residual (y, sum). With return_stats also the Statistics of the leading
        shape, last: mean 0, var the mean square.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    name = "rms_norm"
    x = check_input(name, x)
    shape, leading, shape_of = _normalized_shape(name, x, normalized_shape)
    check_trailing(name, x, shape, weight=weight)
    if eps is None:
        eps = x.eps if isinstance(x, DeviceArray) else TABLE[x.dtype].eps
    after = activation, negative_slope, approximate
    return _forward(
        name, x, out, None, shape_of, weight, None, eps, leading, return_stats, NO_MEAN, backend,
        num_threads, fused=_with_sum(name, x, residual, out_sum, *after), with_sum=True,
        out_sum=out_sum,
    )


def rms_norm_backward(
    dy, x, stats, normalized_shape, weight=None, *, out=None, backend=None, num_threads=None,
    dsum=None, activation=None, negative_slope=0.01, approximate="none",
):
    """Gradients of rms_norm.

    Formula, with xhat = x*rstd, dz = dy*activation'(xhat*weight) and gy = dz*weight:
        dx = rstd * (gy - xhat*mean(gy*xhat)) + dsum, dweight = sum over rows of dz*xhat

    Args:
        dy, x: (*leading, *normalized_shape), of one dtype; x is the sum where there was a residual.
        stats: Statistics of the leading shape from the forward.
        dsum: what else arrived at the sum as a gradient, like x: added to dx.

    Returns:
        Gradients(dx, dweight, None), dweight of shape normalized_shape.
    """
    name = "rms_norm_backward"
    x = check_input(name, x)
    shape, leading, shape_of = _normalized_shape(name, x, normalized_shape)
    check_trailing(name, x, shape, weight=weight)
    fused = check_fused(name, x, activation, negative_slope, approximate, dsum=dsum)
    return _backward(
        name, dy, x, stats, weight, out, None, shape_of, leading, shape, NO_MEAN, backend,
        num_threads, False, fused,
    )
