"""The rows loop order in Numba: i > 1, or o == 1. A set is o runs of k*i values; x, y, dy and dx
are flat.

A set is finished while it is in cache. Sets too few and too large are cut into pieces of runs,
which are summed, merged in their order, and mapped: the bits never depend on threads.
"""

import numpy as np
from numba import float64, int64, prange

from fastnorm.backends.numba_activations import map_run_beside, take_back
from fastnorm.backends.numba_gate import bias_at, gate_if
from fastnorm.backends.numba_jit import (
    BACKWARD,
    FORWARD,
    FUSED,
    FUSED_BACKWARD,
    GATED,
    allocating,
    called,
    inlined,
    kernel,
    shared_evenly,
)
from fastnorm.backends.numba_maps import (
    add_runs,
    map_products,
    map_run,
    map_run_weighted,
    map_weighted_rows,
)
from fastnorm.backends.numba_simd import rounded
from fastnorm.backends.numba_words import (
    backward_terms,
    flush,
    forward_terms,
    reciprocal_deviation,
    run_products,
    run_products_weighted,
    run_sums,
    sample,
    statistics,
)

TILE = 65536  # values in a piece
PART = 32768  # of rows with a weight for each place, at least,
MOST_PARTS = 16


def pieces_in(n):
    return (n + TILE - 1) // TILE


pieces_of = inlined(pieces_in)


