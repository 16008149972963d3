"""Layers with torch.nn's constructors and state, but those with running statistics, which are in
layers_running.py. No arithmetic lives here.

A layer is called on an array, keeps what its backward needs, and gives the input's gradient:

    >>> layer = fastnorm.BatchNorm2d(64)
    >>> y = layer(x)
    >>> dx = layer.backward(dy)          # adds to layer.grad_weight, layer.grad_bias

The arrays are NumPy's or on a GPU (see fastnorm.device); parameters follow the input to its place.
Every layer also takes `layout` (where the input has a channel axis), `dtype` of its parameters
and `backend`, and every one that has parameters an `activation` (with `negative_slope` or
`approximate`), which it applies last. Its call then also takes a residual:

    >>> layer = fastnorm.BatchNorm2d(64, activation="relu")
    >>> y = layer(x, residual)           # relu(norm(x) + residual)
    >>> dx, dresidual = layer.backward(dy)
    >>> layer = fastnorm.LayerNorm(768)
    >>> y, total = layer(x, residual)    # total = x + residual, y = norm(total)
    >>> dx = layer.backward(dy, dtotal)  # of x and of the residual

Batch, group, instance, layer and RMS norm are also told which positions count, by a mask or by
lengths (see fastnorm.functional), which the backward remembers:

    >>> y = fastnorm.BatchNorm1d(80)(x, lengths=lengths)    # x is (N, 80, L)

state_dict() and load_state_dict() use PyTorch's key names, so that

    torch_layer.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    layer.load_state_dict({k: v.numpy() for k, v in torch_layer.state_dict().items()})

both work.
"""

import numpy as np

from fastnorm import checks, cross_channel, device, functional, functional_rows
from fastnorm.dtypes import NAMES, TABLE


class Layer:
    """State that every layer has: parameters with gradients, buffers, train and eval."""

    _parameters = ()
    _buffers = ()

    def __init__(
        self, layout="NCHW", dtype=np.float32, backend=None, activation=None, negative_slope=0.01,
        approximate="none",
    ):
        self.layout = layout
        self.dtype = np.dtype(dtype)
        self.backend = backend
        self.activation = activation
        self.negative_slope = negative_slope
        self.approximate = approximate
        self.training = True
        self._saved = None
        self._on_gpu = False
        name = type(self).__name__
        checks.channels_first(name, layout)
        checks.check_fused(name, None, activation, negative_slope, approximate)
        if self.dtype not in TABLE:
            raise TypeError(f"{name}: dtype is {self.dtype}, expected {NAMES}")

    def __call__(self, *inputs, **keywords):
        return self.forward(*inputs, **keywords)

    def _common(self):
        """Keywords of every call of functional.py."""
        return {
            "backend": self.backend, "activation": self.activation,
            "negative_slope": self.negative_slope, "approximate": self.approximate,
        }

    def train(self, mode=True):
        """Switch to training (or with False to inference) and return the layer."""
        self.training = bool(mode)
        return self

    def eval(self):
        """Switch to inference and return the layer."""
        return self.train(False)

    def named_parameters(self):
        """(name, array) of the weight and the bias, as far as the layer has them. The gradient of
        each is its attribute grad_<name>."""
        for name in self._parameters:
            yield name, getattr(self, name)

    def parameters(self):
        """The arrays of named_parameters: an optimizer changes them in place."""
        for _, array in self.named_parameters():
            yield array

    def zero_grad(self):
        """Forget the accumulated gradients."""
        for name in self._parameters:
            setattr(self, f"grad_{name}", None)

    def _set_parameters(self, shape, weight, bias):
        self.weight = np.ones(shape, self.dtype) if weight else None
        self.bias = np.zeros(shape, self.dtype) if bias else None
        self._parameters = tuple(
            name for name in ("weight", "bias") if getattr(self, name) is not None
        )
        self.grad_weight = self.grad_bias = None

    def _follow(self, x):
        """Move parameters, their gradients and running statistics to where x is."""
        on_gpu = not isinstance(x, np.ndarray) and device.view_of(x) is not None
        if on_gpu == self._on_gpu:
            return
        self._on_gpu = on_gpu
        for name in (*self._parameters, "running_mean", "running_var"):
            setattr(self, name, device.beside(getattr(self, name, None), x))
            if name in self._parameters:
                grad = f"grad_{name}"
                setattr(self, grad, device.beside(getattr(self, grad), x))

    def _accumulate(self, dweight, dbias):
        for name, gradient in (("weight", dweight), ("bias", dbias)):
            if name in self._parameters:
                before = getattr(self, f"grad_{name}")
                if isinstance(gradient, np.ndarray):
                    gradient = gradient.astype(self.dtype, copy=False)
                after = gradient if before is None else device.added(before, gradient)
                setattr(self, f"grad_{name}", after)

    def _gradients(self, found):
        """Accumulate the parameters' gradients, and hand out dx, or (dx, dresidual)."""
        self._accumulate(found.dweight, found.dbias)
        return (found.dx, found.dresidual) if len(found) == 4 else found.dx

    def _take_saved(self):
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}: backward before forward")
        return self._saved

    def state_dict(self):
        """Copies of parameters and buffers by PyTorch's names."""
        names = (*self._parameters, *self._buffers)
        return {name: device.to_host(getattr(self, name)) for name in names}

    def load_state_dict(self, state):
        """Copy values into the layer's arrays. Raises ValueError for missing or unknown names and
        wrong shapes, before anything is changed."""
        name = type(self).__name__
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(
                f"{name}: state has {sorted(state)}, expected {sorted(expected)}"
            )
        values = {key: np.asarray(value, expected[key].dtype) for key, value in state.items()}
        for key, value in values.items():
            if value.shape != expected[key].shape:
                raise ValueError(
                    f"{name}: {key} has shape {value.shape}, expected {expected[key].shape}"
                )
        for key, value in values.items():
            if self._on_gpu:
                setattr(self, key, value.copy())
            else:  # whoever holds these arrays sees the new values
                getattr(self, key)[...] = value
        self._on_gpu = False  # or the next call on a GPU would not move them

    def __repr__(self):
        after = f", activation={self.activation!r}" if self.activation else ""
        return f"{type(self).__name__}({self._describe()}{after})"

    def _describe(self):
        return ""


