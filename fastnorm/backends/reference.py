"""The readable backend: what every other one computes, in NumPy and float64.

It is the specification, and what runs where nothing faster can. It is not fast.
"""

from math import erf, pi, sqrt

import numpy as np

from fastnorm.backends import (
    BIASED_RUNNING_VAR,
    GELU,
    GELU_TANH,
    GIVEN_STATISTICS,
    LEAKY_RELU,
    NO_MEAN,
    NOTHING,
    RELU,
    SILU,
)
from fastnorm.dtypes import TABLE

SET = (1, 3, 4)  # the axes o, k, i that a set's statistics are taken over


def supports(dtype):
    return None if dtype in TABLE else f"no kernels for {dtype}"


def _parameter(geometry, array, otherwise):
    """weight or bias as (1, 1, g, k, 1, 1)."""
    if array is None:
        array = np.full(geometry.g * geometry.k, otherwise)
    return array.astype(np.float64).reshape(1, 1, geometry.g, geometry.k, 1, 1)


def _statistic(geometry, array):
    """(b*g*s) as (b, 1, g, 1, 1, s)."""
    return array.reshape(-1, 1, geometry.g, 1, 1, geometry.s)


def _sets(geometry, x):
    return x.reshape(geometry).astype(np.float64)


def _counted(geometry, fused):
    """1 where a value counts and 0 elsewhere, as it broadcasts against values; or None."""
    if fused.mask is None:
        return None
    return fused.mask.reshape(geometry.b, geometry.o, 1, 1, geometry.i, geometry.s)


def _only(values, counted):
    return values if counted is None else np.where(counted, values, 0)


def _mean(values, counted):
    """Over each set, of what counts; 0 where nothing does."""
    if counted is None:
        return np.mean(values, axis=SET, keepdims=True)
    count = np.sum(np.broadcast_to(counted, values.shape), axis=SET, keepdims=True)
    return np.sum(values, axis=SET, keepdims=True, where=counted) / np.maximum(count, 1)


