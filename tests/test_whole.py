"""Calls that compiled code does whole: which they are, and that the long way gives the same."""

from types import MappingProxyType

import numpy as np
import pytest
from cases import DTYPES, Case
from test_grid import layouts, to_layout

import fastnorm
from fastnorm import backends, call
from fastnorm.dtypes import TABLE

native = backends.load("native")
pytestmark = pytest.mark.skipif(isinstance(native, str), reason="no native library here")

CASES = [
    Case("batch", (4, 6, 5, 7)), Case("batch", (9, 5)), Case("instance", (3, 4, 6)),
    Case("group", (2, 6, 5), 3), Case("layer", (5, 3, 8)), Case("rms", (7, 9)),
]


def forbid(*_, **__):
    raise AssertionError("not done whole")


AFTER = [
    ({}, False), ({"activation": "relu"}, True), ({"activation": "silu"}, False),
    ({"activation": "leaky_relu", "negative_slope": 0.3}, True),
    ({"activation": "gelu", "approximate": "tanh"}, False),
]


def everything(case, dtype, layout, out, backend, after=MappingProxyType({}), residual=False):
    x, dy, weight, bias = case.arrays(dtype)
    if out and weight is not None and dtype.itemsize == 2:
        weight = weight.astype(np.float32)
        bias = None if bias is None else bias.astype(np.float32)
    common = {"backend": backend}
    if layout:
        common["layout"] = layout
        x, dy = to_layout(x, layout), to_layout(dy, layout)
    common |= after
    into = [np.empty_like(x) if out else None for _ in range(4)]
    forth, back = {}, {}
    if residual:
        forth["residual"] = back["residual" if case.by_channel else "dsum"] = dy[::-1].copy()
        if not case.by_channel:
            forth["out_sum"] = into[2]
        else:
            back["out_residual"] = into[3]
    y, *total, stats = case.forward(
        x, weight, bias, return_stats=True, out=into[0], **common, **forth
    )
    again = case.forward(x, weight, bias, **common, **forth)
    if after and case.norm != "rms":
        back["bias"] = bias
    gradients = case.backward(dy, x, stats, weight, out=into[1], **common, **back)
    if out:
        assert y is into[0]
        assert gradients.dx is into[1]
        assert not total or total[0] is into[2]
        assert "out_residual" not in back or gradients.dresidual is into[3]
    again = again[0] if total else again
    return [y, again, *total, stats.mean, stats.var, stats.rstd, *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("after", "residual"), AFTER)
