"""What the normalizations are, in long double, straight from their textbook definitions.

It imports nothing from fastnorm. Everything is (N, C, *spatial): callers move the channels.
"""

import math

import numpy as np

WIDE = np.longdouble


def _spread(values, axis, ndim):
    """A vector along one axis of an ndim-dimensional array."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(values, WIDE).reshape(shape)


def _normalize(x, axes, eps, centred=True):
    """xhat, mean, var, rstd with the reduced axes kept."""
    x = x.astype(WIDE)
    mean = np.mean(x, axis=axes, keepdims=True) if centred else WIDE(0)
    var = np.mean((x - mean) ** 2, axis=axes, keepdims=True)
    rstd = 1 / np.sqrt(var + WIDE(eps))
    return (x - mean) * rstd, np.broadcast_to(mean, var.shape), var, rstd


def _gradients(dy, xhat, rstd, axes, weight, centred=True):
    """dx by the chain rule through mean and variance, written term by term."""
    gy = dy.astype(WIDE) * weight
    dx = gy - xhat * np.mean(gy * xhat, axis=axes, keepdims=True)
    if centred:
        dx = dx - np.mean(gy, axis=axes, keepdims=True)
    return dx * rstd


def channel_norm(x, dy, kind, groups, weight, bias, eps, given=None):
    """Batch, instance or group norm of (N, C, *spatial), and its gradients.

    Returns a dict of y, mean, var, rstd, dx, dweight, dbias.
    """
    n, c = x.shape[:2]
    split = (n, groups, c // groups, -1) if kind == "group" else None
    if kind == "batch":
        axes, stats_shape = (0, *range(2, x.ndim)), (c,)
    elif kind == "instance":
        axes, stats_shape = tuple(range(2, x.ndim)), (n, c)
    else:
        axes, stats_shape = (2, 3), (n, groups)
    w = _spread(np.ones(c) if weight is None else weight, 1, x.ndim)
    b = _spread(np.zeros(c) if bias is None else bias, 1, x.ndim)
    whole = x.shape

    def cut(a):
        return np.broadcast_to(a, whole).reshape(split) if split else a

    def join(a):
        return a.reshape(whole)

    if given is None:
        xhat, mean, var, rstd = _normalize(cut(x), axes, eps)
        dx = join(_gradients(cut(dy), xhat, rstd, axes, cut(w)))
        xhat = join(xhat)
    else:
        mean, var = (_spread(g, 1, x.ndim) for g in given)
        rstd = 1 / np.sqrt(var + WIDE(eps))
        xhat = (x.astype(WIDE) - mean) * rstd
        dx = dy.astype(WIDE) * w * rstd
    reduced = (0, *range(2, x.ndim))
    return {
        "y": xhat * w + b,
        "mean": mean.reshape(stats_shape),
        "var": var.reshape(stats_shape),
        "rstd": rstd.reshape(stats_shape),
        "dx": dx,
        "dweight": np.sum(dy.astype(WIDE) * xhat, axis=reduced),
        "dbias": np.sum(dy.astype(WIDE), axis=reduced),
    }


def row_norm(x, dy, ndim, weight, bias, eps, centred):
    """Layer norm, or RMS norm where not centred, over the last ndim axes, and its gradients."""
    axes = tuple(range(x.ndim - ndim, x.ndim))
    leading = tuple(range(x.ndim - ndim))
    w = WIDE(1) if weight is None else weight.astype(WIDE)
    b = WIDE(0) if bias is None else bias.astype(WIDE)
    xhat, mean, var, rstd = _normalize(x, axes, eps, centred)
    shape = x.shape[: x.ndim - ndim]
    return {
        "y": xhat * w + b,
        "mean": mean.reshape(shape),
        "var": var.reshape(shape),
        "rstd": rstd.reshape(shape),
        "dx": _gradients(dy, xhat, rstd, axes, w, centred),
        "dweight": np.sum(dy.astype(WIDE) * xhat, axis=leading),
        "dbias": np.sum(dy.astype(WIDE), axis=leading),
    }


def activation(z, kind, slope=0.01):
    """An activation of PyTorch's and its derivative; "gelu_tanh" is gelu's approximate="tanh"."""
    z = z.astype(WIDE)
    one = np.ones_like(z)
    if kind is None:
        return z, one
    if kind == "relu":
        return np.maximum(z, 0), np.where(z > 0, one, 0)
    if kind == "leaky_relu":
        return np.where(z > 0, z, slope * z), np.where(z > 0, one, slope)
    if kind == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return z * sigmoid, sigmoid + z * sigmoid * (1 - sigmoid)
    if kind == "gelu":
        below = np.vectorize(lambda v: 0.5 * math.erfc(-v * math.sqrt(0.5)), otypes=[WIDE])(z)
        return z * below, below + z * np.exp(-z * z / 2) / np.sqrt(2 * WIDE(math.pi))
    inner = np.sqrt(2 / WIDE(math.pi)) * (z + WIDE("0.044715") * z**3)
    slope_of_inner = np.sqrt(2 / WIDE(math.pi)) * (1 + 3 * WIDE("0.044715") * z**2)
    tanh = np.tanh(inner)
    return z * (1 + tanh) / 2, (1 + tanh) / 2 + z / 2 * (1 - tanh**2) * slope_of_inner


def masked_norm(x, dy, valid, axes, weight, bias, eps, centred=True):
    """What normalizes over `axes` only the values where `valid` (like x) is True, and its
    gradients; zeros elsewhere, and for sets without such values. weight and bias broadcast.

    Returns a dict of y, mean, var, rstd (axes kept), dx, and the terms dy*xhat and dy, whose sums
    are dweight and dbias.
    """
    x, dy = (np.where(valid, a, 0).astype(WIDE) for a in (x, dy))
    count = np.maximum(np.sum(valid, axis=axes, keepdims=True), 1)

    def mean_of(values):
        return np.sum(np.where(valid, values, 0), axis=axes, keepdims=True) / count

    mean = mean_of(x) if centred else WIDE(0) * mean_of(x)
    var = mean_of((x - mean) ** 2)
    rstd = np.where(np.any(valid, axis=axes, keepdims=True), 1 / np.sqrt(var + WIDE(eps)), 0)
    xhat = (x - mean) * rstd
    gy = dy * weight
    dx = gy - xhat * mean_of(gy * xhat) - (mean_of(gy) if centred else 0)
    return {
        "y": np.where(valid, xhat * weight + bias, 0),
        "mean": mean, "var": var, "rstd": rstd,
        "dx": np.where(valid, dx * rstd, 0),
        "dweight": np.where(valid, dy * xhat, 0),
        "dbias": np.where(valid, dy, 0),
    }
