"""The case table: what tests of correctness, gradients and threads, and benchmarks, run on."""

from dataclasses import dataclass

import numpy as np
import oracle

import fastnorm
from fastnorm.dtypes import TABLE

DTYPES = list(TABLE)

@dataclass(frozen=True)
class Case:
    """One normalization of one shape. Shapes are (N, C, *spatial), or rows for layer and RMS."""

    norm: str
    shape: tuple
    groups: int = 0
    axes: int = 1  # trailing axes that layer and RMS norm reduce

    def __str__(self):
        extra = f"-g{self.groups}" if self.groups else f"-a{self.axes}" if self.axes > 1 else ""
        return f"{self.norm}-{'x'.join(map(str, self.shape))}{extra}"

    @property
    def by_channel(self):
        return self.norm in ("batch", "instance", "group")

    @property
    def param_shape(self):
        return (self.shape[1],) if self.by_channel else self.shape[len(self.shape) - self.axes :]

    def arrays(self, dtype, seed=0, weighted=True):
        """x, dy (both channels first), weight, bias."""
        rng = np.random.default_rng(seed)
        x = rng.normal(0.7, 2.0, self.shape).astype(dtype)
        dy = rng.normal(0.1, 1.0, self.shape).astype(dtype)
        if not weighted:
            return x, dy, None, None
        weight = rng.normal(3.0, 2.0, self.param_shape).astype(dtype)
        bias = rng.normal(-1.0, 1.0, self.param_shape).astype(dtype)
        return x, dy, weight, None if self.norm == "rms" else bias

    def forward(self, x, weight, bias, eps=1e-5, **common):
        """The fastnorm call; x is in common["layout"] where there is one."""
        if self.norm == "batch":
            return fastnorm.batch_norm(x, None, None, weight, bias, True, 0.1, eps, **common)
        if self.norm == "instance":
            return fastnorm.instance_norm(x, None, None, weight, bias, eps=eps, **common)
        if self.norm == "group":
            return fastnorm.group_norm(x, self.groups, weight, bias, eps, **common)
        shape = self.shape[len(self.shape) - self.axes :]
        if self.norm == "layer":
            return fastnorm.layer_norm(x, shape, weight, bias, eps, **common)
        return fastnorm.rms_norm(x, shape, weight, eps, **common)

    def backward(self, dy, x, stats, weight, **common):
        name = f"{self.norm}_norm_backward"
        extra = ()
        if self.norm == "group":
            extra = (self.groups,)
        elif not self.by_channel:
            extra = (self.shape[len(self.shape) - self.axes :],)
        return getattr(fastnorm, name)(dy, x, stats, *extra, weight, **common)

    def exact(self, x, dy, weight, bias, eps=1e-5):
        """The oracle's answer, channels first."""
        x, dy, weight, bias = (
            None if a is None else a.astype(np.longdouble) for a in (x, dy, weight, bias)
        )
        if self.by_channel:
            return oracle.channel_norm(x, dy, self.norm, self.groups, weight, bias, eps)
        return oracle.row_norm(x, dy, self.axes, weight, bias, eps, self.norm == "layer")


def small_cases():
    """Every norm at every rank that makes sense, odd sizes, group counts 1, C and between."""
    shapes = [(5, 6), (4, 6, 7), (3, 4, 5, 9), (2, 6, 3, 4, 5)]
    cases = [Case("batch", shape) for shape in shapes]
    cases += [Case("instance", shape) for shape in shapes[1:]]
    cases += [Case("group", s, g) for s in shapes for g in (1, 2, s[1])]
    for norm in ("layer", "rms"):
        cases += [Case(norm, shape) for shape in [(33,), (7, 33), (3, 5, 70)]]
        cases += [Case(norm, (2, 3, 4, 9), axes=axes) for axes in (2, 3, 4)]
    return cases


def large_cases():
    """Shapes that reach every way through the kernels: tiles, blocks, splits, folded columns."""
    return [
        Case("batch", (32, 20, 7, 7)),
        Case("batch", (300, 50, 5, 5)),
        Case("batch", (70, 11, 5, 7)),
        Case("batch", (260, 43, 7, 7)),
        Case("batch", (9, 3, 61, 67)),
        Case("batch", (2, 3, 300, 301)),
        Case("batch", (3, 2, 70001)),
        Case("batch", (500, 17)),
        Case("batch", (300, 260)),
        Case("batch", (70, 1000)),
        Case("batch", (150, 1100)),
        Case("batch", (40, 4100)),
        Case("batch", (4, 100, 13, 13)),
        Case("batch", (9, 1, 61, 67)),
        Case("batch", (3, 900, 5, 5)),
        Case("instance", (2, 3, 40, 41, 43)),
        Case("instance", (40, 37, 3, 3)),
        Case("group", (2, 32, 33, 35), 8),
        Case("group", (1, 8, 101, 103), 2),
        Case("group", (3, 640, 8, 8), 32),
        Case("group", (40, 64), 16),
        Case("layer", (300, 96)),
        Case("layer", (70, 1000)),
        Case("layer", (12, 2080)),
        Case("layer", (2, 70001)),
        Case("rms", (300, 96)),
        Case("rms", (3, 70001)),
    ]
