"""The tables of element types: one row for each type that x may have."""

from typing import NamedTuple

import numpy as np


class DType(NamedTuple):
    storage: np.dtype  # of x and y
    accumulator: np.dtype  # of the readable backend's arithmetic
    work: np.dtype  # of the other backends'
    bits: np.dtype  # as which Numba sees it: its own type, or integers that tell two apart
    code: int  # fastnorm_dtype of fastnorm.h
    eps: float  # machine epsilon
    tolerance: float  # relative to the largest value of y, against the exact result


_F2, _F4, _F8 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
_ROWS = [
    DType(_F4, _F8, _F4, _F4, 1, 2.0**-23, 1e-6),
    DType(_F8, _F8, _F8, _F8, 2, 2.0**-52, 1e-14),
    DType(_F2, _F8, _F4, np.dtype(np.uint16), 3, 2.0**-10, 5e-4),
]
try:  # NumPy's bfloat16, for those who have it
    import ml_dtypes
except ImportError:
    pass
else:
    _BF2 = np.dtype(ml_dtypes.bfloat16)
    _ROWS.append(DType(_BF2, _F8, _F4, np.dtype(np.int16), 4, 2.0**-7, 4e-3))
TABLE = {row.storage: row for row in _ROWS}
NAMES = "float32, float64, float16 or (of ml_dtypes) bfloat16"


class DeviceType(NamedTuple):
    itemsize: int
    accumulator: str  # of statistics and of the arithmetic
    eps: float
    tolerance: float


# By name: NumPy has no bfloat16.
DEVICE_TABLE = {
    "float32": DeviceType(4, "float32", 2.0**-23, 2e-6),
    "float64": DeviceType(8, "float64", 2.0**-52, 1e-14),
    "float16": DeviceType(2, "float32", 2.0**-10, 1e-3),
    "bfloat16": DeviceType(2, "float32", 2.0**-7, 8e-3),
}
DEVICE_NAMES = ", ".join(DEVICE_TABLE)
