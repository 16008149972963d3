"""The promises of the Numba backend: threads, forks, the cache, worlds without a compiler."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cases import DTYPES

import fastnorm
from fastnorm import backends
from fastnorm.__main__ import main

ROOT = Path(__file__).parents[1]

numba = pytest.importorskip("numba")


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=1500,
        env=os.environ | environment, cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WORLDS = {
    "native": ([], "native"),
    "numba": (["fastnorm.backends.native"], "numba"),
    "reference": (["fastnorm.backends.native", "numba"], "reference"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_each_world_normalizes_and_explains(world):
    missing, chosen = WORLDS[world]
    if chosen == "native" and isinstance(backends.load("native"), str):
        pytest.skip("no native library here")
    out = run(f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
import numpy as np, fastnorm
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
y, stats = fastnorm.batch_norm(x, training=True, return_stats=True)
assert abs(y.mean()) < 1e-6 and abs(y.std() - 1) < 1e-4
fastnorm.batch_norm_backward(y, x, stats)
fastnorm.explain()
""")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if "chosen" in line] == [chosen]
    cannot = [line.split()[0] for line in lines if "cannot be imported" in line]
    numba_too = ["numba", "cuda"] if "numba" in missing else []
    native = ["native"] if "fastnorm.backends.native" in missing else []
    assert cannot == native + numba_too


def test_without_a_compiler_the_build_succeeds_and_says_why(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "-b", tmp_path / "build"], cwd=ROOT,
        capture_output=True, text=True, timeout=1500,
        env=os.environ | {"CC": "no-such-compiler", "FASTNORM_NATIVE": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "installed without its native library" in done.stdout
    (reason,) = (tmp_path / "build").glob("lib*/fastnorm/lib/*")
    assert reason.name == "not-built.txt"
    assert "no-such-compiler" in reason.read_text()


def test_the_process_keeps_its_number_of_threads():
    before = numba.get_num_threads()
    x = np.ones((8, 16, 64, 64), np.float32)
    fastnorm.batch_norm(x, training=True, backend="numba", num_threads=1)
    fastnorm.batch_norm(x, training=True, backend="numba", num_threads=2)
    assert numba.get_num_threads() == before


def arrays():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (2, 8, 32, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_same_bits_on_every_number_of_threads(norm, layout):
    x, dy = arrays()
    found = []
    for threads in (1, 2, 3):
        common = {"backend": "numba", "num_threads": threads}
        if norm == "layer":
            y, stats = fastnorm.layer_norm(x, 64, return_stats=True, **common)
            gradients = fastnorm.layer_norm_backward(dy, x, stats, 64, **common)
        elif norm == "group":
            common["layout"] = layout
            y, stats = fastnorm.group_norm(x, 8, return_stats=True, **common)
            gradients = fastnorm.group_norm_backward(dy, x, stats, 8, **common)
        else:
            common["layout"] = layout
            y, stats = fastnorm.batch_norm(x, training=True, return_stats=True, **common)
            gradients = fastnorm.batch_norm_backward(dy, x, stats, **common)
            gradients += fastnorm.batch_norm(x, training=True, activation="silu", **common),
        found.append((y, stats.mean, stats.var, *gradients))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a, b)


THREADED = """
import os, sys, threading, warnings
import numba, numpy as np, fastnorm
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while threads run
x = np.random.default_rng(0).normal(2, 3, (8, 32, 64, 64)).astype(np.float32)
call = lambda: fastnorm.batch_norm(x, training=True, backend="numba", num_threads=2)
wanted = call()
assert numba.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
found = [None] * 4
def work(index):
    for _ in range(5):
        found[index] = call()
threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert all(np.array_equal(wanted, y) for y in found)
def child(depth):
    pid = os.fork()
    if pid == 0:
        right = np.array_equal(wanted, call())
        if depth:
            right = right and child(depth - 1) == 0
        os._exit(0 if right else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert child(1) == 0
assert np.array_equal(wanted, call())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_threads_and_forks_under_each_threading_layer(layer):
    probe = subprocess.run(
        [sys.executable, "-c", f"import numba.np.ufunc.{layer}pool"], capture_output=True,
        check=False,
    )
    if layer != "workqueue" and probe.returncode:
        pytest.skip(f"this Numba has no {layer}")
    run(THREADED, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")


def test_several_processes_fill_one_cache(tmp_path):
    script = """
import numpy as np, fastnorm
x = np.arange(64.0).reshape(8, 8)
assert abs(fastnorm.layer_norm(x, 8, backend="numba").mean()) < 1e-12
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT)
        for _ in range(3)
    ]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    assert list(tmp_path.rglob("*forward_elements*.nbc"))


def test_nothing_is_compiled_at_import():
    out = run("""
import fastnorm
from fastnorm.backends import numba_cpu
print(sum(len(build.signatures) for k in numba_cpu.kernels() for build in (k.serial, k.parallel)))
""")
    assert out.strip() == "0"


