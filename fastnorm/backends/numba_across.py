"""The across loop order in Numba, the twin of kernels/across.pyx: o, g and i are 1 and s > 1. A
set's k values lie s apart, and s sets lie side by side.

A strip of neighbouring sets is finished while its values are in cache: sums run down its columns,
each with its own set, and the map goes along its rows, each with its own weight.
"""

from functools import lru_cache

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import BACKWARD, FORWARD, inlined, kernel
from fastnorm.backends.numba_maps import map_product_rows, map_scaled_rows, pour
from fastnorm.backends.numba_rows import merge_terms
from fastnorm.backends.numba_simd import LINE, address, at, bytes_of, lanes, on_grid
from fastnorm.backends.numba_words import (
    IN_ORDER,
    RUN,
    SAMPLES,
    STEP,
    add_four_place_products,
    add_place_products,
    add_rows,
    backward_terms,
    cancels,
    flush,
    forward_terms,
    moments,
    reciprocal_deviation,
    statistics,
)

STRIP = 196608  # bytes of a strip that leave room in a second-level cache
CACHED = 1 << 20  # of strips that are there until they are mapped, at most
PAGE = 4096
SHORT = 1024  # bytes from row to row, up to which memory is read as it lies
MOST_PLACES = 1024
TOGETHER = 8  # rows mapped together: what belongs to places is loaded once (0.7 to 0.9)
FAR = 3072  # bytes from a row to the next, from which several are read together: nearer, the
# processor foresees them one by one better (14x14 0.7 of the time; 28x28 1.2)
JOINED = 4096  # values of rows that are put together
MOST_LANES = 16  # of a line
PARTS = 32  # of the strips, that sum dweight each for themselves


