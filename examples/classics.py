"""Two historic layers, each a few lines on fastnorm: SSD's L2 normalization and GroupBatchnorm2d.

python examples/classics.py
"""

import numpy as np

import fastnorm
from fastnorm.cross_channel import normalize_backward


class L2Norm:
    """SSD's layer: each position's channel vector at unit length, times a learned scale.

    Formula: y = x / max(||x||_2 over channels, eps) * weight

    Source: Liu et al., "SSD: Single Shot MultiBox Detector", 2016, section 3.1.
    """

    def __init__(self, channels, scale=20.0, *, layout="NHWC"):
        self.axis = -1 if layout == "NHWC" else 1
        self.weight = np.full(channels, scale, np.float32)
        self.grad_weight = None

    def _along(self, x):
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return self.weight.reshape(shape)

    def __call__(self, x):
        self.x = x
        self.unit = fastnorm.normalize(x, dim=self.axis)
        return self.unit * self._along(x)

    def backward(self, dy):
        others = tuple(a for a in range(dy.ndim) if a != self.axis % dy.ndim)
        gradient = np.sum(dy * self.unit, axis=others)
        self.grad_weight = gradient if self.grad_weight is None else self.grad_weight + gradient
        return normalize_backward(dy * self._along(dy), self.x, self.axis)


class GroupBatchNorm2d:
    """Group normalization with the unbiased deviation and eps outside the root.

    Formula: y = (x - mean) / (std + eps) * weight + bias, std with M - 1

    The statistics are group norm's; only what divides differs.
    """

    def __init__(self, c_num, group_num=16, eps=1e-10):
        if c_num < group_num:
            raise ValueError(f"GroupBatchNorm2d: c_num is {c_num}, expected at least {group_num}")
        self.group_num = group_num
        self.eps = eps
        self.weight = np.ones((c_num, 1, 1), np.float32)
        self.bias = np.zeros((c_num, 1, 1), np.float32)

    def __call__(self, x):
        _, c, h, w = x.shape
        _, stats = fastnorm.group_norm(x, self.group_num, return_stats=True)
        count = c // self.group_num * h * w
        std = np.sqrt(stats.var * count / (count - 1))
        # Constant groups have no deviation: eps alone divides their zeros.
        centred = x - np.repeat(stats.mean, c // self.group_num, axis=1)[..., None, None]
        scale = np.repeat(1 / (std + self.eps), c // self.group_num, axis=1)[..., None, None]
        return (centred * scale * self.weight + self.bias).astype(x.dtype)


def main():
    x = np.random.default_rng(0).normal(3, 2, (2, 32, 8, 8)).astype(np.float32)
    unit = L2Norm(32, layout="NCHW")(x)
    lengths = np.linalg.norm(unit, axis=1)
    print(f"L2Norm: every position has length {lengths.min():.4f} to {lengths.max():.4f}")
    y = GroupBatchNorm2d(32)(x)
    print(f"GroupBatchNorm2d: mean {y.mean():.1e}, deviation {y.std(ddof=1):.4f}")


if __name__ == "__main__":
    main()
