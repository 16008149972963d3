"""Layers with torch.nn's constructors and state. No arithmetic lives here.

A layer is called on an array, keeps what its backward needs, and gives the input's gradient:

    >>> layer = fastnorm.BatchNorm2d(64)
    >>> y = layer(x)
    >>> dx = layer.backward(dy)          # adds to layer.grad_weight, layer.grad_bias

The arrays are NumPy's or on a GPU (see fastnorm.device); parameters follow the input to its place.
Every layer also takes `layout` (where the input has a channel axis), `dtype` of its parameters
and `backend`. state_dict() and load_state_dict() use PyTorch's key names, so that

    torch_layer.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    layer.load_state_dict({k: v.numpy() for k, v in torch_layer.state_dict().items()})

both work.
"""

import numpy as np

from fastnorm import cross_channel, device, functional
from fastnorm.dtypes import NAMES, TABLE


class Layer:
    """State that every layer has: parameters with gradients, buffers, train and eval."""

    parameters = ()
    _buffers = ()

    def __init__(self, layout="NCHW", dtype=np.float32, backend=None):
        self.layout = layout
        self.dtype = np.dtype(dtype)
        self.backend = backend
        self.training = True
        self._saved = None
        self._on_gpu = False
        functional.channels_first(type(self).__name__, layout)
        if self.dtype not in TABLE:
            raise TypeError(f"{type(self).__name__}: dtype is {self.dtype}, expected {NAMES}")

    def __call__(self, x):
        return self.forward(x)

    def train(self, mode=True):
        """Switch to training (or with False to inference) and return the layer."""
        self.training = bool(mode)
        return self

    def eval(self):
        """Switch to inference and return the layer."""
        return self.train(False)

    def zero_grad(self):
        """Forget the accumulated gradients."""
        for name in self.parameters:
            setattr(self, f"grad_{name}", None)

    def _set_parameters(self, shape, weight, bias):
        self.weight = np.ones(shape, self.dtype) if weight else None
        self.bias = np.zeros(shape, self.dtype) if bias else None
        self.parameters = tuple(
            name for name in ("weight", "bias") if getattr(self, name) is not None
        )
        self.grad_weight = self.grad_bias = None

    def _follow(self, x):
        """Move parameters, their gradients and running statistics to where x is."""
        on_gpu = not isinstance(x, np.ndarray) and device.view_of(x) is not None
        if on_gpu == self._on_gpu:
            return
        self._on_gpu = on_gpu
        for name in (*self.parameters, "running_mean", "running_var"):
            setattr(self, name, device.beside(getattr(self, name, None), x))
            if name in self.parameters:
                grad = f"grad_{name}"
                setattr(self, grad, device.beside(getattr(self, grad), x))

    def _accumulate(self, dweight, dbias):
        for name, gradient in (("weight", dweight), ("bias", dbias)):
            if name in self.parameters:
                before = getattr(self, f"grad_{name}")
                if isinstance(gradient, np.ndarray):
                    gradient = gradient.astype(self.dtype, copy=False)
                after = gradient if before is None else device.added(before, gradient)
                setattr(self, f"grad_{name}", after)

    def _take_saved(self):
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}: backward before forward")
        return self._saved

    def state_dict(self):
        """Copies of parameters and buffers by PyTorch's names."""
        names = (*self.parameters, *self._buffers)
        return {name: device.to_host(getattr(self, name)) for name in names}

    def load_state_dict(self, state):
        """Copy values in. Raises ValueError for missing or unknown names and wrong shapes,
        before anything is changed."""
        name = type(self).__name__
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(
                f"{name}: state has {sorted(state)}, expected {sorted(expected)}"
            )
        values = {key: np.asarray(value) for key, value in state.items()}
        for key, value in values.items():
            if value.shape != expected[key].shape:
                raise ValueError(
                    f"{name}: {key} has shape {value.shape}, expected {expected[key].shape}"
                )
        for key, value in values.items():
            setattr(self, key, value.astype(expected[key].dtype))
        self._on_gpu = False  # or the next call on a GPU would not move them

    def __repr__(self):
        return f"{type(self).__name__}({self._describe()})"

    def _describe(self):
        return ""


