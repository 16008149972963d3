"""Fixtures of the grid: backends and instruction set levels."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # oracle; examples

from fastnorm import backends

LEVELS = {"v2": 2, "v3": 3, "v4": 4}


def engines():
    """Every backend; the native one at each level that this processor has."""
    names = [name for name in backends.NAMES if not isinstance(backends.load(name), str)]
    best = backends.load("native").isa_name() if "native" in names else None
    if best in LEVELS:
        names[:1] = [f"native-{level}" for level in LEVELS if level <= best]
    return names


@pytest.fixture(params=engines())
def engine(request, monkeypatch):
    """The name to pass as backend=, with the level already set."""
    name, _, level = request.param.partition("-")
    if level:
        monkeypatch.setattr(backends.load("native"), "isa", LEVELS[level])
    return name
