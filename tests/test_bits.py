"""The same bits for every number of threads, every level, and for streaming or plain stores."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import DTYPES, large_cases, small_cases
from conftest import LEVELS
from test_grid import layouts, to_layout

import fastnorm
from fastnorm import backends

native = backends.load("native")
pytestmark = pytest.mark.skipif(isinstance(native, str), reason="no native library here")


def everything(case, layout, dtype, threads, residual=None, **after):
    x, dy, weight, bias = (None if a is None else a for a in case.arrays(dtype))
    common = {"backend": "native", "num_threads": threads}
    if layout:
        common["layout"] = layout
        x, dy = to_layout(x, layout), to_layout(dy, layout)
    forth = {} if residual is None else {"residual": dy}
    y, *total, stats = case.forward(x, weight, bias, return_stats=True, **common, **after, **forth)
    if after:
        common |= after | ({} if case.norm == "rms" else {"bias": bias})
    gradients = case.backward(dy, *(total or [x]), stats, weight, **common)
    arrays = (y, *total, stats.mean, stats.var, stats.rstd, *gradients)
    return [a.tobytes() for a in arrays if a is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", small_cases() + large_cases(), ids=str)
def test_threads_and_levels_change_no_bit(case, dtype, monkeypatch):
    levels = [n for name, n in LEVELS.items() if name <= native.isa_name()] or [0]
    for layout in layouts(case):
        wanted = None
        for level in levels:
            monkeypatch.setattr(native, "isa", level)
            for threads in (1, 2, 3, 8):
                found = everything(case, layout, dtype, threads)
                wanted = wanted or found
                assert found == wanted, f"{layout}, level {level}, {threads} threads"


SCRIPT = """
import sys, hashlib
import numpy as np
sys.path.insert(0, {tests!r})
from cases import DTYPES, large_cases
from fastnorm import backends
from test_bits import everything
from test_grid import layouts
digest = hashlib.sha256()
for case in large_cases():
    for layout in layouts(case):
        for dtype in DTYPES:
            for fused in ({{}}, {{"residual": 1}}, {{"residual": 1, "activation": "relu"}}):
                for part in everything(case, layout, dtype, 2, **fused):
                    digest.update(part)
print(backends.load("native").isa_name(), digest.hexdigest())
"""


def run(**environment):
    command = [sys.executable, "-c", SCRIPT.format(tests=os.path.dirname(__file__))]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.split()


def test_environment_forces_level_and_caches_without_changing_a_bit():
    best, wanted = run()
    for level in (name for name in LEVELS if name <= best):
        assert run(FASTNORM_ISA=level) == [level, wanted]
        # Everything streams past a last-level cache of one byte, to wherever an array starts, and
        # blocks are as small as they get.
        assert run(
            FASTNORM_ISA=level, FASTNORM_LAST_LEVEL_BYTES="1", FASTNORM_L2_BYTES="1"
        ) == [level, wanted]


def test_concurrent_python_threads_get_the_same_bits():
    from concurrent.futures import ThreadPoolExecutor

    case = large_cases()[0]
    wanted = everything(case, "NCHW", np.float32, 2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: everything(case, "NCHW", np.float32, 2), range(32)))
    assert all(f == wanted for f in found)


def _child(queue):
    x = np.ones((64, 64, 32, 32), np.float32)
    queue.put(float(fastnorm.group_norm(x, 8, num_threads=2).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_compute(method):
    import multiprocessing
    import warnings

    _child_input = np.ones((64, 64, 32, 32), np.float32)
    fastnorm.group_norm(_child_input, 8, num_threads=2)  # the parent's threads exist
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork
        child = context.Process(target=_child, args=(queue,))
        child.start()
    assert queue.get(timeout=60) == 0.0
    child.join(60)
    assert child.exitcode == 0
