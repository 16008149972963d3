"""The rows loop order in Numba: i > 1, or o == 1. A set is o runs of k*i values; x, y, dy and dx
are flat.

A set is finished while it is in cache. Sets too few and too large are cut into pieces of runs,
which are summed, merged in their order, and mapped: the bits never depend on threads.
"""

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import kernel
from fastnorm.backends.numba_simd import rounded
from fastnorm.backends.numba_words import (
    backward_terms,
    forward_terms,
    map_products,
    map_products_weighted,
    map_run,
    map_run_weighted,
    reciprocal_deviation,
    run_products,
    run_products_weighted,
    run_sums,
    sample,
    statistics,
)


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


@kernel("xdd tn")
def sum_pieces(x, about, partial, sizes, pieces):
    """partial[run][piece] = sums, about[set] in double."""
    b, o, g, k, i = sizes
    n = k * i
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


@kernel("xd tn", parallel=False)
def sample_sets(x, about, sizes, has_mean):
    b, o, g, k, i = sizes
    n = k * i
    for set_ in range(b * g):
        about[set_] = 0.0
        if has_mean:
            about[set_] = float64(sample(x, set_ // g * o * g * n + set_ % g * n, g * n, o, n))


@kernel("xdd ddd tnfn")
def merge_pieces(x, about, partial, mean, var, rstd, sizes, pieces, eps, has_mean):
    """Statistics of each set from its pieces."""
    b, o, g, k, i = sizes
    n = k * i
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


@kernel("xxaa dd tnn")
def map_pieces(x, y, weight, bias, mean, rstd, sizes, pieces, streaming):
    """Map with known statistics, a piece of a channel's run at a time."""
    b, o, g, k, i = sizes
    for unit in prange(b * o * g * k * pieces):
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


@kernel("xxad tn")
def product_pieces(dy, x, hi, partial, sizes, pieces):
    """partial[run of a channel][piece] = sums; hi[set]."""
    b, o, g, k, i = sizes
    for unit in prange(b * o * g * k * pieces):
        run = unit // pieces
        piece = unit % pieces
        set_ = run // (o * g * k) * g + run % (g * k) // k
        first = run * i + piece * i // pieces
        stop = run * i + (piece + 1) * i // pieces
        s, q = run_products(x[first:stop], dy[first:stop], hi[set_])
        partial[2 * unit] = s
        partial[2 * unit + 1] = q


@kernel("aa ddd dd dd tnnn")
def merge_products(
    weight, hi, partial, mean, rstd, terms_w, terms_b, scale, shift, sizes, pieces, has_mean, given
):
    """backward_sets' terms and coefficients from the pieces."""
    b, o, g, k, _ = sizes
    for set_ in prange(b * g):
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
        count = float64(o * k * sizes[4])
        scale[set_], shift[set_] = backward_terms(gy, gyd, lo, rstd[set_], count, has_mean)
        if given:
            scale[set_] = shift[set_] = 0.0


@kernel("xxax a ddd tnn")
def map_product_pieces(dy, x, weight, dx, hi, rstd, scale, shift, sizes, pieces, streaming):
    b, o, g, k, i = sizes
    for unit in prange(b * o * g * k * pieces):
        run = unit // pieces
        piece = unit % pieces
        channel = run % (g * k)
        set_ = run // (o * g * k) * g + channel // k
        first = run * i + piece * i // pieces
        stop = run * i + (piece + 1) * i // pieces
        map_products(
            x[first:stop], dy[first:stop], dx[first:stop], hi[set_], rounded(x, scale[set_]),
            rounded(x, shift[set_]), rounded(x, rstd[set_] * float64(weight[channel])),
            streaming,
        )


@kernel("xxax dd dd tnnnn", allocates=True)
def backward_elements(dy, x, weight, dx, mean, rstd, terms_w, terms_b, sizes, parts, has_mean,
                      given, streaming):
    """backward_sets where i == o == 1; terms_w and terms_b hold [parts][g*k]."""
    b, _, g, k, _ = sizes
    size = g * k
    for part in prange(parts):
        sum_w = np.zeros(size, weight.dtype)
        sum_b = np.zeros(size, weight.dtype)
        total_w = terms_w[part * size : (part + 1) * size]
        total_b = terms_b[part * size : (part + 1) * size]
        total_w[:] = 0.0
        total_b[:] = 0.0
        since = 0
        for set_ in range(part * b // parts * g, (part + 1) * b // parts * g):
            at = set_ * k
            w = set_ % g * k
            hi = rounded(x, mean[set_])
            lo = mean[set_] - float64(hi)
            s, q = run_products_weighted(x[at : at + k], dy[at : at + k], weight[w : w + k], hi)
            scale, shift = backward_terms(s, q, lo, rstd[set_], float64(k), has_mean)
            if given:
                scale = shift = 0.0
            map_products_weighted(
                x[at : at + k], dy[at : at + k], dx[at : at + k], weight[w : w + k], hi,
                rounded(x, scale), rounded(x, shift), rounded(x, rstd[set_]),
                rounded(x, -lo * rstd[set_]), sum_w[w : w + k], sum_b[w : w + k],
                streaming,
            )
            since += 1
            if since == 16 * g:
                for j in range(size):
                    total_w[j] += float64(sum_w[j])
                    total_b[j] += float64(sum_b[j])
                    sum_w[j] = 0
                    sum_b[j] = 0
                since = 0
        for j in range(size):
            total_w[j] += float64(sum_w[j])
            total_b[j] += float64(sum_b[j])
