"""Residual and activation in Numba: one more pass over y after a forward, and over dy before a
backward, which finds z, the activation's input, again from x. Where elements have 16 bits the pass
after a forward starts from x too, so that y is rounded once.

Each activation has a loop of its own, of which LLVM makes vectors: exp and erfc are polynomials in
the working type. (As calls for each value they took 40 to 100 times as long as memory does.)
"""

from math import erfc

import numpy as np
from numba import float64, prange
from numba.extending import overload

from fastnorm.backends import GELU, GELU_TANH, LEAKY_RELU, RELU, SILU
from fastnorm.backends.numba_jit import OPTIONS, inlined, kernel
from fastnorm.backends.numba_maps import fill_run, fill_run_weighted, map_rows
from fastnorm.backends.numba_simd import at, choose, power_of_two, put, rounded
from fastnorm.backends.numba_words import forward_terms

PIECE = 4096
PARTS = 64  # of the work, each with room for z: a piece, or a row of channels

# exp(r), |r| <= ln(2)/2, the highest power first: of least relative error, 3e-9; and Taylor's.
EXP32 = (0.0013814541, 0.0083687454, 0.041668389, 0.16666521, 0.49999994, 1.0, 1.0)
EXP64 = (1 / 6227020800, 1 / 479001600, 1 / 39916800, 1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040,
         1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
# log(erfc(x)/t) + x*x, t = 2/(2 + x), by powers of 2t - 1: a Chebyshev series.
ERFC = (0.00033373589390861394, -0.00020790912059481927, -0.0020487347604965729,
        0.0017765646350106872, 0.0087038120352188045, -0.0098737687473313921,
        -0.046874888178861336, 0.047343106290901012, 0.67264221715548793, -0.67179407605433415)


def _polynomial(powers):
    """Of these constants, by Horner's scheme: functions in functions, since LLVM would not make a
    vector of a loop around a loop."""
    lowest = powers[-1]
    if len(powers) == 1:
        return inlined(lambda x: lowest)
    higher = _polynomial(powers[:-1])
    return inlined(lambda x: higher(x) * x + lowest)


def _finisher(number, powers, far, mantissa, bias, ln2_high, ln2_low):
    """finish_piece in the working type `number`."""
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
        away = exponential(-v)
        s = one / (one + away)
        return s, away * s

    @inlined
    def normal_cdf(v):
        if number is np.float64:
            return 0.5 * erfc(-0.7071067811865476 * v)
        x = abs(v) * root_half
        t = two / (two + x)
        tail = half * t * exponential(within(erfc_series(two * t - one) - x * x))
        return choose(v > zero, one - tail, tail)

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

    def loop(gate):
        @inlined
        def gated(z, dy, backward):
            if backward:
                for j in range(z.size):
                    v = within(at(z, j))
                    found, change = gate(v)
                    put(z, j, at(dy, j) * (found + v * change))
            else:
                for j in range(z.size):
                    v = at(z, j)
                    put(z, j, at_least(v) * gate(within(v))[0])

        return gated

    silu, gelu, gelu_tanh = loop(silu_gate), loop(gelu_gate), loop(gelu_tanh_gate)

    @inlined
    def leaky_relu(z, dy, slope, backward):
        if backward:
            for j in range(z.size):
                put(z, j, choose(at(z, j) <= zero, at(dy, j) * slope, at(dy, j)))
        else:
            for j in range(z.size):
                put(z, j, choose(at(z, j) <= zero, at(z, j) * slope, at(z, j)))

    @inlined
    def relu(z, dy, backward):
        if backward:
            for j in range(z.size):
                put(z, j, choose(at(z, j) <= zero, zero, at(dy, j)))
        else:
            for j in range(z.size):
                put(z, j, choose(at(z, j) <= zero, zero, at(z, j)))

    @inlined
    def piece(z, residual, dy, kind, slope, has_residual, backward):
        if has_residual:
            for j in range(z.size):
                put(z, j, at(z, j) + at(residual, j))
        if kind == RELU:
            relu(z, dy, backward)
        elif kind == LEAKY_RELU:
            leaky_relu(z, dy, number(slope), backward)
        elif kind == SILU:
            silu(z, dy, backward)
        elif kind == GELU:
            gelu(z, dy, backward)
        elif kind == GELU_TANH:
            gelu_tanh(z, dy, backward)

    return piece


_FINISHERS = {
    32: _finisher(np.float32, EXP32, 88, 23, 127, 0.693359375, -2.12194440e-4),
    64: _finisher(np.float64, EXP64, 709, 52, 1023, 6.93147180369123816490e-01,
                  1.90821492927058770002e-10),
}


def finish_piece(z, residual, dy, kind, slope, has_residual, backward):
    """z = activation(z + residual), or backward dy*activation'(z + residual). In place: had it
    another output, its loops would check at run time that this is not z."""


@overload(finish_piece, jit_options=OPTIONS | {"forceinline": True})
def _finish_piece(z, residual, dy, kind, slope, has_residual, backward):
    piece = _FINISHERS[z.dtype.bitwidth]
    return lambda z, residual, dy, kind, slope, has_residual, backward: piece(
        z, residual, dy, kind, slope, has_residual, backward)


@inlined
def copy_run(z, y):
    for j in range(z.size):
        put(y, j, at(z, j))


@inlined
def start_columns(x, weight, bias, mean, rstd, b, g, k, hi, scale, shift):
    """The coefficients of a forward."""
    for channel in range(g * k):
        set_ = b * g + channel // k
        near = rounded(x, mean[set_])
        put(hi, channel, near)
        found = forward_terms(
            mean[set_], float64(near), rstd[set_], float64(weight[channel]), float64(bias[channel])
        )
        put(scale, channel, found[0])
        put(shift, channel, found[1])


@inlined
def find_row(x, z, weight, bias, mean, rstd):
    """z of a set with a weight for each place."""
    hi = rounded(x, mean)
    fill_run_weighted(x, z, weight, bias, hi, rounded(x, rstd),
                      rounded(x, (float64(hi) - mean) * rstd))


# ---- kernels -------------------------------------------------------------------------------------


def room_for_z(geometry, dtype):
    """For each part: z, and where i is 1 hi, scale and shift of each channel."""
    room = 4 * geometry.g * geometry.k if geometry.i == 1 else min(PIECE, geometry.i)
    return np.empty(PARTS * room, dtype)


@kernel("ax nfn")
def finish(y, residual, kind, slope, has_residual):
    """y = activation(y + residual)."""
    for unit in prange(-(-y.size // PIECE)):
        own = y[unit * PIECE : (unit + 1) * PIECE]
        beside = residual[unit * PIECE : (unit + 1) * PIECE]
        finish_piece(own, beside, own, kind, slope, has_residual != 0, False)


@kernel("xxxaaxa dd tnfnn")
def finish_again(dy, x, residual, weight, bias, into, z, mean, rstd, sizes, kind, slope,
                 has_residual, backward):
    """into = activation(z), or backward dy*activation'(z), with z found from x."""
    b, o, g, k, i = sizes
    channels = g * k
    room = z.size // PARTS
    pieces = 1 if i == 1 else -(-i // room)
    rows = b * o if o > 1 else b * g
    units = rows if i == 1 else b * o * channels * pieces
    for part in prange(PARTS):
        own = z[part * room : (part + 1) * room]
        last = -1
        for unit in range(part * units // PARTS, (part + 1) * units // PARTS):
            if i == 1 and o > 1:
                start, stop = unit * channels, (unit + 1) * channels
                hi, scale = own[channels : 2 * channels], own[2 * channels : 3 * channels]
                shift = own[3 * channels :]
                if unit // o != last:
                    last = unit // o
                    start_columns(x, weight, bias, mean, rstd, last, g, k, hi, scale, shift)
                map_rows(x[start:stop], own[:channels], 1, 0, hi, scale, shift, 1, False)
            elif i == 1:
                start, stop = unit * k, (unit + 1) * k
                w = unit % g * k
                find_row(x[start:stop], own[:k], weight[w : w + k], bias[w : w + k], mean[unit],
                         rstd[unit])
            else:
                run = unit // pieces
                start = run * i + unit % pieces * i // pieces
                stop = run * i + (unit % pieces + 1) * i // pieces
                channel = run % channels
                set_ = run // (o * channels) * g + channel // k
                near = rounded(x, mean[set_])
                a, c = forward_terms(
                    mean[set_], float64(near), rstd[set_], float64(weight[channel]),
                    float64(bias[channel]),
                )
                fill_run(x[start:stop], own[: stop - start], near, rounded(x, a), rounded(x, c))
            found = own[: stop - start]
            finish_piece(found, residual[start:stop], dy[start:stop], kind, slope,
                         has_residual != 0, backward != 0)
            copy_run(found, into[start:stop])
