"""What the Numba kernels are made of: sums over a run and down columns, and their maps.

Sums are taken in the type of x over short blocks, so that a vector's lane adds few values, and
the blocks are merged in double. Every operation keeps its order and its rounding.
"""

from numba import float64

from fastnorm.backends import scalar
from fastnorm.backends.numba_jit import inlined
from fastnorm.backends.numba_simd import (
    LINE,
    address,
    at,
    fold,
    load,
    on_grid,
    put,
    rounded,
    splat,
    store,
    stream,
)

BLOCK = 2048  # values of a run summed in the working type
RUN = 128  # and of a column
STEP = 16  # rows of which some columns are summed before the next
SAMPLES = 8

cancels = inlined(scalar.cancels)
moments = inlined(scalar.moments)
reciprocal_deviation = inlined(scalar.reciprocal_deviation)
forward_terms = inlined(scalar.forward_terms)
backward_terms = inlined(scalar.backward_terms)


@inlined
def lanes(x):
    """Of a vector of what an array like x holds: one line of the working type."""
    return LINE // max(x.itemsize, 4)


# ---- runs ------------------------------------------------------------------------------------


@inlined
def term_of_x(x, dy, weight, j, about):
    """(a, d) of which a sum takes a and a*d."""
    d = load(x, j) - about
    return d, d


@inlined
def term_of_dy(x, dy, weight, j, about):
    return load(dy, j), load(x, j) - about


@inlined
def term_of_weighted_dy(x, dy, weight, j, about):
    return load(dy, j) * load(weight, j), load(x, j) - about


def _whole_lines(term):
    """A function of sums over [0, stop), whole lines. (A function handed to another at run time
    could not be cached.)"""

    @inlined
    def whole_lines(x, dy, weight, about, stop):
        width = lanes(x)
        center = splat(about)
        s = 0.0
        q = 0.0
        for start in range(0, stop, BLOCK):
            end = min(stop, start + BLOCK)
            # Two lines at a time, so that neither waits for the other.
            s0 = s1 = q0 = q1 = splat(rounded(x, 0))
            for j in range(start, end - width, 2 * width):
                a, d = term(x, dy, weight, j, center)
                s0 = s0 + a
                q0 = q0 + a * d
                a, d = term(x, dy, weight, j + width, center)
                s1 = s1 + a
                q1 = q1 + a * d
            if (end - start) // width % 2:
                a, d = term(x, dy, weight, end - width, center)
                s0 = s0 + a
                q0 = q0 + a * d
            s += fold(s0 + s1)
            q += fold(q0 + q1)
        return s, q

    return whole_lines


lines_of_x = _whole_lines(term_of_x)
lines_of_dy = _whole_lines(term_of_dy)
lines_of_weighted_dy = _whole_lines(term_of_weighted_dy)


@inlined
def run_sums(x, about):
    """Sums of d and of d*d, d = x - about."""
    stop = x.size - x.size % (lanes(x))
    s, q = lines_of_x(x, x, x, about, stop)
    for j in range(stop, x.size):
        d = float64(at(x, j) - about)
        s += d
        q += d * d
    return s, q


@inlined
def run_sums_exact(x, about):
    """run_sums with every operation in double."""
    s = 0.0
    q = 0.0
    for j in range(x.size):
        d = float64(at(x, j)) - about
        s += d
        q += d * d
    return s, q


@inlined
def run_products(x, dy, about):
    """Sums of dy and of dy*(x - about)."""
    stop = x.size - x.size % (lanes(x))
    s, q = lines_of_dy(x, dy, dy, about, stop)
    for j in range(stop, x.size):
        s += float64(at(dy, j))
        q += float64(at(dy, j)) * float64(at(x, j) - about)
    return s, q


@inlined
def run_products_weighted(x, dy, weight, about):
    """Sums of dy*weight and of dy*weight*(x - about), a weight for each place."""
    stop = x.size - x.size % (lanes(x))
    s, q = lines_of_weighted_dy(x, dy, weight, about, stop)
    for j in range(stop, x.size):
        gy = float64(at(dy, j)) * float64(weight[j])
        s += gy
        q += gy * float64(at(x, j) - about)
    return s, q


# ---- maps: y = f(x), where `streaming` past the caches -------------------------------------------


@inlined
def streamed(y):
    """(first, stop) of what of a run is stored past the caches: whole lines. Lines that are half
    streamed cost more than they save, so that a short run must be whole lines."""
    width = lanes(y)
    past = address(y) % LINE
    first = (LINE - past) % LINE // y.itemsize
    if past % y.itemsize or (y.size < 64 * width and (first or y.size % width)):
        return y.size, y.size
    return first, first + (y.size - first) // width * width


