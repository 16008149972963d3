"""The same bits for every number of threads, every level, and for streaming or plain stores."""

import hashlib
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from cases import DTYPES, Case, large_cases, small_cases
from conftest import LEVELS
from test_grid import layouts, to_layout

import fastnorm
from fastnorm import backends

native = backends.load("native")
pytestmark = pytest.mark.skipif(isinstance(native, str), reason="no native library here")
FUSED = ({}, {"residual": 1}, {"residual": 1, "activation": "relu"}, {"activation": "silu"})


def everything(case, layout, dtype, threads, residual=None, place=np.empty_like, **after):
    """The bytes of all results; y and dx are written to place(x)."""
    x, dy, weight, bias = (None if a is None else a for a in case.arrays(dtype))
    common = {"backend": "native", "num_threads": threads}
    if layout:
        common["layout"] = layout
        x, dy = to_layout(x, layout), to_layout(dy, layout)
    forth = {} if residual is None else {"residual": dy}
    y, *total, stats = case.forward(
        x, weight, bias, return_stats=True, out=place(x), **common, **after, **forth
    )
    inferred = None
    if case.norm == "batch":
        kind = (x if weight is None else weight).dtype
        running = stats.mean.astype(kind), stats.var.astype(kind)
        inferred = fastnorm.batch_norm(
            x, *running, weight, bias, out=place(x), **common, **after, **forth
        )
    if after:
        common |= after | ({} if case.norm == "rms" else {"bias": bias})
    gradients = case.backward(dy, *(total or [x]), stats, weight, out=place(x), **common)
    arrays = (y, inferred, *total, stats.mean, stats.var, stats.rstd, *gradients)
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
from test_bits import FUSED, everything
from test_grid import layouts
digest = hashlib.sha256()
for case in large_cases():
    for layout in layouts(case):
        for dtype in DTYPES:
            for fused in FUSED:
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
    assert run(OMP_THREAD_LIMIT="1") == [best, wanted]  # fewer threads come than a call asks for
    # A build of one level has no other name.
    for level in [name for name in LEVELS if name <= best] or [best]:
        assert run(FASTNORM_ISA=level) == [level, wanted]
        # Everything streams past a last-level cache of one line, to wherever an array starts, and
        # blocks are as small as they get.
        assert run(
            FASTNORM_ISA=level, FASTNORM_LAST_LEVEL_BYTES="64", FASTNORM_L2_BYTES="1"
        ) == [level, wanted]


# Runs, rows and columns that end within a line, so that two of them share it.
ODD = [
    Case("batch", (3, 6, 17, 19)),
    Case("batch", (2, 20, 31, 33)),
    Case("batch", (40, 300)),
    Case("instance", (3, 7, 15, 15)),
    Case("group", (2, 12, 17, 19), 3),
    Case("layer", (20, 301)),
    Case("layer", (9, 2500)),
    Case("rms", (20, 301)),
    Case("rms", (9, 1100)),
]


class Places:
    """Arrays like x that start `start` elements behind a line, in memory that is not theirs."""

    def __init__(self, start):
        self.start = start
        self.given = []

    def __call__(self, x):
        memory = np.full(x.size + 128, 3, x.dtype)
        first = -memory.ctypes.data % 64 // memory.itemsize + self.start
        self.given.append((memory, first, first + x.size))
        return memory[first : first + x.size].reshape(x.shape)

    def check(self):
        for memory, first, stop in self.given:
            assert np.all(memory[:first] == 3)
            assert np.all(memory[stop:] == 3)
        self.given.clear()


def digests_of_any_place():
    """Of what is written to wherever an array starts in a line, and nowhere else; of each start."""
    for place in map(Places, (0, 1, 7)):
        digest = hashlib.sha256()
        for case, dtype, threads in product(ODD, DTYPES, (1, 3)):
            for layout, fused in product(layouts(case), FUSED):
                for part in everything(case, layout, dtype, threads, place=place, **fused):
                    digest.update(part)
                place.check()
        yield digest.hexdigest()


def test_lines_that_are_shared_are_whole():
    script = "from test_bits import digests_of_any_place; print(*set(digests_of_any_place()))"
    levels = [name for name in LEVELS if name <= native.isa_name()] or [native.isa_name()]
    plain, *streamed = (
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment,
            cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True, timeout=300,
        ).stdout.split()
        for environment in (
            {}, *({"FASTNORM_ISA": name, "FASTNORM_LAST_LEVEL_BYTES": "1"} for name in levels),
            # Caches that a part of y has room in beside x, of one array or another.
            *({"FASTNORM_LAST_LEVEL_BYTES": str(1 << power)} for power in range(15, 19)),
        )
    )
    assert len(plain) == 1
    assert all(found == plain for found in streamed)


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
