"""What the Numba kernels are made of, beside the maps: sums over a run and down columns, and
statistics from them.

Sums are taken in the type of x over short blocks, so that a vector's lane adds few values, and
the blocks are merged in double. Every operation keeps its order and its rounding.
"""

from numba import float64

from fastnorm.backends import scalar
from fastnorm.backends.numba_gate import gate_line, gate_part, through
from fastnorm.backends.numba_jit import called, inlined
from fastnorm.backends.numba_simd import (
    at,
    fold,
    lanes,
    load,
    load_part,
    on_grid,
    rounded,
    splat,
    splat_part,
    store,
    store_part,
)

BLOCK = 2048  # values of a run summed in the working type
RUN = 128  # and of a column
STEP = 4  # rows of which some columns are summed or mapped before the next, while in cache: from
IN_ORDER = 1  # memory in its own order (0.4 to 0.6 of the time; in cache 1.1 to 1.5 times)
SAMPLES = 8
CLOSE = 8192  # values of a set whose samples are the first ones

cancels = inlined(scalar.cancels)
moments = inlined(scalar.moments)
reciprocal_deviation = inlined(scalar.reciprocal_deviation)
forward_terms = inlined(scalar.forward_terms)
backward_terms = inlined(scalar.backward_terms)


# ---- runs ------------------------------------------------------------------------------------


def _terms(read):
    """(a, d) of which a sum takes a and a*d, of a line or of a part of one."""

    @inlined
    def of_x(x, dy, weight, gate, j, about):
        d = read(x, j) - about
        return d, d

    @inlined
    def of_dy(x, dy, weight, gate, j, about):
        d = read(x, j) - about
        return through(read(dy, j), d, gate), d

    @inlined
    def of_weighted_dy(x, dy, weight, gate, j, about):
        return read(dy, j) * read(weight, j), read(x, j) - about

    return of_x, of_dy, of_weighted_dy


TERMS, TERMS_OF_PARTS = _terms(load), _terms(load_part)


def _run_sums(term, term_of_part):
    """A function of sums over a run. (A function handed to another at run time could not be
    cached. The last part summed first, before the lines: 1.15 times as long at rows of 300.)"""

    @inlined
    def sums(x, dy, weight, gate, about):
        width = lanes(x)
        stop = x.size - x.size % width
        center = splat(about)
        own = gate_line(gate, 0)
        s = 0.0
        q = 0.0
        for start in range(0, max(1, stop), BLOCK):
            end = min(stop, start + BLOCK)
            # Two lines at a time, so that neither waits for the other.
            s0 = s1 = q0 = q1 = splat(rounded(x, 0))
            for j in range(start, end - width, 2 * width):
                a, d = term(x, dy, weight, own, j, center)
                s0 = s0 + a
                q0 = q0 + a * d
                a, d = term(x, dy, weight, own, j + width, center)
                s1 = s1 + a
                q1 = q1 + a * d
            if (end - start) // width % 2:
                a, d = term(x, dy, weight, own, end - width, center)
                s0 = s0 + a
                q0 = q0 + a * d
            if end == stop < x.size:
                last = stop, x.size - stop
                a, d = term_of_part(x, dy, weight, own, last, splat_part(about, last[1]))
                s1 = s1 + a
                q1 = q1 + a * d
            s += fold(s0 + s1)
            q += fold(q0 + q1)
        return s, q

    return sums


sums_of_x, sums_of_dy, sums_of_weighted_dy = map(_run_sums, TERMS, TERMS_OF_PARTS)


@inlined
def run_sums(x, about):
    """Sums of d and of d*d, d = x - about."""
    return sums_of_x(x, x, x, (), about)


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
def run_products(x, dy, gate, about):
    """Sums of dy and of dy*(x - about); a gate is of numbers."""
    return sums_of_dy(x, dy, dy, gate, about)


@inlined
def run_products_weighted(x, dy, weight, about):
    """Sums of dy*weight and of dy*weight*(x - about), a weight for each place."""
    return sums_of_weighted_dy(x, dy, weight, (), about)


# ---- statistics of a set of runs -----------------------------------------------------------------


@inlined
def sample(x, start, stride, runs, n):
    """A value near the mean of the set's runs: the average of a few of its values, exactly the
    constant of a constant set. The first four, or of a large set SAMPLES values spread over it: to
    touch a line here and there costs more than the line."""
    first = float64(at(x, start))
    total = 0.0
    if n >= 4 and runs * n <= CLOSE:
        for j in range(1, 4):
            total += float64(at(x, start + j)) - first
        value = first + total / 4
    else:
        for j in range(1, SAMPLES):
            place = j * runs // SAMPLES * stride + j * n // SAMPLES
            total += float64(at(x, start + place)) - first
        value = first + total / SAMPLES
    return on_grid(x, value if abs(value) < 1e37 else 0.0)


