"""The gate of a backward through ReLU alone, which finds the gradient in front of it in registers,
once for the sums and once for the map: that costs less than to write it.

A gate is (scale, shift) of ReLU's input (x - hi)*scale + shift, each of the places or a number for
all. Other backwards have (), and `bias` of a kernel is (bias,) or () in the same way: which it is,
is known when the kernel is compiled.
"""

import numpy as np
from numba import float64
from numba.extending import overload

from fastnorm.backends.numba_jit import INLINING
from fastnorm.backends.numba_simd import Vector, choose, load, load_part

# Named here, and compiled as the overloads below say.


def gate_if(bias, beside, scale, shift):
    """The gate of these, where there is one: a bias, and nothing beside the kernel."""


def bias_at(bias, c):
    """Of a channel, or 0."""


def gate_line(gate, j):
    """The gate of a vector at place j."""


def gate_part(gate, place):
    """Of a part of a vector, as load_part."""


def through(u, d, gate):
    """u behind ReLU, in front of it, with d = x - hi: vectors or numbers."""


@overload(gate_if, jit_options=INLINING)
def _gate_if(bias, beside, scale, shift):
    if len(bias) == 0 or len(beside) > 0:
        return lambda bias, beside, scale, shift: ()
    return lambda bias, beside, scale, shift: (scale, shift)


@overload(bias_at, jit_options=INLINING)
def _bias_at(bias, c):
    if len(bias) == 0:
        return lambda bias, c: 0.0
    return lambda bias, c: float64(bias[0][c])


@overload(gate_line, jit_options=INLINING)
def _gate_line(gate, j):
    if len(gate) == 0:
        return lambda gate, j: ()
    return lambda gate, j: (load(gate[0], j), load(gate[1], j))


@overload(gate_part, jit_options=INLINING)
def _gate_part(gate, place):
    if len(gate) == 0:
        return lambda gate, place: ()
    return lambda gate, place: (load_part(gate[0], place), load_part(gate[1], place))


@overload(through, jit_options=INLINING)
def _through(u, d, gate):
    if len(gate) == 0:
        return lambda u, d, gate: u
    is_vector = isinstance(d, Vector)
    number = d.element if is_vector else d
    zero = np.float32(0) if number.bitwidth == 32 else np.float64(0)
    if is_vector:
        return lambda u, d, gate: choose(d * gate[0] + gate[1] <= zero, zero, u)
    return lambda u, d, gate: zero if d * gate[0] + gate[1] <= zero else u
