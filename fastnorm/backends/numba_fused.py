"""Residual and activation in Numba: maps of their own instead of a forward's, and before a backward
a pass that takes the gradient back through the activation. Both find z, the activation's input,
from x.

An activation is a function of a number or of a vector, and has a loop of its own; exp and erfc are
polynomials in the working type. (As calls for each value they took 40 to 100 times as long as
memory does.)
"""

from math import erfc

import numpy as np
from numba import float64, prange, types
from numba.extending import overload

from fastnorm.backends import GELU, GELU_TANH, LEAKY_RELU, RELU, SILU
from fastnorm.backends.numba_jit import OPTIONS, called, inlined, kernel
from fastnorm.backends.numba_maps import affine, streamed
from fastnorm.backends.numba_rows import pieces_of, start_runs
from fastnorm.backends.numba_simd import (
    at,
    bytes_of,
    choose,
    lanes,
    load,
    load_part,
    power_of_two,
    put,
    rounded,
    store,
    store_part,
    stream,
)
from fastnorm.backends.numba_slabs import SHORT_RUN, slab_of, spread
from fastnorm.backends.numba_words import forward_terms

WIDE = 1024  # values, at least, of the rows of channels that are mapped as one
PARTS = 64  # of the rows

# exp(r), |r| <= ln(2)/2, the highest power first: of least relative error, 3e-9; and Taylor's.
EXP32 = (0.0013814541, 0.0083687454, 0.041668389, 0.16666521, 0.49999994, 1.0, 1.0)
EXP64 = (1 / 6227020800, 1 / 479001600, 1 / 39916800, 1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040,
         1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
# log(erfc(x)/t) + x*x, t = 2/(2 + x), by powers of 2t - 1: a Chebyshev series.
ERFC = (0.00033373589390861394, -0.00020790912059481927, -0.0020487347604965729,
        0.0017765646350106872, 0.0087038120352188045, -0.0098737687473313921,
        -0.046874888178861336, 0.047343106290901012, 0.67264221715548793, -0.67179407605433415)


def _polynomial(powers):
    """Of these constants, by Horner's scheme: a loop over them would not be unrolled."""
    lowest = powers[-1]
    if len(powers) == 1:
        return inlined(lambda x: lowest)
    higher = _polynomial(powers[:-1])
    return inlined(lambda x: higher(x) * x + lowest)


# ---- runs ----------------------------------------------------------------------------------------
#
# `arrays` are (x, residual, dy, y) of a run, y also the gradient in front of the activation;
# `terms` (hi, scale, shift) of z, each of the places or a number for all, and where places have
# them (weight, bias); `how` (has_residual, backward, streaming).

_INLINED = OPTIONS | {"forceinline": True}


def _reading(read):
    """A function of term and place, and of how many: of an array, or of a number for all."""

    def term(term, j, count):
        pass

    @overload(term, jit_options=_INLINED)
    def read_term(term, j, count):
        if isinstance(term, types.Array):
            return lambda term, j, count: read(term, j, count)
        return lambda term, j, count: term

    return term


_one = _reading(inlined(lambda array, j, count: at(array, j)))
_line = _reading(inlined(lambda array, j, count: load(array, j)))
_part = _reading(inlined(lambda array, j, count: load_part(array, j, count)))


def _weighting(read):
    """A function of z and terms, of which the last two may be left out."""

    def weighted(z, terms, j, count):
        pass

    @overload(weighted, jit_options=_INLINED)
    def weigh(z, terms, j, count):
        if len(terms) == 3:
            return lambda z, terms, j, count: z
        return lambda z, terms, j, count: (
            z * read(terms[3], j, count) + read(terms[4], j, count))

    return weighted


def _over_run(forward, backward, as_vectors=True):
    """A function of a run that has these of z, or of z and dy."""

    def found(read):
        weighted = _weighting(read)

        @inlined
        def value(arrays, terms, slope, how, j, count):
            x, residual, dy, _ = arrays
            z = affine(read(x, j, count), read(terms[0], j, count), read(terms[1], j, count),
                       read(terms[2], j, count))
            z = weighted(z, terms, j, count)
            if how[0]:
                z = z + read(residual, j, count)
            return backward(z, read(dy, j, count), slope) if how[1] else forward(z, slope)

        return value

    one, line, part = found(_one), found(_line), found(_part)

    @called
    def end(arrays, terms, slope, how, first, count):
        store_part(arrays[3], first, count, part(arrays, terms, slope, how, first, count))

    @inlined
    def vectors(arrays, terms, slope, how):
        y = arrays[3]
        width = lanes(y)
        first, stop = streamed(y) if how[2] else (0, 0)
        past = first < stop
        if not past:
            first, stop = 0, y.size - y.size % width
        if first > 0:
            end(arrays, terms, slope, how, 0, first)
        for j in range(first, stop, width):
            value = line(arrays, terms, slope, how, j, width)
            if past:
                stream(y, j, value)
            else:
                store(y, j, value)
        if stop < y.size:
            end(arrays, terms, slope, how, stop, y.size - stop)

    @inlined
    def numbers(arrays, terms, slope, how):
        for j in range(arrays[3].size):
            put(arrays[3], j, one(arrays, terms, slope, how, j, 1))

    return vectors if as_vectors else numbers


def _activations(number, powers, far, mantissa, bias, ln2_high, ln2_low):
    """map_line in the working type `number`."""
    zero, half, one, two, far = (number(value) for value in (0, 0.5, 1, 2, far))
    log2e, ln2_high, ln2_low = (number(value) for value in (1.4426950408889634, ln2_high, ln2_low))
    magic = number(1.5 * 2.0**mantissa + bias)  # adding it rounds to a whole number
    scale, cube, cube3 = (number(value) for value in (1.5957691216057308, 0.044715, 3 * 0.044715))
    root_half, density = number(0.7071067811865476), number(0.3989422804014327)
    power_series = _polynomial([number(power) for power in powers])
    erfc_series = _polynomial([number(power) for power in ERFC])

    @inlined
    def at_least(v):
        return choose(v < -far, -far, v)

    @inlined
    def within(v):
        """From where on exp would leave the normal numbers; NaN is kept."""
        return choose(v > far, far, at_least(v))

    @inlined
    def exponential(v):
        """|v| <= far."""
        n = v * log2e + magic
        whole = n - magic
        r = v - whole * ln2_high - whole * ln2_low
        return power_series(r) * power_of_two(n)

    @inlined
    def sigmoid(v):
        """And 1 minus it."""
        away = exponential(zero - v)
        s = one / (one + away)
        return s, away * s

    @inlined
    def exact_normal_cdf(v):
        return 0.5 * erfc(-0.7071067811865476 * v)

    @inlined
    def series_normal_cdf(v):
        x = choose(v < zero, zero - v, v) * root_half
        t = two / (two + x)
        tail = half * t * exponential(within(erfc_series(two * t - one) - x * x))
        return choose(v > zero, one - tail, tail)

    vectors_of_cdf = number is np.float32
    normal_cdf = series_normal_cdf if vectors_of_cdf else exact_normal_cdf

    # (gate, its derivative) of an activation z*gate(z); (1 + tanh(a))/2 is sigmoid(2a).

    @inlined
    def silu_gate(z):
        s, rest = sigmoid(z)
        return s, s * rest

    @inlined
    def gelu_gate(z):
        return normal_cdf(z), density * exponential(within(-half * z * z))

    @inlined
    def gelu_tanh_gate(z):
        s, rest = sigmoid(within(scale * z * (one + cube * z * z)))
        return s, s * rest * scale * (one + cube3 * z * z)

    def gated(gate, as_vectors=True):
        @inlined
        def forward(z, slope):
            return at_least(z) * gate(within(z))[0]

        @inlined
        def backward(z, dy, slope):
            v = within(z)
            found, change = gate(v)
            return dy * (found + v * change)

        return _over_run(forward, backward, as_vectors)

    def kinked(below):
        """Of slope 1, and of another below 0."""

        @inlined
        def forward(z, slope):
            return choose(z <= zero, below(z, slope), z)

        @inlined
        def backward(z, dy, slope):
            return choose(z <= zero, below(dy, slope), dy)

        return _over_run(forward, backward)

    relu = kinked(inlined(lambda v, slope: zero))
    leaky_relu = kinked(inlined(lambda v, slope: v * slope))
    silu, gelu_tanh = gated(silu_gate), gated(gelu_tanh_gate)
    gelu = gated(gelu_gate, vectors_of_cdf)
    identity = _over_run(inlined(lambda z, slope: z), inlined(lambda z, dy, slope: dy))

    @called
    def line(arrays, terms, kind, slope, how):
        slope = number(slope)
        if kind == RELU:
            relu(arrays, terms, slope, how)
        elif kind == LEAKY_RELU:
            leaky_relu(arrays, terms, slope, how)
        elif kind == SILU:
            silu(arrays, terms, slope, how)
        elif kind == GELU:
            gelu(arrays, terms, slope, how)
        elif kind == GELU_TANH:
            gelu_tanh(arrays, terms, slope, how)
        else:
            identity(arrays, terms, slope, how)

    return line


_LINES = {
    32: _activations(np.float32, EXP32, 88, 23, 127, 0.693359375, -2.12194440e-4),
    64: _activations(np.float64, EXP64, 709, 52, 1023, 6.93147180369123816490e-01,
                  1.90821492927058770002e-10),
}


def map_line(arrays, terms, kind, slope, how):
    """y of a run."""


@overload(map_line, jit_options=_INLINED)
def _map_line(arrays, terms, kind, slope, how):
    line = _LINES[getattr(terms[0], "dtype", terms[0]).bitwidth]
    return lambda arrays, terms, kind, slope, how: line(arrays, terms, kind, slope, how)


# ---- kernels -------------------------------------------------------------------------------------

# (dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope, has_residual, backward,
# streaming); in a forward dy may be anything like x, and without one the residual
LETTERS = "xxxaax dd tnfnnn"


def kernel_of(geometry):
    if geometry.i >= SHORT_RUN:
        return map_fused_runs
    return map_fused_elements if geometry.i == geometry.o == 1 else map_fused_slabs


@kernel(LETTERS, allocates=True)
def map_fused_runs(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                   has_residual, backward, streaming):
    """into = activation(z + residual), or backward dy*activation'(z + residual)."""
    b, o, g, k, i = sizes
    channels, pieces = g * k, pieces_of(i)
    hi = np.empty(b * channels, weight.dtype)
    scale = np.empty(b * channels, weight.dtype)
    shift = np.empty(b * channels, weight.dtype)
    start_runs(weight, bias, mean, rstd, sizes, hi, scale, shift)
    how = has_residual != 0, backward != 0, streaming != 0
    units = b * o * channels * pieces
    for part in prange(PARTS):
        for unit in range(part * units // PARTS, (part + 1) * units // PARTS):
            run, piece = unit // pieces, unit % pieces
            own = slice(run * i + piece * i // pieces, run * i + (piece + 1) * i // pieces)
            channel = run // (o * channels) * channels + run % channels
            map_line((x[own], residual[own], dy[own], into[own]),
                     (hi[channel], scale[channel], shift[channel]), kind, slope, how)


@inlined
def repeat(values, i, into):
    """Each of the values i times, and all of that again as often as it fits."""
    if i > 1:
        spread(values, i, into)
        return
    for start in range(0, into.size, values.size):
        copy = into[start : start + values.size]
        for c in range(values.size):
            copy[c] = values[c]


@kernel(LETTERS, allocates=True)
def map_fused_slabs(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                    has_residual, backward, streaming):
    """Of short runs: those of neighbouring channels in a sample as one, and of few channels where
    i is 1 those of several samples."""
    b, o, g, k, i = sizes
    channels = g * k
    hi = np.empty(b * channels, weight.dtype)
    scale = np.empty(b * channels, weight.dtype)
    shift = np.empty(b * channels, weight.dtype)
    start_runs(weight, bias, mean, rstd, sizes, hi, scale, shift)
    how = has_residual != 0, backward != 0, streaming != 0
    most = channels if i == 1 else min(channels, slab_of(i, bytes_of(x)))
    slabs = (channels + most - 1) // most
    copies = min(o, (WIDE + channels - 1) // channels) if i == 1 else 1
    rows = (o + copies - 1) // copies
    parts = min(rows, (PARTS + b * slabs - 1) // (b * slabs))
    for unit in prange(b * slabs * parts):
        sample_, slab, part = unit // (slabs * parts), unit // parts % slabs, unit % parts
        first = sample_ * channels + slab * most
        own = slice(first, min((sample_ + 1) * channels, first + most))
        terms = hi[own], scale[own], shift[own]
        width = (own.stop - own.start) * i * copies
        if width > own.stop - own.start:
            room = np.empty(3 * width, weight.dtype)
            terms = room[:width], room[width : 2 * width], room[2 * width :]
            repeat(hi[own], i, terms[0])
            repeat(scale[own], i, terms[1])
            repeat(shift[own], i, terms[2])
        end = (sample_ + 1) * o * channels * i
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            at = (sample_ * o + row * copies) * channels * i + slab * most * i
            n = min(width, end - at)
            run = slice(at, at + n)
            map_line((x[run], residual[run], dy[run], into[run]),
                     (terms[0][:n], terms[1][:n], terms[2][:n]), kind, slope, how)


@kernel(LETTERS)
def map_fused_elements(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope,
                       has_residual, backward, streaming):
    """Of rows with a weight for each place."""
    b, _, g, k, _ = sizes
    how = has_residual != 0, backward != 0, streaming != 0
    for set_ in prange(b * g):
        own, w = slice(set_ * k, (set_ + 1) * k), slice(set_ % g * k, (set_ % g + 1) * k)
        hi = rounded(x, mean[set_])
        scale, shift = forward_terms(mean[set_], float64(hi), rstd[set_], 1.0, 0.0)
        map_line((x[own], residual[own], dy[own], into[own]),
                 (hi, rounded(x, scale), rounded(x, shift), weight[w], bias[w]), kind, slope, how)
