"""The CUDA kernels under Numba's simulator; test_cuda.py runs this file where that is switched on.

Small sizes: the simulator takes a thread of the system for each thread of a block. The twin of the
device primitives refuses every access outside of an array and every unaligned vector access.
"""

import ml_dtypes
import numpy as np
import pytest
from cases import Case
from numba import cuda

import fastnorm
from fastnorm.backends import cuda_simulated, numba_cuda

DTYPES = {
    "float32": np.dtype(np.float32), "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}

# Both loop orders, vector and scalar accesses, one part and several, rows with a weight for each
# place and without, groups of one, some and all channels.
CASES = [
    Case("batch", (2, 3, 8)),
    Case("batch", (3, 2, 5)),
    Case("batch", (2, 2, 9, 8)),
    Case("batch", (5, 8)),
    Case("batch", (40, 3)),
    Case("instance", (2, 2, 7)),
    Case("group", (2, 4, 2, 4), 2),
    Case("group", (2, 6, 3), 1),
    Case("group", (3, 6), 3),
    Case("layer", (3, 16)),
    Case("layer", (2, 3, 5)),
    Case("rms", (3, 24)),
    Case("rms", (2, 7)),
]


@pytest.fixture(autouse=True)
def small_launches(monkeypatch):
    """So that small arrays are cut into several parts too."""
    monkeypatch.setattr(numba_cuda, "BLOCKS", 8)
    monkeypatch.setattr(numba_cuda, "STEPS", 1)


def lay(array, layout):
    """On the device, in the layout."""
    if layout == "NHWC":
        array = np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return cuda.to_device(array)


def fetch(array, layout=None):
    """Back from it, channels first, exactly."""
    host = array.copy_to_host().astype(np.longdouble)
    return np.moveaxis(host, -1, 1) if layout == "NHWC" else host


def close(found, exact, dtype, scale=None):
    scale = np.max(np.abs(exact)) if scale is None else scale
    assert np.max(np.abs(found - exact)) <= TOLERANCE[dtype] * scale


def layouts(case):
    return ("NCHW", "NHWC") if case.by_channel else (None,)


GRID = [(case, layout) for case in CASES for layout in layouts(case)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "layout"), GRID, ids=lambda value: str(value))
def test_forward_and_backward(case, layout, dtype):
    x, dy, weight, bias = case.arrays(np.float64)
    x, dy = x.astype(DTYPES[dtype]), dy.astype(DTYPES[dtype])
    parameter = np.float64 if dtype == "float64" else np.float32
    weight = weight.astype(parameter)
    bias = None if bias is None else bias.astype(parameter)
    exact = case.exact(x.astype(np.float64), dy.astype(np.float64), weight, bias)
    common = {"layout": layout} if layout else {}
    device_x, device_w = lay(x, layout), cuda.to_device(weight)
    y, stats = case.forward(
        device_x, device_w, None if bias is None else cuda.to_device(bias), return_stats=True,
        **common,
    )
    assert type(y) is type(device_x)
    assert y.shape == device_x.shape
    close(fetch(y, layout), exact["y"], dtype)
    work = "float64" if dtype == "float64" else "float32"
    close(fetch(stats.mean), exact["mean"].reshape(stats.mean.shape), work, 2)
    close(fetch(stats.rstd), exact["rstd"].reshape(stats.rstd.shape), work)
    dx, dweight, dbias = case.backward(lay(dy, layout), device_x, stats, device_w, **common)
    close(fetch(dx, layout), exact["dx"], dtype, np.max(np.abs(dy)) * np.max(np.abs(weight)))
    close(fetch(dweight), exact["dweight"], work, np.max(np.abs(exact["dweight"])) + 1)
    if dbias is not None:
        close(fetch(dbias), exact["dbias"], work, np.max(np.abs(exact["dbias"])) + 1)


