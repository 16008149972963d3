"""The rows loop order in Numba: i > 1, or o == 1. A set is o runs of k*i values; x, y, dy and dx
are flat.

A set is finished while it is in cache. Sets too few and too large are cut into pieces of runs,
which are summed, merged in their order, and mapped: the bits never depend on threads.
"""

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import inlined, kernel
from fastnorm.backends.numba_simd import rounded
from fastnorm.backends.numba_words import (
    backward_terms,
    flush,
    forward_terms,
    map_products,
    map_run,
    map_run_weighted,
    map_weighted_rows,
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
    return min(-(-geometry.b // least), MOST_PARTS)


# x, y, weight, bias -> mean, var, rstd
@kernel("xxaa ddd tfnn")
def forward_sets(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
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
        for c in range(k):
            channel = set_ % g * k + c
            scale, shift = forward_terms(
                found[0], float64(hi), rstd[set_], float64(weight[channel]), float64(bias[channel])
            )
            for r in range(o):
                at = start + r * g * n + c * i
                map_run(
                    x[at : at + i], y[at : at + i], hi, rounded(x, scale), rounded(x, shift),
                    streaming,
                )


@kernel("xxaa ddd tfnn")
def forward_elements(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """forward_sets where i == o == 1: a weight for each place."""
    b, _, g, k, _ = sizes
    for set_ in prange(b * g):
        at = set_ * k
        about = sample(x, at, 0, 1, k) if has_mean else rounded(x, 0)
        s, q = run_sums(x[at : at + k], about)
        found = statistics(x, at, 0, 1, k, about, s, q, has_mean)
        mean[set_] = found[0]
        var[set_] = found[1]
        rstd[set_] = reciprocal_deviation(found[1], eps)
        hi = rounded(x, found[0])
        scale, shift = forward_terms(found[0], float64(hi), rstd[set_], 1.0, 0.0)
        w = set_ % g * k
        map_run_weighted(
            x[at : at + k], y[at : at + k], weight[w : w + k], bias[w : w + k], hi,
            rounded(x, scale), rounded(x, shift), streaming,
        )


@kernel("xxaa dd ddd tfnnn")
def forward_pieces(x, y, weight, bias, about, partial, mean, var, rstd, sizes, eps, has_mean, given,
                   streaming):
    """forward_sets of few large sets, a piece of a run at a time; given: only the map. about holds
    a value of each set, partial the sums of each run's pieces."""
    b, o, g, k, i = sizes
    n = k * i
    pieces = pieces_of(n)
    if given:
        for set_ in range(b * g):
            rstd[set_] = reciprocal_deviation(var[set_], eps)
    else:
        for set_ in range(b * g):
            about[set_] = 0.0
            if has_mean:
                about[set_] = float64(sample(x, set_ // g * o * g * n + set_ % g * n, g * n, o, n))
        for unit in prange(b * o * g * pieces):
            run = unit // pieces
            piece = unit % pieces
            set_ = run // (o * g) * g + run % g
            s, q = run_sums(
                x[run * n + piece * n // pieces : run * n + (piece + 1) * n // pieces],
                rounded(x, about[set_]),
            )
            partial[2 * unit] = s
            partial[2 * unit + 1] = q
        for set_ in prange(b * g):
            s = 0.0
            q = 0.0
            for r in range(o):
                run = (set_ // g * o + r) * g + set_ % g
                for unit in range(run * pieces, (run + 1) * pieces):
                    s += partial[2 * unit]
                    q += partial[2 * unit + 1]
            start = set_ // g * o * g * n + set_ % g * n
            found = statistics(
                x, start, g * n, o, n, rounded(x, about[set_]), s, q, has_mean
            )
            mean[set_] = found[0]
            var[set_] = found[1]
            rstd[set_] = reciprocal_deviation(found[1], eps)
    runs = b * o * g * k
    pieces = pieces_of(i)
    for unit in prange(runs * pieces):
        run = unit // pieces
        piece = unit % pieces
        channel = run % (g * k)
        set_ = run // (o * g * k) * g + channel // k
        hi = rounded(x, mean[set_])
        scale, shift = forward_terms(
            mean[set_], float64(hi), rstd[set_], float64(weight[channel]), float64(bias[channel])
        )
        first = run * i + piece * i // pieces
        stop = run * i + (piece + 1) * i // pieces
        map_run(
            x[first:stop], y[first:stop], hi, rounded(x, scale), rounded(x, shift), streaming
        )


# ---- backward: dx, and for each (set, channel) its terms of dweight and dbias --------------------


@kernel("xxax dd dd tnnn")
def backward_sets(
    dy, x, weight, dx, mean, rstd, terms_w, terms_b, sizes, has_mean, given, streaming
):
    b, o, g, k, i = sizes
    n = k * i
    for set_ in prange(b * g):
        start = set_ // g * o * g * n + set_ % g * n
        hi = rounded(x, mean[set_])
        lo = mean[set_] - float64(hi)
        gy = 0.0
        gyd = 0.0
        for c in range(k):
            s = 0.0
            q = 0.0
            for r in range(o):
                at = start + r * g * n + c * i
                sums = run_products(x[at : at + i], dy[at : at + i], hi)
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
                at = start + r * g * n + c * i
                map_products(
                    x[at : at + i], dy[at : at + i], dx[at : at + i], hi, rounded(x, scale),
                    rounded(x, shift),
                    rounded(x, rstd[set_] * float64(weight[set_ % g * k + c])), streaming,
                )


@kernel("xxax a d dd dd aa tnnn")
def backward_pieces(dy, x, weight, dx, hi, partial, mean, rstd, terms_w, terms_b, scale, shift,
                    sizes, has_mean, given, streaming):
    """backward_sets of few large sets, a piece of a channel's run at a time. hi, scale and shift
    hold a value of each set, partial the sums of each run's pieces."""
    b, o, g, k, i = sizes
    pieces = pieces_of(i)
    for set_ in range(b * g):
        hi[set_] = mean[set_]
    for unit in prange(b * o * g * k * pieces):
        run = unit // pieces
        piece = unit % pieces
        set_ = run // (o * g * k) * g + run % (g * k) // k
        first = run * i + piece * i // pieces
        stop = run * i + (piece + 1) * i // pieces
        s, q = run_products(x[first:stop], dy[first:stop], hi[set_])
        partial[2 * unit] = s
        partial[2 * unit + 1] = q
    for set_ in range(b * g):
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
        a, c = backward_terms(gy, gyd, lo, rstd[set_], float64(o * k * i), has_mean)
        if given:
            a = c = 0.0
        scale[set_] = a
        shift[set_] = c
    for unit in prange(b * o * g * k * pieces):
        run = unit // pieces
        piece = unit % pieces
        channel = run % (g * k)
        set_ = run // (o * g * k) * g + channel // k
        first = run * i + piece * i // pieces
        stop = run * i + (piece + 1) * i // pieces
        map_products(
            x[first:stop], dy[first:stop], dx[first:stop], hi[set_], scale[set_], shift[set_],
            rounded(x, rstd[set_] * float64(weight[channel])), streaming,
        )


TOGETHER = 8  # rows at most that are summed, and then mapped together,
VALUES = 8192  # and values; rows of pages, whose places meet in the same cache lines,
PAGES = 2  # so many (8 took 1.3 times as long at rows of 4 KB)


@kernel("xxax dd dd tnnnn", allocates=True)
def backward_elements(dy, x, weight, dx, mean, rstd, terms_w, terms_b, sizes, parts, has_mean,
                      given, streaming):
    """backward_sets where i == o == 1; terms_w and terms_b hold [parts][g*k]."""
    b, _, g, k, _ = sizes
    size = g * k
    most = TOGETHER if size * x.itemsize % 4096 else PAGES
    together = max(1, min(most, VALUES // k))
    for part in prange(parts):
        sum_w = np.zeros(k, weight.dtype)
        sum_b = np.zeros(k, weight.dtype)
        terms = np.zeros((5, TOGETHER), weight.dtype)
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
                    terms[0, r] = hi
                    terms[1, r] = scale
                    terms[2, r] = shift
                    terms[3, r] = rstd[set_]
                    terms[4, r] = -lo * rstd[set_]
                at = row * size + group * k
                map_weighted_rows(
                    x[at:], dy[at:], dx[at:], own, rows, size, terms, sum_w, sum_b, streaming
                )
                row += rows
                since += rows
                if since >= 16 or row == last:
                    flush(sum_w, total_w)
                    flush(sum_b, total_b)
                    since = 0


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


@kernel("dd aa n", parallel=False)
def merge_terms(terms_w, terms_b, dweight, dbias, parts):
    """The sums of the parts' terms, which stay in those of the first."""
    size = dweight.size
    for terms, into in ((terms_w, dweight), (terms_b, dbias)):
        total = terms[:size]
        for part in range(1, parts):
            own = terms[part * size : (part + 1) * size]
            for j in range(size):
                total[j] += own[j]
        for j in range(size):
            into[j] = total[j]
