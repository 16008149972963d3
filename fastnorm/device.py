"""Arrays on a GPU, whosever they are, as one view that answers to NumPy's words for their shape.

A view is made without a copy from torch tensors, CuPy and Numba device arrays, from any other
object with a __cuda_array_interface__, and through DLPack where torch or CuPy has been imported.
New arrays come from the library that made x, on its device and its current stream.
"""

import sys
from math import prod

import numpy as np

from fastnorm.dtypes import DEVICE_TABLE

CUDA_OF_DLPACK = 2  # kDLCUDA


class _Flags:
    __slots__ = ("c_contiguous", "writeable")

    def __init__(self, c_contiguous, writeable):
        self.c_contiguous = c_contiguous
        self.writeable = writeable


class DeviceArray:
    """Memory of a device: `owner` is the array it was made from, `kind` that array's library."""

    __slots__ = ("address", "dtype", "flags", "kind", "owner", "shape", "strides")

    def __init__(self, owner, kind, address, shape, strides, dtype, writeable=True):
        self.owner, self.kind, self.address = owner, kind, address
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), dtype
        self.flags = _Flags(self._is_contiguous(), writeable)

    def _is_contiguous(self):
        step = DEVICE_TABLE[self.dtype].itemsize if self.dtype in DEVICE_TABLE else 1
        if 0 in self.shape:
            return True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return prod(self.shape)

    @property
    def eps(self):
        """Machine epsilon of the dtype."""
        return DEVICE_TABLE[self.dtype].eps

    def transpose(self, order):
        """The same memory with its axes in another order; numpy.moveaxis calls this."""
        return DeviceArray(
            self.owner, self.kind, self.address, (self.shape[a] for a in order),
            (self.strides[a] for a in order), self.dtype, self.flags.writeable,
        )

    def span(self):
        """The first address, and the one behind the last byte."""
        if self.size == 0:
            return self.address, self.address
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.address, self.address + reach + DEVICE_TABLE[self.dtype].itemsize

    def apart(self, other):
        """Whether two arrays surely share no byte."""
        (start, stop), (other_start, other_stop) = self.span(), other.span()
        return stop <= other_start or other_stop <= start

    def empty_like(self):
        """A new array that lies as this one does."""
        return self.kind.view(self.kind.empty_like(self.owner))

    def empty(self, shape, dtype, zero=False):
        """A new contiguous array on the same device."""
        return self.kind.view(self.kind.empty(self.owner, shape, dtype, zero))

    def stream(self):
        """The stream that the owner's library works on now, as the driver's handle."""
        return self.kind.stream(self.owner)


def _view_by_interface(kind, array):
    """By the CUDA array interface, version 3 or before."""
    told = array.__cuda_array_interface__
    dtype = np.dtype(told["typestr"])
    strides = told.get("strides")
    if strides is None:
        strides = [dtype.itemsize * prod(told["shape"][a + 1 :]) for a in range(len(told["shape"]))]
    address, read_only = told["data"]
    return DeviceArray(
        array, kind, address or 0, told["shape"], strides, str(dtype), writeable=not read_only
    )


class _Torch:
    name = "torch.Tensor"

    @staticmethod
    def owns(array):
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor) and array.is_cuda

    @classmethod
    def view(cls, array):
        itemsize = array.element_size()
        return DeviceArray(
            array, cls, array.data_ptr(), array.shape, (s * itemsize for s in array.stride()),
            str(array.dtype).removeprefix("torch."),
        )

    @staticmethod
    def empty_like(array):
        return sys.modules["torch"].empty_like(array)

    @staticmethod
    def empty(like, shape, dtype, zero):
        torch = sys.modules["torch"]
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=getattr(torch, dtype), device=like.device)

    @staticmethod
    def upload(like, host):
        return sys.modules["torch"].from_numpy(host).to(like.device)

    @staticmethod
    def download(array):
        return array.detach().cpu().numpy()

    @staticmethod
    def stream(array):
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream


