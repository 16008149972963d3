"""The columns loop order in Numba: i == 1 and o > 1. Sums run down the columns of a slice's
(o, g*k) matrix, one slice for each b.

Few columns would leave vectors empty, so the matrix is read as (o/copies, copies*g*k) and the
copies of a column are merged; `rest` values are left over as one more, shorter row. `cut` is
(copies, width, rows, rest, tile_rows). Tiles of rows are merged in their order: the bits never
depend on threads.
"""

from functools import lru_cache

import numpy as np
from numba import float64, prange

from fastnorm.backends.numba_jit import allocating, called, inlined, kernel
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
    map_product_rows,
    map_rows,
    moments,
    reciprocal_deviation,
)

NARROW = 16  # the width of few columns becomes a multiple of this
WIDE = 256  # and at least this
TILE = 65536  # values in a tile, at least,
TILE_ROWS = 64  # and rows: fewer, and the tiles' sums weigh as much as their values
MOST_TILES = 16
CHUNK = 256  # channels that one thread finishes, about


@lru_cache(maxsize=1024)
def cut_columns(geometry):
    """(cut, tiles) of a geometry."""
    channels = geometry.g * geometry.k
    copies = 1
    if channels < WIDE:
        while copies * channels % NARROW or copies * channels < WIDE:
            copies += 1
        copies = min(copies, geometry.o)
    width, rows = copies * channels, geometry.o // copies
    tiles = -(-rows // max(TILE_ROWS, -(-rows // MOST_TILES), -(-TILE // width)))
    tile_rows = -(-rows // tiles)
    return (copies, width, rows, geometry.o % copies * channels, tile_rows), -(-rows // tile_rows)


@called
def start_columns(x, about, total, cut, has_mean, first, stop):
    """about = a value near the mean of each column [first, stop), exactly the constant of a
    constant column. total is room for a sum of each column."""
    width, rows = cut[1], cut[2]
    count = min(rows, 2 * SAMPLES)
    near, own = about[first:stop], total[first:stop]
    near[:] = 0
    if not has_mean:
        return
    own[:] = 0.0
    start = x[first:stop]
    for j in range(1, count):
        row = j * rows // count * width
        sampled = x[row + first : row + stop]
        for c in range(own.size):
            own[c] += float64(at(sampled, c)) - float64(at(start, c))
    for c in range(own.size):
        value = float64(at(start, c)) + own[c] / count
        near[c] = on_grid(x, value if abs(value) < 1e37 else 0.0)


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
def merge_tiles(partial, width, first, stop):
    """The sums of columns [first, stop) into those of tile 0."""
    for sums in range(2, partial.size // width):
        start = sums % 2 * width
        into = partial[start + first : start + stop]
        part = partial[sums * width + first : sums * width + stop]
        for j in range(into.size):
            into[j] += part[j]


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
def column_moments(x, about, s, q, cut, has_mean, first, stop):
    """s = the mean of each column [first, stop), all of one copy, q = its sum of squares about it.
    In two loops where nothing cancels: LLVM makes vectors of them."""
    width, rows = cut[1], cut[2] + (1 if first < cut[3] else 0)
    count = float64(rows)
    own_s, own_q, near = s[first:stop], q[first:stop], about[first:stop]
    if not has_mean:
        own_s[:] = 0.0
    lost = 0
    for c in range(own_s.size):
        lost += cancels(own_s[c], own_q[c], count)
    if lost == 0:
        for c in range(own_s.size):
            own_s[c], var = moments(own_s[c], own_q[c], float64(near[c]), count)
            own_q[c] = var * count
        return
    for c in range(own_s.size):
        center = float64(near[c])
        if cancels(own_s[c], own_q[c], count):
            if has_mean:
                center += exact_column(x, first + c, width, rows, center)[0] / count
            own_s[c], own_q[c] = exact_column(x, first + c, width, rows, center)
            if not has_mean:
                own_s[c] = 0.0
        own_s[c], var = moments(own_s[c], own_q[c], center, count)
        own_q[c] = var * count


@inlined
def merge_copies(means, squares, copies, channels, o, first, stop):
    """Chan's merge of the copies of each channel [first, stop), into the first."""
    for channel in range(first, stop):
        near = means[channel]
        total = 0.0
        for r in range(copies):
            total += (means[r * channels + channel] - near) * float64(rows_of_copy(o, copies, r))
        found = near + total / float64(o)
        m2 = 0.0
        for r in range(copies):
            d = means[r * channels + channel] - found
            m2 += squares[r * channels + channel] + d * d * float64(rows_of_copy(o, copies, r))
        means[channel] = found
        squares[channel] = m2


@inlined
def rows_of_copy(o, copies, r):
    return o // copies + (1 if r < o % copies else 0)


@inlined
def group_moments(means, squares, mean, var, o, k, from_group, to_group):
    """Chan's merge of the channels of each group."""
    for group in range(from_group, to_group):
        first = group * k
        total = 0.0
        for channel in range(first, first + k):
            total += means[channel] - means[first]
        found = means[first] + total / float64(k)
        m2 = 0.0
        for channel in range(first, first + k):
            d = means[channel] - found
            m2 += squares[channel] + d * d * float64(o)
        mean[group] = found
        var[group] = m2 / float64(o * k)


@inlined
def copy_columns(columns, channels, first, stop):
    """Those of channels [first, stop) to all copies."""
    own = columns[first:stop]
    for start in range(channels, columns.size, channels):
        into = columns[start + first : start + stop]
        for c in range(into.size):
            into[c] = own[c]


@called
def finish_groups(x, coefficients, partial, weight, bias, mean, var, rstd, sizes, cut, eps,
                  has_mean, given, from_group, to_group):
    """Statistics of the groups [from_group, to_group), and the coefficients of their columns."""
    _, o, g, k, _ = sizes
    copies, width = cut[0], cut[1]
    channels = g * k
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    means = partial[:width]
    squares = partial[width : 2 * width]
    first, stop = from_group * k, to_group * k
    if not given:
        for r in range(0, width, channels):
            merge_tiles(partial, width, r + first, r + stop)
            column_moments(x, hi, means, squares, cut, has_mean, r + first, r + stop)
        if copies > 1:
            merge_copies(means, squares, copies, channels, o, first, stop)
        group_moments(means, squares, mean, var, o, k, from_group, to_group)
    for group in range(from_group, to_group):
        rstd[group] = reciprocal_deviation(var[group], eps)
        center = rounded(x, mean[group])
        for channel in range(group * k, (group + 1) * k):
            hi[channel] = center
            scale[channel], shift[channel] = forward_terms(
                mean[group], float64(center), rstd[group], float64(weight[channel]),
                float64(bias[channel]),
            )
    copy_columns(hi, channels, first, stop)
    copy_columns(scale, channels, first, stop)
    copy_columns(shift, channels, first, stop)


@called
def map_tile(x, y, coefficients, cut, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    row, stop = tile * tile_rows, min(rows, (tile + 1) * tile_rows)
    map_rows(
        x[row * width :], y[row * width :], stop - row, width, hi, scale, shift, streaming
    )
    if stop == rows and rest > 0:
        map_rows(
            x[rows * width :], y[rows * width :], 1, 0, hi[:rest], scale[:rest], shift[:rest],
            False,
        )


@inlined
def in_turn(unit, part, parts, units, streaming):
    """The unit-th of a part of the units. Large arrays are mapped from the end of what the same
    thread has summed, of which something is left in its caches (0.6 to 0.8 of the time around the
    last level's size, where threads do not share it). The parts are the threads' own: a kernel that
    asks Numba for their number could not be kept on disk."""
    first, stop = part * units // parts, (part + 1) * units // parts
    return stop - 1 - (unit - first) if streaming else unit


@inlined
def tiles_of(cut):
    return (cut[2] + cut[4] - 1) // cut[4]


@kernel("xx aa a d ddd t t fnn", allocates=True)
def forward_slices(x, y, weight, bias, coefficients, partial, mean, var, rstd, sizes, cut, eps,
                   has_mean, streaming):
    """Each slice, all steps."""
    b, o, g, k, _ = sizes
    size = o * g * k
    width = cut[1]
    tiles = tiles_of(cut)
    for s in prange(b):
        xs = x[s * size : (s + 1) * size]
        ys = y[s * size : (s + 1) * size]
        own = coefficients[s * 4 * width : (s + 1) * 4 * width]
        sums = partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width]
        start_columns(xs, own[:width], sums[:width], cut, has_mean, 0, width)
        for tile in range(tiles):
            sum_tile(
                xs, xs, own[:width], sums[tile * 2 * width : (tile + 1) * 2 * width], cut, tile,
                False,
            )
        finish_groups(
            xs, own, sums, weight, bias, mean[s * g : (s + 1) * g], var[s * g : (s + 1) * g],
            rstd[s * g : (s + 1) * g], sizes, cut, eps, has_mean, False, 0, g,
        )
        for tile in range(tiles):
            map_tile(xs, ys, own, cut, tiles - 1 - tile, streaming != 0)


@kernel("xx aa a d ddd t t fnnnn", allocates=True)
def forward_tiles(x, y, weight, bias, coefficients, partial, mean, var, rstd, sizes, cut, eps,
                  has_mean, given, streaming, threads):
    """One slice, a tile at a time; given: only the map."""
    _, _, g, k, _ = sizes
    width = cut[1]
    tiles = tiles_of(cut)
    about = coefficients[:width]
    chunks = (width + CHUNK - 1) // CHUNK
    if not given:
        if chunks == 1:  # not worth waking the threads
            start_columns(x, about, partial, cut, has_mean, 0, width)
        else:
            for chunk in prange(chunks):
                start_columns(
                    x, about, partial, cut, has_mean, chunk * CHUNK,
                    min(width, (chunk + 1) * CHUNK),
                )
        for tile in prange(tiles):
            sum_tile(
                x, x, about, partial[tile * 2 * width : (tile + 1) * 2 * width], cut, tile, False
            )
    groups = max(1, CHUNK // k)
    if g <= groups:
        finish_groups(
            x, coefficients, partial, weight, bias, mean, var, rstd, sizes, cut, eps, has_mean,
            given != 0, 0, g,
        )
    else:
        for chunk in prange((g + groups - 1) // groups):
            finish_groups(
                x, coefficients, partial, weight, bias, mean, var, rstd, sizes, cut, eps, has_mean,
                given != 0, chunk * groups, min(g, (chunk + 1) * groups),
            )
    for part in prange(threads):
        for unit in range(part * tiles // threads, (part + 1) * tiles // threads):
            tile = in_turn(unit, part, threads, tiles, streaming)
            map_tile(x, y, coefficients, cut, tile, streaming != 0)


# ---- backward: as in numba_rows, terms of dweight and dbias for each slice ---------------------


@called
def finish_products(weight, coefficients, partial, mean, rstd, terms_w, terms_b, sizes, cut,
                    has_mean, given, from_group, to_group):
    """Terms of the channels of the groups [from_group, to_group), and the coefficients of their
    columns."""
    _, o, g, k, _ = sizes
    width = cut[1]
    channels = g * k
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    dscale = coefficients[3 * width : 4 * width]
    first, stop = from_group * k, to_group * k
    sums, products = partial[first:stop], partial[width + first : width + stop]
    for r in range(0, width, channels):
        merge_tiles(partial, width, r + first, r + stop)
        if r > 0:
            more, more_products = partial[r + first : r + stop], partial[width + r + first :]
            for c in range(sums.size):
                sums[c] += more[c]
                products[c] += more_products[c]
    for group in range(from_group, to_group):
        lo = mean[group] - float64(hi[group * k])
        gy = 0.0
        gyd = 0.0
        for channel in range(group * k, (group + 1) * k):
            s, q = partial[channel], partial[width + channel]
            terms_b[channel] = s
            terms_w[channel] = rstd[group] * (q - lo * s)
            gy += float64(weight[channel]) * s
            gyd += float64(weight[channel]) * q
            dscale[channel] = rstd[group] * float64(weight[channel])
        a, b = backward_terms(gy, gyd, lo, rstd[group], float64(o * k), has_mean)
        if given:
            a = b = 0.0
        scale[group * k : (group + 1) * k] = a
        shift[group * k : (group + 1) * k] = b
    copy_columns(scale, channels, first, stop)
    copy_columns(shift, channels, first, stop)
    copy_columns(dscale, channels, first, stop)


@called
def map_product_tile(dy, x, dx, coefficients, cut, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    dscale = coefficients[3 * width : 4 * width]
    row, stop = tile * tile_rows, min(rows, (tile + 1) * tile_rows)
    map_product_rows(
        x[row * width :], dy[row * width :], dx[row * width :], stop - row, width, hi, scale,
        shift, dscale, streaming,
    )
    if stop == rows and rest > 0:
        map_product_rows(
            x[rows * width :], dy[rows * width :], dx[rows * width :], 1, 0, hi[:rest],
            scale[:rest], shift[:rest], dscale[:rest], False,
        )


@kernel("xxax a d dd dd t t nnnn", allocates=True)
def backward_tiles(dy, x, weight, dx, coefficients, partial, mean, rstd, terms_w, terms_b, sizes,
                   cut, has_mean, given, streaming, threads):
    """All slices, a tile at a time."""
    b, o, g, k, _ = sizes
    size = o * g * k
    width = cut[1]
    tiles = tiles_of(cut)
    for s in range(b):
        hi = coefficients[s * 4 * width : s * 4 * width + width]
        for group in range(g):
            hi[group * k : (group + 1) * k] = mean[s * g + group] if has_mean else 0.0
        copy_columns(hi, g * k, 0, g * k)
    for unit in prange(b * tiles):
        s = unit // tiles
        sum_tile(
            x[s * size : (s + 1) * size], dy[s * size : (s + 1) * size],
            coefficients[s * 4 * width : s * 4 * width + width],
            partial[unit * 2 * width : (unit + 1) * 2 * width], cut, unit % tiles, True,
        )
    groups = max(1, CHUNK // k)
    chunks = (g + groups - 1) // groups
    for unit in prange(b * chunks):
        s, chunk = unit // chunks, unit % chunks
        finish_products(
            weight, coefficients[s * 4 * width : (s + 1) * 4 * width],
            partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width],
            mean[s * g : (s + 1) * g], rstd[s * g : (s + 1) * g],
            terms_w[s * g * k : (s + 1) * g * k], terms_b[s * g * k : (s + 1) * g * k], sizes, cut,
            has_mean, given, chunk * groups, min(g, (chunk + 1) * groups),
        )
    for part in prange(threads):
        for unit in range(part * b * tiles // threads, (part + 1) * b * tiles // threads):
            turn = in_turn(unit, part, threads, b * tiles, streaming)
            s = turn // tiles
            map_product_tile(
                dy[s * size : (s + 1) * size], x[s * size : (s + 1) * size],
                dx[s * size : (s + 1) * size], coefficients[s * 4 * width : (s + 1) * 4 * width],
                cut, turn % tiles, streaming != 0,
            )
