"""What arguments are refused for, with what error: every text of the calls is here.

An error says what came, what was expected and, where there is one, the likely slip. Nothing has
been written when it is raised. Arrays are NumPy's, or views of device arrays (device.py), which
answer to the same names.
"""

import math
import operator

import numpy as np

from fastnorm import backends, device, geometry
from fastnorm.backends import ACTIVATIONS, GELU, GELU_TANH, LEAKY_RELU, NOTHING, Fused
from fastnorm.device import DeviceArray
from fastnorm.dtypes import DEVICE_NAMES, DEVICE_TABLE, TABLE
from fastnorm.dtypes import NAMES as DTYPE_NAMES

# Most calls have nothing to look at closely, which compiled code sees sooner.
_fits = getattr(backends.load("native"), "fits", lambda *_: False)


def _sort(x):
    """What arrays beside x must be: (table of dtypes, its names, the type by name)."""
    if isinstance(x, DeviceArray):
        return DEVICE_TABLE, DEVICE_NAMES, f"{x.kind.name} on the GPU"
    return TABLE, DTYPE_NAMES, "numpy.ndarray"


def seen(array, x):
    """An array as it is looked at beside x: itself, or where x is on a GPU, a view of it; None
    where it is not of that sort."""
    if isinstance(x, DeviceArray):
        return device.view_of(array)
    return array if isinstance(array, np.ndarray) else None


def check_input(name, x, what="x", least=1, like=None, on_gpu=True):
    """x, or a view of it where it is on a GPU."""
    if type(x) is np.ndarray and x.dtype in TABLE and x.ndim >= least and (
        like is None or (type(like) is np.ndarray and x.shape == like.shape
                         and x.dtype == like.dtype)
    ):
        return x
    given = x
    if not isinstance(x, np.ndarray):
        x = device.view_of(x) if on_gpu else None
        if x is None:
            raise TypeError(
                f"{name}: {what} is a {type(given).__name__}, expected a numpy.ndarray;"
                f" did you mean numpy.asarray({what})?"
            )
    if np.ma.is_masked(given):
        raise TypeError(
            f"{name}: {what} is a MaskedArray, whose masked values would count; did you mean"
            f" {what}.filled(...) with mask= for the places that count?"
        )
    known, names, _ = _sort(x)
    if like is not None and isinstance(x, DeviceArray) != isinstance(like, DeviceArray):
        raise TypeError(
            f"{name}: {what} is a {type(given).__name__}, expected like x a {_sort(like)[2]}"
        )
    if x.dtype not in known:
        slip = f"; did you mean {what}.astype(numpy.float32)?" if x is given else ""
        raise TypeError(f"{name}: {what} has dtype {x.dtype}, expected {names}{slip}")
    if x.ndim < least:
        raise ValueError(
            f"{name}: {what} has shape {x.shape}, expected at least {least} axes;"
            " is the batch axis missing?"
        )
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype):
        raise ValueError(
            f"{name}: {what} has shape {x.shape} and dtype {x.dtype}, expected those of x,"
            f" {like.shape} and {like.dtype}"
        )
    return x


def channels_first(name, layout):
    try:
        return geometry.CHANNELS_FIRST[layout]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, geometry.CHANNELS_FIRST))
        raise ValueError(f"{name}: layout is {came(layout)}, expected one of {known}") from None


def came(value):
    """What came in place of something else: a value, or an array's type, shape and dtype."""
    if not getattr(value, "shape", ()):
        return repr(value)
    sort = type(value)
    shape, dtype = tuple(value.shape), getattr(value, "dtype", None)
    return f"a {sort.__module__}.{sort.__qualname__} of shape {shape} and dtype {dtype}"


def check_choice(name, what, value, *known):
    for one in known:
        if value is one:
            return
    if not (isinstance(value, str) and value in known):
        expected = " or ".join(map(repr, known))
        raise ValueError(f"{name}: {what} is {came(value)}, expected {expected}")


def check_number(name, what, value):
    try:
        if math.isfinite(value):
            return float(value)
    except TypeError:
        raise TypeError(f"{name}: {what} is {came(value)}, expected a number") from None
    raise ValueError(f"{name}: {what} is {value!r}, expected a finite number")


def check_int(name, what, value, expected="an int"):
    """value as an int, which a bool is not."""
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: {what} is {came(value)}, expected {expected}")


