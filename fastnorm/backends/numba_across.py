"""The across loop order in Numba, the twin of kernels/across.pyx: o, g and i are 1 and s > 1. A
set's k values lie s apart, and s sets lie side by side.

A strip of neighbouring sets is finished while its values are in cache: sums run down its columns,
each with its own set, and the map goes along its rows, each with its own weight.
"""

from functools import lru_cache

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import kernel
from fastnorm.backends.numba_words import (
    RUN,
    add_place_products,
    add_rows,
    backward_terms,
    flush,
    forward_terms,
    map_product_rows,
    map_rows,
    reciprocal_deviation,
    sample,
    statistics,
)

STRIP = 196608  # bytes of a strip that leave room in a second-level cache
MOST_PLACES = 1024
PARTS = 32  # of the strips, that sum dweight each for themselves


@lru_cache(maxsize=1024)
def cut_strips(geometry, itemsize):
    """(places of a strip, parts), by the geometry alone."""
    places = min(MOST_PLACES, max(64, STRIP // (geometry.k * itemsize)))
    strips = -(-geometry.s // places)
    places = min(geometry.s, -(-geometry.s // strips // 16) * 16)
    units = geometry.b * -(-geometry.s // places)
    return places, min(units, PARTS, max(4, (1 << 16) // geometry.k))


@kernel("xxaa ddd tfnnnn", allocates=True)
def forward_across(
    x, y, weight, bias, mean, var, rstd, sizes, eps, s, places, has_mean, streaming
):
    """Strips of sets: statistics out, then y."""
    b, _, _, k, _ = sizes
    strips = (s + places - 1) // places
    for unit in prange(b * strips):
        first = unit % strips * places
        n = min(places, s - first)
        start = unit // strips * k * s + first
        set_ = unit // strips * s + first
        hi = np.zeros(n, weight.dtype)
        scale = np.zeros(n, weight.dtype)
        shift = np.zeros(n, weight.dtype)
        row_scale = np.zeros(n, weight.dtype)
        row_shift = np.zeros(n, weight.dtype)
        sums = np.zeros((2, n))
        if has_mean:
            for c in range(n):
                hi[c] = sample(x, start + c, s, k, 1)
        for r in range(0, k, RUN):
            add_rows(x[start + r * s :], min(RUN, k - r), s, hi, scale, shift)
            flush(scale, sums[0])
            flush(shift, sums[1])
        for c in range(n):
            mean[set_ + c], var[set_ + c] = statistics(
                x, start + c, s, k, 1, hi[c], sums[0, c], sums[1, c], has_mean
            )
            rstd[set_ + c] = reciprocal_deviation(var[set_ + c], eps)
            hi[c] = mean[set_ + c]
            scale[c], shift[c] = forward_terms(
                mean[set_ + c], float64(hi[c]), rstd[set_ + c], 1.0, 0.0
            )
        for r in range(k):
            for c in range(n):
                row_scale[c] = scale[c] * weight[r]
                row_shift[c] = shift[c] * weight[r] + bias[r]
            at = start + r * s
            map_rows(x[at:], y[at:], 1, 0, hi, row_scale, row_shift, streaming)


@kernel("xxax dd dd tnnnnnn", allocates=True)
def backward_across(
    dy, x, weight, dx, mean, rstd, terms_w, terms_b, sizes, s, places, parts, has_mean, given,
    streaming,
):
    """Parts of the strips: dx, and each part's terms of dweight and dbias."""
    b, _, _, k, _ = sizes
    strips = (s + places - 1) // places
    units = b * strips
    for part in prange(parts):
        dweight = terms_w[part * k : (part + 1) * k]
        dbias = terms_b[part * k : (part + 1) * k]
        dweight[:] = 0.0
        dbias[:] = 0.0
        for unit in range(part * units // parts, (part + 1) * units // parts):
            first = unit % strips * places
            n = min(places, s - first)
            start = unit // strips * k * s + first
            set_ = unit // strips * s + first
            hi = np.zeros(n, weight.dtype)
            near = np.zeros(n, weight.dtype)  # rstd, and with offset xhat from x - hi
            offset = np.zeros(n, weight.dtype)
            scale = np.zeros(n, weight.dtype)
            shift = np.zeros(n, weight.dtype)
            dscale = np.zeros(n, weight.dtype)
            sums = np.zeros((2, n))
            for c in range(n):
                hi[c] = mean[set_ + c]
                near[c], offset[c] = forward_terms(
                    mean[set_ + c], float64(hi[c]), rstd[set_ + c], 1.0, 0.0
                )
            for r in range(k):
                at = start + r * s
                found = add_place_products(
                    x[at : at + n], dy[at : at + n], weight[r], hi, near, offset, scale, shift
                )
                dweight[r] += found[0]
                dbias[r] += found[1]
                if r % RUN == RUN - 1 or r == k - 1:
                    flush(scale, sums[0])
                    flush(shift, sums[1])
            if not given:
                for c in range(n):
                    scale[c], shift[c] = backward_terms(
                        sums[0, c], sums[1, c], mean[set_ + c] - float64(hi[c]), rstd[set_ + c],
                        float64(k), has_mean,
                    )
            for r in range(k):
                for c in range(n):
                    dscale[c] = near[c] * weight[r]
                at = start + r * s
                map_product_rows(
                    x[at:], dy[at:], dx[at:], 1, 0, hi, scale, shift, dscale, streaming
                )
