"""Fixtures of the grid: backends and instruction set levels."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # oracle; examples

from fastnorm import backends
from fastnorm.config import available_threads

LEVELS = {"v2": 2, "v3": 3, "v4": 4}


def engines():
    """Every backend; the native one at each level that this processor has."""
    names = [name for name in backends.NAMES if not isinstance(backends.load(name), str)]
    best = backends.load("native").isa_name() if "native" in names else None
    if best in LEVELS:
        names[:1] = [f"native-{level}" for level in LEVELS if level <= best]
    return names


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What -n auto means: a worker may hold three gigabytes."""
    return min(4, available_threads())


def pytest_collection_modifyitems(items):
    """What takes long to compile is compiled by one worker of pytest-xdist, not by each: the C
    library, and Numba's kernels of a type."""
    for item in items:
        if "test_embedding" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("embedding"))
        if "numba" in item.nodeid:
            types = (dtype for dtype in ("bfloat16", "float16", "float64") if dtype in item.nodeid)
            item.add_marker(pytest.mark.xdist_group(f"numba-{next(types, 'float32')}"))


@pytest.fixture(params=engines())
def engine(request, monkeypatch):
    """The name to pass as backend=, with the level already set."""
    name, _, level = request.param.partition("-")
    if level:
        monkeypatch.setattr(backends.load("native"), "isa", LEVELS[level])
    return name
