"""Every cell of the benchmark under pytest-benchmark, for comparing two versions.

    python -m pytest benchmarks -k "quick and fastnorm" --benchmark-autosave
    python -m pytest benchmarks -k "quick and fastnorm" --benchmark-compare

The table beside the peers, in units of the memory floor, is `fastnorm bench`.
"""

import pytest

from fastnorm.bench import cells, contenders, run

THREADS = 2
QUICK = set(cells.cells(quick=True))
WHO = {
    "floor": lambda problem: run.floors(problem)["floor streaming"],
    **contenders.available(("fastnorm", "PyTorch")),
}


def cell_id(cell):
    return f"{'quick ' if cell in QUICK else ''}{cell}"


@pytest.fixture(autouse=True, scope="session")
def _memory():
    run.keep_freed_memory()


@pytest.mark.parametrize("name", WHO)
@pytest.mark.parametrize("cell", cells.cells(), ids=cell_id)
def test_cell(benchmark, cell, name):
    problem = contenders.Problem(cell, THREADS)
    call = WHO[name](problem)
    benchmark.group = str(cell)
    benchmark.extra_info["bytes of x"] = problem.x.nbytes
    benchmark(call)
