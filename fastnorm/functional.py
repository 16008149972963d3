"""Batch, instance and group norm as functions: check, find the geometry, call a backend. (Layer
and RMS norm are in functional_rows.py.)

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
    mask, lengths which positions count: mask is an array of bool of shape (N, *spatial), True where
                  one does (layer and RMS norm: of the shape of the axes that are not normalized;
                  torch's key_padding_mask says the opposite), lengths, for one sequence axis, ints
                  of shape (N,): the first so many count.
                  What is left out belongs to no statistic, running ones included, and to no
                  gradient, whatever it holds; every output is 0 there. A set in which nothing
                  counts has statistics of 0, rstd too. A backward is given the forward's. Not on
                  a GPU yet.
    residual      an array like x that is added before the activation (by layer_norm and rms_norm:
                  to x, before they normalize). Natively it and the activation cost no pass of
                  their own. Not on a GPU yet.

A backward is given the forward's bias, residual and activation, and finds the activation's input
again from x: nothing else has to be kept. The gradient in front of the activation is rounded to x's
dtype; where there is no residual whose gradient it is, out holds it for a while, and must not be x.
    Raises        TypeError for a wrong type or dtype, ValueError for a wrong shape or value
"""

import numpy as np

from fastnorm import batch_statistics, call, geometry
from fastnorm.backends import (
    BATCH,
    BIASED_RUNNING_VAR,
    GIVEN_STATISTICS,
    GROUP,
    LEAKY_RELU,
    NOTHING,
)
from fastnorm.checks import (
    channels_first,
    check_channels,
    check_choice,
    check_flag,
    check_fused,
    check_input,
    check_int,
    check_mask,
    check_number,
    check_writable,
    seen,
)
from fastnorm.device import DeviceArray
from fastnorm.results import Statistics

# A call of arrays in which there is nothing to look at closely, without a mask and the like, is
# done whole by compiled code (whole.pyx). The rest below is for the others.

# ---- batch norm ----------------------------------------------------------------------------


