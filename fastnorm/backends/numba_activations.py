"""Residual and activation of a run in Numba: y of x, or in a backward the gradient taken back
through the activation. Both find z, the activation's input, from x.

An activation is a function of a vector, and has a loop of its own; exp and erfc are polynomials in
the working type. (As calls for each value they took 40 to 100 times as long as memory does.)
"""

from math import erfc

import numpy as np
from numba.extending import overload

from fastnorm.backends import GELU, GELU_TANH, LEAKY_RELU, RELU, SILU
from fastnorm.backends.numba_jit import INLINING, called, inlined
from fastnorm.backends.numba_maps import affine, map_rows, map_run, whole_lines
from fastnorm.backends.numba_simd import (
    TOGETHER,
    choose,
    lanes,
    lanewise,
    load,
    load_part,
    load_together,
    multiply_add,
    polynomial,
    power_of_two,
    store,
    store_part,
    stream,
)

# exp(r), |r| <= ln(2)/2, the highest power first: of least relative error, 3e-9; and Taylor's.
EXP32 = (0.0013814541, 0.0083687454, 0.041668389, 0.16666521, 0.49999994, 1.0, 1.0)
EXP64 = (1 / 6227020800, 1 / 479001600, 1 / 39916800, 1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040,
         1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
# log(erfc(x)/t) + x*x, t = 2/(2 + x), by powers of 2t - 1: a Chebyshev series.
ERFC = (0.00033373589390861394, -0.00020790912059481927, -0.0020487347604965729,
        0.0017765646350106872, 0.0087038120352188045, -0.0098737687473313921,
        -0.046874888178861336, 0.047343106290901012, 0.67264221715548793, -0.67179407605433415)


# ---- runs ----------------------------------------------------------------------------------------
#
# `arrays` are (x, residual, dy, y) of a run, y also the gradient in front of the activation;
# `terms` (hi, scale, shift) of z, each of the places or a number for all, and where places have
# them (weight, bias); `how` (has_residual, backward, streaming).

def _input(read):
    """z of a vector."""

    def weighted(z, terms, place):
        pass

    @overload(weighted, jit_options=INLINING)
    def weigh(z, terms, place):
        if len(terms) == 3:
            return lambda z, terms, place: z
        return lambda z, terms, place: z * read(terms[3], place) + read(terms[4], place)

    @inlined
    def find(arrays, terms, has_residual, place):
        z = affine(read(arrays[0], place), read(terms[0], place), read(terms[1], place),
                   read(terms[2], place))
        z = weighted(z, terms, place)
        return z + read(arrays[1], place) if has_residual else z

    return find


input_of_line, input_of_part = _input(load), _input(load_part)
input_of_lines = _input(load_together)


def _steps(activated, find, read, lines):
    """A function of whole vectors of so many lines."""

    @inlined
    def steps(arrays, terms, slope, how, first, stop):
        has_residual, backward, past = how
        for j in range(first, stop, lines * lanes(arrays[3])):
            z = find(arrays, terms, has_residual, j)
            found = activated(z, read(arrays[2], j), slope, backward)
            if past:
                stream(arrays[3], j, found)
            else:
                store(arrays[3], j, found)

    return steps


def _over_lines(activated):
    """A function of whole lines of a run."""
    together = _steps(activated, input_of_lines, load_together, TOGETHER)
    one_by_one = _steps(activated, input_of_line, load, 1)

    @inlined
    def over(arrays, terms, slope, how, first, stop):
        many = stop - (stop - first) % (TOGETHER * lanes(arrays[3]))
        together(arrays, terms, slope, how, first, many)
        one_by_one(arrays, terms, slope, how, many, stop)

    return over


def _activations(number, powers, far, mantissa, bias, ln2_high, ln2_low):
    """map_fused_run in the working type `number`."""
    zero, half, one, two, far = (number(value) for value in (0, 0.5, 1, 2, far))
    log2e, ln2_high, ln2_low = (number(value) for value in (1.4426950408889634, ln2_high, ln2_low))
    magic = number(1.5 * 2.0**mantissa + bias)  # adding it rounds to a whole number
    scale, cube, cube3 = (number(value) for value in (1.5957691216057308, 0.044715, 3 * 0.044715))
    root_half, density = number(0.7071067811865476), number(0.3989422804014327)
    power_series = polynomial(powers)
    erfc_series = polynomial(ERFC)

    @inlined
    def at_least(v):
        return choose(v < -far, -far, v)

    @inlined
    def within(v):
        """From where on exp would leave the normal numbers; NaN is kept."""
        v = at_least(v)
        return choose(v > far, far, v)

    @inlined
    def exponential(v, sign):
        """exp(sign*v), |v| <= far."""
        n = multiply_add(v, sign * log2e, magic)
        whole = n - magic
        r = multiply_add(whole, -ln2_low, multiply_add(whole, -ln2_high, v * sign))
        return power_series(r) * power_of_two(n)

    @inlined
    def sigmoid(v):
        """And 1 minus it."""
        away = exponential(v, -one)
        s = one / (one + away)
        return s, away * s

    @inlined
    def series_normal_cdf(v):
        x = choose(v < zero, zero - v, v) * root_half
        t = two / (two + x)
        tail = half * t * exponential(within(erfc_series(two * t - one) - x * x), one)
        return choose(v > zero, one - tail, tail)

    exact_normal_cdf = lanewise(lambda v: 0.5 * erfc(-0.7071067811865476 * v))
    normal_cdf = series_normal_cdf if number is np.float32 else exact_normal_cdf

    # (gate, its derivative) of an activation z*gate(z); (1 + tanh(a))/2 is sigmoid(2a).

    @inlined
    def silu_gate(z):
        s, rest = sigmoid(z)
        return s, s * rest

    @inlined
    def gelu_gate(z):
        return normal_cdf(z), density * exponential(within(-half * z * z), one)

    @inlined
    def gelu_tanh_gate(z):
        s, rest = sigmoid(within(scale * z * (one + cube * z * z)))
        return s, s * rest * scale * (one + cube3 * z * z)

    def gated(gate):
        @inlined
        def activated(z, dy, slope, backward):
            v = within(z)
            found, change = gate(v)
            return dy * (found + v * change) if backward else at_least(z) * found

        return activated

    def kinked(below):
        """Of slope 1, and of another below 0."""

        @inlined
        def activated(z, dy, slope, backward):
            value = dy if backward else z
            return choose(z <= zero, below(value, slope), value)

        return activated

    identity = inlined(lambda z, dy, slope, backward: dy if backward else z)
    relu = kinked(inlined(lambda v, slope: zero))
    leaky_relu = kinked(inlined(lambda v, slope: v * slope))
    silu, gelu, gelu_tanh = gated(silu_gate), gated(gelu_gate), gated(gelu_tanh_gate)
    lines_of_identity, lines_of_relu = _over_lines(identity), _over_lines(relu)
    lines_of_leaky_relu, lines_of_silu = _over_lines(leaky_relu), _over_lines(silu)
    lines_of_gelu, lines_of_gelu_tanh = _over_lines(gelu), _over_lines(gelu_tanh)

    @called
    def activated(z, dy, kind, slope, backward):
        if kind == RELU:
            return relu(z, dy, slope, backward)
        if kind == LEAKY_RELU:
            return leaky_relu(z, dy, slope, backward)
        if kind == SILU:
            return silu(z, dy, slope, backward)
        if kind == GELU:
            return gelu(z, dy, slope, backward)
        if kind == GELU_TANH:
            return gelu_tanh(z, dy, slope, backward)
        return identity(z, dy, slope, backward)

    @called
    def ends(arrays, terms, kind, slope, how, first, stop):
        width = lanes(arrays[3])
        for j in range(first, stop, width):
            place = j, min(width, stop - j)
            z = input_of_part(arrays, terms, how[0], place)
            dy = load_part(arrays[2], place)
            store_part(arrays[3], place, activated(z, dy, kind, slope, how[1]))

    @called
    def run(arrays, terms, kind, slope, how):
        y, slope = arrays[3], number(slope)
        past, first, stop = whole_lines(y, how[2])
        how = how[0], how[1], past
        if first > 0:
            ends(arrays, terms, kind, slope, how, 0, first)
        if kind == RELU:
            lines_of_relu(arrays, terms, slope, how, first, stop)
        elif kind == LEAKY_RELU:
            lines_of_leaky_relu(arrays, terms, slope, how, first, stop)
        elif kind == SILU:
            lines_of_silu(arrays, terms, slope, how, first, stop)
        elif kind == GELU:
            lines_of_gelu(arrays, terms, slope, how, first, stop)
        elif kind == GELU_TANH:
            lines_of_gelu_tanh(arrays, terms, slope, how, first, stop)
        else:
            lines_of_identity(arrays, terms, slope, how, first, stop)
        if stop < y.size:
            ends(arrays, terms, kind, slope, how, stop, y.size)

    return run


_RUNS = {
    32: _activations(np.float32, EXP32, 88, 23, 127, 0.693359375, -2.12194440e-4),
    64: _activations(np.float64, EXP64, 709, 52, 1023, 6.93147180369123816490e-01,
                  1.90821492927058770002e-10),
}


def map_fused_run(arrays, terms, kind, slope, how):
    """y of a run."""


@overload(map_fused_run, jit_options=INLINING)
def _map_fused_run(arrays, terms, kind, slope, how):
    run = _RUNS[getattr(terms[0], "dtype", terms[0]).bitwidth]
    return lambda arrays, terms, kind, slope, how: run(arrays, terms, kind, slope, how)


# ---- in a kernel ---------------------------------------------------------------------------------
#
# `beside` is (residual, kind, slope, has_residual), or () where nothing is: which it is, is known
# when the kernel is compiled.


def map_run_beside(x, y, at, n, terms, beside, streaming):
    """map_run, or map_fused_run, of n values from `at` on."""


@overload(map_run_beside, jit_options=INLINING)
def _map_run_beside(x, y, at, n, terms, beside, streaming):
    def alone(x, y, at, n, terms, beside, streaming):
        map_run(y[at : at + n], (x[at : at + n],), terms, streaming)

    def fused(x, y, at, n, terms, beside, streaming):
        residual, kind, slope, has_residual = beside
        own = slice(at, at + n)
        map_fused_run((x[own], residual[own], x[own], y[own]), terms, kind, slope,
                      (has_residual != 0, False, streaming != 0))

    return fused if len(beside) else alone


def map_rows_beside(x, y, at, rows, stride, terms, beside, step, streaming):
    """map_rows, or map_fused_run of each, from `at` on."""


@overload(map_rows_beside, jit_options=INLINING)
def _map_rows_beside(x, y, at, rows, stride, terms, beside, step, streaming):
    def alone(x, y, at, rows, stride, terms, beside, step, streaming):
        map_rows(x[at:], y[at:], rows, stride, terms[0], terms[1], terms[2], step, streaming)

    def fused(x, y, at, rows, stride, terms, beside, step, streaming):
        for r in range(rows):
            map_run_beside(x, y, at + r * stride, terms[0].size, terms, beside, streaming)

    return fused if len(beside) else alone


def take_back(dy, x, before, at, rows, stride, terms, beside):
    """before = the gradient in front of the activation, where there is one, of rows of as many
    values as the terms have; of one row, as `stride` says."""


@overload(take_back, jit_options=INLINING)
def _take_back(dy, x, before, at, rows, stride, terms, beside):
    if len(beside) == 0:
        return lambda dy, x, before, at, rows, stride, terms, beside: None
    each = hasattr(terms[0], "dtype")

    def found(dy, x, before, at, rows, stride, terms, beside):
        residual, kind, slope, has_residual = beside
        n = terms[0].size if each else stride
        for r in range(rows):
            own = slice(at + r * stride, at + r * stride + n)
            map_fused_run((x[own], residual[own], dy[own], before[own]), terms, kind, slope,
                          (has_residual != 0, True, False))

    return found