@pytest.mark.parametrize("case", [Case("batch", (2, 3, 8)), Case("layer", (3, 16))], ids=str)
def test_parameters_of_the_same_short_type_and_none(case):
    x, dy, weight, bias = case.arrays(np.float16)
    exact = case.exact(x.astype(np.float64), dy.astype(np.float64), weight, bias)
    y, stats = case.forward(*map(cuda.to_device, (x, weight, bias)), return_stats=True)
    close(fetch(y), exact["y"], "float16")
    gradients = case.backward(*map(cuda.to_device, (dy, x)), stats, cuda.to_device(weight))
    assert gradients.dweight.copy_to_host().dtype == np.float16
    plain = case.exact(x.astype(np.float64), dy.astype(np.float64), None, None)
    close(fetch(case.forward(cuda.to_device(x), None, None)), plain["y"], "float16")
    gradients = case.backward(cuda.to_device(dy), cuda.to_device(x), stats, None)
    close(fetch(gradients.dx), plain["dx"], "float16", np.max(np.abs(dy)))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_running_statistics(layout):
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, (3, 4, 5)).astype(np.float32)
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    on_gpu = [cuda.to_device(a) for a in (mean, var)]
    y = fastnorm.batch_norm(lay(x, layout), *on_gpu, training=True, layout=layout)
    wanted = fastnorm.batch_norm(x, mean, var, training=True)
    close(fetch(y, layout), wanted, "float32")
    close(fetch(on_gpu[0]), mean, "float32")
    close(fetch(on_gpu[1]), var, "float32")
    y, stats = fastnorm.batch_norm(lay(x, layout), *on_gpu, layout=layout, return_stats=True)
    wanted, wanted_stats = fastnorm.batch_norm(x, mean, var, return_stats=True)
    close(fetch(y, layout), wanted, "float32")
    dx, dweight, dbias = fastnorm.batch_norm_backward(
        lay(x, layout), lay(x, layout), stats, layout=layout
    )
    gradients = fastnorm.batch_norm_backward(x, x, wanted_stats)
    close(fetch(dx, layout), gradients.dx, "float32")
    close(fetch(dweight), gradients.dweight, "float32")
    close(fetch(dbias), gradients.dbias, "float32")


def test_running_statistics_of_instances():
    x = np.random.default_rng(1).normal(3, 2, (3, 4, 5)).astype(np.float32)
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    on_gpu = [cuda.to_device(a) for a in (mean, var)]
    fastnorm.instance_norm(cuda.to_device(x), *on_gpu)
    fastnorm.instance_norm(x, mean, var)
    close(fetch(on_gpu[0]), mean, "float32")
    close(fetch(on_gpu[1]), var, "float32")