def check_flag(name, what, value):
    """value as a bool."""
    try:
        return bool(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {what} is {came(value)}, expected a bool") from None


def check_ints(name, what, values):
    """An int or several, as a tuple."""
    try:
        return (operator.index(values),)
    except TypeError:
        pass
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        told = f"{name}: {what} is {came(values)}, expected an int or several"
    if what == "normalized_shape" and getattr(values, "shape", ()):
        told += f"; did you mean {what}={tuple(values.shape)}, and this as weight?"
    raise TypeError(told)


def _check_parameter(name, what, array, shape, x, why):
    """A weight, bias or running statistic is None or an array beside x of this shape."""
    known, names, sort = _sort(x)
    view = None if array is None else seen(array, x)
    if array is None or (view is not None and view.shape == shape and view.dtype in known):
        return
    if view is None:
        raise TypeError(f"{name}: {what} is a {type(array).__name__}, expected a {sort} or None")
    if view.dtype not in known:
        raise TypeError(f"{name}: {what} has dtype {view.dtype}, expected {names}")
    raise ValueError(f"{name}: {what} has shape {view.shape}, expected {shape} = {why()}")


def check_channels(name, x, layout, first, weight, bias, running_mean=None, running_var=None):
    """Every parameter has one value for each channel of x."""
    channels = x.shape[geometry.channel_axis(first)]
    parameters = running_mean, running_var, weight, bias
    if _fits(channels, parameters) and not isinstance(x, DeviceArray):
        return channels
    names = "running_mean", "running_var", "weight", "bias"
    for what, array in zip(names, parameters, strict=True):

        def why(array=array):
            told = f"channels of x {x.shape} with layout={layout!r}"
            if seen(array, x).shape == (x.shape[geometry.channel_axis(not first)],):
                told += f"; did you mean layout={'NHWC' if first else 'NCHW'!r}?"
            return told

        _check_parameter(name, what, array, (channels,), x, why)
    return channels


def check_trailing(name, x, shape, **parameters):
    """Every parameter has one value for each place of the trailing axes."""
    if len(shape) == 1 and not isinstance(x, DeviceArray) and _fits(shape[0], parameters.values()):
        return
    for what, array in parameters.items():
        _check_parameter(
            name, what, array, shape, x,
            lambda: f"normalized_shape, trailing axes of x {x.shape}",
        )


def apart(a, b):
    """Whether two arrays share no memory; quickly where each owns its own."""
    if isinstance(a, DeviceArray):
        return a.apart(b)
    if a.base is None and b.base is None:
        return a is not b
    return not np.may_share_memory(a, b) or not np.shares_memory(a, b)


def same_memory(a, b):
    if isinstance(a, DeviceArray):
        return a.span() == b.span() and a.strides == b.strides and a.shape == b.shape
    return a is b or (
        a.ctypes.data == b.ctypes.data and a.shape == b.shape and a.strides == b.strides
    )


def check_writable(name, what, array, *others):
    """An array that is updated in place, and shares no memory with the others."""
    if not array.flags.writeable:
        raise ValueError(f"{name}: {what} is read-only, expected a writable array")
    for other_name, other in others:
        if other is not None and not apart(array, other):
            raise ValueError(
                f"{name}: {what} shares memory with {other_name}, expected an array apart"
            )


def check_mask(name, x, mask, lengths, first, shape=None):
    """Which positions of x count, as a contiguous array of bool of this shape, else (N, *spatial);
    None where all do."""
    if mask is None and lengths is None:
        return None
    if isinstance(x, DeviceArray):
        raise ValueError(f"{name}: x is on a GPU, where neither mask nor lengths are served yet")
    if mask is not None and lengths is not None:
        raise ValueError(f"{name}: mask and lengths, expected one of them")
    if shape is None:
        shape = geometry.positions(x.shape, first)
    if lengths is not None:
        return _mask_of_lengths(name, x, lengths, shape)
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"{name}: mask is a {type(mask).__name__}, expected a numpy.ndarray")
    if mask.dtype != np.bool_:
        raise TypeError(
            f"{name}: mask has dtype {mask.dtype}, expected bool; did you mean mask.astype(bool)?"
        )
    if mask.shape != shape:
        raise ValueError(
            f"{name}: mask has shape {mask.shape}, expected {shape}, one for each place of x"
            f" {x.shape} that is normalized with others or left out"
        )
    return np.ascontiguousarray(mask)


def _mask_of_lengths(name, x, lengths, shape):
    if len(shape) != 2:
        raise ValueError(
            f"{name}: lengths with x of shape {x.shape}, expected one sequence axis beside those of"
            " samples and channels; did you mean mask?"
        )
    given, lengths = lengths, np.asarray(lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"{name}: lengths is {given!r}, expected ints")
    samples, most = shape
    if lengths.shape != (samples,):
        raise ValueError(
            f"{name}: lengths has shape {lengths.shape}, expected ({samples},), one for each sample"
        )
    if np.any(lengths < 0) or np.any(lengths > most):
        raise ValueError(f"{name}: lengths is {given!r}, expected 0 to {most} of x {x.shape}")
    return np.arange(most) < lengths[:, np.newaxis]


def check_fused(
    name, x, activation, negative_slope, approximate, residual=None, bias=None, dsum=None,
    valid=None,
):
    """The Fused of a call; its arrays as they came. valid is check_mask's."""
    if activation is None and residual is None and dsum is None:
        return NOTHING if valid is None else Fused(mask=valid)
    try:
        kind = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in ACTIVATIONS if known)
        told = f"{name}: activation is {came(activation)}, expected {known} or None"
        raise ValueError(told) from None
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{name}: approximate is {approximate!r}, expected 'none' or 'tanh'")
    if kind == GELU and approximate == "tanh":
        kind = GELU_TANH
    slope = check_number(name, "negative_slope", negative_slope) if kind == LEAKY_RELU else 0.0
    if isinstance(x, DeviceArray):
        raise ValueError(
            f"{name}: x is on a GPU, where neither an activation nor a residual is fused yet;"
            f" apply it with {x.kind.name}"
        )
    for what, array in (("residual", residual), ("dsum", dsum)):
        if array is not None:
            check_input(name, array, what, like=x)
    return Fused(kind, slope, residual, bias=bias, dsum=dsum, mask=valid)


def check_out(name, out, x, same, others=(), what="out"):
    """`out` has x's shape and dtype, is writable, and overlaps nothing but what it is."""
    given, out = out, seen(out, x)
    if out is None:
        raise TypeError(
            f"{name}: {what} is a {type(given).__name__}, expected a {_sort(x)[2]} or None"
        )
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name}: {what} has shape {out.shape} and dtype {out.dtype}, expected those of x,"
            f" {x.shape} and {x.dtype}"
        )
    if not out.flags.c_contiguous and out.size > 1 and 0 in out.strides:
        raise ValueError(
            f"{name}: {what} has strides {out.strides}: several elements share memory"
        )
    check_writable(name, what, out, *others)
    for other_name, other in same:
        if other is not None and not apart(out, other) and not same_memory(out, other):
            raise ValueError(
                f"{name}: {what} shares memory with {other_name}, expected all or none"
            )
