"""The CUDA backend: what it refuses, the simulated grid, the compiled code, and a GPU where one is.

Without a GPU and without numba-cuda, the simulator (a part of Numba) runs every kernel, and the
tests of compiled code and of a GPU are skipped. With the extra fastnorm[cuda13] and ptxas, every
kernel is compiled and assembled for two architectures without a GPU.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cases import Case

import fastnorm
from fastnorm import backends, device
from fastnorm.backends import numba_cuda

HERE = Path(__file__).parent


def run(code, **environment):
    return subprocess.run(
        [sys.executable, *code], cwd=HERE, env=os.environ | environment, capture_output=True,
        text=True, timeout=900,
    )


# ---- without a GPU ------------------------------------------------------------------------------


class Far:
    """What an array on a GPU shows of itself."""

    def __init__(self, shape, typestr="<f4", strides=None, address=4096):
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "strides": strides, "data": (address, False),
            "version": 3,
        }


def test_simulated_grid():
    pytest.importorskip("ml_dtypes")
    done = run(["-m", "pytest", "-q", "cuda_simulated.py"], NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_without_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None)
    numba_cuda._reason.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"needs numba-cuda.*fastnorm\[cuda13\]"):
            fastnorm.batch_norm(Far((2, 3, 4)), training=True)
    finally:
        numba_cuda._reason.cache_clear()


def test_where_it_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(backends._loaded, "cuda", "cannot be imported: No module named 'numba'")
    with pytest.raises(RuntimeError, match="'cuda' cannot be imported"):
        fastnorm.layer_norm(Far((2, 3, 4)), 4)


def test_after_a_fork_it_is_refused(monkeypatch):
    monkeypatch.setattr(numba_cuda, "_process", os.getpid() + 1)
    with pytest.raises(RuntimeError, match=r"does not survive a fork.*spawn"):
        fastnorm.batch_norm(Far((2, 3, 4)), training=True)


def test_arrays_of_the_host_are_refused():
    with pytest.raises(ValueError, match=r"numpy.ndarray.*'cuda'.*torch.from_numpy\(x\).cuda"):
        fastnorm.batch_norm(np.ones((2, 3, 4)), training=True, backend="cuda")
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"x is a Tensor.*numpy.asarray"):
        fastnorm.batch_norm(torch.ones(2, 3, 4), training=True)


def test_a_view_of_the_array_interface():
    view = device.view_of(Far((2, 3, 4)))
    assert (view.shape, view.strides, view.dtype) == ((2, 3, 4), (48, 16, 4), "float32")
    assert view.flags.c_contiguous
    assert view.span() == (4096, 4096 + 96)
    strided = device.view_of(Far((2, 3), "<f8", (64, 8)))
    assert not strided.flags.c_contiguous
    assert strided.span() == (4096, 4096 + 64 + 24)
    moved = np.moveaxis(device.view_of(Far((2, 3, 4))), 1, -1)
    assert (moved.shape, moved.strides) == ((2, 4, 3), (48, 4, 16))
    assert view.apart(device.view_of(Far((1,), address=4096 + 96)))
    assert not view.apart(device.view_of(Far((1,), address=4096 + 95)))
    assert device.view_of(np.ones(3)) is None
    assert device.view_of("text") is None


def test_an_unknown_type_is_refused():
    with pytest.raises(TypeError, match=r"complex64.*bfloat16"):
        fastnorm.batch_norm(Far((2, 3, 4), "<c8"), training=True)


# ---- what the compiler makes of the kernels -------------------------------------------------

PTXAS = shutil.which("ptxas") or next(
    (str(path) for path in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/ptxas")),
    None,
)
LOADS = {  # kernels that read and write x in vectors where they may: (loads, stores)
    "row_moments": (1, 0), "row_products": (1, 0), "column_moments": (1, 0),
    "column_products": (1, 0), "map_rows": (1, 1), "map_columns": (1, 1),
    "element_forward": (1, 1), "element_backward": (1, 1),
}


@pytest.fixture(scope="module")
def compiler():
    if find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    if PTXAS is None:
        pytest.skip("ptxas is not installed")
    import numba.cuda.dispatcher as dispatcher
    from numba import cuda, types

    from fastnorm.backends import cuda_kernels

    def compile_(storage, parameter, wide, capability):
        # Functions of the device are compiled for the GPU at hand, of which there may be none.
        present = type("Device", (), {"compute_capability": capability})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatcher, "get_current_device", lambda: present)
            made = cuda_kernels.kernels.__wrapped__(storage, parameter, wide)
            for name, kernel in vars(made).items():
                if name in ("work", "lanes"):
                    continue
                arguments = inspect.signature(kernel.py_func).parameters
                numbers = ("eps", "momentum", "count", "scale")
                signature = types.void(
                    *(made.work if name in numbers else types.int64 for name in arguments)
                )
                yield name, cuda.compile_ptx(kernel.py_func, signature, cc=capability)[0]

    return compile_


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["vectors", "scalars"])
@pytest.mark.parametrize(
    ("storage", "parameter"),
    [("float32", "float32"), ("float64", "float64"), ("float16", "float16"),
     ("float16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_compiled_code(compiler, tmp_path, storage, parameter, wide, capability):
    for name, ptx in compiler(storage, parameter, wide, capability):
        source, binary = tmp_path / f"{name}.ptx", tmp_path / f"{name}.cubin"
        source.write_text(ptx, encoding="utf-8")
        architecture = f"sm_{capability[0]}{capability[1]}"
        done = subprocess.run(
            [PTXAS, f"-arch={architecture}", "-v", str(source), "-o", str(binary)],
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, (name, done.stderr)
        spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
        assert spilled and not any(map(int, spilled)), (name, done.stderr)  # noqa: PT018
        assert storage == "float64" or ".f64" not in ptx, name
        if wide:
            loads, stores = LOADS.get(name, (0, 0))
            assert len(re.findall(r"ld\.global\.v[24]\.", ptx)) >= loads, name
            assert len(re.findall(r"st\.global\.v[24]\.", ptx)) >= stores, name


# ---- on a GPU -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu():
    """torch, where it has a GPU and numba-cuda can use it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if numba_cuda.refusal() is not None:
        pytest.skip(numba_cuda.refusal())
    return torch


