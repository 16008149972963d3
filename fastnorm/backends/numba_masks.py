"""Masks in Numba: what counts is packed into an array of its own, with the channels last, and
computed there as if it were all there is. Two more passes over what counts each way.
"""

import numpy as np

from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS
from fastnorm.backends.reference import move, values_of
from fastnorm.geometry import Geometry


def _view(geometry, array):
    """(b, o, i, channels) of an array like x."""
    shape = geometry.b, geometry.o, geometry.g * geometry.k, geometry.i
    return np.moveaxis(array.reshape(shape), 2, 3)


def _parts(geometry, mask):
    """(geometry, where in a _view, where in (b, g)) of what is computed in one call: all rows, or
    what counts of a b."""
    mask = mask.reshape(geometry.b, geometry.o, geometry.i)
    if geometry.o * geometry.i == 1:
        at = np.nonzero(mask)
        cut = [(Geometry(len(at[0]), 1, geometry.g, geometry.k, 1), at, at[0])]
    else:
        cut = []
        for b in range(geometry.b):
            at = (b, *np.nonzero(mask[b]))
            own = Geometry(1, len(at[1]), geometry.g, geometry.k, 1)
            cut.append((own, at, slice(b, b + 1)))
    return [part for part in cut if part[0].b * part[0].o > 0]


def _packed(geometry, array, at):
    return None if array is None else np.ascontiguousarray(_view(geometry, array)[at])


def _blank(geometry, mask, *arrays):
    padding = ~mask.reshape(geometry.b, geometry.o, geometry.i)
    for array in arrays:
        if array is not None:
            _view(geometry, array)[padding] = 0


def _like(packed, wanted):
    return None if wanted is None else np.empty_like(packed)


def forward(
    plain, geometry, x, y, weight, bias, eps, statistics, running, momentum, flags, num_threads,
    fused,
):
    """plain is the forward of numba_cpu. statistics are (mean, var, rstd)."""
    mask = fused.mask
    after = fused._replace(mask=None)
    if flags & GIVEN_STATISTICS:
        plain(geometry, x, y, weight, bias, eps, *statistics, *running, momentum, flags,
              num_threads, after)
        _blank(geometry, mask, y)
        return
    found = np.zeros((3, geometry.b, geometry.g))
    for own, at, sets in _parts(geometry, mask):
        packed = _packed(geometry, x, at)
        into, total = np.empty_like(packed), _like(packed, fused.sum)
        stats = np.empty((3, own.b * own.g))
        own_after = after._replace(residual=_packed(geometry, fused.residual, at), sum=total)
        plain(own, packed, into, weight, bias, eps, *stats, None, None, momentum, flags,
              num_threads, own_after)
        found[:, sets] = stats.reshape(3, own.b, own.g)
        for array, values in ((y, into), (fused.sum, total)):
            if array is not None:
                _view(geometry, array)[at] = values
    _blank(geometry, mask, y, fused.sum)
    for statistic, values in zip(statistics, found, strict=True):
        if statistic is not None:
            statistic[:] = values.ravel()
    count = values_of(geometry, fused)
    unbiased = 1 if flags & BIASED_RUNNING_VAR else count / np.maximum(count - 1, 1)
    move(running[0], found[0], count, momentum)
    move(running[1], found[1] * unbiased, count, momentum)


def backward(
    plain, geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused
):
    """plain is the backward of numba_cpu."""
    sums = np.zeros((2, geometry.g * geometry.k))
    for own, at, sets in _parts(geometry, fused.mask):
        packed = [_packed(geometry, array, at) for array in (dy, x)]
        into, dz = np.empty_like(packed[0]), _like(packed[0], fused.dresidual)
        stats = (
            None if found is None else found.reshape(geometry.b, geometry.g)[sets].ravel()
            for found in (mean, rstd)
        )
        own_fused = fused._replace(
            mask=None, dresidual=dz, residual=_packed(geometry, fused.residual, at),
            dsum=_packed(geometry, fused.dsum, at),
        )
        terms = np.empty_like(sums)
        plain(own, *packed, weight, *stats, into, *terms, flags, num_threads, own_fused)
        sums += terms
        for array, values in ((dx, into), (fused.dresidual, dz)):
            if array is not None:
                _view(geometry, array)[at] = values
    _blank(geometry, fused.mask, dx, fused.dresidual)
    for gradient, found in zip((dweight, dbias), sums, strict=True):
        if gradient is not None:
            gradient[...] = found.reshape(gradient.shape)
