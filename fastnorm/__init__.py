"""Normalization of NumPy arrays at the speed of memory. The names follow torch.nn."""

from fastnorm.config import explain, get_num_threads, set_num_threads
from fastnorm.cross_channel import local_response_norm, normalize
from fastnorm.functional import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
)
from fastnorm.functional_rows import (
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from fastnorm.install import get_include, get_library
from fastnorm.layers import GroupNorm, LayerNorm, LocalResponseNorm, RMSNorm
from fastnorm.layers_running import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from fastnorm.results import Gradients, GradientsWithResidual, Statistics

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Gradients",
    "GradientsWithResidual",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "LocalResponseNorm",
    "RMSNorm",
    "Statistics",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "explain",
    "get_include",
    "get_library",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "local_response_norm",
    "normalize",
    "rms_norm",
    "rms_norm_backward",
    "set_num_threads",
]


def __getattr__(name):
    if name == "__version__":
        from fastnorm.install import version

        return version()
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