def test_warmup_compiles_what_calls_use():
    """Into the cache that is there: into an empty one takes minutes."""
    from fastnorm.backends import numba_cpu

    big = np.ones((4, 8, 64, 64), np.float32)
    big.setflags(write=False)
    after = {"activation": "relu"}, {"activation": "silu"}, {}
    for x, layout, also in product(
        (big, big[:1, :2], big[:1, :, :2, :2]), ("NCHW", "NHWC"), after
    ):
        common = {"layout": layout, "backend": "numba"} | also
        y, stats = fastnorm.batch_norm(x, training=True, return_stats=True, **common)
        fastnorm.batch_norm(x, stats.mean, stats.var, **common)
        fastnorm.batch_norm_backward(y, x, stats, **common)
        y, stats = fastnorm.group_norm(x, 2, return_stats=True, **common)
        fastnorm.group_norm_backward(y, x, stats, 2, **common)
        common.pop("layout")
        y, stats = fastnorm.layer_norm(x, x.shape[-1], return_stats=True, **common)
        fastnorm.layer_norm_backward(y, x, stats, x.shape[-1], **common)
    called = 0
    for kernel in numba_cpu.kernels():
        known = {signature for dtype in DTYPES for signature in kernel.signatures(dtype)}
        for build in (kernel.serial, kernel.parallel):
            called += len(build.signatures)
            assert known.issuperset(build.signatures), build  # those of tests before, too
    assert called >= 30
    assert main(["warmup", "--dtype", "float32"]) == 0
    out = run("""
import numpy as np, fastnorm
from fastnorm.backends import numba_cpu
x = np.ones((4, 8, 64, 64), np.float32)
fastnorm.batch_norm(x, training=True, backend="numba", activation="relu")
fastnorm.layer_norm(x, 64, backend="numba", num_threads=1)
for kernel in numba_cpu.kernels():
    kernel.compile("float32")
builds = [build for k in numba_cpu.kernels() for build in (k.serial, k.parallel)]
print(*(sum(sum(getattr(build.stats, of).values()) for build in builds)
        for of in ("cache_hits", "cache_misses")))
""")
    hits, misses = map(int, out.split())
    assert hits >= 2 * len(numba_cpu.kernels()) - 1  # one has no parallel build
    assert misses == 0


@pytest.mark.parametrize("offset", [0, 4, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1100), (9, 32, 7, 7), (3, 40, 33, 35), (64, 96), (3, 1030), (2, 70, 8, 8),
     (1, 9, 36, 80)],
)
def test_streaming_stores_change_no_bit(shape, dtype, offset, monkeypatch):
    from fastnorm.backends import numba_cpu

    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, (2, *shape)).astype(dtype)
    memory = np.empty(x.size + 32, dtype)
    out = memory[offset : offset + x.size].reshape(shape)

    def everything(**common):
        found = []
        for layout in ("NCHW", "NHWC"):
            both = common | {"layout": layout, "backend": "numba"}
            y, stats = fastnorm.batch_norm(x, training=True, return_stats=True, out=out, **both)
            found.append(y.copy())
            gradients = fastnorm.batch_norm_backward(dy, x, stats, out=out, **both)
            found.extend(gradient.copy() for gradient in gradients)
            gradients = fastnorm.batch_norm_backward(
                dy, x, stats, out=out, activation="relu", **both
            )
            found.extend(gradient.copy() for gradient in gradients)
            found.append(fastnorm.batch_norm(x, stats.mean, stats.var, out=out, **both).copy())
            both |= {"residual": dy, "out": out}
            for activation in (None, "relu", "silu"):
                y = fastnorm.batch_norm(x, training=True, activation=activation, **both)
                found.append(y.copy())
        for axis in sorted({1, len(shape) - 1}):
            both = common | {"axis": axis, "out": out, "backend": "numba"}
            y, stats = fastnorm.layer_norm(x, shape[axis], return_stats=True, **both)
            found.append(y.copy())
            gradients = fastnorm.layer_norm_backward(dy, x, stats, shape[axis], **both)
            found.extend(gradient.copy() for gradient in gradients)
        both |= {"residual": dy, "activation": "relu"}  # the last axis
        found.extend(part.copy() for part in fastnorm.layer_norm(x, shape[-1], **both))
        return found

    def plan_again():
        numba_cpu.forward_plan.cache_clear()
        numba_cpu.backward_plan.cache_clear()

    plain = everything()
    with monkeypatch.context() as patch:
        patch.setattr(numba_cpu, "_last_level_bytes", lambda: 0)
        plan_again()
        streamed = everything()
    plan_again()
    for a, b in zip(plain, streamed, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("caches", "processors", "expected"),
    [
        (("32K", "32K", "1M", "32M"), 2, 32 << 20),
        (("32K", "32K", "1M", "96M"), 1, 96 << 20),
        (("48K", "32K", "2M", "480M"), 2, 8 << 20),  # a virtual machine on a large server
        (("48K", "32K", "2M", "105M"), 56, 105 << 20),  # all of one
    ],
)
def test_what_of_the_last_level_calls_count_on(caches, processors, expected):
    from fastnorm.backends.numba_cpu import _bytes_to_count_on

    sizes = [int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in caches]
    assert _bytes_to_count_on(sizes, processors) == expected


def test_cache_key_knows_every_kernels_file():
    from fastnorm.backends.numba_jit import KERNELS, sources

    known = {file.stem for file in sources()}
    assert {kernel.serial.py_func.__module__.rpartition(".")[2] for kernel in KERNELS} <= known
    assert "numba_cpu" not in known