def forward(
    geometry,
    x,
    y,
    weight,
    bias,
    eps,
    mean,
    var,
    rstd,
    running_mean,
    running_var,
    momentum,
    flags,
    num_threads,
    fused=NOTHING,
):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)."""
    counted = _counted(geometry, fused)
    if fused.sum is not None:
        total = _sets(geometry, x) + _sets(geometry, fused.residual)
        fused.sum[...] = _only(total, counted).reshape(x.shape)
        x = fused.sum
    values = _only(_sets(geometry, x), counted)
    if x.size == 0:
        for statistic in (mean, var, rstd):
            if statistic is not None:
                statistic[:] = 0
        return
    with np.errstate(all="ignore"):
        if flags & GIVEN_STATISTICS:
            found_mean = _statistic(geometry, running_mean.astype(np.float64))
            found_var = _statistic(geometry, running_var.astype(np.float64))
        else:
            # About the first value, so that a constant set has exactly its constant as mean.
            first = values[:, :1, :, :1, :1] if counted is None else _first(values, counted)
            first = np.where(np.isfinite(first), first, 0)
            found_mean = first + _mean(values - first, counted)
            if flags & NO_MEAN:
                found_mean = np.zeros_like(found_mean)
            found_var = _mean(np.square(values - found_mean), counted)
        found_rstd = 1 / np.sqrt(found_var + eps)
        if counted is not None and not flags & GIVEN_STATISTICS:
            found_rstd *= np.any(counted, axis=SET, keepdims=True)
        scaled = (values - found_mean) * found_rstd
        scaled *= _parameter(geometry, weight, 1)
        scaled += _parameter(geometry, bias, 0)
        if fused.residual is not None and fused.sum is None:
            scaled += _sets(geometry, fused.residual)
        scaled = _only(_activation(scaled, fused)[0], counted)
        y[...] = scaled.reshape(y.shape)
        for into, found in ((mean, found_mean), (var, found_var), (rstd, found_rstd)):
            if into is not None:
                into[:] = found.ravel()
        if not flags & GIVEN_STATISTICS:
            count = values_of(geometry, fused)
            unbiased = 1 if flags & BIASED_RUNNING_VAR else count / np.maximum(count - 1, 1)
            rows = geometry.b, -1
            move(running_mean, found_mean.reshape(rows), count, momentum)
            move(running_var, found_var.reshape(rows) * unbiased, count, momentum)


def values_of(geometry, fused):
    """Values in the sets of each b, as (b, 1)."""
    if fused.mask is None:
        return np.full((geometry.b, 1), geometry.values)
    counted = np.count_nonzero(fused.mask.reshape(geometry.b, -1), axis=1)
    return geometry.k * counted[:, np.newaxis]


def move(running, found, count, momentum):
    """A running statistic by the mean over b of what was found in (b, g), but where nothing was."""
    sets = np.count_nonzero(count)
    if running is not None and sets:
        batch = np.sum(found, axis=0, where=count > 0) / sets
        running[:] = (1 - momentum) * running.astype(np.float64) + momentum * batch


def _first(values, counted):
    """The first value of each set that counts."""
    flat = np.moveaxis(np.broadcast_to(counted, values.shape), (0, 2, 5), (0, 1, 2))
    shape = flat.shape[:3]
    at = np.argmax(flat.reshape(*shape, -1), axis=-1)[..., np.newaxis]
    found = np.moveaxis(values, (0, 2, 5), (0, 1, 2)).reshape(*shape, -1)
    first = np.take_along_axis(found, at, -1)
    return first.reshape(shape[0], 1, shape[1], 1, 1, shape[2])


def _gate(z, kind):
    """Of an activation z*gate(z): gate(z) and its derivative."""
    if kind == GELU:
        normal = np.exp(-0.5 * z * z) / sqrt(2 * pi)
        return 0.5 * (1 + np.vectorize(erf, otypes=[float])(z / sqrt(2))), normal
    scale, cube = (2 * sqrt(2 / pi), 0.044715) if kind == GELU_TANH else (1, 0)
    away = np.exp(-np.clip(scale * (z + cube * z * z * z), -709, 709))
    gate = 1 / (1 + away)  # (1 + tanh(a))/2 is sigmoid(2a), and 1 - sigmoid is away*sigmoid
    return gate, gate * (away * gate) * scale * (1 + 3 * cube * z * z)


def _activation(z, fused):
    """activation(z) and its derivative."""
    if fused.activation in (RELU, LEAKY_RELU):
        slope = fused.slope if fused.activation == LEAKY_RELU else 0.0
        below = z * slope if slope else 0.0
        return np.where(z <= 0, below, z), np.where(z <= 0, slope, 1.0)
    if fused.activation in (SILU, GELU, GELU_TANH):
        near = np.clip(z, -709, 709)  # or infinities would meet zeros
        gate, change = _gate(near, fused.activation)
        return np.maximum(z, -709) * gate, gate + near * change
    return z, 1.0


def backward(
    geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused=NOTHING
):
    """dx = rstd * (gy - mean(gy) - xhat*mean(gy*xhat)), gy = dy*activation'(z)*weight."""
    if x.size == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient[:] = 0
        return
    with np.errstate(all="ignore"):
        counted = _counted(geometry, fused)
        grad = _only(_sets(geometry, dy), counted)
        found_rstd = _statistic(geometry, rstd)
        xhat = _only(_sets(geometry, x), counted)
        if not flags & NO_MEAN:
            xhat -= _statistic(geometry, mean)
        xhat *= found_rstd
        if fused.activation:
            z = xhat * _parameter(geometry, weight, 1) + _parameter(geometry, fused.bias, 0)
            if fused.residual is not None:
                z += _sets(geometry, fused.residual)
            grad = _only(grad * _activation(z, fused)[1], counted)
            if fused.dresidual is not None:
                fused.dresidual[...] = grad.reshape(x.shape)
        gy = grad * _parameter(geometry, weight, 1)
        result = gy.copy()
        if not flags & GIVEN_STATISTICS:
            if not flags & NO_MEAN:
                result -= _mean(gy, counted)
            result -= xhat * _mean(gy * xhat, counted)
        result *= found_rstd
        for into, terms in ((dweight, grad * xhat), (dbias, grad)):
            if into is not None:
                into[...] = np.sum(terms, axis=(0, 1, 4, 5)).reshape(into.shape)
        if fused.dsum is not None:
            result += _sets(geometry, fused.dsum)
        dx[...] = _only(result, counted).reshape(dx.shape)
