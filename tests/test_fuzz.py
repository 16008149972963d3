"""Random calls against the oracle: shapes, layouts, types, parameters or none, fusion, memory.

FASTNORM_FUZZ is the number of calls; a plain run makes few, always the same. A call that ever
failed stays below as an @example.
"""

import os

import numpy as np
import pytest
from cases import DTYPES, Case
from conftest import engines
from test_fused import ACTIVATIONS, exact
from test_grid import STRIDES, from_layout, moved_memory, to_layout
from test_masks import exact as exact_of_valid
from test_masks import like_x, mask_shape, poisoned

from fastnorm import backends
from fastnorm.dtypes import TABLE

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

CALLS = int(os.environ.get("FASTNORM_FUZZ", "0"))
LEVEL = {"v2": 2, "v3": 3, "v4": 4}

sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97]))


@st.composite
def calls(draw):
    norm = draw(st.sampled_from(["batch", "instance", "group", "layer", "rms"]))
    rank = draw(st.integers(3 if norm == "instance" else 2 if norm in ("batch", "group") else 1, 4))
    shape = tuple(draw(sizes) for _ in range(rank))
    while np.prod(shape) > 40000:
        shape = tuple(max(1, size // 2) for size in shape)
    groups = 0
    if norm == "group":
        groups = draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    axes = draw(st.integers(1, rank)) if norm in ("layer", "rms") else 1
    return {
        "case": Case(norm, shape, groups, axes),
        "dtype": draw(st.sampled_from(DTYPES)),
        "param_dtype": draw(st.sampled_from(DTYPES)),
        "engine": draw(st.sampled_from(engines())),
        "layout": draw(st.sampled_from(["NCHW", "NHWC"])),
        "weighted": draw(st.booleans()),
        "biased": draw(st.booleans()),
        "kind": draw(st.sampled_from(list(ACTIVATIONS))),
        "with_residual": draw(st.booleans()),
        "arrange": draw(st.sampled_from([*STRIDES, "moved"])),
        "threads": draw(st.sampled_from([1, 2, 5])),
        "masked": draw(st.sampled_from([None, None, 0.1, 0.5, 0.9])),
        "in_place": draw(st.booleans()),
        "scale": draw(st.sampled_from([1e-3, 1.0, 30.0])),
        "offset": draw(st.sampled_from([0.0, 1.0, 50.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


def values(call, dtype, shape, salt, scale=1.0, offset=0.0):
    rng = np.random.default_rng((call["seed"], salt))
    return (rng.normal(size=shape) * scale + offset).astype(dtype)


def check(call):
    case, dtype = call["case"], call["dtype"]
    engine, _, level = call["engine"].partition("-")
    if backends.refusal(engine, np.dtype(dtype)) is not None:
        return
    ones = {"batch": case.shape[0], "instance": 1}.get(case.norm, 0)
    if ones * np.prod(case.shape[2:]) == 1:
        return  # one value for each channel, which training refuses
    if level:
        backends.load(engine).isa = LEVEL[level]
    shape = case.shape
    x = values(call, dtype, shape, 0, call["scale"], call["offset"])
    dy, residual, dsum = (values(call, dtype, shape, salt) for salt in (1, 2, 3))
    weight = bias = None
    if call["weighted"]:
        weight = values(call, call["param_dtype"], case.param_shape, 4, 2.0, 1.0)
    if call["biased"] and case.norm != "rms":
        bias = values(call, call["param_dtype"], case.param_shape, 5)
    if not call["with_residual"]:
        residual = dsum = None
    mask = None
    if call["masked"] is not None:
        shares = np.random.default_rng((call["seed"], 9)).random(mask_shape(case))
        mask = np.asarray(shares < call["masked"])
        valid = like_x(mask, case)
        dy = np.where(valid, dy, 0)
        x, residual, dsum = (None if a is None else poisoned(a, valid) for a in (x, residual, dsum))
    layout = call["layout"] if case.by_channel else None
    move = STRIDES.get(call["arrange"])
    if move is None:
        move = moved_memory if case.by_channel and len(shape) > 2 else np.ascontiguousarray
    lx, ldy, lresidual, ldsum = (
        None if a is None else move(to_layout(a, layout)) for a in (x, dy, residual, dsum)
    )
    common = {"backend": engine, "num_threads": call["threads"]} | ACTIVATIONS[call["kind"]]
    common |= {"layout": layout} if layout else {}
    common |= {} if mask is None else {"mask": mask}
    in_place = call["in_place"] and lx.flags.writeable
    own = lx.copy(order="K") if in_place else None
    y, *total, stats = case.forward(
        own if in_place else lx, weight, bias, residual=lresidual, return_stats=True, out=own,
        **common,
    )
    assert not in_place or y is own
    if total:
        x = total[0].reshape(shape)
        lx = total[0]
    extra = {} if case.norm == "rms" else {"bias": bias}
    if case.by_channel and lresidual is not None:
        extra["residual"] = lresidual
    elif not case.by_channel:
        extra["dsum"] = ldsum
    found = case.backward(ldy, lx, stats, weight, **extra, **common)
    of_sum = None if case.by_channel else dsum
    if mask is None:
        wanted = exact(case, call["kind"], x, dy, residual, weight, bias, of_sum)
    else:
        x = np.where(valid, x, 0)
        wanted = exact_of_valid(
            case, x, dy, valid, weight, bias, call["kind"], residual if case.by_channel else None,
            of_sum,
        )
    rstd = float(np.max(wanted["rstd"]))
    # What the terms weigh before they cancel; behind ReLU's edge a gradient may go either way.
    heavy = float(np.max(np.abs(dy)))
    if weight is not None:
        heavy *= max(1.0, float(np.max(np.abs(weight))))
    spread = float(np.max(np.abs(np.asarray(x, float)), initial=0)) * rstd
    edge = call["kind"] in ("relu", "leaky_relu")
    results = dict(zip(("dx", "dweight", "dbias", "dresidual"), found, strict=False)) | {"y": y}
    for name, value in results.items():
        if value is None or (edge and name != "y"):
            continue
        exactly = wanted[name]
        value = from_layout(value, layout) if value.ndim == len(shape) and layout else value
        scale = float(np.max(np.abs(exactly), initial=0))
        scale = max(scale, {"dx": heavy * rstd, "y": 0.0}.get(name, heavy * dy.size**0.5))
        of_x, of_value = TABLE[np.dtype(dtype)].tolerance, TABLE[value.dtype].tolerance
        tolerance = 4 * max(of_x, of_value, 1e-11 if engine == "reference" else 0)
        worst = float(np.max(np.abs(value.astype(np.longdouble) - exactly), initial=0))
        # And what digits a mean in double has lost far from 0.
        weights = 1.0 if weight is None else float(np.max(np.abs(weight)))
        lost = 2**-50 * spread * (weights if name == "y" else scale)
        assert worst <= tolerance * max(scale, 1e-30) + lost, (name, worst)


def alone(engine):
    """A single value, added to another one before its norm."""
    return {
        "case": Case("layer", (1,)), "dtype": DTYPES[0], "param_dtype": DTYPES[0],
        "engine": engine, "layout": "NCHW", "weighted": False, "biased": False, "kind": "none",
        "with_residual": True, "arrange": "contiguous", "threads": 1, "masked": None,
        "in_place": False, "scale": 1e-3, "offset": 0.0, "seed": 0,
    }


@hypothesis.settings(
    max_examples=CALLS or 150, derandomize=not CALLS, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(calls())
@hypothesis.example(alone("numba"))
@hypothesis.example(alone("native"))
def test_random_calls(call):
    native = backends.load("native")
    before = getattr(native, "isa", None)
    try:
        check(call)
    finally:
        if before is not None:
            native.isa = before
