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


# Plain loops where y is not streamed, of which LLVM makes vectors: spelled out they took as long,
# and 1.1 times as long down columns. They start at 0: from anywhere else Numba's indices could be
# negative, and the loops would not become vectors.


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


@inlined
def fill_row(x, y, hi, scale, shift):
    for j in range(x.size):
        put(y, j, affine(at(x, j), hi[j], scale[j], shift[j]))


@inlined
def map_row(x, y, hi, scale, shift, streaming):
    """map_run with coefficients for each place."""
    if not streaming:
        fill_row(x, y, hi, scale, shift)
        return
    first, stop = streamed(y)
    fill_row(x[:first], y[:first], hi[:first], scale[:first], shift[:first])
    for j in range(first, stop, lanes(y)):
        stream(y, j, affine(load(x, j), load(hi, j), load(scale, j), load(shift, j)))
    fill_row(x[stop:], y[stop:], hi[stop:], scale[stop:], shift[stop:])


@inlined
def fill_row_products(x, dy, dx, hi, scale, shift, dscale):
    for j in range(x.size):
        put(dx, j, affine_products(at(x, j), at(dy, j), hi[j], scale[j], shift[j], dscale[j]))


@inlined
def map_row_products(x, dy, dx, hi, scale, shift, dscale, streaming):
    """map_products with coefficients for each place."""
    if not streaming:
        fill_row_products(x, dy, dx, hi, scale, shift, dscale)
        return
    first, stop = streamed(dx)
    fill_row_products(
        x[:first], dy[:first], dx[:first], hi[:first], scale[:first], shift[:first], dscale[:first]
    )
    for j in range(first, stop, lanes(dx)):
        stream(dx, j, affine_products(
            load(x, j), load(dy, j), load(hi, j), load(scale, j), load(shift, j), load(dscale, j)
        ))
    fill_row_products(
        x[stop:], dy[stop:], dx[stop:], hi[stop:], scale[stop:], shift[stop:], dscale[stop:]
    )


@inlined
def fill_products_weighted(
    x, dy, dx, weight, hi, scale, shift, rstd, offset, dweight, dbias
):
    for j in range(x.size):
        d = at(x, j) - hi
        dweight[j] += at(dy, j) * (d * rstd + offset)
        dbias[j] += at(dy, j)
        put(dx, j, d * scale + shift + at(dy, j) * weight[j] * rstd)


@inlined
def map_products_weighted(
    x, dy, dx, weight, hi, scale, shift, rstd, offset, dweight, dbias, streaming
):
    """dx of a run with a weight for each place, and its terms onto dweight and dbias."""
    if not streaming or streamed(dx) != (0, dx.size):
        fill_products_weighted(
            x, dy, dx, weight, hi, scale, shift, rstd, offset, dweight, dbias
        )
        return
    h, a, b, c, e = splat(hi), splat(scale), splat(shift), splat(rstd), splat(offset)
    for j in range(0, dx.size, lanes(dx)):
        d = load(x, j) - h
        u = load(dy, j)
        store(dweight, j, load(dweight, j) + u * (d * c + e))
        store(dbias, j, load(dbias, j) + u)
        stream(dx, j, d * a + b + u * load(weight, j) * c)


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


@inlined
def add_rows(x, rows, stride, about, s, q):
    """Onto s and q the sums of run_sums down the columns of `rows` rows, four at a time."""
    width = about.size
    r = 0
    while r + 4 <= rows:
        x0 = x[r * stride : r * stride + width]
        x1 = x[(r + 1) * stride : (r + 1) * stride + width]
        x2 = x[(r + 2) * stride : (r + 2) * stride + width]
        x3 = x[(r + 3) * stride : (r + 3) * stride + width]
        for j in range(width):
            a = at(x0, j) - about[j]
            b = at(x1, j) - about[j]
            c = at(x2, j) - about[j]
            d = at(x3, j) - about[j]
            s[j] += (a + b) + (c + d)
            q[j] += (a * a + b * b) + (c * c + d * d)
        r += 4
    while r < rows:
        x0 = x[r * stride : r * stride + width]
        for j in range(width):
            a = at(x0, j) - about[j]
            s[j] += a
            q[j] += a * a
        r += 1


@inlined
def add_row_products(x, dy, rows, stride, about, s, q):
    """Onto s and q the sums of run_products down the columns of `rows` rows."""
    width = about.size
    r = 0
    while r + 2 <= rows:
        x0 = x[r * stride : r * stride + width]
        x1 = x[(r + 1) * stride : (r + 1) * stride + width]
        u0 = dy[r * stride : r * stride + width]
        u1 = dy[(r + 1) * stride : (r + 1) * stride + width]
        for j in range(width):
            s[j] += at(u0, j) + at(u1, j)
            q[j] += at(u0, j) * (at(x0, j) - about[j]) + at(u1, j) * (at(x1, j) - about[j])
        r += 2
    while r < rows:
        x0 = x[r * stride : r * stride + width]
        u0 = dy[r * stride : r * stride + width]
        for j in range(width):
            s[j] += at(u0, j)
            q[j] += at(u0, j) * (at(x0, j) - about[j])
        r += 1


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
