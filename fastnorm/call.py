"""The two calls that every function comes down to. Arrays on a GPU go on to their twins in
on_device.py, NumPy arrays to a backend: as they lie, where that is in the order of their axes or in
the other layout, and else copied.
"""

import numpy as np

from fastnorm import backends, config, geometry, on_device
from fastnorm.backends import GIVEN_STATISTICS, NOTHING
from fastnorm.checks import check_input, check_number, check_out, check_writable
from fastnorm.device import DeviceArray
from fastnorm.results import Gradients, GradientsWithResidual, Statistics

try:
    from fastnorm.whole import whole_backward, whole_forward
except ImportError:  # without the native library every call goes the long way

    def whole_forward(*_):
        return None

    whole_backward = whole_forward

# Most calls have nothing to look at closely, which compiled code sees sooner.
_plain = getattr(backends.load("native"), "plain", lambda *_: False)
_holds = getattr(backends.load("native"), "holds", lambda *_: False)


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


def forward(
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
    if fused.mask is not None:
        _check_apart(name, fused.mask, out=out, out_sum=out_sum)
    parameters = (weight, bias, *running)
    total, residual = None, fused.residual
    if _plain(x, out, parameters, (residual,)) and (
        out_sum is None or _plain(x, out_sum, (*parameters, out), (residual,))
    ):
        view, first, is_out = x, channel_order, out is not None
        y = out if is_out else geometry.empty(x.shape, x.dtype)
        if with_sum and residual is not None:
            is_out_sum = out_sum is not None
            total = out_sum if is_out_sum else geometry.empty(x.shape, x.dtype)
            fused = fused._replace(sum=total)
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
            fused = fused._replace(residual=residual, sum=total)
    sizes = shape_of(view.shape, first)
    mean = var = rstd = None
    moves = not flags & GIVEN_STATISTICS and (running[0] is not None or running[1] is not None)
    if return_stats or (moves and sizes.b > 1):
        mean, var, rstd = np.empty((3, sizes.b * sizes.g * sizes.s))
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


def _check_apart(name, mask, **outs):
    for what, out in outs.items():
        if isinstance(out, np.ndarray):
            check_writable(name, what, out, ("mask", mask))


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
    return geometry.empty(view.shape, view.dtype), False


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


def backward(
    name, dy, x, stats, weight, out, channel_order, shape_of, stats_shape, param_shape, flags,
    backend, num_threads, with_bias=True, fused=NOTHING, out_residual=None,
):
    """Check what is common, compute the gradients, and pack them."""
    dy = check_input(name, dy, "dy", like=x)
    num_threads = config.check_threads(name, num_threads)
    if isinstance(x, DeviceArray):
        return on_device.backward(
            name, dy, x, stats, weight, out, channel_order, shape_of, stats_shape, param_shape,
            flags, backend, with_bias,
        )
    engine = config.choose(name, backend, x.dtype)
    if fused.mask is not None:
        _check_apart(name, fused.mask, out=out, out_residual=out_residual)
    mean = statistic(name, stats, "mean", stats_shape)
    rstd = statistic(name, stats, "rstd", stats_shape)
    param_dtype = x.dtype if weight is None else weight.dtype
    # dz is written before dx is: into the residual's gradient, or in the place of dx.
    early = (x, fused.dsum) if fused.activation and fused.residual is None else ()
    plain = fused.residual is None and out_residual is None and _plain(
        x, out, (weight, fused.bias, *early), (dy, fused.dsum)
    )
    if not plain:
        check_gradients_out(name, dy, x, weight, out, out_residual, fused)
    if getattr(stats, "given", False):
        flags |= GIVEN_STATISTICS
    if plain:
        view, grad, first, is_out = x, dy, channel_order, out is not None
        dx = out if is_out else geometry.empty(x.shape, x.dtype)
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


def check_gradients_out(name, dy, x, weight, out, out_residual, fused):
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
    # Without an activation it is dy, where it counts.
    if out_residual is not None:
        out_residual[...] = dy
        dy = out_residual
    if fused.mask is not None:
        padding = ~geometry.at_positions(fused.mask, channel_order)
        if out_residual is None:
            dy = np.copy(dy)
        np.copyto(dy, 0, where=padding)
    return fused, lambda: dy


def statistic(name, stats, what, shape):
    array = getattr(stats, what, None)
    if array is None:
        raise TypeError(
            f"{name}: stats is a {type(stats).__name__}, expected the Statistics that the forward"
            " returns with return_stats=True"
        )
    if _holds(array, shape):
        return array
    array = np.asarray(array, np.float64, order="C")
    if array.shape != shape:
        raise ValueError(
            f"{name}: stats.{what} has shape {array.shape}, expected {shape};"
            " do they come from another input or another normalization?"
        )
    return array
