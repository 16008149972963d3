"""The columns loop order in Numba: i == 1 and o > 1, or one row. Sums run down the columns of a
slice's (o, g*k) matrix, one slice for each b.

Few columns would leave vectors empty, so the matrix is read as (o/copies, copies*g*k) and the
copies of a column are merged; `rest` values are left over as one more, shorter row. `cut` is
(copies, width, rows, rest, tile_rows). Tiles of rows are merged in their order: the bits never
depend on threads.
"""

from functools import lru_cache

import numpy as np
from numba import boolean, float64, int64, prange

from fastnorm.backends.numba_gate import bias_at, gate_if
from fastnorm.backends.numba_jit import (
    FORWARD,
    GATED,
    allocating,
    called,
    inlined,
    kernel,
    shared_evenly,
)
from fastnorm.backends.numba_maps import map_product_rows, map_rows
from fastnorm.backends.numba_rows import invert_deviations, merge_terms, terms_of_sets
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
    moments,
    reciprocal_deviation,
)

FEW = 256  # channels, below which a row has several copies of them
NARROW = 16  # the width of few columns becomes a multiple of this
WIDE = 64  # and at least this (48: 0.75 to 1.8 times as long; multiples of 64: 0.7 to 1.15)
TILE = 65536  # values in a tile, at least,
TILE_ROWS = 64  # and rows: fewer, and the tiles' sums weigh as much as their values
MOST_TILES = 16
STRIP = 1024  # columns summed and mapped down a tile: what belongs to them stays in the first cache
CHUNK = 256  # channels that one thread finishes, about