def _of_set(sums_of_run):
    """A function of the sums over all runs of a set, which is seldom called."""

    @called
    def sums(x, start, stride, runs, n, about):
        s = 0.0
        q = 0.0
        for r in range(runs):
            of_run = sums_of_run(x[start + r * stride : start + r * stride + n], about)
            s += of_run[0]
            q += of_run[1]
        return s, q

    return sums


set_sums, set_sums_exact = _of_set(run_sums), _of_set(run_sums_exact)


@inlined
def statistics(x, start, stride, runs, n, about, s, q, has_mean):
    """Mean and variance of a set from its sums. Where those cancel, from the set again: about the
    mean that they gave, or in double the mean, then the variance about it."""
    count = float64(runs * n)
    if not has_mean:
        s = 0.0
    if not cancels(s, q, count):
        return moments(s, q, float64(about), count)
    mean = 0.0
    if has_mean:
        found = float64(about) + s / count
        near = on_grid(x, found if abs(found) < 1e37 else 0.0)
        if near != about:
            s, q = set_sums(x, start, stride, runs, n, near)
            if not cancels(s, q, count):
                return moments(s, q, float64(near), count)
        mean = float64(about) + set_sums_exact(x, start, stride, runs, n, float64(about))[0] / count
    s, q = set_sums_exact(x, start, stride, runs, n, mean)
    if not has_mean:
        return 0.0, q / count
    return moments(s, q, mean, count)


# ---- columns -------------------------------------------------------------------------------------


def _down_columns(term, term_of_part):
    """A function of sums down columns: four lines at a time, whose sums stay in registers, then the
    others, and the last columns."""

    @inlined
    def down(x, dy, gate, rows, stride, about, s, q):
        w = lanes(x)
        stop = about.size - about.size % w
        quads = stop - stop % (4 * w)
        for j in range(0, quads, 4 * w):
            c0, c1, c2, c3 = (
                load(about, j), load(about, j + w), load(about, j + 2 * w), load(about, j + 3 * w)
            )
            g0, g1 = gate_line(gate, j), gate_line(gate, j + w)
            g2, g3 = gate_line(gate, j + 2 * w), gate_line(gate, j + 3 * w)
            s0, s1, s2, s3 = load(s, j), load(s, j + w), load(s, j + 2 * w), load(s, j + 3 * w)
            q0, q1, q2, q3 = load(q, j), load(q, j + w), load(q, j + 2 * w), load(q, j + 3 * w)
            for r in range(rows):
                first = r * stride + j
                a, d = term(x, dy, dy, g0, first, c0)
                s0, q0 = s0 + a, q0 + a * d
                a, d = term(x, dy, dy, g1, first + w, c1)
                s1, q1 = s1 + a, q1 + a * d
                a, d = term(x, dy, dy, g2, first + 2 * w, c2)
                s2, q2 = s2 + a, q2 + a * d
                a, d = term(x, dy, dy, g3, first + 3 * w, c3)
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
            c0, s0, q0, g0 = load(about, j), load(s, j), load(q, j), gate_line(gate, j)
            for r in range(rows):
                a, d = term(x, dy, dy, g0, r * stride + j, c0)
                s0, q0 = s0 + a, q0 + a * d
            store(s, j, s0)
            store(q, j, q0)
        if stop < about.size:
            last = stop, about.size - stop
            c0, s0, q0 = load_part(about, last), load_part(s, last), load_part(q, last)
            g0 = gate_part(gate, last)
            for r in range(rows):
                a, d = term_of_part(x, dy, dy, g0, (r * stride + stop, last[1]), c0)
                s0, q0 = s0 + a, q0 + a * d
            store_part(s, last, s0)
            store_part(q, last, q0)

    return down


def _add_rows(down):
    """A function that adds to s and q the sums of run_sums or run_products down the columns of
    rows; `step` rows of some columns before the next."""

    @inlined
    def add(x, dy, gate, rows, stride, about, s, q, step):
        if about.size <= 4 * lanes(x):
            step = rows
        for row in range(0, rows, step):
            at_row = row * stride
            down(x[at_row:], dy[at_row:], gate, min(step, rows - row), stride, about, s, q)

    return add