@inlined
def affine(x, hi, scale, shift):
    return (x - hi) * scale + shift


@inlined
def affine_weighted(x, hi, scale, shift, weight, bias):
    return ((x - hi) * scale + shift) * weight + bias


@inlined
def affine_products(x, dy, hi, scale, shift, dscale):
    return (x - hi) * scale + shift + dy * dscale


# Plain loops where y is not streamed, of which LLVM makes vectors: spelled out they took as long.
# They start at 0: from anywhere else Numba's indices could be negative, and the loops would not
# become vectors.


@inlined
def fill_run(x, y, hi, scale, shift):
    for j in range(x.size):
        put(y, j, affine(at(x, j), hi, scale, shift))


@inlined
def map_run(x, y, hi, scale, shift, streaming):
    if not streaming:
        fill_run(x, y, hi, scale, shift)
        return
    first, stop = streamed(y)
    fill_run(x[:first], y[:first], hi, scale, shift)
    h, a, b = splat(hi), splat(scale), splat(shift)
    for j in range(first, stop, lanes(y)):
        stream(y, j, affine(load(x, j), h, a, b))
    fill_run(x[stop:], y[stop:], hi, scale, shift)


@inlined
def fill_run_weighted(x, y, weight, bias, hi, scale, shift):
    for j in range(x.size):
        put(y, j, affine_weighted(at(x, j), hi, scale, shift, weight[j], bias[j]))


@inlined
def map_run_weighted(x, y, weight, bias, hi, scale, shift, streaming):
    if not streaming:
        fill_run_weighted(x, y, weight, bias, hi, scale, shift)
        return
    first, stop = streamed(y)
    fill_run_weighted(x[:first], y[:first], weight[:first], bias[:first], hi, scale, shift)
    h, a, b = splat(hi), splat(scale), splat(shift)
    for j in range(first, stop, lanes(y)):
        stream(y, j, affine_weighted(load(x, j), h, a, b, load(weight, j), load(bias, j)))
    fill_run_weighted(x[stop:], y[stop:], weight[stop:], bias[stop:], hi, scale, shift)


@inlined
def fill_products(x, dy, dx, hi, scale, shift, dscale):
    for j in range(x.size):
        put(dx, j, affine_products(at(x, j), at(dy, j), hi, scale, shift, dscale))


@inlined
def map_products(x, dy, dx, hi, scale, shift, dscale, streaming):
    if not streaming:
        fill_products(x, dy, dx, hi, scale, shift, dscale)
        return
    first, stop = streamed(dx)
    fill_products(x[:first], dy[:first], dx[:first], hi, scale, shift, dscale)
    h, a, b, c = splat(hi), splat(scale), splat(shift), splat(dscale)
    for j in range(first, stop, lanes(dx)):
        stream(dx, j, affine_products(load(x, j), load(dy, j), h, a, b, c))
    fill_products(x[stop:], dy[stop:], dx[stop:], hi, scale, shift, dscale)


# ---- maps of rows, a coefficient for each place --------------------------------------------------
#
# A row starts `stride` values behind the one before it.


@inlined
def streamed_rows(y, width, stride, streaming):
    """(whether, first, stop): which places of all rows are whole lines, as in streamed."""
    first, stop = streamed(y[:width])
    if not streaming or first == stop or stride * y.itemsize % LINE:
        return False, 0, width - width % lanes(y)
    return True, first, stop


def _map_rows(put_line):
    @inlined
    def whole_lines(x, y, rows, stride, hi, scale, shift, first, stop):
        for r in range(rows):
            for j in range(first, stop, lanes(y)):
                put_line(y, r * stride + j, affine(
                    load(x, r * stride + j), load(hi, j), load(scale, j), load(shift, j)
                ))

    return whole_lines


stored_rows, rows_past = _map_rows(store), _map_rows(stream)


@inlined
def fill_rows(x, y, rows, stride, hi, scale, shift, first, stop):
    for r in range(rows):
        for j in range(first, stop):
            put(y, r * stride + j, affine(at(x, r * stride + j), hi[j], scale[j], shift[j]))


@inlined
def map_rows(x, y, rows, stride, hi, scale, shift, streaming):
    """map_run of rows."""
    width = hi.size
    past, first, stop = streamed_rows(y, width, stride, streaming)
    if past:
        rows_past(x, y, rows, stride, hi, scale, shift, first, stop)
    else:
        stored_rows(x, y, rows, stride, hi, scale, shift, first, stop)
    fill_rows(x, y, rows, stride, hi, scale, shift, 0, first)
    fill_rows(x, y, rows, stride, hi, scale, shift, stop, width)


