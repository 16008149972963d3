"""The scalar mathematics of the kernels that are compiled from Python: plain functions of numbers,
compiled by each of their backends.

A value is handed on as hi + lo, hi its rounding to the working type, so that subtracting it from
an x near it loses nothing: y = (x - hi)*scale + (bias - lo*scale).
"""

from math import isfinite, sqrt

TINY = 1e-30  # mean squares below it may have lost float32 squares under the smallest normal


def cancels(s, q, count):
    """Whether the variance from the sums of d and d*d would lose too many digits: the squares left
    the range of the working type, or the values lie far from where they were taken about."""
    return not (isfinite(q) and q > TINY * count and s * s <= 0.75 * q * count)


def moments(s, q, about, count):
    """Mean and population variance from the sums of d and d*d, d = x - about."""
    shifted = s / count
    return about + shifted, max(q / count - shifted * shifted, 0.0)


def reciprocal_deviation(var, eps):
    return 1.0 / sqrt(var + eps)


def forward_terms(mean, hi, rstd, weight, bias):
    """(scale, shift) of y = (x - hi)*scale + shift."""
    scale = rstd * weight
    return scale, bias - (mean - hi) * scale


def backward_terms(gy, gyd, lo, rstd, count, has_mean):
    """(scale, shift) of dx = dy*rstd*weight + (x - hi)*scale + shift, from the sums over the set of
    gy = dy*weight and of gy*(x - hi)."""
    mean_gy = gy / count if has_mean else 0.0
    mean_gyx = rstd * (gyd - lo * gy) / count
    return -rstd * rstd * mean_gyx, rstd * (rstd * mean_gyx * lo - mean_gy)
