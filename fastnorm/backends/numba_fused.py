"""Residual and activation in Numba as a map of its own: of a forward whose kernel only finds
statistics, and before a backward, as a pass that takes the gradient back through the activation.
Behind ReLU alone backwards have a gate instead (numba_gate): 0.4 to 0.8 of the time.
"""

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_activations import map_fused_run
from fastnorm.backends.numba_columns import in_turn
from fastnorm.backends.numba_jit import inlined, kernel
from fastnorm.backends.numba_rows import pieces_of, terms_of_runs
from fastnorm.backends.numba_simd import bytes_of, rounded
from fastnorm.backends.numba_slabs import SHORT_RUN, slab_of, spread
from fastnorm.backends.numba_words import forward_terms

WIDE = 1024  # values, at least, of the rows of channels that are mapped as one
PARTS = 64  # of the work
# Values of a run from which coefficients that serve once are not spread over places: runs of 7x7
# 0.9, of 14x14 0.55 of the time (where a channel has several runs 0.85 to 1.9).
ONCE = 40

# (dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope, has_residual, backward,
# streaming, threads); in a forward dy may be anything like x, and without one the residual
LETTERS = "xxxaax dd tnfnnnn"


def kernel_of(geometry):
    if geometry.i >= (SHORT_RUN if geometry.o > 1 else ONCE):
        return map_fused_runs
    return map_fused_elements if geometry.i == geometry.o == 1 else map_fused_slabs


@kernel(LETTERS, allocates=True)
def map_fused_runs(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                   has_residual, backward, streaming, threads):
    """into = activation(z + residual), or backward dy*activation'(z + residual)."""
    b, o, g, k, i = sizes
    channels, pieces = g * k, pieces_of(i)
    hi, scale, shift = terms_of_runs(weight, bias, mean, rstd, sizes)
    how = has_residual != 0, backward != 0, streaming != 0
    units = b * o * channels * pieces
    for part in prange(threads):
        for turn in range(part * units // threads, (part + 1) * units // threads):
            unit = in_turn(turn, part, threads, units, True)
            run, piece = unit // pieces, unit % pieces
            own = slice(run * i + piece * i // pieces, run * i + (piece + 1) * i // pieces)
            channel = run // (o * channels) * channels + run % channels
            map_fused_run((x[own], residual[own], dy[own], into[own]),
                          (hi[channel], scale[channel], shift[channel]), kind, slope, how)


@inlined
def repeat(values, i, into):
    """Each of the values i times, and all of that again as often as it fits."""
    if i > 1:
        spread(values, i, into)
        return
    for start in range(0, into.size, values.size):
        copy = into[start : start + values.size]
        for c in range(values.size):
            copy[c] = values[c]


@kernel(LETTERS, allocates=True)
def map_fused_slabs(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                    has_residual, backward, streaming, threads):
    """Of short runs: those of neighbouring channels in a sample as one, and of few channels where
    i is 1 those of several samples."""
    b, o, g, k, i = sizes
    channels = g * k
    hi, scale, shift = terms_of_runs(weight, bias, mean, rstd, sizes)
    how = has_residual != 0, backward != 0, streaming != 0
    most = channels if i == 1 else min(channels, slab_of(i, bytes_of(x)))
    slabs = (channels + most - 1) // most
    copies = min(o, (WIDE + channels - 1) // channels) if i == 1 else 1
    rows = (o + copies - 1) // copies
    parts = min(rows, (PARTS + b * slabs - 1) // (b * slabs))
    units = b * slabs * parts
    for thread in prange(threads):
        for turn in range(thread * units // threads, (thread + 1) * units // threads):
            unit = in_turn(turn, thread, threads, units, True)
            sample_, slab, part = unit // (slabs * parts), unit // parts % slabs, unit % parts
            first = sample_ * channels + slab * most
            own = slice(first, min((sample_ + 1) * channels, first + most))
            terms = hi[own], scale[own], shift[own]
            width = (own.stop - own.start) * i * copies
            if width > own.stop - own.start:
                room = np.empty(3 * width, weight.dtype)
                terms = room[:width], room[width : 2 * width], room[2 * width :]
                repeat(hi[own], i, terms[0])
                repeat(scale[own], i, terms[1])
                repeat(shift[own], i, terms[2])
            end = (sample_ + 1) * o * channels * i
            for row in range(part * rows // parts, (part + 1) * rows // parts):
                at = (sample_ * o + row * copies) * channels * i + slab * most * i
                n = min(width, end - at)
                run = slice(at, at + n)
                map_fused_run((x[run], residual[run], dy[run], into[run]),
                              (terms[0][:n], terms[1][:n], terms[2][:n]), kind, slope, how)


@kernel(LETTERS)
def map_fused_elements(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                       has_residual, backward, streaming, threads):
    """Of rows with a weight for each place."""
    b, _, g, k, _ = sizes
    how = has_residual != 0, backward != 0, streaming != 0
    for set_ in prange(b * g):
        own, w = slice(set_ * k, (set_ + 1) * k), slice(set_ % g * k, (set_ % g + 1) * k)
        hi = rounded(x, mean[set_])
        scale, shift = forward_terms(mean[set_], float64(hi), rstd[set_], 1.0, 0.0)
        terms = hi, rounded(x, scale), rounded(x, shift), weight[w], bias[w]
        map_fused_run((x[own], residual[own], dy[own], into[own]), terms, kind, slope, how)
