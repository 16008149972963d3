"""The calls on arrays on a GPU, twins of those on NumPy arrays in call.py.

Nothing is copied: what lies neither in the order of its axes nor in the other layout is refused,
and so is anything that is not where x is. Work is queued on the stream that x's library uses now;
results are of x's kind, statistics and gradients of parameters too.
"""

from fastnorm import backends, geometry
from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS, NO_MEAN
from fastnorm.checks import check_out, seen
from fastnorm.dtypes import DEVICE_TABLE
from fastnorm.results import Gradients, Statistics

FLAGS = GIVEN_STATISTICS | NO_MEAN | BIASED_RUNNING_VAR


def _engine(name, backend):
    """The module numba_cuda. Raises ValueError for another backend and RuntimeError where there is
    no GPU to work on."""
    if backend not in (None, "cuda"):
        raise ValueError(
            f"{name}: x is on a GPU and backend is {backend!r}, expected 'cuda' or None; to"
            " compute on the CPU, move x there (x.cpu().numpy(), cupy.asnumpy(x))"
        )
    engine = backends.load("cuda")
    reason = engine if isinstance(engine, str) else engine.refusal()
    if reason is not None:
        raise RuntimeError(f"{name}: backend 'cuda' {reason}")
    return engine


def _lying(name, what, array, channel_order, first=None):
    """The array as its memory is, and whether its channels come first there; as `first` says."""
    view, is_first = geometry.lying(array, channel_order)
    if view is None or first not in (None, is_first):
        where = "contiguous memory, or that of the other layout" if first is None else (
            "memory that lies as that of x does")
        raise ValueError(
            f"{name}: {what} has shape {array.shape} and strides {array.strides}, expected {where};"
            " nothing is copied on a GPU unasked, did you mean .contiguous()?"
        )
    return view, is_first


def _parameters(name, x, **arrays):
    """Views of the parameters, contiguous and of one dtype."""
    views = {what: None if a is None else seen(a, x) for what, a in arrays.items()}
    present = {what: view for what, view in views.items() if view is not None}
    dtypes = {what: view.dtype for what, view in present.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{name}: parameters on a GPU have dtypes {dtypes}, expected one")
    for what, view in present.items():
        _lying(name, what, view, None)
    return views


def forward(
    name, x, out, channel_order, shape_of, weight, bias, eps, stats_shape, return_stats, flags,
    backend, running, momentum,
):
    engine = _engine(name, backend)
    view, first = _lying(name, "x", x, channel_order)
    parameters = _parameters(
        name, x, weight=weight, bias=bias, running_mean=running[0], running_var=running[1]
    )
    if out is None:
        y = x.empty_like()
    else:
        check_out(name, out, x, (("x", x),), parameters.items())
        y = seen(out, x)
    into, _ = _lying(name, "out", y, channel_order, first)
    sizes = shape_of(view.shape, first)
    accumulator = DEVICE_TABLE[x.dtype].accumulator
    mean, var, rstd = (x.empty(stats_shape, accumulator, x.size == 0) for _ in range(3))
    engine.forward(sizes, view, into, mean, var, rstd, eps, momentum, flags & FLAGS, **parameters)
    result = y.owner if out is None else out
    if not return_stats:
        return result
    return result, Statistics(
        mean.owner, var.owner, rstd.owner, given=bool(flags & GIVEN_STATISTICS)
    )


def backward(
    name, dy, x, stats, weight, out, channel_order, shape_of, stats_shape, param_shape, flags,
    backend, with_bias,
):
    engine = _engine(name, backend)
    view, first = _lying(name, "x", x, channel_order)
    grad, _ = _lying(name, "dy", dy, channel_order, first)
    weight = _parameters(name, x, weight=weight)["weight"]
    accumulator = DEVICE_TABLE[x.dtype].accumulator
    mean, rstd = (
        _statistic(name, stats, what, stats_shape, accumulator, x) for what in ("mean", "rstd")
    )
    if out is None:
        dx = x.empty_like()
    else:
        check_out(name, out, x, (("dy", dy), ("x", x)), (("weight", weight),))
        dx = seen(out, x)
    into, _ = _lying(name, "out", dx, channel_order, first)
    if getattr(stats, "given", False):
        flags |= GIVEN_STATISTICS
    dtype = x.dtype if weight is None else weight.dtype
    dweight = x.empty(param_shape, dtype, x.size == 0)
    dbias = x.empty(param_shape, dtype, x.size == 0) if with_bias else None
    engine.backward(
        shape_of(view.shape, first), grad, view, weight, mean, rstd, into, dweight, dbias, flags
    )
    return Gradients(
        dx.owner if out is None else out, dweight.owner, None if dbias is None else dbias.owner
    )


def _statistic(name, stats, what, shape, dtype, x):
    array = getattr(stats, what, None)
    view = None if array is None else seen(array, x)
    if view is None:
        raise TypeError(
            f"{name}: stats.{what} is a {type(array).__name__}, expected what the forward on the"
            " GPU returns with return_stats=True"
        )
    if view.shape != shape or view.dtype != dtype:
        raise ValueError(
            f"{name}: stats.{what} has shape {view.shape} and dtype {view.dtype}, expected {shape}"
            f" and {dtype}; do they come from another input or another normalization?"
        )
    return view
