"""The one view of the input that every normalization is computed on.

    x[b, o, g, k, i]     statistics over (o, k, i), one per (b, g)
                         weight and bias per (g, k)

This is the only Python file that knows NCHW and NHWC (its C twin is kernels/simple.c):

                      b       o      g    k      i
    batch, NCHW       1       N      C    1      S
    batch, NHWC       1       N*S    C    1      1
    ghost, NCHW       N/n     n      C    1      S       n samples at a time
    ghost, NHWC       N/n     n*S    C    1      1
    group, NCHW       N       1      G    C/G    S
    group, NHWC       N       S      G    C/G    1       instance norm: G = C
    rows              rows    1      1    D      1       layer and RMS norm
    across            before  1      1    D      1       the same over other than the last axes

S is the product of the spatial axes. Of sets across, s lie side by side: before and s are the
products of the axes before and behind those that are normalized.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

LINE = 64  # bytes
ALIGNED = 32768  # bytes of an array from which it is worth it to start at a line
CHANNELS_FIRST = {"NCHW": True, "channels_first": True, "NHWC": False, "channels_last": False}


class Geometry(NamedTuple):
    """Sizes of the axes; see the table above."""

    b: int
    o: int
    g: int
    k: int
    i: int
    s: int = 1

    @property
    def values(self):
        """Values in one set, the M of mean = sum/M."""
        return self.o * self.k * self.i


def channel_axis(channels_first):
    return 1 if channels_first else -1


def positions(shape, channels_first):
    """The shape without the channel axis, which a mask has: (N, *spatial)."""
    return shape[:1] + shape[2:] if channels_first else shape[:-1]


def at_positions(mask, channels_first):
    """A mask as it broadcasts against an array with a channel axis."""
    return np.expand_dims(mask, channel_axis(channels_first))


def lying(x, channels_first):
    """x as the C-contiguous array that its memory is, and whether *its* channels come first;
    None where its memory is neither channels first nor last."""
    if x.flags.c_contiguous:
        return x, channels_first
    if channels_first is not None:
        moved = as_asked(x, channels_first, not channels_first)
        if moved.flags.c_contiguous:
            return moved, not channels_first
    return None, channels_first


def as_it_lies(x, channels_first):
    """lying(x), or a copy of x that is C-contiguous."""
    view, first = lying(x, channels_first)
    return (np.ascontiguousarray(x) if view is None else view), first


def as_asked(y, has_first, channels_first):
    """A view of y with its channel axis where channels_first wants it."""
    if has_first == channels_first:
        return y
    return np.moveaxis(y, -1, 1) if channels_first else np.moveaxis(y, 1, -1)


@lru_cache(maxsize=1024)
def batch(shape, channels_first):
    """One set for each channel."""
    if channels_first:
        return Geometry(1, shape[0], shape[1], 1, prod(shape[2:]))
    return Geometry(1, prod(shape[:-1]), shape[-1], 1, 1)


@lru_cache(maxsize=1024)
def ghost(shape, channels_first, size):
    """One set for each channel of `size` samples at a time, a divisor of the batch."""
    b = shape[0] // size
    if channels_first:
        return Geometry(b, size, shape[1], 1, prod(shape[2:]))
    return Geometry(b, size * prod(shape[1:-1]), shape[-1], 1, 1)


@lru_cache(maxsize=1024)
def group(shape, channels_first, groups):
    """One set for each sample and group of channels."""
    if channels_first:
        return Geometry(shape[0], 1, groups, shape[1] // groups, prod(shape[2:]))
    return Geometry(shape[0], prod(shape[1:-1]), groups, shape[-1] // groups, 1)


@lru_cache(maxsize=1024)
def rows(shape, normalized_ndim):
    """One set for each index of the leading axes."""
    split = len(shape) - normalized_ndim
    return Geometry(prod(shape[:split]), 1, 1, prod(shape[split:]), 1)


@lru_cache(maxsize=1024)
def across(shape, start, stop):
    """One set for each index of the axes before and behind [start, stop)."""
    behind = prod(shape[stop:])
    return Geometry(prod(shape[:start]) * min(behind, 1), 1, 1, prod(shape[start:stop]), 1,
                    max(behind, 1))


def empty(shape, dtype):
    """np.empty, from a cache line on: NumPy's memory starts 16 bytes behind one, where every other
    store of a vector straddles two (calls took 1.0 to 1.6 times as long)."""
    size = prod(shape) * dtype.itemsize
    if size + LINE - 1 < ALIGNED:
        return np.empty(shape, dtype)
    memory = np.empty(size + LINE - 1, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(dtype).reshape(shape)
