"""Residual and activation in Numba: one more pass over y after a forward, and over dy before a
backward. Where elements have 16 bits the pass after a forward starts again from x, so that y is
rounded once."""

from numba import float64, prange

from fastnorm.backends import LEAKY_RELU, scalar
from fastnorm.backends.numba_jit import inlined, kernel
from fastnorm.backends.numba_simd import at, put, rounded
from fastnorm.backends.numba_words import forward_terms

PIECE = 4096

FAR = 88.0  # beyond, gates are 0 or 1, and infinities would meet zeros

gate = inlined(scalar.gate)


@inlined
def near(z):
    return -FAR if z < -FAR else FAR if z > FAR else z


@inlined
def activated(z, kind, slope):
    if kind == 0 or (kind <= LEAKY_RELU and not z <= 0.0):
        return z
    if kind <= LEAKY_RELU:
        return z * slope if kind == LEAKY_RELU else 0.0
    return (-FAR if z < -FAR else z) * gate(near(z), kind)[0]


@inlined
def steepness(z, kind, slope):
    """The derivative of activated."""
    if kind <= LEAKY_RELU:
        return 1.0 if not z <= 0.0 else slope if kind == LEAKY_RELU else 0.0
    found, change = gate(near(z), kind)
    return found + near(z) * change


@kernel("xx nfn")
def finish(y, residual, kind, slope, has_residual):
    """y = activation(y + residual)."""
    for piece in prange(-(-y.size // PIECE)):
        for j in range(piece * PIECE, min(y.size, (piece + 1) * PIECE)):
            z = float64(at(y, j))
            if has_residual:
                z += float64(at(residual, j))
            put(y, j, activated(z, kind, slope))


def _again(last):
    """A function of z, found from x as a forward does, at each place: last(dy, into, j, z, kind,
    slope) puts what comes of it."""

    @inlined
    def again(dy, x, residual, weight, bias, into, mean, rstd, sizes, kind, slope, has_residual,
              row):
        _, o, g, k, i = sizes
        j = row * g * k * i
        for c in range(g * k):
            set_ = row // o * g + c // k
            hi = rounded(x, mean[set_])
            scale, shift = forward_terms(
                mean[set_], float64(hi), rstd[set_], float64(weight[c]), float64(bias[c])
            )
            for _ in range(i):
                z = float64(at(x, j) - hi) * scale + shift
                if has_residual:
                    z += float64(at(residual, j))
                last(dy, into, j, z, kind, slope)
                j += 1

    return again


@inlined
def put_activated(dy, into, j, z, kind, slope):
    put(into, j, activated(z, kind, slope))


@inlined
def put_gradient(dy, into, j, z, kind, slope):
    put(into, j, float64(at(dy, j)) * steepness(z, kind, slope))


activated_again = _again(put_activated)
gradient_again = _again(put_gradient)


@kernel("xxaax dd tnfn")
def finish_again(x, residual, weight, bias, y, mean, rstd, sizes, kind, slope, has_residual):
    """y = activation(z + residual)."""
    for row in prange(sizes[0] * sizes[1]):
        activated_again(x, x, residual, weight, bias, y, mean, rstd, sizes, kind, slope,
                        has_residual, row)


@kernel("xxxaax dd tnfn")
def take_back(dy, x, residual, weight, bias, dz, mean, rstd, sizes, kind, slope, has_residual):
    """dz = dy*activation'(z)."""
    for row in prange(sizes[0] * sizes[1]):
        gradient_again(dy, x, residual, weight, bias, dz, mean, rstd, sizes, kind, slope,
                       has_residual, row)
