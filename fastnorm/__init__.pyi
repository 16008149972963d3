from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastnorm.layers import GroupNorm as GroupNorm
from fastnorm.layers import LayerNorm as LayerNorm
from fastnorm.layers import LocalResponseNorm as LocalResponseNorm
from fastnorm.layers import RMSNorm as RMSNorm
from fastnorm.layers_running import BatchNorm1d as BatchNorm1d
from fastnorm.layers_running import BatchNorm2d as BatchNorm2d
from fastnorm.layers_running import BatchNorm3d as BatchNorm3d
from fastnorm.layers_running import InstanceNorm1d as InstanceNorm1d
from fastnorm.layers_running import InstanceNorm2d as InstanceNorm2d
from fastnorm.layers_running import InstanceNorm3d as InstanceNorm3d
from fastnorm.layers_running import LazyBatchNorm1d as LazyBatchNorm1d
from fastnorm.layers_running import LazyBatchNorm2d as LazyBatchNorm2d
from fastnorm.layers_running import LazyBatchNorm3d as LazyBatchNorm3d
from fastnorm.layers_running import LazyInstanceNorm1d as LazyInstanceNorm1d
from fastnorm.layers_running import LazyInstanceNorm2d as LazyInstanceNorm2d
from fastnorm.layers_running import LazyInstanceNorm3d as LazyInstanceNorm3d

__version__: str

# NumPy's, or any library's on a GPU; the result is of the same kind.
Array = Any
Layout = Literal["NCHW", "NHWC", "channels_first", "channels_last"]
Backend = Literal["native", "numba", "reference", "cuda"]
Activation = Literal["relu", "leaky_relu", "silu", "gelu"]
Approximate = Literal["none", "tanh"]

class Statistics:
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    rstd: NDArray[np.float64]
    given: bool
    def __init__(
        self,
        mean: NDArray[np.float64],
        var: NDArray[np.float64],
        rstd: NDArray[np.float64],
        given: bool = ...,
    ) -> None: ...

class Gradients(NamedTuple):
    dx: Array
    dweight: Array
    dbias: Array | None

class GradientsWithResidual(NamedTuple):
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array

@overload
def batch_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    convention: Literal["torch", "keras"] = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    statistics: Literal["batch", "running"] | None = ...,
    update: bool | None = ...,
    nan_policy: Literal["propagate", "skip", "raise"] = ...,
    ghost_size: int | None = ...,
) -> Array: ...
@overload
def batch_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    convention: Literal["torch", "keras"] = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    statistics: Literal["batch", "running"] | None = ...,
    update: bool | None = ...,
    nan_policy: Literal["propagate", "skip", "raise"] = ...,
    ghost_size: int | None = ...,
) -> tuple[Array, Statistics]: ...
@overload
def instance_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    use_input_stats: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> Array: ...
@overload
def instance_norm(
    x: Array,
    running_mean: Array | None = ...,
    running_var: Array | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    use_input_stats: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> tuple[Array, Statistics]: ...
@overload
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> Array: ...
@overload
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> tuple[Array, Statistics]: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> Array: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array,
    out_sum: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Array]: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Statistics]: ...
@overload
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    bias: Array | None = ...,
    eps: float = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array,
    out_sum: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Array, Statistics]: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    eps: float | None = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> Array: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    eps: float | None = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[False] = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array,
    out_sum: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Array]: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    eps: float | None = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Statistics]: ...
@overload
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    eps: float | None = ...,
    *,
    out: Array | None = ...,
    return_stats: Literal[True],
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    residual: Array,
    out_sum: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> tuple[Array, Array, Statistics]: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    ghost_size: int | None = ...,
    from_output: bool = ...,
) -> Gradients: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: Array,
    out_residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    ghost_size: int | None = ...,
    from_output: bool = ...,
) -> GradientsWithResidual: ...
@overload
def instance_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> Gradients: ...
@overload
def instance_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: Array,
    out_residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> GradientsWithResidual: ...
@overload
def group_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    num_groups: int,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> Gradients: ...
@overload
def group_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    num_groups: int,
    weight: Array | None = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    bias: Array | None = ...,
    residual: Array,
    out_residual: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
) -> GradientsWithResidual: ...
def layer_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    *,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    dsum: Array | None = ...,
    bias: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> Gradients: ...
def rms_norm_backward(
    dy: Array,
    x: Array,
    stats: Statistics,
    normalized_shape: int | Sequence[int] | None = ...,
    weight: Array | None = ...,
    *,
    out: Array | None = ...,
    backend: Backend | None = ...,
    num_threads: int | None = ...,
    dsum: Array | None = ...,
    activation: Activation | None = ...,
    negative_slope: float = ...,
    approximate: Approximate = ...,
    mask: Array | None = ...,
    lengths: ArrayLike | None = ...,
    axis: int | Sequence[int] | None = ...,
) -> Gradients: ...
def local_response_norm(
    x: Array,
    size: int,
    alpha: float = ...,
    beta: float = ...,
    k: float = ...,
    *,
    layout: Layout = ...,
    out: Array | None = ...,
) -> Array: ...
def normalize(
    x: Array,
    p: float = ...,
    dim: int = ...,
    eps: float = ...,
    *,
    out: Array | None = ...,
    axis: int | None = ...,
) -> Array: ...
def explain(x: Array | DTypeLike | None = ..., *, backend: Backend | None = ...) -> None: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def get_include() -> str: ...
def get_library() -> str: ...
