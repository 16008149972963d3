"""Layers with running statistics: batch and instance norm, of every rank."""

import numpy as np

from fastnorm import checks, functional
from fastnorm.layers import Layer


class _ChannelNorm(Layer):
    """What batch and instance norm share: parameters and running statistics for each channel."""

    _ranks = ()

    def __init__(
        self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *,
        layout="NCHW", dtype=np.float32, backend=None, activation=None, negative_slope=0.01,
        approximate="none",
    ):
        super().__init__(layout, dtype, backend, activation, negative_slope, approximate)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self._set_parameters((0,), False, False)
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if num_features is not None:
            self._allocate(num_features)

    def _allocate(self, num_features):
        self.num_features = checks.check_int(type(self).__name__, "num_features", num_features)
        self._set_parameters((self.num_features,), self.affine, self.affine)
        if self.track_running_stats:
            self._buffers = ("running_mean", "running_var", "num_batches_tracked")
            self.reset_running_stats()

    def reset_running_stats(self):
        """Running mean 0, running variance 1, no batches."""
        if self.track_running_stats:
            self._on_gpu = False
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = np.zeros((), np.int64)

    def _check_rank(self, x):
        if getattr(x, "ndim", None) not in self._ranks:
            ranks = " or ".join(f"{rank}-D" for rank in self._ranks)
            raise ValueError(
                f"{type(self).__name__}: x has shape {getattr(x, 'shape', None)},"
                f" expected a {ranks} array"
            )

    def _describe(self):
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine},"
            f" track_running_stats={self.track_running_stats}"
        )


class _BatchNorm(_ChannelNorm):
    """Batch normalization of {inputs}.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Statistics over the batch and the spatial axes in training, the running ones in eval();
    with track_running_stats=False those of the batch always. The running variance is the
    unbiased one.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None is the cumulative average.
        affine: whether there are a weight (1 at first) and a bias (0).
        track_running_stats: whether there are running statistics (mean 0, variance 1 at first).
        layout, dtype, backend, activation, negative_slope, approximate: see fastnorm.layers.
        statistics, update, nan_policy, ghost_size: see fastnorm.batch_norm. A frozen layer has
            statistics="running", update=False.

    Shape:
        {inputs} in, the same out.

    Examples:
        >>> y = fastnorm.{name}(64)(x)

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def __init__(
        self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *,
        layout="NCHW", dtype=np.float32, backend=None, activation=None, negative_slope=0.01,
        approximate="none", statistics=None, update=None, nan_policy="propagate", ghost_size=None,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout, dtype=dtype,
            backend=backend, activation=activation, negative_slope=negative_slope,
            approximate=approximate,
        )
        self.statistics = statistics
        self.update = update
        self.nan_policy = nan_policy
        self.ghost_size = ghost_size

    def _momentum(self):
        """Of this batch: 1/t for the cumulative average of momentum=None. The batch is counted
        behind the call, so that a refused input leaves the layer as it was."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / (float(self.num_batches_tracked or 0) + 1.0)

    def forward(self, x, residual=None, *, mask=None, lengths=None):
        """Normalize x; in training also move the running statistics."""
        self._check_rank(x)
        self._follow(x)
        use_batch = self.training or not self.track_running_stats
        if self.statistics is not None:
            use_batch = self.statistics == "batch"
        moving = self.training if self.update is None else self.update
        moving = moving and self.track_running_stats
        running = self.track_running_stats and (moving or not use_batch)
        y, stats = functional.batch_norm(
            x, self.running_mean if running else None, self.running_var if running else None,
            self.weight, self.bias, use_batch, self._momentum(), self.eps,
            layout=self.layout, return_stats=True, residual=residual, update=bool(moving),
            nan_policy=self.nan_policy, ghost_size=self.ghost_size, mask=mask, lengths=lengths,
            **self._common(),
        )
        if moving:
            self.num_batches_tracked += 1
        self._saved = x, stats, {"residual": residual, "mask": mask, "lengths": lengths}
        return y

    def backward(self, dy):
        """The gradient of the last input, and of its residual; adds to grad_weight, grad_bias."""
        x, stats, beside = self._take_saved()
        return self._gradients(functional.batch_norm_backward(
            dy, x, stats, self.weight, layout=self.layout, bias=self.bias,
            ghost_size=self.ghost_size, **beside, **self._common(),
        ))