class GroupNorm(Layer):
    """Group normalization.

    Formula:
        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Statistics of each sample's group of channels.

    Args:
        num_groups: G, a divisor of num_channels.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are a weight and a bias.
        layout, dtype, backend, activation, negative_slope, approximate: see fastnorm.layers.

    Shape:
        (N, C, *) in, the same out.

    Examples:
        >>> y = fastnorm.GroupNorm(32, 320)(x)

    Source:
        Wu and He, "Group Normalization", 2018.
    """

    def __init__(
        self, num_groups, num_channels, eps=1e-5, affine=True, *, layout="NCHW", dtype=np.float32,
        backend=None, activation=None, negative_slope=0.01, approximate="none",
    ):
        super().__init__(layout, dtype, backend, activation, negative_slope, approximate)
        num_groups = checks.check_int("GroupNorm", "num_groups", num_groups)
        num_channels = checks.check_int("GroupNorm", "num_channels", num_channels)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups}, expected a divisor of num_channels"
                f" {num_channels}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self._set_parameters((num_channels,), affine, affine)

    def forward(self, x, residual=None, *, mask=None, lengths=None):
        self._follow(x)
        y, stats = functional.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, layout=self.layout,
            return_stats=True, residual=residual, mask=mask, lengths=lengths, **self._common(),
        )
        self._saved = x, stats, {"residual": residual, "mask": mask, "lengths": lengths}
        return y

    def backward(self, dy):
        """The gradient of the last input, and of its residual; adds to grad_weight, grad_bias."""
        x, stats, beside = self._take_saved()
        return self._gradients(functional.group_norm_backward(
            dy, x, stats, self.num_groups, self.weight, layout=self.layout, bias=self.bias,
            **beside, **self._common(),
        ))

    def _describe(self):
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class _RowNorm(Layer):
    """What layer and RMS norm share."""

    axis = None

    def _common(self):
        return super()._common() | {"axis": self.axis}

    def _keep(self, x, results, **beside):
        """Keep what the backward needs, and hand out y, or (y, sum)."""
        *results, stats = results
        self._saved = results[-1] if len(results) == 2 else x, stats, beside
        return tuple(results) if len(results) == 2 else results[0]

    def _describe(self):
        return (
            f"{self.normalized_shape}, eps={self.eps},"
            f" elementwise_affine={self.elementwise_affine}"
            + (f", axis={self.axis}" if self.axis is not None else "")
        )


