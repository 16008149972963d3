"""Layer and RMS norm over axes that others follow."""

import hashlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES
from conftest import LEVELS
from test_fused import ACTIVATIONS
from test_gradients import numerical
from test_grid import moved_memory, skip_what_it_does_not_serve

import fastnorm
from fastnorm import backends
from fastnorm.dtypes import TABLE

# (shape, axes): one axis and several, short and long behind them, strips whole and cut.
CASES = [
    ((3, 5, 7), 1),
    ((2, 96, 5, 13), 1),
    ((2, 3, 61, 67), 1),
    ((4, 33, 129), -2),
    ((5, 6, 7), 0),
    ((2, 4, 3, 6, 5), (1, 2)),
    ((1, 700, 70), 1),
    ((1, 600, 15, 17), 1),
    ((2, 140, 32, 64), 1),
    ((3, 1, 50), 1),
    ((40, 24, 3), 1),
]
NORMS = ("layer", "rms")


def axes_of(shape, axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(a % len(shape) for a in axes)


def arrays(shape, axis, dtype):
    rng = np.random.default_rng(0)
    normalized = tuple(shape[a] for a in axes_of(shape, axis))
    x = rng.normal(0.7, 2, shape).astype(dtype)
    dy = rng.normal(0.1, 1, shape).astype(dtype)
    weight = rng.normal(3, 2, normalized).astype(dtype)
    bias = rng.normal(-1, 1, normalized).astype(dtype)
    return x, dy, weight, bias


def last(a, shape, axis):
    """The normalized axes moved behind the others."""
    axes = axes_of(shape, axis)
    return np.moveaxis(a, axes, range(len(shape) - len(axes), len(shape)))


def call(norm, x, dy, weight, bias, axis, kind="none", **common):
    common |= {"axis": axis} | ACTIVATIONS[kind]
    if norm == "rms":
        y, stats = fastnorm.rms_norm(x, weight.shape, weight, 1e-5, return_stats=True, **common)
        return y, stats, fastnorm.rms_norm_backward(dy, x, stats, weight.shape, weight, **common)
    y, stats = fastnorm.layer_norm(x, weight.shape, weight, bias, return_stats=True, **common)
    return y, stats, fastnorm.layer_norm_backward(
        dy, x, stats, weight.shape, weight, bias=bias, **common
    )


def exact(norm, x, dy, weight, bias, axis, kind):
    shape = x.shape
    wide = [a.astype(np.longdouble) for a in (last(x, shape, axis), last(dy, shape, axis), weight)]
    b = None if norm == "rms" else bias.astype(np.longdouble)
    settings = (weight.ndim, wide[2], b, 1e-5, norm == "layer")
    z = oracle.row_norm(wide[0], np.zeros_like(wide[0]), *settings)["y"]
    y, steepness = oracle.activation(z, None if kind == "none" else kind, 0.2)
    return oracle.row_norm(wide[0], wide[1] * steepness, *settings) | {"y": y}


@pytest.mark.parametrize("kind", ["none", "gelu"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_oracle(shape, axis, dtype, norm, kind, engine):
    skip_what_it_does_not_serve(engine, dtype)
    x, dy, weight, bias = arrays(shape, axis, dtype)
    wanted = exact(norm, x, dy, weight, bias, axis, kind)
    tolerance = 2 * TABLE[np.dtype(dtype)].tolerance
    if engine == "reference":
        tolerance = max(tolerance, 1e-11)
    largest = float(np.max(np.abs(dy)))
    terms = {"dx": 2 * largest * float(np.max(wanted["rstd"])), "dweight": largest}
    memories = [np.ascontiguousarray]
    if axis == 1 and len(shape) > 2:
        memories.append(moved_memory)  # the normalized axis is the last in memory
    for move in memories:
        for threads in (1, 3):
            y, stats, found = call(
                norm, move(x), move(dy), weight, bias, axis, kind, backend=engine,
                num_threads=threads,
            )
            if move is moved_memory:
                assert y.strides == found.dx.strides == move(x).strides
            values = {
                "y": last(y, shape, axis), "dx": last(found.dx, shape, axis),
                "dweight": found.dweight, "dbias": found.dbias, "mean": stats.mean,
                "var": stats.var, "rstd": stats.rstd,
            }
            for name, value in values.items():
                if value is None:
                    assert norm == "rms"
                    continue
                assert value.shape == wanted[name].shape, name
                scale = max(float(np.max(np.abs(wanted[name]))), terms.get(name, 1e-300))
                worst = float(np.max(np.abs(value.astype(np.longdouble) - wanted[name]))) / scale
                assert worst < tolerance, f"{name} is off by {worst:.1e} of its largest value"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "silu"])
@pytest.mark.skipif(isinstance(backends.load("native"), str), reason="no native library here")
def test_threads_and_levels_change_no_bit(kind, dtype, norm, monkeypatch):
    native = backends.load("native")
    for shape, axis in (*CASES, ((2, 64, 56, 56), 1)):
        x, dy, weight, bias = arrays(shape, axis, dtype)
        wanted = None
        for level in [n for name, n in LEVELS.items() if name <= native.isa_name()] or [0]:
            monkeypatch.setattr(native, "isa", level)
            for threads in (1, 2, 5):
                y, stats, found = call(
                    norm, x, dy, weight, bias, axis, kind, num_threads=threads, backend="native"
                )
                bits = [a.tobytes() for a in (y, stats.rstd, *found) if a is not None]
                wanted = wanted or bits
                assert bits == wanted, (shape, level, threads)


def digests_of_any_place():
    """Of what each level writes to an array, wherever it starts in a line, and nowhere else."""
    native = backends.load("native")
    best = native.isa_name()
    levels = [n for name, n in LEVELS.items() if name <= best] or [0]
    shapes = (*CASES, ((3, 384, 14, 14), 1), ((2, 130, 6, 8), 1), ((5, 300, 2), 1))
    for native.isa, start in product(levels, (0, 1, 7)):
        digest = hashlib.sha256()
        for (shape, axis), dtype in product(shapes, DTYPES):
            x, dy, weight, bias = arrays(shape, axis, dtype)
            memory = np.full(x.size + 128, 3, dtype)
            first = -memory.ctypes.data % 64 // memory.itemsize + start
            out = memory[first : first + x.size].reshape(shape)
            common = {"axis": axis, "out": out, "num_threads": 2, "backend": "native"}
            _, stats = fastnorm.layer_norm(
                x, weight.shape, weight, bias, return_stats=True, **common
            )
            digest.update(out.tobytes())
            fastnorm.layer_norm_backward(dy, x, stats, weight.shape, weight, **common)
            digest.update(out.tobytes())
            assert np.all(memory[:first] == 3)
            assert np.all(memory[first + x.size :] == 3)
        yield digest.hexdigest()


@pytest.mark.skipif(isinstance(backends.load("native"), str), reason="no native library here")
def test_streaming_stores_change_no_bit():
    script = "from test_axis import digests_of_any_place; print(*set(digests_of_any_place()))"
    found = [
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | cache, cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True, timeout=300,
        ).stdout.split()
        for cache in ({}, {"FASTNORM_LAST_LEVEL_BYTES": "1"})
    ]
    assert len(found[0]) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("norm", NORMS)