def _map_product_rows(put_line):
    @inlined
    def whole_lines(x, dy, dx, rows, stride, hi, scale, shift, dscale, first, stop):
        for r in range(rows):
            for j in range(first, stop, lanes(dx)):
                put_line(dx, r * stride + j, affine_products(
                    load(x, r * stride + j), load(dy, r * stride + j), load(hi, j), load(scale, j),
                    load(shift, j), load(dscale, j),
                ))

    return whole_lines


stored_product_rows, product_rows_past = _map_product_rows(store), _map_product_rows(stream)


@inlined
def fill_product_rows(x, dy, dx, rows, stride, hi, scale, shift, dscale, first, stop):
    for r in range(rows):
        for j in range(first, stop):
            put(dx, r * stride + j, affine_products(
                at(x, r * stride + j), at(dy, r * stride + j), hi[j], scale[j], shift[j], dscale[j]
            ))


@inlined
def map_product_rows(x, dy, dx, rows, stride, hi, scale, shift, dscale, streaming):
    """map_products of rows."""
    width = hi.size
    past, first, stop = streamed_rows(dx, width, stride, streaming)
    if past:
        product_rows_past(x, dy, dx, rows, stride, hi, scale, shift, dscale, first, stop)
    else:
        stored_product_rows(x, dy, dx, rows, stride, hi, scale, shift, dscale, first, stop)
    fill_product_rows(x, dy, dx, rows, stride, hi, scale, shift, dscale, 0, first)
    fill_product_rows(x, dy, dx, rows, stride, hi, scale, shift, dscale, stop, width)


def _map_scaled_rows(put_line):
    @inlined
    def whole_lines(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop):
        for j in range(first, stop, lanes(y)):
            h, a, b = load(hi, j), load(scale, j), load(shift, j)
            for r in range(rows):
                put_line(y, r * stride + j, affine_weighted(
                    load(x, r * stride + j), h, a, b, splat(weight[r]), splat(bias[r])
                ))

    return whole_lines


stored_scaled_rows, scaled_rows_past = _map_scaled_rows(store), _map_scaled_rows(stream)