class LayerNorm(_RowNorm):
    """Layer normalization over the trailing axes.

    Formula, with sum = x + residual:
        y = activation((sum - mean) / sqrt(var + eps) * weight + bias)

    Args:
        normalized_shape: an int or a sequence of ints, the trailing axes of the input.
        eps: added to the variance.
        elementwise_affine: whether there is a weight (and a bias) for each place.
        bias: whether there is a bias.
        dtype, backend, activation, negative_slope, approximate: see fastnorm.layers.
        axis: the axes that are normalized, in place of the last; see fastnorm.layer_norm.

    Shape:
        (*, *normalized_shape) in, the same out.

    Examples:
        >>> y = fastnorm.LayerNorm(768)(x)

    Source:
        Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    def __init__(
        self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, *, dtype=np.float32,
        backend=None, activation=None, negative_slope=0.01, approximate="none", axis=None,
    ):
        super().__init__("NCHW", dtype, backend, activation, negative_slope, approximate)
        self.axis = axis
        self.normalized_shape = checks.check_ints(
            type(self).__name__, "normalized_shape", normalized_shape
        )
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._set_parameters(self.normalized_shape, elementwise_affine, elementwise_affine and bias)

    def forward(self, x, residual=None, *, mask=None, lengths=None):
        self._follow(x)
        return self._keep(x, functional_rows.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, return_stats=True,
            residual=residual, mask=mask, lengths=lengths, **self._common(),
        ), mask=mask, lengths=lengths)

    def backward(self, dy, dsum=None):
        """The gradient of the last input (and of its residual), dsum being what arrived at their
        sum from elsewhere; adds to grad_weight and grad_bias."""
        x, stats, beside = self._take_saved()
        return self._gradients(functional_rows.layer_norm_backward(
            dy, x, stats, self.normalized_shape, self.weight, dsum=dsum, bias=self.bias,
            **beside, **self._common(),
        ))


class RMSNorm(_RowNorm):
    """Root mean square normalization over the trailing axes.

    Formula, with sum = x + residual:
        y = activation(sum / sqrt(mean(sum*sum) + eps) * weight)

    Args:
        normalized_shape: an int or a sequence of ints, the trailing axes of the input.
        eps: added to the mean square; None is the machine epsilon of the input's dtype.
        elementwise_affine: whether there is a weight for each place.
        dtype, backend, activation, negative_slope, approximate: see fastnorm.layers.
        axis: the axes that are normalized, in place of the last; see fastnorm.layer_norm.

    Shape:
        (*, *normalized_shape) in, the same out.

    Examples:
        >>> y = fastnorm.RMSNorm(4096)(x)

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, *, dtype=np.float32,
        backend=None, activation=None, negative_slope=0.01, approximate="none", axis=None,
    ):
        super().__init__("NCHW", dtype, backend, activation, negative_slope, approximate)
        self.axis = axis
        self.normalized_shape = checks.check_ints(
            type(self).__name__, "normalized_shape", normalized_shape
        )
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._set_parameters(self.normalized_shape, elementwise_affine, False)

    def forward(self, x, residual=None, *, mask=None, lengths=None):
        self._follow(x)
        return self._keep(x, functional_rows.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, return_stats=True, residual=residual,
            mask=mask, lengths=lengths, **self._common(),
        ), mask=mask, lengths=lengths)

    def backward(self, dy, dsum=None):
        """The gradient of the last input (and of its residual), dsum being what arrived at their
        sum from elsewhere; adds to grad_weight."""
        x, stats, beside = self._take_saved()
        return self._gradients(functional_rows.rms_norm_backward(
            dy, x, stats, self.normalized_shape, self.weight, dsum=dsum, **beside,
            **self._common(),
        ))


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
