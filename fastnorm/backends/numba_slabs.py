"""Short runs of the rows loop order in Numba: b == k == 1, many samples, few values in a run.

The runs of neighbouring channels in one sample lie one behind the other: a slab. Sums run down the
o slabs of the same channels, place by place as in the columns order, and a channel's places are
added up at the end. A slab is small enough to stay in cache from the sums to the map.
"""

from math import gcd

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_activations import map_rows_beside, take_back
from fastnorm.backends.numba_gate import bias_at, gate_if
from fastnorm.backends.numba_jit import FUSED, FUSED_BACKWARD, inlined, kernel
from fastnorm.backends.numba_maps import map_product_rows
from fastnorm.backends.numba_simd import LINE, fold, lanes, load, rounded, splat
from fastnorm.backends.numba_words import (
    RUN,
    STEP,
    add_row_products,
    add_rows,
    backward_terms,
    forward_terms,
    reciprocal_deviation,
    sample,
    statistics,
)

SLAB = 1024  # places, about
SHORT_RUN = 256  # values in a run, below which it pays,
GIVEN_SHORT_RUN = 100  # or where they are only mapped
MANY = 8  # samples, from which it does


def serves(geometry, only_map=False):
    most = GIVEN_SHORT_RUN if only_map else SHORT_RUN
    return geometry.b == geometry.k == 1 and 1 < geometry.i < most and geometry.o >= MANY


@inlined
def slab_of(i, itemsize):
    """Channels of a slab: whole lines, where so many make any."""
    count = max(1, SLAB // i)
    whole = LINE // itemsize // gcd(i, LINE // itemsize)
    return count - count % whole if count > whole else count


@inlined
def spread(values, i, into):
    """Each of the values to the i places of its channel."""
    for c in range(values.size):
        own = into[c * i : (c + 1) * i]
        for j in range(own.size):
            own[j] = values[c]


@inlined
def gather(places, i, totals):
    """The i places of each channel onto its total."""
    width = lanes(places)
    for c in range(totals.size):
        stop = (c + 1) * i - i % width
        lines = splat(rounded(places, 0))
        for j in range(c * i, stop, width):
            lines = lines + load(places, j)
        total = fold(lines)
        for j in range(stop, (c + 1) * i):
            total += float64(places[j])
        totals[c] += total
    places[:] = 0


@kernel(FUSED, sizes=6, allocates=True)
def forward_slabs(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming, beside):
    """numba_rows.forward_sets, or with `given` only the map."""
    _, o, g, _, i, given = sizes
    stride = g * i
    most = slab_of(i, x.itemsize)
    for unit in prange((g + most - 1) // most):
        first = unit * most
        channels = min(most, g - first)
        n = channels * i
        hi = np.zeros(n, weight.dtype)
        scale = np.zeros(n, weight.dtype)
        shift = np.zeros(n, weight.dtype)
        terms = np.zeros((3, channels), weight.dtype)
        sums = np.zeros((2, channels))
        if not given:
            for c in range(channels):
                if has_mean:
                    terms[0, c] = sample(x, (first + c) * i, stride, o, i)
            spread(terms[0], i, hi)
            for r in range(0, o, RUN):
                slabs = x[r * stride + first * i :]
                add_rows(slabs, slabs, (), min(RUN, o - r), stride, hi, scale, shift, STEP)
                gather(scale, i, sums[0])
                gather(shift, i, sums[1])
        for c in range(channels):
            set_ = first + c
            if not given:
                mean[set_], var[set_] = statistics(
                    x, set_ * i, stride, o, i, terms[0, c], sums[0, c], sums[1, c], has_mean
                )
            rstd[set_] = reciprocal_deviation(var[set_], eps)
            terms[0, c] = mean[set_]
            terms[1, c], terms[2, c] = forward_terms(
                mean[set_], float64(terms[0, c]), rstd[set_], float64(weight[set_]),
                float64(bias[set_]),
            )
        if y.size > 0:
            spread(terms[0], i, hi)
            spread(terms[1], i, scale)
            spread(terms[2], i, shift)
            map_rows_beside(x, y, first * i, o, stride, (hi, scale, shift), beside, STEP, streaming)


@kernel(FUSED_BACKWARD, allocates=True)
def backward_slabs(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                   given, streaming, before, beside):
    """numba_rows.backward_sets."""
    _, o, g, _, i = sizes
    stride = g * i
    most = slab_of(i, x.itemsize)
    for unit in prange((g + most - 1) // most):
        first = unit * most
        channels = min(most, g - first)
        n = channels * i
        hi = np.zeros(n, weight.dtype)
        scale = np.zeros(n, weight.dtype)
        shift = np.zeros(n, weight.dtype)
        dscale = np.zeros(n, weight.dtype)
        own = np.zeros((4, channels), weight.dtype)
        room = np.zeros((2, n if len(bias) > 0 else 0), weight.dtype)
        gate = gate_if(bias, beside, room[0], room[1])
        sums = np.zeros((2, channels))
        for c in range(channels):
            own[0, c] = mean[first + c]
        spread(own[0], i, hi)
        if len(bias) > 0:
            for c in range(channels):
                set_ = first + c
                own[1, c], own[2, c] = forward_terms(
                    mean[set_], float64(own[0, c]), rstd[set_], float64(weight[set_]),
                    bias_at(bias, set_),
                )
            spread(own[1], i, room[0])
            spread(own[2], i, room[1])
            own[1:3] = 0
        for r in range(0, o, RUN):
            at, rows = r * stride + first * i, min(RUN, o - r)
            take_back(dy, x, before, at, rows, stride, (hi, room[0], room[1]), beside)
            add_row_products(x[at:], before[at:], gate, rows, stride, hi, scale, shift, STEP)
            gather(scale, i, sums[0])
            gather(shift, i, sums[1])
        for c in range(channels):
            set_ = first + c
            w = float64(weight[set_])
            lo = mean[set_] - float64(own[0, c])
            dbias[set_] = sums[0, c]
            dweight[set_] = rstd[set_] * (sums[1, c] - lo * sums[0, c])
            if not given:
                own[1, c], own[2, c] = backward_terms(
                    w * sums[0, c], w * sums[1, c], lo, rstd[set_], float64(o * i), has_mean
                )
            own[3, c] = rstd[set_] * w
        spread(own[1], i, scale)
        spread(own[2], i, shift)
        spread(own[3], i, dscale)
        at = first * i
        map_product_rows(
            x[at:], before[at:], dx[at:], gate, o, stride, hi, scale, shift, dscale, STEP, streaming
        )