class _Cupy:
    name = "cupy.ndarray"

    @staticmethod
    def owns(array):
        cupy = sys.modules.get("cupy")
        return cupy is not None and isinstance(array, cupy.ndarray)

    @classmethod
    def view(cls, array):
        return DeviceArray(
            array, cls, array.data.ptr, array.shape, array.strides, str(array.dtype)
        )

    @staticmethod
    def empty_like(array):
        return sys.modules["cupy"].empty_like(array, order="K")

    @staticmethod
    def empty(like, shape, dtype, zero):
        cupy = sys.modules["cupy"]
        with like.device:
            return (cupy.zeros if zero else cupy.empty)(shape, dtype)

    @staticmethod
    def upload(like, host):
        with like.device:
            return sys.modules["cupy"].asarray(host)

    @staticmethod
    def download(array):
        return array.get()

    @staticmethod
    def stream(array):
        return sys.modules["cupy"].cuda.get_current_stream().ptr


class _Interface:
    """Numba's arrays, and any other object with a __cuda_array_interface__: results are Numba's."""

    name = "numba device array"

    @staticmethod
    def owns(array):
        return hasattr(array, "__cuda_array_interface__")

    @classmethod
    def view(cls, array):
        return _view_by_interface(cls, array)

    @classmethod
    def empty_like(cls, array):
        from numba import cuda

        view = cls.view(array)
        return cuda.device_array(view.shape, view.dtype, strides=view.strides)

    @staticmethod
    def empty(like, shape, dtype, zero):
        from numba import cuda

        if zero:
            return cuda.to_device(np.zeros(shape, dtype))
        return cuda.device_array(shape, dtype)

    @staticmethod
    def upload(like, host):
        from numba import cuda

        return cuda.to_device(host)

    @staticmethod
    def download(array):
        from numba import cuda

        return cuda.as_cuda_array(array).copy_to_host()

    @staticmethod
    def stream(array):
        return array.__cuda_array_interface__.get("stream") or 0


class _Simulated(_Interface):
    """Arrays of Numba's simulator, which lie in the host's memory."""

    @staticmethod
    def owns(array):
        return type(array).__name__ == "FakeCUDAArray"

    @classmethod
    def view(cls, array):
        host = array._ary
        return DeviceArray(array, cls, host.ctypes.data, host.shape, host.strides, str(host.dtype))

    @staticmethod
    def empty_like(array):
        from numba import cuda

        return cuda.to_device(np.full_like(array._ary, np.nan))

    @staticmethod
    def empty(like, shape, dtype, zero):
        from numba import cuda

        return cuda.to_device(np.full(shape, 0 if zero else np.nan, dtype))

    @staticmethod
    def download(array):
        return array.copy_to_host()

    @staticmethod
    def stream(array):
        return 0


KINDS = (_Torch, _Cupy, _Simulated, _Interface)


def view_of(array):
    """A DeviceArray on the memory of an array on a GPU; None for anything else."""
    if isinstance(array, DeviceArray):
        return array
    for kind in KINDS:
        if kind.owns(array):
            return kind.view(array)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == CUDA_OF_DLPACK:
        for library in ("torch", "cupy"):
            if library in sys.modules:
                return view_of(sys.modules[library].from_dlpack(array))
    return None


def beside(array, x):
    """A layer's own array, moved to where x is; None is None. Only ever called for the state of a
    layer: what a person hands in is not moved."""
    there, here = view_of(x), view_of(array) if array is not None else None
    if array is None or (there is None) == (here is None):
        return array
    return here.kind.download(array) if there is None else there.kind.upload(there.owner, array)


def to_host(array):
    """An array of any kind as a NumPy array."""
    view = view_of(array)
    return np.array(array) if view is None else view.kind.download(array)


def added(a, b):
    """a + b of two arrays of one kind. Numba's have no arithmetic, and go by the host."""
    view = None if isinstance(a, np.ndarray) else view_of(a)
    if view is None or not issubclass(view.kind, _Interface):
        return a + b
    return view.kind.upload(a, view.kind.download(a) + view.kind.download(b))