TOLERANCE = {"float32": 2e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}
REAL = [
    Case("batch", (16, 64, 28, 28)), Case("batch", (7, 17, 13, 13)), Case("batch", (32, 512, 7, 7)),
    Case("batch", (300, 257)), Case("batch", (2, 3, 300, 301)),
    Case("instance", (4, 33, 41, 43)), Case("instance", (2, 32, 16, 16, 16)),
    Case("group", (2, 320, 32, 32), 32), Case("group", (3, 12, 9, 11), 4),
    Case("layer", (512, 768)), Case("layer", (33, 1001)), Case("layer", (4, 70001)),
    Case("rms", (512, 4096)), Case("rms", (100, 96)),
]


def on_gpu(torch, array, dtype, nhwc=False):
    tensor = torch.from_numpy(array).to("cuda", getattr(torch, dtype))
    return tensor.movedim(1, -1).contiguous() if nhwc else tensor


def error(found, exact, nhwc=False):
    host = found.double().cpu().numpy()
    host = np.moveaxis(host, -1, 1) if nhwc else host
    return np.max(np.abs(host - exact)) / max(1, np.max(np.abs(exact)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_on_a_gpu(gpu, case, dtype):
    x, dy, weight, bias = case.arrays(np.float64)
    rounded = [on_gpu(gpu, a, dtype).double().cpu().numpy() for a in (x, dy)]
    parameter = "float64" if dtype == "float64" else "float32"
    w = on_gpu(gpu, weight, parameter)
    b = None if bias is None else on_gpu(gpu, bias, parameter)
    exact = case.exact(*rounded, w.double().cpu().numpy(), bias)
    work = TOLERANCE[parameter]
    for nhwc in (False, True)[: 1 + case.by_channel]:
        common = {"layout": "NHWC" if nhwc else "NCHW"} if case.by_channel else {}
        here, slopes = (on_gpu(gpu, a, dtype, nhwc) for a in (x, dy))
        y, stats = case.forward(here, w, b, return_stats=True, **common)
        assert error(y, exact["y"], nhwc) < TOLERANCE[dtype]
        dx, dweight, dbias = case.backward(slopes, here, stats, w, **common)
        assert error(dx, exact["dx"], nhwc) < 4 * TOLERANCE[dtype]
        assert error(dweight, exact["dweight"]) < 20 * work
        assert dbias is None or error(dbias, exact["dbias"]) < 20 * work
        again, _ = case.forward(here, w, b, return_stats=True, **common)
        assert gpu.equal(y, again)


def test_channels_last_memory_on_a_gpu(gpu):
    x = gpu.randn(4, 32, 9, 9, device="cuda").to(memory_format=gpu.channels_last)
    y = fastnorm.batch_norm(x, training=True)
    assert y.stride() == x.stride()
    wanted = gpu.nn.functional.batch_norm(x, None, None, training=True)
    assert gpu.allclose(y, wanted, atol=1e-5)


def test_beside_torch_on_a_gpu(gpu):
    x = gpu.randn(8, 16, 14, 14, device="cuda")
    ours, theirs = fastnorm.BatchNorm2d(16), gpu.nn.BatchNorm2d(16, device="cuda")
    for _ in range(3):
        assert gpu.allclose(ours(x), theirs(x), atol=1e-5)
    for name, value in theirs.state_dict().items():
        assert np.allclose(ours.state_dict()[name], value.cpu().numpy(), rtol=1e-4, atol=1e-6)


def test_the_current_stream_on_a_gpu(gpu):
    stream = gpu.cuda.Stream()
    x = gpu.zeros(64, 64, 64, 64, device="cuda")
    out = gpu.empty_like(x)
    gpu.cuda.synchronize()
    with gpu.cuda.stream(stream):
        for step in range(20):
            x.fill_(step)
            x[:, :, ::2] += 1
            fastnorm.batch_norm(x, training=True, out=out)
            mean = out.mean()
    stream.synchronize()
    assert abs(float(mean)) < 1e-4
    assert abs(float(out.std()) - 1) < 1e-3


def test_cupy_on_a_gpu(gpu):
    cupy = pytest.importorskip("cupy")
    x = cupy.random.standard_normal((4, 8, 5), dtype=cupy.float32)
    y = fastnorm.batch_norm(x, training=True)
    assert isinstance(y, cupy.ndarray)
    assert cupy.allclose(y.mean(axis=(0, 2)), 0, atol=1e-5)


def test_a_forked_child_on_a_gpu(gpu):
    code = (
        "import os, torch, fastnorm\n"
        "x = torch.randn(2, 3, 4, device='cuda')\n"
        "fastnorm.batch_norm(x, training=True)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    try:\n"
        "        fastnorm.batch_norm(x, training=True)\n"
        "    except RuntimeError as error:\n"
        "        os._exit(0 if 'fork' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert run(["-c", code]).returncode == 0
