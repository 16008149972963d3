"""Residual and activation in Numba: one more pass over y after a forward, and over dy before a
backward."""

from numba import float64, prange

from fastnorm.backends import LEAKY_RELU, scalar
from fastnorm.backends.numba_jit import inlined, kernel
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


@kernel("aa nfn")
def finish(y, residual, kind, slope, has_residual):
    """y = activation(y + residual)."""
    for piece in prange(-(-y.size // PIECE)):
        for j in range(piece * PIECE, min(y.size, (piece + 1) * PIECE)):
            z = float64(y[j])
            if has_residual:
                z += float64(residual[j])
            y[j] = activated(z, kind, slope)


@kernel("aaaaaa dd tnfn")
def take_back(dy, x, residual, weight, bias, dz, mean, rstd, sizes, kind, slope, has_residual):
    """dz = dy*activation'(z), z found again from x."""
    b, o, g, k, i = sizes
    for row in prange(b * o):
        j = row * g * k * i
        for c in range(g * k):
            set_ = row // o * g + c // k
            hi = x.dtype.type(mean[set_])
            scale, shift = forward_terms(
                mean[set_], float64(hi), rstd[set_], float64(weight[c]), float64(bias[c])
            )
            for _ in range(i):
                z = float64(x[j] - hi) * scale + shift
                if has_residual:
                    z += float64(residual[j])
                dz[j] = float64(dy[j]) * steepness(z, kind, slope)
                j += 1