@lru_cache(maxsize=1024)
def cut_strips(geometry, itemsize, arrays):
    """(places of a strip, parts), by the geometry alone; `arrays` are read and written. The rules
    are those of kernels/across.pxd."""
    row, inputs = geometry.s * itemsize, arrays - 1
    least = 64 if inputs == 1 else 128
    crowded = max(least * itemsize, min(PAGE, row & -row)) * geometry.k * inputs
    places = max(least, STRIP // (geometry.k * itemsize))
    if row <= SHORT or geometry.k * row <= 4 // inputs * STRIP or crowded > CACHED:
        places = MOST_PLACES
    strips = -(-geometry.s // min(MOST_PLACES, places))
    places = min(geometry.s, -(-geometry.s // strips // 32) * 32)
    units = geometry.b * -(-geometry.s // places)
    return places, min(units, PARTS, max(4, (1 << 16) // geometry.k))


# Loops over neighbouring sets, of which LLVM makes vectors.


@inlined
def sample_sets(x, start, stride, k, near, total):
    """near = sample() of each set."""
    first = x[start : start + near.size]
    for j in range(1, SAMPLES):
        row = x[start + j * k // SAMPLES * stride :]
        for c in range(near.size):
            total[c] += float64(at(row, c)) - float64(at(first, c))
    for c in range(near.size):
        value = float64(at(first, c)) + total[c] / SAMPLES
        near[c] = on_grid(x, value if abs(value) < 1e37 else 0.0)
        total[c] = 0.0


@inlined
def set_moments(x, start, stride, k, about, sums, mean, var, has_mean):
    """statistics() of each set."""
    lost = 0
    if not has_mean:
        sums[0][:] = 0.0
    s, q = sums[0], sums[1]
    for c in range(mean.size):
        lost += cancels(s[c], q[c], float64(k))
    if lost == 0:
        for c in range(mean.size):
            mean[c], var[c] = moments(s[c], q[c], float64(about[c]), float64(k))
        return
    for c in range(mean.size):
        mean[c], var[c] = statistics(
            x, start + c, stride, k, 1, about[c], s[c], q[c], has_mean
        )


@inlined
def finish_sets(mean, var, rstd, hi, scale, shift, eps):
    for c in range(mean.size):
        rstd[c] = reciprocal_deviation(var[c], eps)
        hi[c] = mean[c]
        scale[c], shift[c] = forward_terms(mean[c], float64(hi[c]), rstd[c], 1.0, 0.0)


@inlined
def joins(y, s, places, streaming):
    """Whether rows are put together to be streamed: where they lie one behind the other, but start
    anywhere in a line or are a few vectors and a part of one."""
    past = address(y) % LINE
    return (streaming and places == s and past % bytes_of(y) == 0
            and (past + s * bytes_of(y) % LINE > 0 or s % (4 * lanes(y)) > s // 8))


@kernel(FORWARD, sizes=4, allocates=True)
def forward_across(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """Strips of sets: statistics out, then y."""
    b, k, s, places = sizes
    strips = (s + places - 1) // places
    joining = joins(y, s, places, streaming)
    for unit in prange(b * strips):
        first = unit % strips * places
        n = min(places, s - first)
        start = unit // strips * k * s + first
        set_ = unit // strips * s + first
        hi = np.zeros(n, weight.dtype)
        scale = np.zeros(n, weight.dtype)
        shift = np.zeros(n, weight.dtype)
        sums = np.zeros((2, n))
        step = STEP if s * bytes_of(x) >= FAR else IN_ORDER
        if has_mean:
            sample_sets(x, start, s, k, hi, sums[0])
        for r in range(0, k, RUN):
            row = x[start + r * s :]
            add_rows(row, row, (), min(RUN, k - r), s, hi, scale, shift, step)
            flush(scale, sums[0])
            flush(shift, sums[1])
        own = slice(set_, set_ + n)
        set_moments(x, start, s, k, hi, sums, mean[own], var[own], has_mean)
        finish_sets(mean[own], var[own], rstd[own], hi, scale, shift, eps)
        # Others that start anywhere in a line are streamed each for itself.
        alone = streaming and not joining and s * bytes_of(y) % LINE != 0
        step, stride = (1, 0) if alone else (TOGETHER, s)
        if joining:
            step = min(step, JOINED // s)
        kept, filled, to = np.empty(JOINED + LINE if joining else 0, y.dtype), 0, start
        for r in range(0, k, step):
            place, rows = start + r * s, slice(r, min(r + step, k))
            map_scaled_rows(
                x[place:], kept[filled:] if joining else y[place:], stride, hi, scale, shift,
                weight[rows], bias[rows], streaming and not joining,
            )
            if joining:
                filled += (rows.stop - r) * s
                poured = pour(kept, filled, y[to:], rows.stop == k)
                filled -= poured
                to += poured


@kernel(BACKWARD, sizes=5, allocates=True)
def backward_across(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                    given, streaming):
    """Parts of the strips: dx, and each part's terms of dweight and dbias."""
    b, k, s, places, parts = sizes
    terms_w, terms_b = terms[: parts * k], terms[parts * k :]
    strips = (s + places - 1) // places
    units = b * strips
    joining = joins(dx, s, places, streaming)
    for part in prange(parts):
        own_w = terms_w[part * k : (part + 1) * k]
        own_b = terms_b[part * k : (part + 1) * k]
        own_w[:] = 0.0
        own_b[:] = 0.0
        for unit in range(part * units // parts, (part + 1) * units // parts):
            first = unit % strips * places
            n = min(places, s - first)
            start = unit // strips * k * s + first
            set_ = unit // strips * s + first
            whole = (n + MOST_LANES - 1) // MOST_LANES * MOST_LANES
            room = np.zeros((6, whole), weight.dtype)
            hi, scale, shift, dscale = room[0, :n], room[1, :n], room[2, :n], room[3, :n]
            near, offset = room[4, :n], room[5, :n]  # rstd, and with offset xhat from x - hi
            sums = np.zeros((2, n))
            for c in range(n):
                hi[c] = mean[set_ + c]
                near[c], offset[c] = forward_terms(
                    mean[set_ + c], float64(hi[c]), rstd[set_ + c], 1.0, 0.0
                )
            for block in range(0, k, RUN):
                last = min(block + RUN, k)
                fours = last - (last - block) % 4 if s * bytes_of(x) >= FAR else block
                for r in range(block, fours, 4):
                    place = start + r * s
                    add_four_place_products(
                        x[place:], dy[place:], s, weight[r:], hi, near, offset, scale, shift,
                        own_w[r:], own_b[r:],
                    )
                for r in range(fours, last):
                    place = start + r * s
                    add_place_products(
                        x[place:], dy[place:], weight[r:], hi, near, offset, scale, shift,
                        own_w[r:], own_b[r:],
                    )
                flush(scale, sums[0])
                flush(shift, sums[1])
            if not given:
                for c in range(n):
                    scale[c], shift[c] = backward_terms(
                        sums[0, c], sums[1, c], mean[set_ + c] - float64(hi[c]), rstd[set_ + c],
                        float64(k), has_mean,
                    )
            kept, filled, to = np.empty(JOINED + LINE if joining else 0, dx.dtype), 0, start
            for r in range(k):
                # Whole lines of them: a load of a part waits where several stores filled it.
                for c in range(whole):
                    room[3, c] = room[4, c] * weight[r]
                place = start + r * s
                map_product_rows(
                    x[place:], dy[place:], kept[filled:] if joining else dx[place:], (), 1, 0, hi,
                    scale, shift, dscale, 1, streaming and not joining,
                )
                filled += s
                if joining and (r + 1 == k or filled + s > JOINED):
                    poured = pour(kept, filled, dx[to:], r + 1 == k)
                    filled -= poured
                    to += poured
    merge_terms(terms, dweight, dbias, parts)
