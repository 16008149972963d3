"""What a normalization hands out beside y."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a forward normalized with: float64 arrays, one value for each set.

    Shaped (C,) for batch norm, (N, C) for instance norm, (N, G) for group norm, and as the
    leading axes of x for layer and RMS norm.

    Attributes:
        mean: of the values (for RMS norm 0).
        var: the population variance (for RMS norm the mean square).
        rstd: 1 / sqrt(var + eps).
        given: True where they are running statistics: a backward takes them as constants.
    """

    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    given: bool = False


class Gradients(NamedTuple):
    """Gradients of a backward, by x, weight and bias (RMS norm: None)."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray | None


class GradientsWithResidual(NamedTuple):
    """Gradients of a backward that was given the residual."""

    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dresidual: np.ndarray
