"""The maps of the Numba kernels: y = f(x) over a run, and over rows with coefficients for each
place or each row; where `streaming`, past the caches."""

from fastnorm.backends.numba_gate import gate_line, gate_part, through
from fastnorm.backends.numba_jit import inlined
from fastnorm.backends.numba_simd import (
    LINE,
    TOGETHER,
    address,
    bytes_of,
    lanes,
    load,
    load_part,
    load_together,
    splat,
    store,
    store_part,
    stream,
)
from fastnorm.backends.numba_words import IN_ORDER


@inlined
def whole_lines(y, streaming):
    """(whether past the caches, first, stop) of the whole lines of a run. Lines that are half
    streamed cost more than they save, so that a short run must be whole lines."""
    width = lanes(y)
    past = address(y) % LINE
    first = (LINE - past) % LINE // bytes_of(y)
    stop = first + (y.size - first) // width * width
    short = y.size < 32 * width and (first or y.size % width)
    if not streaming or past % bytes_of(y) or short or first >= stop:
        return False, 0, y.size - y.size % width
    return True, first, stop


@inlined
def pour(kept, n, y, last):
    """The first n values of kept to y, whole lines past the caches, and the rest where they are the
    last. How many were written; those that were not move to the front."""
    line = LINE // bytes_of(y)
    first = min(n, (LINE - address(y) % LINE) % LINE // bytes_of(y))
    stop = first + (n - first) // line * line
    for j in range(first):
        y[j] = kept[j]
    for j in range(first, stop, lanes(y)):
        stream(y, j, load(kept, j))
    if last:
        for j in range(stop, n):
            y[j] = kept[j]
        return n
    for j in range(n - stop):
        kept[j] = kept[stop + j]
    return stop


@inlined
def affine(x, hi, scale, shift):
    return (x - hi) * scale + shift


@inlined
def affine_weighted(x, hi, scale, shift, weight, bias):
    return ((x - hi) * scale + shift) * weight + bias


@inlined
def affine_products(x, dy, gate, hi, scale, shift, dscale):
    d = x - hi
    return d * scale + shift + through(dy, d, gate) * dscale


# ---- runs ----------------------------------------------------------------------------------------
#
# `arrays` are what is read of a run, `terms` coefficients.


def _sum(read):
    return inlined(lambda arrays, terms, j: read(arrays[0], j) + read(arrays[1], j))


def _affine(read):
    @inlined
    def of_x(arrays, terms, j):
        return affine(read(arrays[0], j), terms[0], terms[1], terms[2])

    return of_x


def _affine_weighted(read):
    @inlined
    def of_x(arrays, terms, j):
        return affine_weighted(read(arrays[0], j), terms[0], terms[1], terms[2],
                               read(arrays[1], j), read(arrays[2], j))

    return of_x


def _affine_products(read):
    @inlined
    def of_dy(arrays, terms, j):
        return affine_products(read(arrays[0], j), read(arrays[1], j), terms[0], terms[1],
                               terms[2], terms[3], terms[4])

    return of_dy


def _map(term):
    """A function that maps a run onto y, which may be what it reads: LLVM would make vectors of a
    plain loop only for arrays apart (in place it took 1.1 to 1.85 times as long as beside)."""
    of_lines, of_line, of_part = term(load_together), term(load), term(load_part)

    @inlined
    def map_onto(y, arrays, terms, streaming):
        past, first, stop = whole_lines(y, streaming)
        width = lanes(y)
        many = stop - (stop - first) % (TOGETHER * width)
        for j in range(0, first, width):  # a line of 16-bit elements is two vectors
            place = j, min(width, first - j)
            store_part(y, place, of_part(arrays, terms, place))
        if past:
            for j in range(first, many, TOGETHER * width):
                stream(y, j, of_lines(arrays, terms, j))
            for j in range(many, stop, width):
                stream(y, j, of_line(arrays, terms, j))
        else:
            for j in range(first, many, TOGETHER * width):
                store(y, j, of_lines(arrays, terms, j))
            for j in range(many, stop, width):
                store(y, j, of_line(arrays, terms, j))
        if stop < y.size:
            last = stop, y.size - stop
            store_part(y, last, of_part(arrays, terms, last))

    return map_onto


# (y, arrays, terms, streaming): y = a + b of (a, b); affine of (x,) with (hi, scale, shift);
# affine_weighted of (x, weight, bias) with them; affine_products of (x, dy) with (gate, hi, scale,
# shift, dscale).
add_runs, map_run, map_run_weighted, map_products = map(
    _map, (_sum, _affine, _affine_weighted, _affine_products)
)


# ---- maps of rows, a coefficient for each place --------------------------------------------------
#
# A row starts `stride` values behind the one before it.


@inlined
def streamed_rows(y, width, stride, streaming):
    """whole_lines of all rows."""
    return whole_lines(y[:width], (streaming != 0) & (stride * bytes_of(y) % LINE == 0))


def _map_rows(put_line):
    @inlined
    def lines_of(x, y, rows, stride, hi, scale, shift, first, stop):
        w = lanes(y)
        quads = stop - (stop - first) % (4 * w)
        for j in range(first, quads, 4 * w):
            h0, a0, b0 = load(hi, j), load(scale, j), load(shift, j)
            h1, a1, b1 = load(hi, j + w), load(scale, j + w), load(shift, j + w)
            h2, a2, b2 = load(hi, j + 2 * w), load(scale, j + 2 * w), load(shift, j + 2 * w)
            h3, a3, b3 = load(hi, j + 3 * w), load(scale, j + 3 * w), load(shift, j + 3 * w)
            for r in range(rows):
                at = r * stride + j
                put_line(y, at, affine(load(x, at), h0, a0, b0))
                put_line(y, at + w, affine(load(x, at + w), h1, a1, b1))
                put_line(y, at + 2 * w, affine(load(x, at + 2 * w), h2, a2, b2))
                put_line(y, at + 3 * w, affine(load(x, at + 3 * w), h3, a3, b3))
        for j in range(quads, stop, w):
            h0, a0, b0 = load(hi, j), load(scale, j), load(shift, j)
            for r in range(rows):
                put_line(y, r * stride + j, affine(load(x, r * stride + j), h0, a0, b0))

    return lines_of


stored_rows, rows_past = _map_rows(store), _map_rows(stream)


@inlined
def fill_rows(x, y, rows, stride, hi, scale, shift, first, stop):
    for j in range(first, stop, lanes(y)):
        n = min(lanes(y), stop - j)
        h, a, b = load_part(hi, (j, n)), load_part(scale, (j, n)), load_part(shift, (j, n))
        for r in range(rows):
            place = r * stride + j, n
            store_part(y, place, affine(load_part(x, place), h, a, b))


@inlined
def map_rows(x, y, rows, stride, hi, scale, shift, step, streaming):
    """map_run of rows, `step` rows of some columns before the next."""
    width = hi.size
    past, first, stop = streamed_rows(y, width, stride, streaming)
    if stop - first <= 4 * lanes(y):
        step = rows
    elif past:
        step = IN_ORDER
    for row in range(0, rows, step):
        xs, ys, count = x[row * stride :], y[row * stride :], min(step, rows - row)
        if past:
            rows_past(xs, ys, count, stride, hi, scale, shift, first, stop)
        else:
            stored_rows(xs, ys, count, stride, hi, scale, shift, first, stop)
    fill_rows(x, y, rows, stride, hi, scale, shift, 0, first)
    fill_rows(x, y, rows, stride, hi, scale, shift, stop, width)


@inlined
def terms(gate, hi, scale, shift, dscale, j):
    return gate_line(gate, j), load(hi, j), load(scale, j), load(shift, j), load(dscale, j)


def _map_product_rows(put_line):
    @inlined
    def lines_of(x, dy, dx, gate, rows, stride, hi, scale, shift, dscale, first, stop):
        w = lanes(dx)
        quads = stop - (stop - first) % (4 * w)
        for j in range(first, quads, 4 * w):
            g0, h0, a0, b0, c0 = terms(gate, hi, scale, shift, dscale, j)
            g1, h1, a1, b1, c1 = terms(gate, hi, scale, shift, dscale, j + w)
            g2, h2, a2, b2, c2 = terms(gate, hi, scale, shift, dscale, j + 2 * w)
            g3, h3, a3, b3, c3 = terms(gate, hi, scale, shift, dscale, j + 3 * w)
            for r in range(rows):
                at = r * stride + j
                put_line(dx, at, affine_products(load(x, at), load(dy, at), g0, h0, a0, b0, c0))
                at += w
                put_line(dx, at, affine_products(load(x, at), load(dy, at), g1, h1, a1, b1, c1))
                at += w
                put_line(dx, at, affine_products(load(x, at), load(dy, at), g2, h2, a2, b2, c2))
                at += w
                put_line(dx, at, affine_products(load(x, at), load(dy, at), g3, h3, a3, b3, c3))
        for j in range(quads, stop, w):
            g0, h0, a0, b0, c0 = terms(gate, hi, scale, shift, dscale, j)
            for r in range(rows):
                at = r * stride + j
                put_line(dx, at, affine_products(load(x, at), load(dy, at), g0, h0, a0, b0, c0))

    return lines_of


stored_product_rows, product_rows_past = _map_product_rows(store), _map_product_rows(stream)


@inlined
def fill_product_rows(x, dy, dx, gate, rows, stride, hi, scale, shift, dscale, first, stop):
    for j in range(first, stop, lanes(dx)):
        n = min(lanes(dx), stop - j)
        g, h, a = gate_part(gate, (j, n)), load_part(hi, (j, n)), load_part(scale, (j, n))
        b, c = load_part(shift, (j, n)), load_part(dscale, (j, n))
        for r in range(rows):
            place = r * stride + j, n
            store_part(dx, place, affine_products(
                load_part(x, place), load_part(dy, place), g, h, a, b, c
            ))


@inlined
def map_product_rows(x, dy, dx, gate, rows, stride, hi, scale, shift, dscale, step, streaming):
    """map_products of rows, as map_rows."""
    width = hi.size
    past, first, stop = streamed_rows(dx, width, stride, streaming)
    if stop - first <= 4 * lanes(dx):
        step = rows
    elif past:
        step = IN_ORDER
    for row in range(0, rows, step):
        at, count = row * stride, min(step, rows - row)
        xs, dys, dxs = x[at:], dy[at:], dx[at:]
        if past:
            product_rows_past(
                xs, dys, dxs, gate, count, stride, hi, scale, shift, dscale, first, stop
            )
        else:
            stored_product_rows(
                xs, dys, dxs, gate, count, stride, hi, scale, shift, dscale, first, stop
            )
    fill_product_rows(x, dy, dx, gate, rows, stride, hi, scale, shift, dscale, 0, first)
    fill_product_rows(x, dy, dx, gate, rows, stride, hi, scale, shift, dscale, stop, width)


def _map_scaled_rows(put_line):
    @inlined
    def lines_of(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop):
        for j in range(first, stop, lanes(y)):
            h, a, b = load(hi, j), load(scale, j), load(shift, j)
            for r in range(rows):
                put_line(y, r * stride + j, affine_weighted(
                    load(x, r * stride + j), h, a, b, splat(weight[r]), splat(bias[r])
                ))

    return lines_of


stored_scaled_rows, scaled_rows_past = _map_scaled_rows(store), _map_scaled_rows(stream)


@inlined
def fill_scaled_rows(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop):
    for j in range(first, stop, lanes(y)):
        n = min(lanes(y), stop - j)
        h, a, b = load_part(hi, (j, n)), load_part(scale, (j, n)), load_part(shift, (j, n))
        for r in range(rows):
            place = r * stride + j, n
            store_part(y, place, affine_weighted(
                load_part(x, place), h, a, b, splat(weight[r]), splat(bias[r])
            ))


@inlined
def map_scaled_rows(x, y, stride, hi, scale, shift, weight, bias, streaming):
    """map_run_weighted of rows: coefficients for each place, a weight for each row."""
    width, rows = hi.size, weight.size
    past, first, stop = streamed_rows(y, width, stride, streaming)
    if past:
        scaled_rows_past(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop)
    else:
        stored_scaled_rows(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop)
    fill_scaled_rows(x, y, rows, stride, hi, scale, shift, weight, bias, 0, first)
    fill_scaled_rows(x, y, rows, stride, hi, scale, shift, weight, bias, stop, width)


def _map_weighted_rows(put_line):
    @inlined
    def lines_of(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop):
        hi, scale, shift, rstd, offset = terms
        for j in range(first, stop, lanes(x)):
            w = load(weight, j)
            s = load(dweight, j)
            q = load(dbias, j)
            for r in range(rows):
                u = load(dy, r * stride + j)
                d = load(x, r * stride + j) - splat(hi[r])
                s = s + u * (d * splat(rstd[r]) + splat(offset[r]))
                q = q + u
                put_line(
                    dx, r * stride + j,
                    d * splat(scale[r]) + splat(shift[r]) + u * w * splat(rstd[r]),
                )
            store(dweight, j, s)
            store(dbias, j, q)

    return lines_of


stored_weighted_rows, weighted_rows_past = _map_weighted_rows(store), _map_weighted_rows(stream)


@inlined
def fill_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop):
    hi, scale, shift, rstd, offset = terms
    for j in range(first, stop, lanes(dx)):
        n = min(lanes(dx), stop - j)
        w, s, q = load_part(weight, (j, n)), load_part(dweight, (j, n)), load_part(dbias, (j, n))
        for r in range(rows):
            place = r * stride + j, n
            u = load_part(dy, place)
            d = load_part(x, place) - splat(hi[r])
            s = s + u * (d * splat(rstd[r]) + splat(offset[r]))
            q = q + u
            store_part(
                dx, place, d * splat(scale[r]) + splat(shift[r]) + u * w * splat(rstd[r])
            )
        store_part(dweight, (j, n), s)
        store_part(dbias, (j, n), q)


@inlined
def map_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, streaming):
    """dx of few rows with a weight for each place, and their terms onto dweight and dbias.
    terms are (hi, scale, shift, rstd, offset) of each row."""
    width = weight.size
    past, first, stop = streamed_rows(dx, width, stride, streaming)
    if past:
        weighted_rows_past(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop)
    else:
        stored_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop)
    fill_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, 0, first)
    fill_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, stop, width)