def test_numbas_threads_change_no_bit(norm):
    if backends.refusal("numba", np.dtype("f4")) is not None:
        pytest.skip("numba does not serve here")
    given = arrays((2, 64, 56, 56), 1, np.float32)
    found = []
    for threads in (1, 2):
        y, _, gradients = call(norm, *given, 1, backend="numba", num_threads=threads)
        found.append([a.tobytes() for a in (y, *gradients) if a is not None])
    assert found[0] == found[1]


def test_hard_numbers(engine):
    """Far from 0, constant, huge and tiny; NaN stays in its own place."""
    x = np.random.default_rng(0).normal(size=(2, 40, 70)).astype(np.float32)
    for scale, offset in ((1, 1e6), (1e15, 0), (1e25, 0), (1e-15, 0), (1e-22, 0)):
        moved = (x * np.float32(scale) + np.float32(offset)).astype(np.float32)
        wide = np.moveaxis(moved, 1, -1).astype(np.longdouble)
        wanted = oracle.row_norm(wide, wide, 1, None, None, 1e-40, True)["y"]
        y = fastnorm.layer_norm(moved, 40, eps=1e-40, axis=1, backend=engine)
        assert np.max(np.abs(np.moveaxis(y, 1, -1) - wanted)) < 1e-5
    bias = np.linspace(-1, 1, 40).astype(np.float32)
    constant = np.full((2, 40, 70), 1 / 3, np.float32)
    y = fastnorm.layer_norm(constant, 40, None, bias, axis=1, backend=engine)
    assert np.array_equal(y, np.broadcast_to(bias[:, np.newaxis], y.shape))
    x[1, 7, 33] = np.nan
    y = fastnorm.layer_norm(x, 40, axis=1, backend=engine)
    bad = np.isnan(y)
    assert np.all(bad[1, :, 33])
    assert bad.sum() == 40