@inlined
def fill_scaled_rows(x, y, rows, stride, hi, scale, shift, weight, bias, first, stop):
    for r in range(rows):
        for j in range(first, stop):
            put(y, r * stride + j, affine_weighted(
                at(x, r * stride + j), hi[j], scale[j], shift[j], weight[r], bias[r]
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
    def whole_lines(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop):
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

    return whole_lines


stored_weighted_rows, weighted_rows_past = _map_weighted_rows(store), _map_weighted_rows(stream)


@inlined
def fill_weighted_rows(x, dy, dx, weight, rows, stride, terms, dweight, dbias, first, stop):
    hi, scale, shift, rstd, offset = terms
    for r in range(rows):
        for j in range(first, stop):
            u = at(dy, r * stride + j)
            d = at(x, r * stride + j) - hi[r]
            dweight[j] += u * (d * rstd[r] + offset[r])
            dbias[j] += u
            put(dx, r * stride + j, d * scale[r] + shift[r] + u * weight[j] * rstd[r])


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


# ---- statistics of a set of runs -----------------------------------------------------------------


@inlined
def sample(x, start, stride, runs, n):
    """A value near the mean of the set's runs: the average of SAMPLES of its values, exactly the
    constant of a constant set."""
    first = float64(at(x, start))
    total = 0.0
    for j in range(1, SAMPLES):
        place = start + j * runs // SAMPLES * stride + j * n // SAMPLES
        total += float64(at(x, place)) - first
    value = first + total / SAMPLES
    return on_grid(x, value if abs(value) < 1e37 else 0.0)


@inlined
def statistics(x, start, stride, runs, n, about, s, q, has_mean):
    """Mean and variance of a set from its sums; where they cancel, from the set again."""
    count = float64(runs * n)
    if not has_mean:
        s = 0.0
    if not cancels(s, q, count):
        return moments(s, q, float64(about), count)
    mean = 0.0
    if has_mean:
        s = 0.0
        for r in range(runs):
            s += run_sums_exact(x[start + r * stride : start + r * stride + n], float64(about))[0]
        mean = float64(about) + s / count
    s = 0.0
    q = 0.0
    for r in range(runs):
        sums = run_sums_exact(x[start + r * stride : start + r * stride + n], mean)
        s += sums[0]
        q += sums[1]
    if not has_mean:
        return 0.0, q / count
    return moments(s, q, mean, count)


# ---- columns -------------------------------------------------------------------------------------


def _down_columns(term):
    """A function of sums down the whole lines of columns: four lines at a time, whose sums stay in
    registers, and then the others."""

    @inlined
    def whole_lines(x, dy, rows, stride, about, s, q, stop):
        w = lanes(x)
        quads = stop - stop % (4 * w)
        for j in range(0, quads, 4 * w):
            c0, c1, c2, c3 = (
                load(about, j), load(about, j + w), load(about, j + 2 * w), load(about, j + 3 * w)
            )
            s0, s1, s2, s3 = load(s, j), load(s, j + w), load(s, j + 2 * w), load(s, j + 3 * w)
            q0, q1, q2, q3 = load(q, j), load(q, j + w), load(q, j + 2 * w), load(q, j + 3 * w)
            for r in range(rows):
                first = r * stride + j
                a, d = term(x, dy, dy, first, c0)
                s0, q0 = s0 + a, q0 + a * d
                a, d = term(x, dy, dy, first + w, c1)
                s1, q1 = s1 + a, q1 + a * d
                a, d = term(x, dy, dy, first + 2 * w, c2)
                s2, q2 = s2 + a, q2 + a * d
                a, d = term(x, dy, dy, first + 3 * w, c3)
                s3, q3 = s3 + a, q3 + a * d
            store(s, j, s0)
            store(s, j + w, s1)
            store(s, j + 2 * w, s2)
            store(s, j + 3 * w, s3)
            store(q, j, q0)
            store(q, j + w, q1)
            store(q, j + 2 * w, q2)
            store(q, j + 3 * w, q3)
        for j in range(quads, stop, w):
            c0, s0, q0 = load(about, j), load(s, j), load(q, j)
            for r in range(rows):
                a, d = term(x, dy, dy, r * stride + j, c0)
                s0, q0 = s0 + a, q0 + a * d
            store(s, j, s0)
            store(q, j, q0)

    return whole_lines


down_x = _down_columns(term_of_x)
down_dy = _down_columns(term_of_dy)


@inlined
def add_rows(x, rows, stride, about, s, q):
    """Onto s and q the sums of run_sums down the columns of rows."""
    width = about.size
    stop = width - width % lanes(x)
    step = STEP if width > 4 * lanes(x) else rows
    for row in range(0, rows, step):
        down_x(x[row * stride :], x, min(step, rows - row), stride, about, s, q, stop)
    for r in range(rows):
        for j in range(stop, width):
            d = at(x, r * stride + j) - about[j]
            s[j] += d
            q[j] += d * d


@inlined
def add_row_products(x, dy, rows, stride, about, s, q):
    """Onto s and q the sums of run_products down the columns of rows."""
    width = about.size
    stop = width - width % lanes(x)
    step = STEP if width > 4 * lanes(x) else rows
    for row in range(0, rows, step):
        down_dy(
            x[row * stride :], dy[row * stride :], min(step, rows - row), stride, about, s, q, stop
        )
    for r in range(rows):
        for j in range(stop, width):
            s[j] += at(dy, r * stride + j)
            q[j] += at(dy, r * stride + j) * (at(x, r * stride + j) - about[j])


@inlined
def add_place_products(x, dy, weight, about, rstd, offset, s, q):
    """Sums over a row of dy*xhat and of dy; onto s and q the terms of run_products of each place,
    with the row's weight."""
    width = lanes(x)
    stop = x.size - x.size % width
    w = splat(weight)
    over_w = over_b = splat(rounded(x, 0))
    for j in range(0, stop, width):
        d = load(x, j) - load(about, j)
        u = load(dy, j)
        over_w = over_w + u * (d * load(rstd, j) + load(offset, j))
        over_b = over_b + u
        u = u * w
        store(s, j, load(s, j) + u)
        store(q, j, load(q, j) + u * d)
    total_w = fold(over_w)
    total_b = fold(over_b)
    for j in range(stop, x.size):
        d = at(x, j) - about[j]
        u = at(dy, j)
        total_w += float64(u * (d * rstd[j] + offset[j]))
        total_b += float64(u)
        u = u * weight
        s[j] += u
        q[j] += u * d
    return total_w, total_b


@inlined
def flush(lanes, total):
    for j in range(lanes.size):
        total[j] += float64(lanes[j])
        lanes[j] = 0
