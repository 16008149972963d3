"""Batch norm with statistics of its own: of ghost batches, and running ones that move apart from
the normalizing. Everything is made of plain calls; what moves is moved here.
"""

import numpy as np

from fastnorm import geometry
from fastnorm.results import Gradients, GradientsWithResidual, Statistics


def parts(samples, ghost_size):
    """(slice of the batch, samples in each of its ghost batches): the whole ones, and what they
    leave over."""
    size = min(ghost_size or samples, samples)
    whole = samples - samples % size if size else 0
    cut = [(slice(0, whole), size), (slice(whole, samples), samples - whole)]
    return [(part, count) for part, count in cut if count and part.stop > part.start]


def _of_part(array, part):
    return None if array is None else array[part]


def _fused_of_part(fused, part):
    return fused._replace(
        residual=_of_part(fused.residual, part), mask=_of_part(fused.mask, part)
    )


def _shape_of(size):
    return lambda shape, first: geometry.ghost(shape, first, size)


def forward(call, x, channels, out, fused, ghost_size):
    """(y, Statistics of shape (ghost batches, C), values in a set of each ghost batch).

    call(x, out, shape_of, stats_shape, fused) is a plain forward.
    """
    y = np.empty_like(x) if out is None else out
    stats, counts = [], []
    for part, size in parts(x.shape[0], ghost_size):
        groups = (part.stop - part.start) // size
        after = _fused_of_part(fused, part)
        found = call(x[part], y[part], _shape_of(size), (groups, channels), after)[1]
        stats.append((found.mean, found.var, found.rstd))
        if fused.mask is None:
            counts += [size * (x.size // x.shape[0] // channels)] * groups
        else:
            counts += np.count_nonzero(fused.mask[part].reshape(groups, -1), axis=1).tolist()
    columns = zip(*stats, strict=True) if stats else [[np.empty((0, channels))]] * 3
    return y, Statistics(*map(np.concatenate, columns)), counts


def move(name, running, stats, counts, momentum, biased, nan_policy):
    """Move the running statistics by those of the sets of each channel, weighed by their values."""
    if not sum(counts):
        return
    shares = np.array(counts, float)[:, np.newaxis] / np.sum(counts)
    unbiased = 1.0 if biased else np.array([[n / max(n - 1, 1)] for n in counts])
    with np.errstate(all="ignore"):
        batch = [
            np.sum(shares * found.reshape(len(counts), -1), axis=0)
            for found in (stats.mean, stats.var * unbiased)
        ]
        moved = [
            None if old is None else (1 - momentum) * old.astype(np.float64) + momentum * new
            for old, new in zip(running, batch, strict=True)
        ]
    good = np.isfinite(batch[0]) & np.isfinite(batch[1])
    if nan_policy == "raise" and not np.all(good):
        raise FloatingPointError(
            f"{name}: the batch's statistics of {np.sum(~good)} of {good.size} channels are not"
            " finite; the running ones are as they were (nan_policy='raise')"
        )
    for old, new in zip(running, moved, strict=True):
        if old is not None:
            old[...] = np.where(good, new, old) if nan_policy == "skip" else new


def backward(call, dy, x, stats, channels, out, fused, out_residual, ghost_size, dtype):
    """Gradients through the statistics of ghost batches, from their parts'.

    call(dy, x, stats, out, shape_of, stats_shape, fused, out_residual) is a plain backward.
    """
    dx = np.empty_like(x) if out is None else out
    dresidual = out_residual
    if fused.residual is not None and fused.activation and out_residual is None:
        dresidual = np.empty_like(x)
    sums = np.zeros((2, channels))
    at = 0
    for part, size in parts(x.shape[0], ghost_size):
        groups = (part.stop - part.start) // size
        own = Statistics(*(a[at : at + groups] for a in (stats.mean, stats.var, stats.rstd)))
        after = _fused_of_part(fused, part)
        found = call(
            dy[part], x[part], own, dx[part], _shape_of(size), (groups, channels), after,
            _of_part(dresidual, part),
        )
        sums += found[1:3]
        at += groups
    dweight, dbias = sums.astype(dtype)
    if fused.residual is None:
        return Gradients(dx, dweight, dbias)
    return GradientsWithResidual(dx, dweight, dbias, dy if dresidual is None else dresidual)