class _ChannelNorm(Layer):
    """What batch and instance norm share: parameters and running statistics for each channel."""

    _ranks = ()

    def __init__(
        self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *,
        layout="NCHW", dtype=np.float32, backend=None,
    ):
        super().__init__(layout, dtype, backend)
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
        self.num_features = num_features
        self._set_parameters((num_features,), self.affine, self.affine)
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
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Statistics over the batch and the spatial axes in training, the running ones in eval();
    with track_running_stats=False those of the batch always. The running variance is the
    unbiased one.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None is the cumulative average.
        affine: whether there are a weight (1 at first) and a bias (0).
        track_running_stats: whether there are running statistics (mean 0, variance 1 at first).
        layout, dtype, backend: see fastnorm.layers.

    Shape:
        {inputs} in, the same out.

    Examples:
        >>> y = fastnorm.{name}(64)(x)

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def _momentum(self):
        """Of this batch: 1/t for the cumulative average of momentum=None. The batch is counted
        behind the call, so that a refused input leaves the layer as it was."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / (float(self.num_batches_tracked or 0) + 1.0)

    def forward(self, x):
        """Normalize x; in training also move the running statistics."""
        self._check_rank(x)
        self._follow(x)
        use_batch = self.training or not self.track_running_stats
        moving = self.training and self.track_running_stats
        running = self.track_running_stats and (moving or not use_batch)
        y, stats = functional.batch_norm(
            x, self.running_mean if running else None, self.running_var if running else None,
            self.weight, self.bias, use_batch, self._momentum(), self.eps,
            layout=self.layout, return_stats=True, backend=self.backend,
        )
        if moving:
            self.num_batches_tracked += 1
        self._saved = x, stats
        return y

    def backward(self, dy):
        """The gradient of the last input; adds to grad_weight and grad_bias."""
        x, stats = self._take_saved()
        dx, dweight, dbias = functional.batch_norm_backward(
            dy, x, stats, self.weight, layout=self.layout, backend=self.backend
        )
        self._accumulate(dweight, dbias)
        return dx


class _InstanceNorm(_ChannelNorm):
    """Instance normalization of {inputs}.

    Formula:
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Statistics of each sample's channel over the spatial axes; with track_running_stats=True the
    running ones in eval().

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; with None they stay, and as in PyTorch
            num_batches_tracked counts nothing.
        affine: whether there are a weight and a bias; not by default.
        track_running_stats: whether there are running statistics; not by default.
        layout, dtype, backend: see fastnorm.layers.

    Shape:
        {inputs} in, the same out. One axis less is one sample without the batch axis.

    Examples:
        >>> y = fastnorm.{name}(64)(x)

    Source:
        Ulyanov et al., "Instance Normalization", 2016.
    """

    def __init__(
        self, num_features, eps=1e-5, momentum=0.1, affine=False, track_running_stats=False, *,
        layout="NCHW", dtype=np.float32, backend=None,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout, dtype=dtype,
            backend=backend,
        )

    def forward(self, x):
        """Normalize x; in training also move the running statistics, where there are any."""
        self._check_rank(x)
        self._follow(x)
        alone = x.ndim == self._ranks[0]
        batched = x[np.newaxis] if alone else x
        use_input = self.training or not self.track_running_stats
        y, stats = functional.instance_norm(
            batched, self.running_mean, self.running_var, self.weight, self.bias, use_input,
            self.momentum or 0.0, self.eps, layout=self.layout, return_stats=True,
            backend=self.backend,
        )
        self._saved = batched, stats, alone
        return y[0] if alone else y

    def backward(self, dy):
        """The gradient of the last input; adds to grad_weight and grad_bias."""
        x, stats, alone = self._take_saved()
        dx, dweight, dbias = functional.instance_norm_backward(
            dy[np.newaxis] if alone else dy, x, stats, self.weight, layout=self.layout,
            backend=self.backend,
        )
        self._accumulate(dweight, dbias)
        return dx[0] if alone else dx


class _Lazy:
    """C is taken from the first input's channel axis."""

    def __init__(self, *args, **keywords):
        super().__init__(None, *args, **keywords)

    def forward(self, x):
        if self.num_features is None:
            self._check_rank(x)
            first = functional.channels_first(type(self).__name__, self.layout)
            alone = isinstance(self, _InstanceNorm) and x.ndim == self._ranks[0]
            self._allocate(x.shape[-1 if not first else 0 if alone else 1])
        return super().forward(x)


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