def parts_of(geometry):
    """Of the rows with a weight for each place: each sums dweight for itself."""
    least = max(TOGETHER, PART // (geometry.g * geometry.k))
    return shared_evenly(min(-(-geometry.b // least), MOST_PARTS))


@kernel(FUSED)
def forward_sets(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming, beside):
    """Each set: sums, statistics, map."""
    b, o, g, k, i = sizes
    n = k * i
    for set_ in prange(b * g):
        start = set_ // g * o * g * n + set_ % g * n
        about = sample(x, start, g * n, o, n) if has_mean else rounded(x, 0)
        s = 0.0
        q = 0.0
        for r in range(o):
            at = start + r * g * n
            sums = run_sums(x[at : at + n], about)
            s += sums[0]
            q += sums[1]
        found = statistics(x, start, g * n, o, n, about, s, q, has_mean)
        mean[set_] = found[0]
        var[set_] = found[1]
        rstd[set_] = reciprocal_deviation(found[1], eps)
        hi = rounded(x, found[0])
        for c in range(k if y.size > 0 else 0):
            channel = set_ % g * k + c
            scale, shift = forward_terms(
                found[0], float64(hi), rstd[set_], float64(weight[channel]), float64(bias[channel])
            )
            for r in range(o):
                at = start + r * g * n + c * i
                map_run_beside(x, y, at, i, (hi, rounded(x, scale), rounded(x, shift)), beside,
                               streaming)


@inlined
def forward_row(x, y, weight, bias, mean, var, rstd, set_, sizes, eps, has_mean, streaming):
    """A set where i == o == 1: a weight for each place."""
    _, _, g, k, _ = sizes
    at = set_ * k
    about = sample(x, at, 0, 1, k) if has_mean else rounded(x, 0)
    s, q = run_sums(x[at : at + k], about)
    found = statistics(x, at, 0, 1, k, about, s, q, has_mean)
    mean[set_] = found[0]
    var[set_] = found[1]
    inverse = reciprocal_deviation(found[1], eps)
    rstd[set_] = inverse
    if y.size > 0:
        hi = rounded(x, found[0])
        scale, shift = forward_terms(found[0], float64(hi), inverse, 1.0, 0.0)
        w = set_ % g * k
        map_run_weighted(
            y[at : at + k], (x[at : at + k], weight[w : w + k], bias[w : w + k]),
            (hi, rounded(x, scale), rounded(x, shift)), streaming,
        )


@kernel(FORWARD)
def forward_elements(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    b, _, g, _, _ = sizes
    for set_ in prange(b * g):
        forward_row(x, y, weight, bias, mean, var, rstd, set_, sizes, eps, has_mean, streaming)


@kernel("xx" + FORWARD)
def forward_sums(first, second, x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean,
                 streaming):
    """forward_elements of x = first + second, which is written."""
    b, _, g, k, _ = sizes
    for set_ in prange(b * g):
        own = slice(set_ * k, (set_ + 1) * k)
        add_runs(x[own], (first[own], second[own]), (), False)
        forward_row(x, y, weight, bias, mean, var, rstd, set_, sizes, eps, has_mean, streaming)


@inlined
def set_of_run(run, o, g):
    return run // (o * g) * g + run % g


@inlined
def sum_piece(x, about, partial, unit, sizes):
    """partial = the sums of a piece of a run."""
    _, o, g, k, i = sizes
    n = k * i
    pieces = pieces_of(n)
    run, piece = unit // pieces, unit % pieces
    first, stop = run * n + piece * n // pieces, run * n + (piece + 1) * n // pieces
    partial[2 * unit], partial[2 * unit + 1] = run_sums(
        x[first:stop], rounded(x, about[set_of_run(run, o, g)])
    )


@inlined
def finish_pieces(x, about, partial, mean, var, set_, sizes, has_mean):
    _, o, g, k, i = sizes
    n = k * i
    pieces = pieces_of(n)
    s = 0.0
    q = 0.0
    for r in range(o):
        run = (set_ // g * o + r) * g + set_ % g
        for unit in range(run * pieces, (run + 1) * pieces):
            s += partial[2 * unit]
            q += partial[2 * unit + 1]
    start = set_ // g * o * g * n + set_ % g * n
    mean[set_], var[set_] = statistics(
        x, start, g * n, o, n, rounded(x, about[set_]), s, q, has_mean
    )


@inlined
def invert_deviations(var, rstd, eps):
    for set_ in range(var.size):
        rstd[set_] = reciprocal_deviation(var[set_], eps)


# Loops over neighbouring channels, of which LLVM makes vectors.


@inlined
def terms_of_set(hi, scale, shift, weight, bias, mean, rstd):
    for c in range(hi.size):
        hi[c] = mean
    near = float64(hi[0])
    for c in range(scale.size):
        scale[c] = forward_terms(mean, near, rstd, float64(weight[c]), float64(bias[c]))[0]
    for c in range(shift.size):
        shift[c] = forward_terms(mean, near, rstd, float64(weight[c]), float64(bias[c]))[1]


@inlined
def terms_of_sets(hi, scale, shift, weight, bias, mean, rstd):
    for c in range(hi.size):
        hi[c] = mean[c]
    for c in range(scale.size):
        scale[c] = forward_terms(mean[c], 0.0, rstd[c], float64(weight[c]), 0.0)[0]
    for c in range(shift.size):
        shift[c] = forward_terms(
            mean[c], float64(hi[c]), rstd[c], float64(weight[c]), float64(bias[c])
        )[1]


@allocating
def terms_of_runs(weight, bias, mean, rstd, sizes):
    """(hi, scale, shift), of each channel of each b."""
    b, _, g, k, _ = sizes
    hi = np.empty(b * g * k, weight.dtype)
    scale = np.empty(b * g * k, weight.dtype)
    shift = np.empty(b * g * k, weight.dtype)
    for first in range(0, b * g, g if k == 1 else 1):
        own = slice(first * k, first * k + (g if k == 1 else k))
        w = slice(own.start % (g * k), own.start % (g * k) + own.stop - own.start)
        if k == 1:
            sets = slice(first, first + g)
            terms_of_sets(hi[own], scale[own], shift[own], weight[w], bias[w], mean[sets],
                          rstd[sets])
        else:
            terms_of_set(hi[own], scale[own], shift[own], weight[w], bias[w], mean[first],
                         rstd[first])
    return hi, scale, shift


@inlined
def map_runs(x, y, hi, scale, shift, unit, sizes, streaming):
    """Some short runs of a sample, in their order in memory, or a piece of a long one."""
    _, o, g, k, i = sizes
    channels = g * k
    pieces, together = pieces_of(i), max(1, TILE // i)
    chunks = (channels + together - 1) // together
    piece, chunk = unit % pieces, unit // pieces % chunks
    sample_ = unit // (pieces * chunks)
    own = sample_ // o * channels
    for channel in range(chunk * together, min(channels, (chunk + 1) * together)):
        at = (sample_ * channels + channel) * i
        first, stop = at + piece * i // pieces, at + (piece + 1) * i // pieces
        map_run(y[first:stop], (x[first:stop],),
                (hi[own + channel], scale[own + channel], shift[own + channel]), streaming)


@inlined
def units_of_map(sizes):
    b, o, g, k, i = sizes
    together = max(1, TILE // i)
    return b * o * ((g * k + together - 1) // together) * pieces_of(i)


@kernel(FORWARD, allocates=True)
def forward_pieces(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """forward_sets of few large sets, a piece of a run at a time."""
    b, o, g, k, i = sizes
    runs = b * o * g
    about = np.zeros(b * g)
    partial = np.empty(2 * runs * pieces_of(k * i))
    if has_mean:
        for set_ in range(b * g):
            n = k * i
            about[set_] = float64(sample(x, set_ // g * o * g * n + set_ % g * n, g * n, o, n))
    for unit in prange(runs * pieces_of(k * i)):
        sum_piece(x, about, partial, int64(unit), sizes)
    for set_ in prange(b * g):
        finish_pieces(x, about, partial, mean, var, int64(set_), sizes, has_mean)
    invert_deviations(var, rstd, eps)
    hi, scale, shift = terms_of_runs(weight, bias, mean, rstd, sizes)
    if y.size > 0:
        for unit in prange(units_of_map(sizes)):
            map_runs(x, y, hi, scale, shift, int64(unit), sizes, streaming)


@kernel(FORWARD, allocates=True)
def forward_given(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """Only the map, by the given mean and var."""
    invert_deviations(var, rstd, eps)
    hi, scale, shift = terms_of_runs(weight, bias, mean, rstd, sizes)
    if y.size > 0:
        for unit in prange(units_of_map(sizes)):
            map_runs(x, y, hi, scale, shift, int64(unit), sizes, streaming)


# ---- backward: dx, and for each (set, channel) its terms of dweight and dbias --------------------


@called
def merge_terms(terms, dweight, dbias, parts):
    """The sums of the parts' terms."""
    size = dweight.size
    for first, into in ((0, dweight), (parts * size, dbias)):
        total = terms[first : first + size]
        for part in range(1, parts):
            own = terms[first + part * size : first + (part + 1) * size]
            for j in range(size):
                total[j] += own[j]
        for j in range(size):
            into[j] = total[j]


@inlined
def terms_before(bias, x, weight, mean, hi, rstd, channel):
    """(hi, scale, shift) of the activation's input, of a channel of a set."""
    scale, shift = forward_terms(
        mean, float64(hi), rstd, float64(weight[channel]), bias_at(bias, channel)
    )
    return hi, rounded(x, scale), rounded(x, shift)


@inlined
def gate_of(bias, beside, x, weight, mean, hi, rstd, channel):
    """The gate of a channel of a set."""
    _, scale, shift = terms_before(bias, x, weight, mean, hi, rstd, channel)
    return gate_if(bias, beside, scale, shift)


@kernel(FUSED_BACKWARD)
def backward_sets(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                  given, streaming, before, beside):
    b, o, g, k, i = sizes
    n = k * i
    terms_w, terms_b = terms[: b * g * k], terms[b * g * k :]
    for set_ in prange(b * g):
        start = set_ // g * o * g * n + set_ % g * n
        hi = rounded(x, mean[set_])
        lo = mean[set_] - float64(hi)
        gy = 0.0
        gyd = 0.0
        for c in range(k):
            channel = set_ % g * k + c
            gate = gate_of(bias, beside, x, weight, mean[set_], hi, rstd[set_], channel)
            z = terms_before(bias, x, weight, mean[set_], hi, rstd[set_], channel)
            s = 0.0
            q = 0.0
            for r in range(o):
                at = start + r * g * n + c * i
                take_back(dy, x, before, at, 1, i, z, beside)
                sums = run_products(x[at : at + i], before[at : at + i], gate, hi)
                s += sums[0]
                q += sums[1]
            terms_b[set_ * k + c] = s
            terms_w[set_ * k + c] = rstd[set_] * (q - lo * s)
            gy += float64(weight[set_ % g * k + c]) * s
            gyd += float64(weight[set_ % g * k + c]) * q
        scale, shift = backward_terms(gy, gyd, lo, rstd[set_], float64(o * n), has_mean)
        if given:
            scale = shift = 0.0
        for r in range(o):
            for c in range(k):
                at, channel = start + r * g * n + c * i, set_ % g * k + c
                gate = gate_of(bias, beside, x, weight, mean[set_], hi, rstd[set_], channel)
                terms_of_run = (gate, hi, rounded(x, scale), rounded(x, shift),
                                rounded(x, rstd[set_] * float64(weight[channel])))
                map_products(dx[at : at + i], (x[at : at + i], before[at : at + i]), terms_of_run,
                             streaming)
    merge_terms(terms, dweight, dbias, b)


@inlined
def sum_product_piece(x, dy, weight, bias, hi, partial, mean, rstd, unit, sizes):
    """partial = the sums of a piece of a channel's run."""
    _, o, g, k, i = sizes
    pieces = pieces_of(i)
    run, piece = unit // pieces, unit % pieces
    set_ = set_of_run(run // k, o, g)
    gate = gate_of(bias, (), x, weight, mean[set_], hi[set_], rstd[set_], run % (g * k))
    first, stop = run * i + piece * i // pieces, run * i + (piece + 1) * i // pieces
    partial[2 * unit], partial[2 * unit + 1] = run_products(
        x[first:stop], dy[first:stop], gate, hi[set_]
    )


@inlined
def finish_product_pieces(weight, hi, scale, shift, partial, mean, rstd, terms_w, terms_b, set_,
                          sizes, has_mean, given):
    _, o, g, k, i = sizes
    pieces = pieces_of(i)
    lo = mean[set_] - float64(hi[set_])
    gy = 0.0
    gyd = 0.0
    for c in range(k):
        s = 0.0
        q = 0.0
        for r in range(o):
            run = ((set_ // g * o + r) * g + set_ % g) * k + c
            for unit in range(run * pieces, (run + 1) * pieces):
                s += partial[2 * unit]
                q += partial[2 * unit + 1]
        terms_b[set_ * k + c] = s
        terms_w[set_ * k + c] = rstd[set_] * (q - lo * s)
        gy += float64(weight[set_ % g * k + c]) * s
        gyd += float64(weight[set_ % g * k + c]) * q
    if not given:
        scale[set_], shift[set_] = backward_terms(
            gy, gyd, lo, rstd[set_], float64(o * k * i), has_mean
        )


@inlined
def map_product_piece(dy, x, dx, weight, bias, hi, scale, shift, mean, rstd, unit, sizes,
                      streaming):
    _, o, g, k, i = sizes
    pieces = pieces_of(i)
    run, piece = unit // pieces, unit % pieces
    set_ = set_of_run(run // k, o, g)
    first, stop = run * i + piece * i // pieces, run * i + (piece + 1) * i // pieces
    channel = run % (g * k)
    gate = gate_of(bias, (), x, weight, mean[set_], hi[set_], rstd[set_], channel)
    terms = (gate, hi[set_], scale[set_], shift[set_],
             rounded(x, rstd[set_] * float64(weight[channel])))
    map_products(dx[first:stop], (x[first:stop], dy[first:stop]), terms, streaming)


@kernel(GATED, allocates=True)
def backward_pieces(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                    given, streaming):
    """backward_sets of few large sets, a piece of a channel's run at a time."""
    b, o, g, k, i = sizes
    units = b * o * g * k * pieces_of(i)
    hi = np.empty(b * g, weight.dtype)
    scale = np.zeros(b * g, weight.dtype)
    shift = np.zeros(b * g, weight.dtype)
    partial = np.empty(2 * units)
    for set_ in range(b * g):
        hi[set_] = mean[set_]
    for unit in prange(units):
        sum_product_piece(x, dy, weight, bias, hi, partial, mean, rstd, int64(unit), sizes)
    for set_ in range(b * g):
        finish_product_pieces(
            weight, hi, scale, shift, partial, mean, rstd, terms[: b * g * k], terms[b * g * k :],
            set_, sizes, has_mean, given,
        )
    for unit in prange(units):
        map_product_piece(
            dy, x, dx, weight, bias, hi, scale, shift, mean, rstd, int64(unit), sizes, streaming
        )
    merge_terms(terms, dweight, dbias, b)


TOGETHER = 8  # rows at most that are summed, and then mapped together,
VALUES = 8192  # and values


@kernel(BACKWARD, sizes=6, allocates=True)
def backward_elements(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                      given, streaming):
    """backward_sets where i == o == 1, in parts of the rows."""
    b, _, g, k, _, parts = sizes
    terms_w, terms_b = terms[: parts * g * k], terms[parts * g * k :]
    size = g * k
    together = max(1, min(TOGETHER, VALUES // k))
    for part in prange(parts):
        sum_w = np.zeros(k, weight.dtype)
        sum_b = np.zeros(k, weight.dtype)
        of_rows = np.zeros((5, TOGETHER), weight.dtype)
        last = (part + 1) * b // parts
        for group in range(g):
            own = weight[group * k : (group + 1) * k]
            total_w = terms_w[part * size + group * k : part * size + (group + 1) * k]
            total_b = terms_b[part * size + group * k : part * size + (group + 1) * k]
            total_w[:] = 0.0
            total_b[:] = 0.0
            since = 0
            row = part * b // parts
            while row < last:
                rows = min(together, last - row)
                for r in range(rows):
                    set_ = (row + r) * g + group
                    at = set_ * k
                    hi = rounded(x, mean[set_])
                    lo = mean[set_] - float64(hi)
                    s, q = run_products_weighted(x[at : at + k], dy[at : at + k], own, hi)
                    scale, shift = backward_terms(s, q, lo, rstd[set_], float64(k), has_mean)
                    if given:
                        scale = shift = 0.0
                    of_rows[0, r] = hi
                    of_rows[1, r] = scale
                    of_rows[2, r] = shift
                    of_rows[3, r] = rstd[set_]
                    of_rows[4, r] = -lo * rstd[set_]
                at = row * size + group * k
                map_weighted_rows(
                    x[at:], dy[at:], dx[at:], own, rows, size, of_rows, sum_w, sum_b, streaming
                )
                row += rows
                since += rows
                if since >= 16 or row == last:
                    flush(sum_w, total_w)
                    flush(sum_b, total_b)
                    since = 0
    merge_terms(terms, dweight, dbias, parts)


# ---- what a call ends with -----------------------------------------------------------------------


@kernel("ad nff", parallel=False)
def move_running(running, found, b, factor, momentum):
    """A running statistic by the mean over b of what was found, times the factor."""
    g = running.size
    for group in range(g):
        total = 0.0
        for s in range(b):
            total += found[s * g + group]
        batch = factor * total / float64(b)
        running[group] = (1 - momentum) * float64(running[group]) + momentum * batch