def test_calls_are_and_the_long_way_gives_the_same(
    case, after, residual, backend, out, dtype, monkeypatch
):
    fastnorm.rms_norm(np.ones(3, dtype), 3)  # the first call of a type chooses a backend
    for layout in layouts(case):
        with monkeypatch.context() as short:
            short.setattr(call, "forward", forbid)
            short.setattr(call, "backward", forbid)
            whole = everything(case, dtype, layout, out, backend, after, residual)
        with monkeypatch.context() as long:
            long.setattr(call, "whole_forward", lambda *_: None)
            long.setattr(call, "whole_backward", lambda *_: None)
            parts = everything(case, dtype, layout, out, backend, after, residual)
        for a, b in zip(whole, parts, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert a.tobytes() == b.tobytes()


def test_running_statistics_and_inference(monkeypatch):
    x = np.random.default_rng(0).normal(3, 2, (6, 4, 5)).astype(np.float32)
    found = []
    for ways in ({"forward": forbid}, {"whole_forward": lambda *_: None}):
        running = np.zeros(4, np.float32), np.ones(4, np.float32)
        with monkeypatch.context() as way:
            for name, function in ways.items():
                way.setattr(call, name, function)
            y = fastnorm.batch_norm(x, *running, training=True)
            z, stats = fastnorm.batch_norm(x, *running, return_stats=True)
        assert stats.given
        found.append([a.tobytes() for a in (y, z, *running, stats.mean, stats.rstd)])
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_eps_of_rms_norm(dtype, monkeypatch):
    x = np.random.default_rng(0).normal(0, 1e-3, (3, 5)).astype(dtype)
    wanted = fastnorm.rms_norm(x, 5, eps=float(TABLE[dtype].eps))
    monkeypatch.setattr(call, "forward", forbid)
    assert fastnorm.rms_norm(x, 5).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("samples", [1, 3])
def test_running_statistics_of_samples(samples, monkeypatch):
    x = np.random.default_rng(0).normal(3, 2, (samples, 4, 5)).astype(np.float32)
    found = []
    for whole in (call.whole_forward, lambda *_: None):
        monkeypatch.setattr(call, "whole_forward", whole)
        running = np.zeros(4, np.float32), np.ones(4, np.float32)
        y = fastnorm.instance_norm(x, *running)
        found.append([a.tobytes() for a in (y, *running)])
    assert found[0] == found[1]
    wanted = 0.9 + 0.1 * np.mean(np.var(x.astype(np.float64), axis=2, ddof=1), axis=0)
    assert np.allclose(running[1], wanted, rtol=1e-6)


def test_layers_are_done_whole(monkeypatch):
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    fastnorm.rms_norm(x, 5)
    monkeypatch.setattr(call, "forward", forbid)
    monkeypatch.setattr(call, "backward", forbid)
    for layer in (
        fastnorm.BatchNorm1d(6), fastnorm.BatchNorm1d(6, track_running_stats=False),
        fastnorm.InstanceNorm1d(6, affine=True), fastnorm.GroupNorm(3, 6), fastnorm.LayerNorm(5),
        fastnorm.RMSNorm(5),
    ):
        layer(x)
        assert layer.backward(x).shape == x.shape
        layer.eval()(x)


OUT = object()


def doubts():
    x = np.ones((4, 6, 5), np.float32)
    six = np.ones(6, np.float32)
    room = np.empty(x.size + 1, np.float32)
    frozen = np.ones_like(x)
    frozen.flags.writeable = False
    yield "list", {"x": [1.0]}
    yield "int32", {"x": x.astype(np.int32)}
    yield "byte order", {"x": x.astype(">f4")}
    yield "subclass", {"x": np.ma.array(x)}
    yield "strides", {"x": x[:, :, ::2]}
    yield "one axis", {"x": six}
    yield "empty", {"x": x[:0]}
    yield "one value", {"x": x[:1, :, :1].copy()}
    yield "layout", {"layout": "NCWH"}
    yield "weight's size", {"weight": np.ones(5, np.float32)}
    yield "weight's type", {"weight": six.astype(np.int64)}
    yield "parameters of two types", {"weight": six.astype(np.float64), "bias": six}
    yield "weight's axes", {"weight": six.reshape(1, 6)}
    yield "running mean within x", {"x": x, "running_mean": x.reshape(-1)[:6]}
    yield "one running array", {"running_mean": six, "running_var": six}
    yield "running within out", {"running_var": room[:6], "out": room[:-1].reshape(x.shape)}
    yield "out's shape", {"out": np.empty((4, 6, 6), np.float32)}
    yield "out's type", {"out": np.empty(x.shape)}
    yield "out read-only", {"out": frozen}
    yield "out half x", {"x": room[:-1].reshape(x.shape), "out": room[1:].reshape(x.shape)}
    yield "weight within out", {"weight": room[:6], "out": room[:-1].reshape(x.shape)}
    yield "eps", {"eps": float("nan")}
    yield "eps of 0", {"eps": 0.0}
    yield "momentum", {"momentum": None}
    yield "backend", {"backend": "torch"}
    yield "backend on a GPU", {"backend": "cuda"}
    yield "backend's type", {"backend": six}
    yield "threads", {"num_threads": -1}
    yield "threads as a bool", {"num_threads": True}
    yield "activation", {"activation": "tanh"}
    yield "activation's type", {"activation": 1}
    yield "slope", {"activation": "leaky_relu", "slope": float("inf")}
    yield "slope's type", {"activation": "leaky_relu", "slope": 1}
    yield "approximate", {"activation": "gelu", "approximate": True}
    yield "residual's shape", {"residual": x[:3].copy()}
    yield "residual's type", {"residual": x.astype(np.float64)}
    yield "out half the residual", {
        "residual": room[:-1].reshape(x.shape), "out": room[1:].reshape(x.shape)
    }
    yield "running within the residual", {"residual": x, "running_mean": x.reshape(-1)[:6]}
    yield "out_sum alone", {"out_sum": np.empty_like(x)}
    yield "out_sum read-only", {"residual": x, "out_sum": frozen}
    yield "out_sum's shape", {"residual": x, "out_sum": x[:3].copy()}
    yield "out_sum is out", {"residual": x, "out": np.empty_like(x), "out_sum": OUT}
    yield "out_sum half the residual", {
        "residual": room[:-1].reshape(x.shape), "out_sum": room[1:].reshape(x.shape)
    }
    yield "weight within out_sum", {
        "residual": x, "weight": room[:6], "out_sum": room[:-1].reshape(x.shape)
    }


@pytest.mark.parametrize("changed", [pytest.param(c, id=name) for name, c in doubts()])
def test_in_doubt_the_long_way_looks(changed):
    plain = {
        "x": np.ones((4, 6, 5), np.float32), "out": None, "layout": "NCHW", "groups": 0,
        "weight": None, "bias": None, "eps": 1e-5, "running_mean": None, "running_var": None,
        "momentum": 0.1, "flags": 0, "return_stats": False, "backend": "native",
        "num_threads": None, "activation": None, "slope": 0.01, "approximate": "none",
        "residual": None, "out_sum": None,
    }
    if changed.get("out_sum") is OUT:
        changed = changed | {"out_sum": changed["out"]}
    assert call.whole_forward(backends.BATCH, *plain.values()) is not None
    assert call.whole_forward(backends.BATCH, *(plain | changed).values()) is None


@pytest.mark.parametrize("groups", [0, 4, -2, True, 2.0, "2", 1 << 70])
def test_odd_groups_are_looked_at(groups):
    x = np.ones((4, 6, 5), np.float32)
    arguments = (None, None, 1e-5, None, None, 0.1, 0, False, "native", None)
    assert call.whole_forward(backends.GROUP, x, None, "NCHW", groups, *arguments) is None


def test_a_backward_in_doubt():
    x = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    _, stats = fastnorm.batch_norm(x, training=True, return_stats=True)

    def whole(dy=x, x=x, stats=stats, weight=None, bias=None, out=None, **after):
        return call.whole_backward(
            backends.BATCH, dy, x, stats, "NCHW", 0, weight, bias, out, 0, "native", None, **after
        )

    assert whole() is not None
    relu = {"activation": "relu"}
    assert whole(**relu, out=np.empty_like(x)) is not None
    assert whole(**relu, residual=x, out_residual=np.empty_like(x), out=x) is not None
    other = fastnorm.Statistics(stats.mean[:5], stats.var[:5], stats.rstd[:5])
    room = np.empty(x.size + 1, np.float32)
    part = room[:-1].reshape(x.shape)
    frozen = np.empty_like(x)
    frozen.flags.writeable = False
    for changed in (
        {"dy": x.astype(np.float64)}, {"dy": x[:3]}, {"stats": other}, {"stats": None},
        {"stats": fastnorm.Statistics(*(a.astype(np.float32) for a in (
            stats.mean, stats.var, stats.rstd)))},
        {"weight": np.ones(5, np.float32)}, {"bias": np.ones(5, np.float32)},
        {"out": x[:3].copy()},
        {"dy": room[1:].reshape(x.shape), "out": room[:-1].reshape(x.shape)},
        {"activation": "tanh"}, {"residual": x}, {"out_residual": x.copy()},
        relu | {"out_residual": x.copy()}, relu | {"residual": x[:3].copy()},
        relu | {"out": x, "dy": x.copy()}, {"dsum": x.astype(np.float64)},
        {"dsum": room[1:].reshape(x.shape), "out": room[:-1].reshape(x.shape)},
        relu | {"dsum": part, "out": part},
        relu | {"residual": part, "out": x.copy(), "out_residual": room[1:].reshape(x.shape)},
        relu | {"residual": x.copy(), "out_residual": x},
        relu | {"residual": x.copy(), "out": part, "out_residual": part},
        relu | {"residual": x.copy(), "weight": room[:6], "out_residual": part},
        relu | {"residual": x.copy(), "bias": room[:6], "out_residual": part},
        relu | {"bias": room[:6], "out": part},
        relu | {"residual": x.copy(), "dy": x.copy(), "out_residual": frozen},
    ):
        assert whole(**changed) is None


def test_geometries_that_are_remembered_are_those_of_the_call(monkeypatch):
    """More of them than are remembered, some in the place of others, and of more axes."""
    rng = np.random.default_rng(0)
    sizes = [(n, spatial) for n in (2, 3)
             for spatial in (*((s,) for s in range(2, 100)), (2, 3), (3, 2), (1,) * 6 + (5,))]
    calls = [
        (fastnorm.batch_norm, "NCHW", {"training": True}),
        (fastnorm.batch_norm, "NHWC", {"training": True}),
        (fastnorm.layer_norm, None, {"normalized_shape": (4,)}),
        *((fastnorm.group_norm, layout, {"num_groups": groups})
          for layout in ("NCHW", "NHWC") for groups in (2, 4, 2)),
        (fastnorm.instance_norm, "NCHW", {}),
    ]
    for function, layout, arguments in calls:
        for n, spatial in sizes:
            x = rng.normal(size=(n, 4, *spatial) if layout == "NCHW" else (n, *spatial, 4))
            if layout:
                arguments["layout"] = layout
            y = function(x, **arguments)
            with monkeypatch.context() as the_long_way:
                the_long_way.setattr(call, "whole_forward", lambda *_: None)
                wanted = function(x, **arguments)
            np.testing.assert_array_equal(y, wanted, err_msg=f"{function.__name__} {x.shape}")