class GroupNorm(Layer):
    """Group normalization.

    Formula:
        y = (x - mean) / sqrt(var + eps) * weight + bias, statistics of each sample's group

    Args:
        num_groups: G, a divisor of num_channels.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are a weight and a bias.
        layout, dtype, backend: see fastnorm.layers.

    Shape:
        (N, C, *) in, the same out.

    Examples:
        >>> y = fastnorm.GroupNorm(32, 320)(x)

    Source:
        Wu and He, "Group Normalization", 2018.
    """

    def __init__(
        self, num_groups, num_channels, eps=1e-5, affine=True, *, layout="NCHW", dtype=np.float32,
        backend=None,
    ):
        super().__init__(layout, dtype, backend)
        if num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups}, expected a divisor of num_channels"
                f" {num_channels}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self._set_parameters((num_channels,), affine, affine)

    def forward(self, x):
        self._follow(x)
        y, stats = functional.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, layout=self.layout,
            return_stats=True, backend=self.backend,
        )
        self._saved = x, stats
        return y

    def backward(self, dy):
        """The gradient of the last input; adds to grad_weight and grad_bias."""
        x, stats = self._take_saved()
        dx, dweight, dbias = functional.group_norm_backward(
            dy, x, stats, self.num_groups, self.weight, layout=self.layout, backend=self.backend
        )
        self._accumulate(dweight, dbias)
        return dx

    def _describe(self):
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class LayerNorm(Layer):
    """Layer normalization over the trailing axes.

    Formula:
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        normalized_shape: an int or a sequence of ints, the trailing axes of the input.
        eps: added to the variance.
        elementwise_affine: whether there is a weight (and a bias) for each place.
        bias: whether there is a bias.
        dtype, backend: see fastnorm.layers.

    Shape:
        (*, *normalized_shape) in, the same out.

    Examples:
        >>> y = fastnorm.LayerNorm(768)(x)

    Source:
        Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    def __init__(
        self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, *, dtype=np.float32,
        backend=None,
    ):
        super().__init__(dtype=dtype, backend=backend)
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._set_parameters(self.normalized_shape, elementwise_affine, elementwise_affine and bias)

    def forward(self, x):
        self._follow(x)
        y, stats = functional.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, return_stats=True,
            backend=self.backend,
        )
        self._saved = x, stats
        return y

    def backward(self, dy):
        """The gradient of the last input; adds to grad_weight and grad_bias."""
        x, stats = self._take_saved()
        dx, dweight, dbias = functional.layer_norm_backward(
            dy, x, stats, self.normalized_shape, self.weight, backend=self.backend
        )
        self._accumulate(dweight, dbias)
        return dx

    def _describe(self):
        return (
            f"{self.normalized_shape}, eps={self.eps},"
            f" elementwise_affine={self.elementwise_affine}"
        )


class RMSNorm(Layer):
    """Root mean square normalization over the trailing axes.

    Formula:
        y = x / sqrt(mean(x*x) + eps) * weight

    Args:
        normalized_shape: an int or a sequence of ints, the trailing axes of the input.
        eps: added to the mean square; None is the machine epsilon of the input's dtype.
        elementwise_affine: whether there is a weight for each place.
        dtype, backend: see fastnorm.layers.

    Shape:
        (*, *normalized_shape) in, the same out.

    Examples:
        >>> y = fastnorm.RMSNorm(4096)(x)

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, *, dtype=np.float32, backend=None
    ):
        super().__init__(dtype=dtype, backend=backend)
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._set_parameters(self.normalized_shape, elementwise_affine, False)

    def forward(self, x):
        self._follow(x)
        y, stats = functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, return_stats=True, backend=self.backend
        )
        self._saved = x, stats
        return y

    def backward(self, dy):
        """The gradient of the last input; adds to grad_weight."""
        x, stats = self._take_saved()
        dx, dweight, _ = functional.rms_norm_backward(
            dy, x, stats, self.normalized_shape, self.weight, backend=self.backend
        )
        self._accumulate(dweight, None)
        return dx

    def _describe(self):
        return (
            f"{self.normalized_shape}, eps={self.eps},"
            f" elementwise_affine={self.elementwise_affine}"
        )


class LocalResponseNorm(Layer):
    """Local response normalization, across neighbouring channels.

    Formula:
        y = x / (k + alpha * sum(x_neighbour**2) / size) ** beta

    Args:
        size: channels in the window.
        alpha, beta, k: see the formula.
        layout: see fastnorm.layers.

    Shape:
        (N, C, *) in, the same out.

    Examples:
        >>> y = fastnorm.LocalResponseNorm(5)(x)

    Source:
        Krizhevsky et al. 2012, section 3.3.
    """

    def __init__(self, size, alpha=1e-4, beta=0.75, k=1.0, *, layout="NCHW"):
        super().__init__(layout)
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x):
        self._saved = x
        return cross_channel.local_response_norm(
            x, self.size, self.alpha, self.beta, self.k, layout=self.layout
        )

    def backward(self, dy):
        """The gradient of the last input."""
        return cross_channel.local_response_norm_backward(
            dy, self._take_saved(), self.size, self.alpha, self.beta, self.k, layout=self.layout
        )

    def _describe(self):
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def _shape(normalized_shape):
    if hasattr(normalized_shape, "__index__"):
        return (int(normalized_shape),)
    return tuple(int(size) for size in normalized_shape)