def batch_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, *, layout="NCHW", out=None, return_stats=False, backend=None, num_threads=None,
    convention="torch", residual=None, activation=None, negative_slope=0.01, approximate="none",
    statistics=None, update=None, nan_policy="propagate", ghost_size=None, mask=None, lengths=None,
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
        statistics: which normalize, "batch" or "running"; None is as training says. Frozen batch
            norm is statistics="running", update=False whatever training is.
        update: whether the running statistics move, by those of the batch; None is as training
            says. With statistics="running" they move after they have normalized.
        nan_policy: what batch statistics that are not finite do to the running ones: "propagate",
            "skip" (a channel's stay as they are) or "raise" (FloatingPointError, and all stay; y
            has been written).
        ghost_size: samples that are normalized together, each ghost batch by its own statistics;
            the last may be shorter. The running statistics move by the mean over them, weighed by
            their samples. Ignored where the running ones normalize.

    Returns:
        y like x, or (y, Statistics of shape (C,), with a ghost_size (ghost batches, C)). An empty
        batch gives an empty result and leaves the running statistics alone.

    Raises:
        ValueError: also for one value per channel in training, and for running statistics
            that are missing outside training.

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2; ghost batches: Hoffer,
        Hubara and Soudry, "Train longer, generalize better", 2017.
    """
    if training is not True and training is not False:
        training = check_flag("batch_norm", "training", training)
    if mask is lengths is statistics is ghost_size is None and (
        convention == "torch" and nan_policy == "propagate"
        and (update is None or update is training or running_mean is running_var is None)
    ):
        y = call.whole_forward(
            BATCH, x, out, layout, 0, weight, bias, eps, running_mean, running_var, momentum,
            0 if training else GIVEN_STATISTICS, return_stats, backend, num_threads, activation,
            negative_slope, approximate, residual,
        )
        if y is not None:
            return y
    name = "batch_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight, bias, running_mean, running_var)
    momentum = check_number(name, "momentum", momentum)
    check_choice(name, "convention", convention, "torch", "keras")
    check_choice(name, "statistics", statistics, None, "batch", "running")
    check_choice(name, "nan_policy", nan_policy, "propagate", "skip", "raise")
    flags = 0
    if convention == "keras":
        momentum = 1.0 - momentum
        flags = BIASED_RUNNING_VAR
    by_batch = training if statistics is None else statistics == "batch"
    moves = training if update is None else update
    if by_batch or moves:
        _check_training(
            name, x, channels, eps, weight, bias, *(running_mean, running_var) if moves else ()
        )
    if not by_batch and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{name}: {missing} is None, expected an array of shape ({channels},) outside"
            " training; did you mean training=True?"
        )
    valid = check_mask(name, x, mask, lengths, first)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual, valid=valid)
    running = running_mean, running_var
    ghosts = _check_ghosts(name, x, channels, ghost_size) if by_batch else None
    if ghosts is None and (by_batch or not moves) and not (moves and nan_policy != "propagate"):
        if by_batch and not moves:
            running = None, None
        return call.forward(
            name, x, out, first, geometry.batch, weight, bias, eps, (channels,), return_stats,
            flags if by_batch else GIVEN_STATISTICS, backend, num_threads, running, momentum, fused,
        )
    if isinstance(x, DeviceArray):
        raise ValueError(
            f"{name}: x is on a GPU, where ghost_size, nan_policy and statistics='running' with"
            " update=True are not served yet"
        )

    if out is not None:
        call.check_out(name, out, x, (("x", x), ("residual", fused.residual)))

    def of_batch(x, out, shape_of, stats_shape, fused):
        return call.forward(
            name, x, out, first, shape_of, weight, bias, eps, stats_shape, True, 0, backend,
            num_threads, fused=fused,
        )

    if by_batch:
        y, found, counts = batch_statistics.forward(of_batch, x, channels, out, fused, ghosts)
        stats = found
        if ghosts is None:
            stats = Statistics(found.mean[0], found.var[0], found.rstd[0]) if counts else found
    else:
        only = NOTHING._replace(mask=valid)
        _, found, counts = batch_statistics.forward(of_batch, x, channels, None, only, None)
        y, stats = call.forward(
            name, x, out, first, geometry.batch, weight, bias, eps, (channels,), True,
            GIVEN_STATISTICS, backend, num_threads, running, fused=fused,
        )
    if moves:
        batch_statistics.move(
            name, running, found, counts, momentum, flags == BIASED_RUNNING_VAR, nan_policy
        )
    return (y, stats) if return_stats else y


def _check_ghosts(name, x, channels, ghost_size):
    """ghost_size as an int or None; every ghost batch has more than one value for each channel."""
    if ghost_size is None:
        return None
    size = check_int(name, "ghost_size", ghost_size, "an int or None")
    samples = x.shape[0]
    if size < 1:
        raise ValueError(f"{name}: ghost_size is {size}, expected 1 or more")
    last = samples % size or min(size, samples)
    if x.size and last * (x.size // samples) == channels:
        raise ValueError(
            f"{name}: ghost_size is {size} and x has shape {x.shape}: a ghost batch has one value"
            " for each channel, expected more"
        )
    return size


def _check_training(name, x, sets, eps, weight, bias, running_mean=None, running_var=None):
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
    approximate="none", ghost_size=None, from_output=False, mask=None, lengths=None,
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
        weight, bias, residual, activation, negative_slope, approximate, ghost_size, mask, lengths:
            as in the forward.
        out: receives dx; may be dy or x.
        out_residual: receives dresidual; may be dy or residual.
        from_output: x is the forward's output instead of its input, which is found again from it
            and put in its place, so that a forward with out=x keeps nothing else (Rota Bulò,
            Porzi and Kontschieder, "In-Place Activated BatchNorm", 2018). What can be turned back:
            no activation or leaky_relu with a negative_slope above 0, no residual, no weight of 0.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape (C,), whether or not there is a
        weight or a bias. With a residual GradientsWithResidual(dx, dweight, dbias, dresidual);
        without an activation dresidual is dy.
    """
    if mask is lengths is ghost_size is None and not from_output:
        gradients = call.whole_backward(
            BATCH, dy, x, stats, layout, 0, weight, bias, out, 0, backend, num_threads, activation,
            negative_slope, approximate, residual, out_residual,
        )
        if gradients is not None:
            return gradients
    name = "batch_norm_backward"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight, bias)
    fused = check_fused(
        name, x, activation, negative_slope, approximate, residual, bias,
        valid=check_mask(name, x, mask, lengths, first),
    )
    if from_output:
        _check_turning_back(name, x, weight, bias, fused, ghost_size, out, out_residual)
        check_input(name, dy, "dy", like=x)
        x = _turned_back(x, stats, weight, bias, fused, layout, backend, num_threads)
    if ghost_size is None or getattr(stats, "given", False):
        return call.backward(
            name, dy, x, stats, weight, out, first, geometry.batch, (channels,), (channels,), 0,
            backend, num_threads, True, fused, out_residual,
        )
    ghosts = _check_ghosts(name, x, channels, ghost_size)
    dy = check_input(name, dy, "dy", like=x)
    if isinstance(x, DeviceArray):
        raise ValueError(f"{name}: x is on a GPU, where ghost_size is not served yet")
    shape = (-(-x.shape[0] // ghosts), channels)
    stats = Statistics(*(call.statistic(name, stats, a, shape) for a in ("mean", "var", "rstd")))
    call.check_gradients_out(name, dy, x, weight, out, out_residual, fused)

    def of_part(dy, x, stats, out, shape_of, stats_shape, fused, out_residual):
        return call.backward(
            name, dy, x, stats, weight, out, first, shape_of, stats_shape, (channels,), 0, backend,
            num_threads, True, fused, out_residual,
        )

    dtype = x.dtype if weight is None else weight.dtype
    return batch_statistics.backward(
        of_part, dy, x, stats, channels, out, fused, out_residual, ghosts, dtype
    )


def _check_turning_back(name, x, weight, bias, fused, ghost_size, out, out_residual):
    leaky = fused.activation == LEAKY_RELU and fused.slope > 0
    told = None
    if isinstance(x, DeviceArray):
        told = "an array on a GPU"
    elif fused.activation and not leaky:
        told = "an activation other than leaky_relu with a negative_slope above 0"
    elif fused.residual is not None or ghost_size is not None:
        told = "a residual or a ghost_size"
    elif weight is not None and not np.all(weight):
        told = "a weight that is 0"
    if told is not None:
        raise ValueError(f"{name}: from_output with {told}, expected none: see its description")
    others = (("weight", weight), ("bias", bias), ("out", out), ("out_residual", out_residual))
    check_writable(name, "x", x, *others)


def _turned_back(y, stats, weight, bias, fused, layout, backend, num_threads):
    """The input from the output, in its place: leaky ReLU's inverse is one with the inverse slope,
    and that of an affine map one of its own."""
    common = {"layout": layout, "out": y, "backend": backend, "num_threads": num_threads, "eps": 0}
    channels = stats.mean.size
    if fused.activation:
        unit = np.zeros(channels), np.ones(channels)
        batch_norm(
            y, *unit, activation="leaky_relu", negative_slope=1 / fused.slope, **common
        )
    scale = stats.rstd * (1.0 if weight is None else weight.astype(np.float64))
    offset = np.zeros(channels) if bias is None else bias
    return batch_norm(y, offset, np.square(scale), np.sign(scale), stats.mean, **common)


# ---- group and instance norm ----------------------------------------------------------------


def _groups(name, x, num_groups, first):
    channels = x.shape[geometry.channel_axis(first)]
    groups = check_int(name, "num_groups", num_groups)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{name}: num_groups is {groups}, expected a divisor of the {channels} channels of x"
            f" {x.shape}"
        )
    return groups, lambda shape, lies_first: geometry.group(shape, lies_first, groups)


def group_norm(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, layout="NCHW", out=None,
    return_stats=False, backend=None, num_threads=None, residual=None, activation=None,
    negative_slope=0.01, approximate="none", mask=None, lengths=None,
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
    if mask is lengths is None:
        y = call.whole_forward(
            GROUP, x, out, layout, num_groups, weight, bias, eps, None, None, 0.0, 0, return_stats,
            backend, num_threads, activation, negative_slope, approximate, residual,
        )
        if y is not None:
            return y
    name = "group_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    check_channels(name, x, layout, first, weight, bias)
    groups, shape_of = _groups(name, x, num_groups, first)
    return call.forward(
        name, x, out, first, shape_of, weight, bias, eps, (x.shape[0], groups), return_stats, 0,
        backend, num_threads,
        fused=check_fused(
            name, x, activation, negative_slope, approximate, residual,
            valid=check_mask(name, x, mask, lengths, first),
        ),
    )


def group_norm_backward(
    dy, x, stats, num_groups, weight=None, *, layout="NCHW", out=None, backend=None,
    num_threads=None, bias=None, residual=None, out_residual=None, activation=None,
    negative_slope=0.01, approximate="none", mask=None, lengths=None,
):
    """Gradients of group_norm; the formula of batch_norm_backward with means over a group.

    Args:
        dy, x: (N, C, *spatial), of one dtype.
        stats: Statistics of shape (N, G) from the forward.

    Returns:
        Gradients(dx, dweight, dbias), the last two of shape (C,), with a residual
        GradientsWithResidual.
    """
    if mask is lengths is None:
        gradients = call.whole_backward(
            GROUP, dy, x, stats, layout, num_groups, weight, bias, out, 0, backend, num_threads,
            activation, negative_slope, approximate, residual, out_residual,
        )
        if gradients is not None:
            return gradients
    name = "group_norm_backward"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight, bias)
    groups, shape_of = _groups(name, x, num_groups, first)
    fused = check_fused(
        name, x, activation, negative_slope, approximate, residual, bias,
        valid=check_mask(name, x, mask, lengths, first),
    )
    return call.backward(
        name, dy, x, stats, weight, out, first, shape_of, (x.shape[0], groups), (channels,), 0,
        backend, num_threads, True, fused, out_residual,
    )


def instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5, *, layout="NCHW", out=None, return_stats=False, backend=None,
    num_threads=None, residual=None, activation=None, negative_slope=0.01, approximate="none",
    mask=None, lengths=None,
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
    if use_input_stats is not True and use_input_stats is not False:
        use_input_stats = check_flag("instance_norm", "use_input_stats", use_input_stats)
    if mask is lengths is None and use_input_stats:
        y = call.whole_forward(
            GROUP, x, out, layout, None, weight, bias, eps, running_mean, running_var, momentum, 0,
            return_stats, backend, num_threads, activation, negative_slope, approximate, residual,
        )
        if y is not None:
            return y
    name = "instance_norm"
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight, bias, running_mean, running_var)
    momentum = check_number(name, "momentum", momentum)
    valid = check_mask(name, x, mask, lengths, first)
    fused = check_fused(name, x, activation, negative_slope, approximate, residual, valid=valid)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(
                f"{name}: running_mean or running_var is None, expected arrays of shape"
                f" ({channels},) with use_input_stats=False"
            )
        return call.forward(
            name, x, out, first, geometry.batch, weight, bias, eps, (channels,), return_stats,
            GIVEN_STATISTICS, backend, num_threads, (running_mean, running_var), fused=fused,
        )
    _check_training(name, x, x.shape[0] * channels, eps, weight, bias, running_mean, running_var)
    _, shape_of = _groups(name, x, channels, first) if channels else (0, geometry.batch)
    return call.forward(
        name, x, out, first, shape_of, weight, bias, eps, (x.shape[0], channels), return_stats, 0,
        backend, num_threads, (running_mean, running_var), momentum, fused,
    )


def instance_norm_backward(
    dy, x, stats, weight=None, *, layout="NCHW", out=None, backend=None, num_threads=None,
    bias=None, residual=None, out_residual=None, activation=None, negative_slope=0.01,
    approximate="none", mask=None, lengths=None,
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
            negative_slope=negative_slope, approximate=approximate, mask=mask, lengths=lengths,
        )
    if mask is lengths is None:
        gradients = call.whole_backward(
            GROUP, dy, x, stats, layout, None, weight, bias, out, 0, backend, num_threads,
            activation, negative_slope, approximate, residual, out_residual,
        )
        if gradients is not None:
            return gradients
    x = check_input(name, x, least=2)
    first = channels_first(name, layout)
    channels = check_channels(name, x, layout, first, weight, bias)
    fused = check_fused(
        name, x, activation, negative_slope, approximate, residual, bias,
        valid=check_mask(name, x, mask, lengths, first),
    )
    _, shape_of = _groups(name, x, channels, first) if channels else (0, geometry.batch)
    return call.backward(
        name, dy, x, stats, weight, out, first, shape_of, (x.shape[0], channels), (channels,), 0,
        backend, num_threads, True, fused, out_residual,
    )