@pytest.mark.parametrize("norm", NORMS)
def test_central_differences(norm):
    x, dy, weight, bias = arrays((2, 5, 3), 1, np.float64)

    def loss():
        return float(np.sum(call(norm, x, dy, weight, bias, 1, "silu")[0] * dy))

    _, _, found = call(norm, x, dy, weight, bias, 1, "silu")
    pairs = [(found.dx, x), (found.dweight, weight)]
    if norm == "layer":
        pairs.append((found.dbias, bias))
    for gradient, array in pairs:
        np.testing.assert_allclose(gradient, numerical(loss, array), atol=2e-6)


def test_convnexts_layer_norm(engine):
    """LayerNorm over the channels of an image, as torch does it by two transposes."""
    x, dy, weight, bias = arrays((2, 96, 7, 9), 1, np.float32)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias)]
    moved = leaves[0].permute(0, 2, 3, 1)
    wanted = torch.nn.functional.layer_norm(moved, (96,), *leaves[1:]).permute(0, 3, 1, 2)
    wanted.backward(torch.from_numpy(dy))
    layer = fastnorm.LayerNorm(96, axis=1, backend=engine)
    layer.load_state_dict({"weight": weight, "bias": bias})
    np.testing.assert_allclose(layer(x), wanted.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(layer.backward(dy), leaves[0].grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(layer.grad_weight, leaves[1].grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(layer.grad_bias, leaves[2].grad.numpy(), atol=1e-4)
    assert "axis=1" in repr(layer)


def test_in_place_and_empty(engine):
    x, dy, weight, bias = arrays((2, 96, 5, 13), 1, np.float32)
    y, stats, found = call("layer", x, dy, weight, bias, 1, backend=engine)
    own, own_dy = x.copy(), dy.copy()
    assert fastnorm.layer_norm(own, 96, weight, bias, axis=1, out=own, backend=engine) is own
    assert np.array_equal(own, y)
    again = fastnorm.layer_norm_backward(
        own_dy, x, stats, 96, weight, axis=1, out=own_dy, backend=engine
    )
    assert again.dx is own_dy
    assert np.array_equal(own_dy, found.dx)
    for shape in ((0, 4, 3), (2, 4, 0)):
        empty = np.empty(shape, np.float32)
        y, stats = fastnorm.layer_norm(empty, 4, axis=1, return_stats=True, backend=engine)
        assert y.shape == shape
        assert stats.mean.shape == (shape[0], shape[2])
        gradients = fastnorm.layer_norm_backward(empty, empty, stats, 4, axis=1, backend=engine)
        assert np.array_equal(gradients.dweight, np.zeros(4))


def test_trailing_axes_by_name_are_the_same():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    assert np.array_equal(
        fastnorm.layer_norm(x, (4, 5), axis=(1, 2)), fastnorm.layer_norm(x, (4, 5))
    )
    assert np.array_equal(fastnorm.rms_norm(x, 5, axis=-1), fastnorm.rms_norm(x, 5))
    assert np.array_equal(fastnorm.normalize(x, axis=0), fastnorm.normalize(x, dim=0))


def test_axes_alone_tell_the_shape():
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    for shape, axis in (((4, 5), (1, 2)), (4, 1), (4, -2), (5, -1)):
        for name in ("layer_norm", "rms_norm"):
            norm, backward = getattr(fastnorm, name), getattr(fastnorm, f"{name}_backward")
            y, stats = norm(x, shape, axis=axis, return_stats=True)
            assert np.array_equal(norm(x, axis=axis), y)
            found = backward(dy, x, stats, axis=axis)
            wanted = backward(dy, x, stats, shape, axis=axis)
            assert np.array_equal(found.dx, wanted.dx)
            assert np.array_equal(found.dweight, wanted.dweight)


@pytest.mark.parametrize(
    ("axis", "shape", "extra", "kind", "text"),
    [
        (1, 5, {}, ValueError, r"normalized_shape is \(5,\), expected axis 1 of x \(3, 4, 5\)"),
        (3, 5, {}, ValueError, "axis is 3, expected axes of x"),
        ((0, 2), (3, 5), {}, ValueError, "that follow each other"),
        (1, (4, 5), {}, ValueError, "expected 2 axes"),
        (None, None, {}, TypeError, "did you mean axis=-1"),
        (3, None, {}, ValueError, "axis is 3, expected axes of x"),
        ((0, 2), None, {}, ValueError, "that follow each other"),
        ((), None, {}, ValueError, "follow each other"),
        ((), (), {}, ValueError, "follow each other"),
        ("C", 4, {}, TypeError, "axis is 'C'"),
        (1.0, 4, {}, TypeError, "axis is 1.0"),
        (1, 4, {"residual": np.ones((3, 4, 5))}, ValueError, "residual with an axis"),
    ],
)
def test_bad_input(axis, shape, extra, kind, text):
    x = np.ones((3, 4, 5))
    with pytest.raises(kind, match=text):
        fastnorm.layer_norm(x, shape, axis=axis, **extra)