add_rows, add_row_products = map(
    _add_rows, map(_down_columns, TERMS[:2], TERMS_OF_PARTS[:2])
)


def _place_terms(read):
    @inlined
    def place_terms(x, dy, at, weight, about, rstd, offset):
        """(dy*xhat, dy, dy*weight, dy*weight*(x - about)) of a line of places, or of a part."""
        d, u = read(x, at) - about, read(dy, at)
        return u * (d * rstd + offset), u, u * weight, u * weight * d

    return place_terms


place_terms, place_terms_of_part = _place_terms(load), _place_terms(load_part)


@inlined
def add_four_place_products(x, dy, stride, weight, about, rstd, offset, s, q, over_w, over_b):
    """add_place_products of four rows: what belongs to places is loaded and stored once."""
    width = lanes(x)
    stop = about.size - about.size % width
    w0, w1, w2, w3 = splat(weight[0]), splat(weight[1]), splat(weight[2]), splat(weight[3])
    g0 = g1 = g2 = g3 = h0 = h1 = h2 = h3 = splat(rounded(x, 0))
    for j in range(0, stop, width):
        c, k, o = load(about, j), load(rstd, j), load(offset, j)
        sums, products = load(s, j), load(q, j)
        g, h, a, b = place_terms(x, dy, j, w0, c, k, o)
        g0, h0, sums, products = g0 + g, h0 + h, sums + a, products + b
        g, h, a, b = place_terms(x, dy, stride + j, w1, c, k, o)
        g1, h1, sums, products = g1 + g, h1 + h, sums + a, products + b
        g, h, a, b = place_terms(x, dy, 2 * stride + j, w2, c, k, o)
        g2, h2, sums, products = g2 + g, h2 + h, sums + a, products + b
        g, h, a, b = place_terms(x, dy, 3 * stride + j, w3, c, k, o)
        g3, h3, sums, products = g3 + g, h3 + h, sums + a, products + b
        store(s, j, sums)
        store(q, j, products)
    if stop < about.size:
        n = about.size - stop
        c, k, o = load(about, stop), load(rstd, stop), load(offset, stop)
        sums, products = load(s, stop), load(q, stop)
        g, h, a, b = place_terms_of_part(x, dy, (stop, n), w0, c, k, o)
        g0, h0, sums, products = g0 + g, h0 + h, sums + a, products + b
        g, h, a, b = place_terms_of_part(x, dy, (stride + stop, n), w1, c, k, o)
        g1, h1, sums, products = g1 + g, h1 + h, sums + a, products + b
        g, h, a, b = place_terms_of_part(x, dy, (2 * stride + stop, n), w2, c, k, o)
        g2, h2, sums, products = g2 + g, h2 + h, sums + a, products + b
        g, h, a, b = place_terms_of_part(x, dy, (3 * stride + stop, n), w3, c, k, o)
        g3, h3, sums, products = g3 + g, h3 + h, sums + a, products + b
        store(s, stop, sums)
        store(q, stop, products)
    over_w[0] += fold(g0)
    over_w[1] += fold(g1)
    over_w[2] += fold(g2)
    over_w[3] += fold(g3)
    over_b[0] += fold(h0)
    over_b[1] += fold(h1)
    over_b[2] += fold(h2)
    over_b[3] += fold(h3)


@inlined
def add_place_products(x, dy, weight, about, rstd, offset, s, q, over_w, over_b):
    """Onto over_w[0] and over_b[0] the sums over a row of dy*xhat and of dy; onto s and q the terms
    of run_products of each place, with the row's weight. Arrays of places have room for whole
    lines: a load waits for a store of a part."""
    width = lanes(x)
    stop = about.size - about.size % width
    w = splat(weight[0])
    g0 = h0 = splat(rounded(x, 0))
    for j in range(0, stop, width):
        g, h, a, b = place_terms(x, dy, j, w, load(about, j), load(rstd, j), load(offset, j))
        g0, h0 = g0 + g, h0 + h
        store(s, j, load(s, j) + a)
        store(q, j, load(q, j) + b)
    if stop < about.size:
        g, h, a, b = place_terms_of_part(
            x, dy, (stop, about.size - stop), w, load(about, stop), load(rstd, stop),
            load(offset, stop),
        )
        g0, h0 = g0 + g, h0 + h
        store(s, stop, load(s, stop) + a)
        store(q, stop, load(q, stop) + b)
    over_w[0] += fold(g0)
    over_b[0] += fold(h0)


@inlined
def flush(lanes, total):
    for j in range(lanes.size):
        total[j] += float64(lanes[j])
        lanes[j] = 0