def test_out_and_in_place():
    x, dy, weight, bias = Case("batch", (2, 3, 8)).arrays(np.float32)
    exact = Case("batch", (2, 3, 8)).exact(x, dy, weight, bias)
    on_gpu = cuda.to_device(x)
    out = cuda.to_device(np.empty_like(x))
    parameters = (cuda.to_device(weight), cuda.to_device(bias), True)
    assert fastnorm.batch_norm(on_gpu, None, None, *parameters, out=out) is out
    close(fetch(out), exact["y"], "float32")
    assert fastnorm.batch_norm(on_gpu, None, None, *parameters, out=on_gpu) is on_gpu
    close(fetch(on_gpu), exact["y"], "float32")


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_variance_about_the_mean(shift):
    """An outlier first in every channel, and a mean far from zero: nothing cancels."""
    x = np.random.default_rng(2).normal(shift, 1, (2, 3, 16)).astype(np.float32)
    if not shift:
        x[:, :, 5] = 1e4
    _, stats = fastnorm.batch_norm(cuda.to_device(x), training=True, return_stats=True)
    var = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert np.max(np.abs(fetch(stats.var) / var - 1)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*invalid value")
def test_constant_nan_and_inf():
    x = np.full((2, 3, 8), 7.1, np.float32)
    assert np.all(fetch(fastnorm.batch_norm(cuda.to_device(x), training=True)) == 0)
    x[1, 1, 3] = np.nan
    x[0, 2, 0] = np.inf
    y = fetch(fastnorm.batch_norm(cuda.to_device(x), training=True))
    assert np.all(y[:, 0] == 0)
    assert np.all(np.isnan(y[:, 1]))
    assert np.isnan(y[0, 2, 0])


def test_the_same_bits_every_time():
    x = cuda.to_device(np.random.default_rng(3).normal(size=(3, 2, 40)).astype(np.float32))
    first, again = (fetch(fastnorm.batch_norm(x, training=True)) for _ in range(2))
    assert np.array_equal(first, again)


def test_an_empty_batch():
    y, stats = fastnorm.instance_norm(
        cuda.to_device(np.empty((0, 3, 4), np.float32)), return_stats=True
    )
    assert y.shape == (0, 3, 4)
    assert stats.mean.shape == (0, 3)


def test_a_layer_follows_its_input():
    x = np.random.default_rng(4).normal(2, 3, (2, 4, 5)).astype(np.float32)
    layer, wanted = fastnorm.BatchNorm1d(4), fastnorm.BatchNorm1d(4)
    for _ in range(2):
        y, here = layer(cuda.to_device(x)), wanted(x)
        close(fetch(y), here, "float32")
        close(fetch(layer.backward(cuda.to_device(x))), wanted.backward(x), "float32", 1)
    close(fetch(layer.grad_bias), wanted.grad_bias, "float32")
    for name, value in wanted.state_dict().items():
        assert np.allclose(layer.state_dict()[name], value, rtol=1e-5)
    assert np.allclose(layer.eval()(x), wanted.eval()(x), rtol=1e-4, atol=1e-5)


def refused(error, words, call, *arguments, **keywords):
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    for word in words:
        assert word in str(caught.value), caught.value


def test_errors():
    host = np.ones((2, 3, 8), np.float32)
    x = cuda.to_device(host)
    norm = fastnorm.batch_norm
    refused(ValueError, ["on a GPU", "'native'"], norm, x, training=True, backend="native")
    refused(ValueError, ["numpy.ndarray", "'cuda'", "cupy"], norm, host, training=True,
            backend="cuda")
    refused(TypeError, ["weight is a ndarray", "on the GPU"], norm, x, None, None,
            np.ones(3, np.float32), training=True)
    refused(ValueError, ["weight has shape (4,)", "(3,)"], norm, x, None, None,
            cuda.to_device(np.ones(4, np.float32)), training=True)
    refused(TypeError, ["int64"], norm, cuda.to_device(np.ones((2, 3), np.int64)), training=True)
    refused(TypeError, ["dtypes", "expected one"], norm, x, None, None,
            cuda.to_device(np.ones(3, np.float32)), cuda.to_device(np.ones(3)), True)
    refused(TypeError, ["out is a ndarray"], norm, x, training=True, out=host)
    refused(ValueError, ["out has shape"], norm, x, training=True,
            out=cuda.to_device(np.ones((2, 3), np.float32)))
    apart = cuda.to_device(np.ones((2, 3, 16), np.float32))[:, :, ::2]
    refused(ValueError, ["x has shape", "nothing is copied"], norm, apart, training=True)
    _, stats = norm(x, training=True, return_stats=True)
    refused(TypeError, ["dy is a ndarray", "like x"], fastnorm.batch_norm_backward, host, x, stats)
    _, elsewhere = norm(host, training=True, return_stats=True)
    refused(TypeError, ["stats.mean is a ndarray"], fastnorm.batch_norm_backward, x, x, elsewhere)
    refused(TypeError, ["numpy.ndarray"], fastnorm.local_response_norm, x, 3)
    for settings, text in (
        ({"activation": "relu"}, "neither an activation nor a residual"),
        ({"residual": x}, "neither an activation nor a residual"),
        ({"ghost_size": 1}, "ghost_size"),
        ({"nan_policy": "skip"}, "nan_policy"),
        ({"mask": np.ones((2, 8), bool)}, "neither mask nor lengths"),
    ):
        running = [cuda.to_device(np.ones(3, np.float32)) for _ in range(2)]
        refused(ValueError, ["on a GPU", text], norm, x, *running, training=True, **settings)
    refused(ValueError, ["only trailing axes"], fastnorm.layer_norm, x, 3, axis=1)
    refused(ValueError, ["on a GPU"], fastnorm.layer_norm_backward, x, x, stats, 8, dsum=x)
    refused(ValueError, ["on a GPU"], fastnorm.batch_norm_backward, x, x, stats, from_output=True)


def test_the_simulator_sees_bad_accesses():
    words = cuda_simulated.words("float32", wide=True)
    address = cuda_simulated.open_array(np.zeros(16, np.float32))
    try:
        start = -(-address // 16) * 16
        with pytest.raises(IndexError, match="not a multiple"):
            words.load_lanes(start + 4, 0, np.empty(4, np.float32))
        with pytest.raises(IndexError, match="outside"):
            words.load(address, 16)
    finally:
        cuda_simulated.close_arrays()
