"""The columns loop order in Numba: i == 1 and o > 1. Sums run down the columns of a slice's
(o, g*k) matrix, one slice for each b.

Few columns would leave vectors empty, so the matrix is read as (o/copies, copies*g*k) and the
copies of a column are merged; `rest` values are left over as one more, shorter row. `cut` is
(copies, width, rows, rest, tile_rows). Tiles of rows are merged in their order: the bits never
depend on threads.
"""

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import allocating, inlined, kernel
from fastnorm.backends.numba_simd import at, on_grid, rounded
from fastnorm.backends.numba_words import (
    RUN,
    SAMPLES,
    add_row_products,
    add_rows,
    backward_terms,
    cancels,
    flush,
    forward_terms,
    map_row,
    map_row_products,
    moments,
    reciprocal_deviation,
)

NARROW = 16  # the width of few columns becomes a multiple of this
WIDE = 256  # and at least this,
WIDER = 1024  # or this in a large slice: each row costs some time of its own
LARGE = 1 << 20  # values
TILE = 65536  # values in a tile, at least
MOST_TILES = 16


def cut_columns(geometry):
    """(cut, tiles) of a geometry."""
    channels = geometry.g * geometry.k
    least = WIDE if geometry.o * channels < LARGE else WIDER
    copies = 1
    if channels < least:
        while copies * channels % NARROW or copies * channels < least:
            copies += 1
        copies = min(copies, geometry.o)
    width, rows = copies * channels, geometry.o // copies
    tile_rows = max(-(-rows // MOST_TILES), -(-TILE // width))
    return (copies, width, rows, geometry.o % copies * channels, tile_rows), -(-rows // tile_rows)


@allocating
def start_slice(x, about, cut, has_mean):
    """about = a value near each column's mean, exactly the constant of a constant column."""
    width, rows = cut[1], cut[2]
    count = min(rows, 2 * SAMPLES)
    about[:] = 0
    if not has_mean:
        return
    first = x[:width]
    total = np.zeros(width)
    for j in range(1, count):
        sampled = x[j * rows // count * width : (j * rows // count + 1) * width]
        for c in range(width):
            total[c] += float64(at(sampled, c)) - float64(at(first, c))
    for c in range(width):
        value = float64(at(first, c)) + total[c] / count
        about[c] = on_grid(x, value if abs(value) < 1e37 else 0.0)


@allocating
def sum_tile(x, dy, about, partial, cut, tile, backward):
    """partial[0] and partial[1] = the sums of a tile's columns."""
    _, width, rows, rest, tile_rows = cut
    row = tile * tile_rows
    stop = min(rows, row + tile_rows)
    s = np.zeros(width, about.dtype)
    q = np.zeros(width, about.dtype)
    total_s = partial[:width]
    total_q = partial[width:]
    partial[:] = 0.0
    while row < stop:
        count = min(RUN, stop - row)
        block = x[row * width : (row + count) * width]
        if backward:
            add_row_products(
                block, dy[row * width : (row + count) * width], count, width, about, s, q
            )
        else:
            add_rows(block, count, width, about, s, q)
        flush(s, total_s)
        flush(q, total_q)
        row += count
    if stop == rows and rest > 0:
        if backward:
            add_row_products(x[rows * width :], dy[rows * width :], 1, 0, about[:rest], s, q)
        else:
            add_rows(x[rows * width :], 1, 0, about[:rest], s, q)
        flush(s[:rest], total_s[:rest])
        flush(q[:rest], total_q[:rest])


@inlined
def merge_tiles(partial, cut):
    """Into those of tile 0."""
    width = cut[1]
    for tile in range(1, partial.size // (2 * width)):
        part = partial[tile * 2 * width : (tile + 1) * 2 * width]
        for j in range(2 * width):
            partial[j] += part[j]


@inlined
def exact_column(x, column, width, count, about):
    s = 0.0
    q = 0.0
    for r in range(count):
        d = float64(at(x, r * width + column)) - about
        s += d
        q += d * d
    return s, q


@inlined
def column_moments(x, about, s, q, cut, has_mean):
    """s = the mean of each column, q = its sum of squares about it."""
    width, rows, rest = cut[1], cut[2], cut[3]
    for c in range(width):
        rows_of_c = rows + (1 if c < rest else 0)
        count = float64(rows_of_c)
        if not has_mean:
            s[c] = 0.0
        center = float64(about[c])
        if cancels(s[c], q[c], count):
            if has_mean:
                center += exact_column(x, c, width, rows_of_c, center)[0] / count
            s[c], q[c] = exact_column(x, c, width, rows_of_c, center)
            if not has_mean:
                s[c] = 0.0
        mean, var = moments(s[c], q[c], center, count)
        s[c] = mean
        q[c] = var * count


@inlined
def finish_slice(x, coefficients, partial, weight, bias, mean, var, rstd, sizes, cut, eps,
                 has_mean, given):
    """Chan's merge of the columns of each group, then the coefficients of each column."""
    _, o, g, k, _ = sizes
    copies, width, rows, rest, _ = cut
    channels = g * k
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    means = partial[:width]
    squares = partial[width : 2 * width]
    if not given:
        merge_tiles(partial, cut)
        column_moments(x, hi, means, squares, cut, has_mean)
    for group in range(g):
        if not given:
            first = means[group * k]
            total = 0.0
            for r in range(copies):
                for c in range(r * channels + group * k, r * channels + (group + 1) * k):
                    total += (means[c] - first) * float64(rows + (1 if c < rest else 0))
            found = first + total / float64(o * k)
            m2 = 0.0
            for r in range(copies):
                for c in range(r * channels + group * k, r * channels + (group + 1) * k):
                    d = means[c] - found
                    m2 += squares[c] + d * d * float64(rows + (1 if c < rest else 0))
            mean[group] = found
            var[group] = m2 / float64(o * k)
            rstd[group] = reciprocal_deviation(var[group], eps)
        near = rounded(x, mean[group])
        for channel in range(group * k, (group + 1) * k):
            a, b = forward_terms(
                mean[group], float64(near), rstd[group], float64(weight[channel]),
                float64(bias[channel]),
            )
            for c in range(channel, width, channels):
                hi[c] = near
                scale[c] = a
                shift[c] = b


@inlined
def map_tile(x, y, coefficients, cut, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    stop = min(rows, (tile + 1) * tile_rows)
    for row in range(tile * tile_rows, stop):
        map_row(
            x[row * width : (row + 1) * width], y[row * width : (row + 1) * width], hi, scale,
            shift, streaming,
        )
    if stop == rows and rest > 0:
        map_row(
            x[rows * width :], y[rows * width :], hi[:rest], scale[:rest], shift[:rest],
            False,
        )


@kernel("xx aa a d ddd t t fnnn", allocates=True)
def forward_slices(x, y, weight, bias, coefficients, partial, mean, var, rstd, sizes, cut, eps,
                   has_mean, given, streaming):
    """Each slice, all steps; given: only finish, which needs no x."""
    b, o, g, k, _ = sizes
    size = o * g * k
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    for s in prange(b):
        xs = x[s * size : (s + 1) * size]
        ys = y[s * size : (s + 1) * size]
        own = coefficients[s * 4 * width : (s + 1) * 4 * width]
        sums = partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width]
        start_slice(xs, own[:width], cut, has_mean)
        for tile in range(tiles):
            sum_tile(
                xs, xs, own[:width], sums[tile * 2 * width : (tile + 1) * 2 * width], cut, tile,
                False,
            )
        finish_slice(
            xs, own, sums, weight, bias, mean[s * g : (s + 1) * g], var[s * g : (s + 1) * g],
            rstd[s * g : (s + 1) * g], sizes, cut, eps, has_mean, given,
        )
        for tile in range(tiles):
            map_tile(xs, ys, own, cut, tiles - 1 - tile, streaming != 0)


@kernel("x a t t n", parallel=False, allocates=True)
def start_slices(x, coefficients, sizes, cut, has_mean):
    b, o, g, k, _ = sizes
    size = o * g * k
    width = cut[1]
    for s in range(b):
        start_slice(
            x[s * size : (s + 1) * size], coefficients[s * 4 * width : s * 4 * width + width], cut,
            has_mean,
        )


@kernel("xx a d t t n", allocates=True)
def sum_tiles(x, dy, coefficients, partial, sizes, cut, backward):
    b, o, g, k, _ = sizes
    size = o * g * k
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    for unit in prange(b * tiles):
        s = unit // tiles
        about = coefficients[s * 4 * width : s * 4 * width + width]
        sum_tile(
            x[s * size : (s + 1) * size], dy[s * size : (s + 1) * size], about,
            partial[unit * 2 * width : (unit + 1) * 2 * width], cut, unit % tiles, backward != 0,
        )


@kernel("x aa a d ddd t t fnn")
def finish_slices(x, weight, bias, coefficients, partial, mean, var, rstd, sizes, cut, eps,
                  has_mean, given):
    b, o, g, k, _ = sizes
    size = o * g * k
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    for s in prange(b):
        finish_slice(
            x[s * size : (s + 1) * size], coefficients[s * 4 * width : (s + 1) * 4 * width],
            partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width], weight, bias,
            mean[s * g : (s + 1) * g], var[s * g : (s + 1) * g], rstd[s * g : (s + 1) * g], sizes,
            cut, eps, has_mean, given,
        )


@kernel("xx a t t n")
def map_tiles(x, y, coefficients, sizes, cut, streaming):
    b, o, g, k, _ = sizes
    size = o * g * k
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    for unit in prange(b * tiles):
        s = unit // tiles
        map_tile(
            x[s * size : (s + 1) * size], y[s * size : (s + 1) * size],
            coefficients[s * 4 * width : (s + 1) * 4 * width], cut, unit % tiles,
            streaming != 0,
        )


# ---- backward: as in numba_rows, terms of dweight and dbias for each slice ---------------------


@inlined
def finish_products(weight, coefficients, partial, mean, rstd, terms_w, terms_b, sizes, cut,
                    has_mean, given):
    _, o, g, k, _ = sizes
    width = cut[1]
    channels = g * k
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    dscale = coefficients[3 * width : 4 * width]
    merge_tiles(partial, cut)
    for group in range(g):
        lo = mean[group] - float64(hi[group * k])
        gy = 0.0
        gyd = 0.0
        for channel in range(group * k, (group + 1) * k):
            s = 0.0
            q = 0.0
            for c in range(channel, width, channels):
                s += partial[c]
                q += partial[width + c]
            terms_b[channel] = s
            terms_w[channel] = rstd[group] * (q - lo * s)
            gy += float64(weight[channel]) * s
            gyd += float64(weight[channel]) * q
        a, b = backward_terms(gy, gyd, lo, rstd[group], float64(o * k), has_mean)
        if given:
            a = b = 0.0
        for channel in range(group * k, (group + 1) * k):
            for c in range(channel, width, channels):
                scale[c] = a
                shift[c] = b
                dscale[c] = rstd[group] * float64(weight[channel])


@inlined
def map_tile_products(dy, x, dx, coefficients, cut, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    dscale = coefficients[3 * width : 4 * width]
    stop = min(rows, (tile + 1) * tile_rows)
    for row in range(tile * tile_rows, stop):
        first, last = row * width, (row + 1) * width
        map_row_products(
            x[first:last], dy[first:last], dx[first:last], hi, scale, shift, dscale, streaming
        )
    if stop == rows and rest > 0:
        map_row_products(
            x[rows * width :], dy[rows * width :], dx[rows * width :], hi[:rest], scale[:rest],
            shift[:rest], dscale[:rest], False,
        )


@kernel("a d t t n", parallel=False)
def start_products(coefficients, mean, sizes, cut, has_mean):
    """hi of each column."""
    b, _, g, k, _ = sizes
    width = cut[1]
    for s in range(b):
        for c in range(width):
            group = c % (g * k) // k
            coefficients[s * 4 * width + c] = mean[s * g + group] if has_mean else 0.0


@kernel("a a d dd dd t t nn")
def finish_product_slices(weight, coefficients, partial, mean, rstd, terms_w, terms_b, sizes, cut,
                          has_mean, given):
    b, _, g, k, _ = sizes
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    size = g * k
    for s in prange(b):
        finish_products(
            weight, coefficients[s * 4 * width : (s + 1) * 4 * width],
            partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width],
            mean[s * g : (s + 1) * g], rstd[s * g : (s + 1) * g],
            terms_w[s * size : (s + 1) * size], terms_b[s * size : (s + 1) * size], sizes, cut,
            has_mean, given,
        )


@kernel("xxx a t t n")
def map_product_tiles(dy, x, dx, coefficients, sizes, cut, streaming):
    b, o, g, k, _ = sizes
    size = o * g * k
    width, rows, tile_rows = cut[1], cut[2], cut[4]
    tiles = (rows + tile_rows - 1) // tile_rows
    for unit in prange(b * tiles):
        s = unit // tiles
        map_tile_products(
            dy[s * size : (s + 1) * size], x[s * size : (s + 1) * size],
            dx[s * size : (s + 1) * size], coefficients[s * 4 * width : (s + 1) * 4 * width], cut,
            unit % tiles, streaming != 0,
        )
