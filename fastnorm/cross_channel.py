"""Normalizations by neighbouring channels or by a vector's length, in plain NumPy.

They are what batch norm replaced and what detectors put beside it; no kernel serves them.
"""

import numpy as np

from fastnorm import checks, geometry


def _result(name, x, out):
    if out is None:
        return np.empty(x.shape, x.dtype)
    checks.check_out(name, out, x, (("x", x),))
    return out


def _window_sums(squares, size):
    """For each channel (axis 1), the sum over the window of PyTorch and ONNX: size // 2 channels
    before it and (size - 1) // 2 behind it."""
    channels = squares.shape[1]
    sums = np.zeros_like(squares)
    for offset in range(-(size // 2), (size - 1) // 2 + 1):
        to = slice(max(0, -offset), min(channels, channels - offset))
        if to.start < to.stop:
            sums[:, to] += squares[:, to.start + offset : to.stop + offset]
    return sums


def _channels_at_1(name, x, layout):
    checks.check_input(name, x, least=2, on_gpu=False)
    return geometry.as_asked(x, checks.channels_first(name, layout), True)


def _check_size(name, size):
    size = checks.check_int(name, "size", size)
    if size < 1:
        raise ValueError(f"{name}: size is {size}, expected at least 1")
    return size


def local_response_norm(x, size, alpha=1e-4, beta=0.75, k=1.0, *, layout="NCHW", out=None):
    """Divide each value by a power of the sum of squares of its neighbouring channels.

    Formula:
        y = x / (k + alpha * sum(x_neighbour**2) / size) ** beta

    Args:
        x: (N, C, *spatial), float32 or float64.
        size: channels in the window, as PyTorch and ONNX centre it.
        out: as in fastnorm.functional.

    Returns:
        y like x.

    Source:
        Krizhevsky et al. 2012, section 3.3.
    """
    name = "local_response_norm"
    size = _check_size(name, size)
    moved = _channels_at_1(name, x, layout).astype(np.float64)
    y = _result(name, x, out)
    base = k + alpha / size * _window_sums(np.square(moved), size)
    y[...] = geometry.as_asked(moved / base**beta, True, checks.channels_first(name, layout))
    return y


def local_response_norm_backward(
    dy, x, size, alpha=1e-4, beta=0.75, k=1.0, *, layout="NCHW", out=None
):
    """Gradient of local_response_norm by x.

    Formula, with base = k + alpha/size * window sum of x**2, and the mirrored window:
        dx = dy * base**-beta - 2*alpha*beta/size * x * sum(dy * x * base**(-beta - 1))
    """
    name = "local_response_norm_backward"
    size = _check_size(name, size)
    moved = _channels_at_1(name, x, layout).astype(np.float64)
    checks.check_input(name, dy, "dy", like=x, on_gpu=False)
    grad = _channels_at_1(name, dy, layout).astype(np.float64)
    dx = _result(name, x, out)
    base = k + alpha / size * _window_sums(np.square(moved), size)
    terms = grad * moved * base ** (-beta - 1)
    # The channels whose window holds this one: the mirrored window.
    mirrored = _window_sums(terms[:, ::-1], size)[:, ::-1]
    result = grad * base**-beta - (2 * alpha * beta / size) * moved * mirrored
    dx[...] = geometry.as_asked(result, True, checks.channels_first(name, layout))
    return dx


def normalize(x, p=2.0, dim=1, eps=1e-12, *, out=None, axis=None):
    """Divide by the p-norm along an axis.

    Formula:
        y = x / max(norm_p(x), eps)

    Args:
        x: any shape, float32 or float64.
        p: order of the norm, above 0, or inf.
        dim: the axis.
        axis: the same, by NumPy's name.
        eps: the least divisor.
        out: as in fastnorm.functional.

    Returns:
        y like x.
    """
    name = "normalize"
    checks.check_input(name, x, on_gpu=False)
    dim = checks.check_int(name, "dim", dim if axis is None else axis)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{name}: dim is {dim}, expected an axis of x {x.shape}")
    if getattr(p, "shape", ()) or not p > 0:
        raise ValueError(f"{name}: p is {checks.came(p)}, expected more than 0")
    y = _result(name, x, out)
    norm = _norm(x, p, dim)
    np.divide(x, np.maximum(norm, eps), out=y, casting="same_kind")
    return y


def _norm(x, p, dim):
    """The p-norm in float64, of values scaled so that no power overflows."""
    size = np.abs(x.astype(np.float64))
    largest = size.max(axis=dim, keepdims=True, initial=0)
    if np.isinf(p):
        return largest
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return scale * np.sum((size / scale) ** p, axis=dim, keepdims=True) ** (1 / p)


def normalize_backward(dy, x, dim=1, eps=1e-12, *, out=None):
    """Gradient of normalize(x, 2.0, dim, eps) by x.

    Formula, with n the norm and y = x/n, where n > eps (elsewhere dx = dy/eps):
        dx = (dy - y*sum(dy*y)) / n
    """
    name = "normalize_backward"
    checks.check_input(name, x, on_gpu=False)
    checks.check_input(name, dy, "dy", like=x, on_gpu=False)
    dx = _result(name, x, out)
    norm = _norm(x, 2.0, dim)
    y = x / np.maximum(norm, eps)
    along = np.where(norm > eps, np.sum(dy * y, axis=dim, keepdims=True), 0)
    dx[...] = (dy - y * along) / np.maximum(norm, eps)
    return dx