@lru_cache(maxsize=1024)
def cut_columns(geometry):
    """(cut, tiles) of a geometry."""
    channels = geometry.g * geometry.k
    copies = 1
    if channels < FEW:
        while copies * channels % NARROW or copies * channels < WIDE:
            copies += 1
        copies = min(copies, geometry.o)
    width, rows = copies * channels, geometry.o // copies
    tiles = -(-rows // max(TILE_ROWS, -(-rows // MOST_TILES), -(-TILE // width)))
    tiles = shared_evenly(tiles) if geometry.b == 1 else tiles
    tile_rows = -(-rows // tiles)
    return (copies, width, rows, geometry.o % copies * channels, tile_rows), -(-rows // tile_rows)


@called
def start_columns(x, about, cut, has_mean, first, stop):
    """about = a value near the mean of each column [first, stop), exactly the constant of a
    constant column."""
    width, rows = cut[1], cut[2]
    count = min(rows, 2 * SAMPLES, max(4, rows // 8))
    near = about[first:stop]
    near[:] = 0
    if not has_mean:
        return
    start = x[first:stop]
    for j in range(1, count):
        row = j * rows // count * width
        sampled = x[row + first : row + stop]
        for c in range(near.size):
            near[c] += at(sampled, c) - at(start, c)
    inverse = rounded(x, 1.0 / count)
    for c in range(near.size):
        value = at(start, c) + near[c] * inverse
        near[c] = on_grid(x, value if abs(value) < 1e37 else 0.0)


def _sum_tile(add):
    """A function of a tile's sums, of which partial[0] and partial[1] are made; `gates` are the
    columns' scales, then their shifts, or empty."""

    @allocating
    def sum_tile(x, dy, bias, gates, about, partial, cut, step, tile):
        _, width, rows, rest, tile_rows = cut
        first, stop = tile * tile_rows, min(rows, (tile + 1) * tile_rows)
        s = np.zeros(width, about.dtype)
        q = np.zeros(width, about.dtype)
        partial[:] = 0.0
        for c in range(0, width, STRIP):
            own = slice(c, min(width, c + STRIP))
            for row in range(first, stop, RUN):
                at, count = row * width + c, min(RUN, stop - row)
                gate = gate_if(bias, (), gates[:width][own], gates[width:][own])
                add(x[at:], dy[at:], gate, count, width, about[own], s[own], q[own], step)
                flush(s[own], partial[:width][own])
                flush(q[own], partial[width:][own])
        if stop == rows and rest > 0:
            at = rows * width
            gate = gate_if(bias, (), gates[:rest], gates[width:])
            add(x[at:], dy[at:], gate, int64(1), int64(0), about[:rest], s, q, int64(1))
            flush(s[:rest], partial[:rest])
            flush(q[:rest], partial[width : width + rest])

    return sum_tile


sum_tile, sum_product_tile = _sum_tile(add_rows), _sum_tile(add_row_products)


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
    if k == 1:
        for group in range(from_group, to_group):
            mean[group] = means[group]
        for group in range(from_group, to_group):
            var[group] = squares[group] / float64(o)
        return
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


# Where a channel is a group, a loop for each output: LLVM makes vectors of them.


@inlined
def channel_products(hi, scale, shift, dscale, weight, s, q, mean, rstd, terms_w, terms_b, count,
                     has_mean, given):
    for c in range(s.size):
        terms_b[c] = s[c]
    for c in range(s.size):
        terms_w[c] = rstd[c] * (q[c] - (mean[c] - float64(hi[c])) * s[c])
    for c in range(s.size):
        dscale[c] = rstd[c] * float64(weight[c])
    if given:
        scale[:] = 0
        shift[:] = 0
        return
    for c in range(s.size):
        w = float64(weight[c])
        scale[c] = backward_terms(
            w * s[c], w * q[c], mean[c] - float64(hi[c]), rstd[c], count, has_mean
        )[0]
    for c in range(s.size):
        w = float64(weight[c])
        shift[c] = backward_terms(
            w * s[c], w * q[c], mean[c] - float64(hi[c]), rstd[c], count, has_mean
        )[1]


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
    own = slice(first, stop)
    for group in range(from_group, to_group if k > 1 else from_group):
        rstd[group] = reciprocal_deviation(var[group], eps)
        center = rounded(x, mean[group])
        for channel in range(group * k, (group + 1) * k):
            hi[channel] = center
            scale[channel], shift[channel] = forward_terms(
                mean[group], float64(center), rstd[group], float64(weight[channel]),
                float64(bias[channel]),
            )
    if k == 1:
        invert_deviations(var[own], rstd[own], eps)
        terms_of_sets(hi[own], scale[own], shift[own], weight[own], bias[own], mean[own], rstd[own])
    copy_columns(hi, channels, first, stop)
    copy_columns(scale, channels, first, stop)
    copy_columns(shift, channels, first, stop)


@called
def map_tile(x, y, coefficients, cut, step, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    row, stop = tile * tile_rows, min(rows, (tile + 1) * tile_rows)
    for c in range(0, width, STRIP):
        start, own = row * width + c, slice(c, min(width, c + STRIP))
        map_rows(
            x[start:], y[start:], stop - row, width, hi[own], scale[own], shift[own], step,
            streaming,
        )
    if stop == rows and rest > 0:
        map_rows(
            x[rows * width :], y[rows * width :], int64(1), int64(0), hi[:rest], scale[:rest],
            shift[:rest], int64(1), boolean(0),
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


@kernel(FORWARD, sizes=13, allocates=True)
def forward_slices(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """Each slice, all steps."""
    b, o, g, k, _ = sizes[:5]
    cut, step = sizes[5:10], sizes[12]
    size = o * g * k
    width = cut[1]
    tiles = tiles_of(cut)
    coefficients = np.empty(b * 4 * width, weight.dtype)
    partial = np.empty(b * tiles * 2 * width)
    for index in prange(b):
        s = int64(index)
        xs = x[s * size : (s + 1) * size]
        ys = y[s * size : (s + 1) * size]
        own = coefficients[s * 4 * width : (s + 1) * 4 * width]
        sums = partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width]
        start_columns(xs, own[:width], cut, has_mean, int64(0), width)
        for tile in range(tiles):
            sum_tile(
                xs, xs, (), own[:0], own[:width],
                sums[tile * 2 * width : (tile + 1) * 2 * width], cut, step, tile,
            )
        finish_groups(
            xs, own, sums, weight, bias, mean[s * g : (s + 1) * g], var[s * g : (s + 1) * g],
            rstd[s * g : (s + 1) * g], sizes[:5], cut, eps, has_mean, boolean(0), int64(0), g,
        )
        for tile in range(tiles if y.size > 0 else 0):
            map_tile(xs, ys, own, cut, step, tiles - 1 - tile, streaming != 0)


@kernel(FORWARD, sizes=13, allocates=True)
def forward_tiles(x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming):
    """One slice, a tile at a time; given: only the map."""
    _, _, g, k, _ = sizes[:5]
    cut = sizes[5:10]
    given, threads, step = sizes[10:]
    width = cut[1]
    tiles = tiles_of(cut)
    coefficients = np.empty(4 * width, weight.dtype)
    partial = np.empty((1 if given else tiles) * 2 * width)
    about = coefficients[:width]
    chunks = (width + CHUNK - 1) // CHUNK
    if not given:
        if chunks == 1:  # not worth waking the threads
            start_columns(x, about, cut, has_mean, int64(0), width)
        else:
            for index in prange(chunks):
                chunk = int64(index)
                start_columns(
                    x, about, cut, has_mean, chunk * CHUNK, min(width, (chunk + 1) * CHUNK)
                )
        for index in prange(tiles):
            tile = int64(index)
            sum_tile(
                x, x, (), about[:0], about, partial[tile * 2 * width : (tile + 1) * 2 * width],
                cut, step, tile,
            )
    groups = max(1, CHUNK // k)
    if g <= groups:
        finish_groups(
            x, coefficients, partial, weight, bias, mean, var, rstd, sizes[:5], cut, eps, has_mean,
            given != 0, int64(0), g,
        )
    else:
        for index in prange((g + groups - 1) // groups):
            chunk = int64(index)
            finish_groups(
                x, coefficients, partial, weight, bias, mean, var, rstd, sizes[:5], cut, eps,
                has_mean, given != 0, chunk * groups, min(g, (chunk + 1) * groups),
            )
    if y.size > 0:
        for index in prange(threads):
            part = int64(index)
            for unit in range(part * tiles // threads, (part + 1) * tiles // threads):
                tile = in_turn(unit, part, threads, tiles, streaming)
                map_tile(x, y, coefficients, cut, step, tile, streaming != 0)


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
    if k == 1:
        own = slice(first, stop)
        channel_products(hi[own], scale[own], shift[own], dscale[own], weight[own], sums,
                         products[: sums.size], mean[own], rstd[own], terms_w[own], terms_b[own],
                         float64(o), has_mean, given)
    for group in range(from_group, to_group if k > 1 else from_group):
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


@inlined
def open_gates(bias, weight, gates, coefficients, mean, rstd, sizes, cut):
    """The gates of the columns of each slice."""
    b, _, g, k, _ = sizes
    width, channels = cut[1], g * k
    for column in range(0, b * width, width):
        hi = coefficients[4 * column : 4 * column + width]
        scale = gates[2 * column : 2 * column + width]
        shift = gates[2 * column + width : 2 * column + 2 * width]
        for c in range(channels):
            set_ = column // width * g + c // k
            scale[c], shift[c] = forward_terms(
                mean[set_], float64(hi[c]), rstd[set_], float64(weight[c]),
                bias_at(bias, c),
            )
        copy_columns(scale, channels, int64(0), channels)
        copy_columns(shift, channels, int64(0), channels)


@called
def map_product_tile(dy, x, dx, bias, gates, coefficients, cut, step, tile, streaming):
    _, width, rows, rest, tile_rows = cut
    hi = coefficients[:width]
    scale = coefficients[width : 2 * width]
    shift = coefficients[2 * width : 3 * width]
    dscale = coefficients[3 * width : 4 * width]
    row, stop = tile * tile_rows, min(rows, (tile + 1) * tile_rows)
    for c in range(0, width, STRIP):
        start, own = row * width + c, slice(c, min(width, c + STRIP))
        gate = gate_if(bias, (), gates[:width][own], gates[width:][own])
        map_product_rows(
            x[start:], dy[start:], dx[start:], gate, stop - row, width, hi[own],
            scale[own], shift[own], dscale[own], step, streaming,
        )
    if stop == rows and rest > 0:
        map_product_rows(
            x[rows * width :], dy[rows * width :], dx[rows * width :],
            gate_if(bias, (), gates[:rest], gates[width:]), int64(1), int64(0), hi[:rest],
            scale[:rest], shift[:rest], dscale[:rest], int64(1), boolean(0),
        )


@kernel(GATED, sizes=13, allocates=True)
def backward_tiles(dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean,
                   given, streaming):
    """All slices, a tile at a time."""
    b, o, g, k, _ = sizes[:5]
    cut, threads, step = sizes[5:10], sizes[11], sizes[12]
    size = o * g * k
    width = cut[1]
    tiles = tiles_of(cut)
    coefficients = np.empty(b * 4 * width, weight.dtype)
    gates = np.empty(b * 2 * width if len(bias) > 0 else 0, weight.dtype)
    partial = np.empty(b * tiles * 2 * width)
    terms_w, terms_b = terms[: b * g * k], terms[b * g * k :]
    for s in range(b):
        hi = coefficients[s * 4 * width : s * 4 * width + width]
        own = mean[s * g : (s + 1) * g]
        if k == 1:
            for c in range(own.size):
                hi[c] = own[c]
        else:
            for group in range(g):
                hi[group * k : (group + 1) * k] = own[group]
        copy_columns(hi, g * k, int64(0), g * k)
    if len(bias) > 0:
        open_gates(bias, weight, gates, coefficients, mean, rstd, sizes[:5], cut)
    for index in prange(b * tiles):
        unit = int64(index)
        s = unit // tiles
        sum_product_tile(
            x[s * size : (s + 1) * size], dy[s * size : (s + 1) * size],
            bias, gates[2 * s * width : 2 * (s + 1) * width],
            coefficients[s * 4 * width : s * 4 * width + width],
            partial[unit * 2 * width : (unit + 1) * 2 * width], cut, step, unit % tiles,
        )
    groups = max(1, CHUNK // k)
    chunks = (g + groups - 1) // groups
    for index in prange(b * chunks):
        unit = int64(index)
        s, chunk = unit // chunks, unit % chunks
        finish_products(
            weight, coefficients[s * 4 * width : (s + 1) * 4 * width],
            partial[s * tiles * 2 * width : (s + 1) * tiles * 2 * width],
            mean[s * g : (s + 1) * g], rstd[s * g : (s + 1) * g],
            terms_w[s * g * k : (s + 1) * g * k], terms_b[s * g * k : (s + 1) * g * k], sizes[:5],
            cut, has_mean, given, chunk * groups, min(g, (chunk + 1) * groups),
        )
    for index in prange(threads):
        part = int64(index)
        for unit in range(part * b * tiles // threads, (part + 1) * b * tiles // threads):
            turn = in_turn(unit, part, threads, b * tiles, streaming)
            s = turn // tiles
            map_product_tile(
                dy[s * size : (s + 1) * size], x[s * size : (s + 1) * size],
                dx[s * size : (s + 1) * size], bias, gates[2 * s * width : 2 * (s + 1) * width],
                coefficients[s * 4 * width : (s + 1) * 4 * width], cut, step, turn % tiles,
                streaming != 0,
            )
    merge_terms(terms, dweight, dbias, b)
