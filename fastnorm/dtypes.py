"""The tables of element types: one row for each type that x may have."""

from typing import NamedTuple

import numpy as np


class DType(NamedTuple):
    storage: np.dtype  # of x and y
    accumulator: np.dtype  # of the readable backend's arithmetic
    code: int  # fastnorm_dtype of fastnorm.h
    eps: float  # machine epsilon
    tolerance: float  # relative to the largest value of y, against the exact result


_ROWS = [
    DType(np.dtype(np.float32), np.dtype(np.float64), 1, 2.0**-23, 1e-6),
    DType(np.dtype(np.float64), np.dtype(np.float64), 2, 2.0**-52, 1e-14),
    DType(np.dtype(np.float16), np.dtype(np.float64), 3, 2.0**-10, 5e-4),
]
try:  # NumPy's bfloat16, for those who have it
    import ml_dtypes
except ImportError:
    pass
else:
    _ROWS.append(
        DType(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64), 4, 2.0**-7, 4e-3)
    )
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
