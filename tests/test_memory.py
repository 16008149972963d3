"""No call needs a temporary of its arrays' size: beyond its outputs it allocates little."""

import ctypes
import pickle
import tracemalloc

import numpy as np
import pytest
from cases import DTYPES
from test_grid import skip_what_it_does_not_serve

import fastnorm
from fastnorm import geometry
from fastnorm.bench.cells import cells

LIMIT = 2 << 20  # bytes


class Sizes(ctypes.Structure):
    """fastnorm_geometry of fastnorm.h."""

    _fields_ = [(axis, ctypes.c_int64) for axis in "bogkis"]


def sizes_of(cell):
    if cell.op in ("layer", "rms"):
        return geometry.across(cell.shape, 1, 2) if cell.layout else geometry.rows(cell.shape, 1)
    first = cell.layout != "NHWC"
    shape = cell.shape if first else (cell.shape[0], *cell.shape[2:], cell.shape[1])
    if cell.op.startswith("batch"):
        return geometry.batch(shape, first)
    return geometry.group(shape, first, cell.groups or cell.shape[1])


@pytest.mark.parametrize("dtype", [1, 2, 3, 4], ids=["float32", "float64", "float16", "bfloat16"])
def test_the_librarys_workspace_is_small_for_every_benchmarked_shape(dtype):
    library = ctypes.CDLL(fastnorm.get_library())
    size = ctypes.c_size_t()
    needed = {}
    for cell in cells():
        status = library.fastnorm_workspace_size(
            ctypes.byref(Sizes(*sizes_of(cell))), dtype, ctypes.byref(size)
        )
        assert status == 0
        needed[str(cell)] = size.value
    assert max(needed.values()) < LIMIT, max(needed, key=needed.get)


CALLS = {
    "batch": lambda x, **kw: fastnorm.batch_norm(x, training=True, **kw),
    "instance": lambda x, **kw: fastnorm.instance_norm(x, **kw),
    "group": lambda x, **kw: fastnorm.group_norm(x, 8, **kw),
    "layer": lambda x, **kw: fastnorm.layer_norm(x, x.shape[-1], **kw),
    "rms": lambda x, **kw: fastnorm.rms_norm(x, x.shape[-1], **kw),
    "axis": lambda x, **kw: fastnorm.layer_norm(x, x.shape[1], axis=1, **kw),
    "fused": lambda x, **kw: fastnorm.batch_norm(
        x, training=True, residual=x, activation="silu", **kw
    ),
}
BACKWARDS = {
    "batch": fastnorm.batch_norm_backward,
    "instance": fastnorm.instance_norm_backward,
    "group": lambda dy, x, s, **kw: fastnorm.group_norm_backward(dy, x, s, 8, **kw),
    "layer": lambda dy, x, s, **kw: fastnorm.layer_norm_backward(dy, x, s, x.shape[-1], **kw),
    "rms": lambda dy, x, s, **kw: fastnorm.rms_norm_backward(dy, x, s, x.shape[-1], **kw),
    "axis": lambda dy, x, s, **kw: fastnorm.layer_norm_backward(
        dy, x, s, x.shape[1], axis=1, **kw
    ),
    "fused": lambda dy, x, s, **kw: fastnorm.batch_norm_backward(
        dy, x, s, activation="silu", **kw
    ),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("norm", CALLS)
def test_python_allocates_nothing_of_the_size_of_x(norm, layout):
    x = np.ones((16, 64, 64, 64), np.float32)  # 16 MB
    out = np.empty_like(x)
    common = {"out": out}
    if norm not in ("layer", "rms", "axis"):
        common["layout"] = layout
    _, stats = CALLS[norm](x, return_stats=True, **common)
    for call in (
        lambda: CALLS[norm](x, return_stats=True, **common),
        lambda: BACKWARDS[norm](x, x, stats, **common),
    ):
        tracemalloc.start()
        try:
            call()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < LIMIT


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", CALLS)
def test_what_a_call_allocates_starts_at_a_cache_line(norm, dtype, transposed, engine):
    """And is an array as any other, whether the call is done whole or the long way."""
    skip_what_it_does_not_serve(engine, dtype)
    x = np.ones((4, 64, 16, 16), dtype)
    if transposed:
        x = x.transpose(0, 1, 3, 2)
    y, stats = CALLS[norm](x, return_stats=True, backend=engine)
    dx = BACKWARDS[norm](x, x, stats, backend=engine).dx
    for made in (y, dx):
        assert made.ctypes.data % 64 == 0
        assert made.shape == x.shape
        assert made.flags.writeable
        assert made.dtype == dtype
        assert type(made) is np.ndarray
    assert np.array_equal(pickle.loads(pickle.dumps(y)), y)