class _InstanceNorm(_ChannelNorm):
    """Instance normalization of {inputs}.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Statistics of each sample's channel over the spatial axes; with track_running_stats=True the
    running ones in eval().

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; with None they stay, and as in PyTorch
            num_batches_tracked counts nothing.
        affine: whether there are a weight and a bias; not by default.
        track_running_stats: whether there are running statistics; not by default.
        layout, dtype, backend, activation, negative_slope, approximate: see fastnorm.layers.

    Shape:
        {inputs} in, the same out. One axis less is one sample without the batch axis.

    Examples:
        >>> y = fastnorm.{name}(64)(x)

    Source:
        Ulyanov et al., "Instance Normalization", 2016.
    """

    def __init__(
        self, num_features, eps=1e-5, momentum=0.1, affine=False, track_running_stats=False, *,
        layout="NCHW", dtype=np.float32, backend=None, activation=None, negative_slope=0.01,
        approximate="none",
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout, dtype=dtype,
            backend=backend, activation=activation, negative_slope=negative_slope,
            approximate=approximate,
        )

    def forward(self, x, residual=None, *, mask=None, lengths=None):
        """Normalize x; in training also move the running statistics, where there are any."""
        self._check_rank(x)
        self._follow(x)
        alone = x.ndim == self._ranks[0]
        batched = x[np.newaxis] if alone else x
        beside = {"residual": residual, "mask": mask, "lengths": lengths}
        if alone:  # lengths is one number
            beside = {
                what: array if array is None else
                [array] if what == "lengths" else array[np.newaxis]
                for what, array in beside.items()
            }
        use_input = self.training or not self.track_running_stats
        y, stats = functional.instance_norm(
            batched, self.running_mean, self.running_var, self.weight, self.bias, use_input,
            self.momentum or 0.0, self.eps, layout=self.layout, return_stats=True,
            **beside, **self._common(),
        )
        self._saved = batched, stats, beside, alone
        return y[0] if alone else y

    def backward(self, dy):
        """The gradient of the last input, and of its residual; adds to grad_weight, grad_bias."""
        x, stats, beside, alone = self._take_saved()
        found = self._gradients(functional.instance_norm_backward(
            dy[np.newaxis] if alone else dy, x, stats, self.weight, layout=self.layout,
            bias=self.bias, **beside, **self._common(),
        ))
        if not alone:
            return found
        return found[0] if beside["residual"] is None else tuple(a[0] for a in found)


class _Lazy:
    """C is taken from the first input's channel axis."""

    def __init__(self, *args, **keywords):
        super().__init__(None, *args, **keywords)

    def forward(self, x, *inputs, **keywords):
        if self.num_features is None:
            self._check_rank(x)
            first = checks.channels_first(type(self).__name__, self.layout)
            alone = isinstance(self, _InstanceNorm) and x.ndim == self._ranks[0]
            self._allocate(x.shape[-1 if not first else 0 if alone else 1])
        return super().forward(x, *inputs, **keywords)


def _dimensions(base, ranks, inputs, lazy):
    """Class decorator: the subclass of `base` for inputs of these ranks."""

    def fill(cls):
        cls._ranks = ranks
        cls.__doc__ = base.__doc__.replace("{inputs}", inputs).replace("{name}", cls.__name__)
        if lazy:
            cls.__doc__ = cls.__doc__.replace(
                "num_features: C.", "(C is taken from the first input's channel axis.)"
            ).replace("(64)(x)", "()(x)")
        return cls

    return fill


@_dimensions(_BatchNorm, (2, 3), "(N, C) or (N, C, L)", lazy=False)
class BatchNorm1d(_BatchNorm):
    pass


@_dimensions(_BatchNorm, (4,), "(N, C, H, W)", lazy=False)
class BatchNorm2d(_BatchNorm):
    pass


@_dimensions(_BatchNorm, (5,), "(N, C, D, H, W)", lazy=False)
class BatchNorm3d(_BatchNorm):
    pass


@_dimensions(_BatchNorm, (2, 3), "(N, C) or (N, C, L)", lazy=True)
class LazyBatchNorm1d(_Lazy, _BatchNorm):
    pass


@_dimensions(_BatchNorm, (4,), "(N, C, H, W)", lazy=True)
class LazyBatchNorm2d(_Lazy, _BatchNorm):
    pass


@_dimensions(_BatchNorm, (5,), "(N, C, D, H, W)", lazy=True)
class LazyBatchNorm3d(_Lazy, _BatchNorm):
    pass


@_dimensions(_InstanceNorm, (2, 3), "(N, C, L)", lazy=False)
class InstanceNorm1d(_InstanceNorm):
    pass


@_dimensions(_InstanceNorm, (3, 4), "(N, C, H, W)", lazy=False)
class InstanceNorm2d(_InstanceNorm):
    pass


@_dimensions(_InstanceNorm, (4, 5), "(N, C, D, H, W)", lazy=False)
class InstanceNorm3d(_InstanceNorm):
    pass


@_dimensions(_InstanceNorm, (2, 3), "(N, C, L)", lazy=True)
class LazyInstanceNorm1d(_Lazy, _InstanceNorm):
    pass


@_dimensions(_InstanceNorm, (3, 4), "(N, C, H, W)", lazy=True)
class LazyInstanceNorm2d(_Lazy, _InstanceNorm):
    pass


@_dimensions(_InstanceNorm, (4, 5), "(N, C, D, H, W)", lazy=True)
class LazyInstanceNorm3d(_Lazy, _InstanceNorm):
    pass
