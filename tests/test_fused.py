"""Residual and activation in the same call: against the oracle, PyTorch and differences."""

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, Case, large_cases
from conftest import LEVELS
from test_gradients import numerical
from test_grid import from_layout, layouts, moved_memory, skip_what_it_does_not_serve, to_layout

import fastnorm
from fastnorm import backends
from fastnorm.dtypes import TABLE

ACTIVATIONS = {
    "none": {},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu", "approximate": "tanh"},
}
CASES = [
    Case("batch", (5, 6)),
    Case("batch", (3, 4, 5, 9)),
    Case("batch", (11, 6, 7, 7)),
    Case("batch", (1, 6, 5, 7)),
    Case("instance", (2, 6, 3, 4, 5)),
    Case("group", (2, 6, 35), 2),
    Case("group", (4, 6), 2),
    Case("layer", (7, 33)),
    Case("rms", (3, 5, 70)),
]


def torch_activation(z, kind):
    functional = torch.nn.functional
    if kind == "none":
        return z
    if kind == "leaky_relu":
        return functional.leaky_relu(z, 0.2)
    if kind == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return getattr(functional, kind)(z)


def exact(case, kind, x, dy, residual, weight, bias, dsum, given=None):
    """The oracle's y and gradients, as fastnorm names them. Rows add the residual first."""
    wide = [None if a is None else a.astype(np.longdouble) for a in (x, dy, residual, weight, bias)]
    x, dy, residual, weight, bias = wide
    name = None if kind == "none" else kind

    def norm(dz):
        if given is not None:
            return oracle.channel_norm(x, dz, "batch", 0, weight, bias, 1e-5, given)
        return case.exact(x, dz, weight, bias)

    z = norm(np.zeros_like(x))["y"]
    if case.by_channel and residual is not None:
        z = z + residual
    y, steepness = oracle.activation(z, name, 0.2)
    dz = dy * steepness
    found = norm(dz)
    found |= {"y": y, "dresidual": dz}
    if dsum is not None:
        found["dx"] = found["dx"] + dsum
    return found


def arrays(case, dtype):
    x, dy, weight, bias = case.arrays(dtype)
    residual, dsum = (case.arrays(dtype, seed)[0] for seed in (1, 2))
    return x, dy, weight, bias, residual, dsum


def forward(case, x, weight, bias, residual, **common):
    """(y, what was normalized, stats)."""
    y, *rest, stats = case.forward(
        x, weight, bias, residual=residual, return_stats=True, **common
    )
    return y, rest[0] if rest else x, stats


def backward(case, dy, x, stats, weight, bias, residual, dsum, **common):
    if not case.by_channel:
        common["dsum"] = dsum
    elif residual is not None:
        common["residual"] = residual
    if case.norm != "rms":
        common["bias"] = bias
    return case.backward(dy, x, stats, weight, **common)


def check(case, kind, dtype, engine, with_residual, **common):
    skip_what_it_does_not_serve(engine, dtype)
    x, dy, weight, bias, residual, dsum = arrays(case, dtype)
    if not with_residual:
        residual = dsum = None
    common |= {"backend": engine} | ACTIVATIONS[kind]
    layout = common.get("layout")
    lx, ldy, lresidual, ldsum = (
        None if a is None else to_layout(a, layout) for a in (x, dy, residual, dsum)
    )
    y, normalized, stats = forward(case, lx, weight, bias, lresidual, **common)
    if normalized is not lx:
        wanted = x.astype(np.longdouble) + residual.astype(np.longdouble)
        largest = float(np.max(np.abs(wanted)))
        unit = max(TABLE[np.dtype(dtype)].eps, 2.0**-52)
        assert np.max(np.abs(normalized.astype(np.longdouble) - wanted)) <= unit * largest
        x = normalized
    if case.by_channel:
        ldsum = dsum = None
    gradients = backward(case, ldy, normalized, stats, weight, bias, lresidual, ldsum, **common)
    wanted = exact(case, kind, x, dy, residual, weight, bias, dsum)
    names = ("dx", "dweight", "dbias", "dresidual")
    found = dict(zip(names, gradients, strict=False)) | {"y": y}
    assert ("dresidual" in found) == (with_residual and case.by_channel)
    # A gradient behind an activation is rounded once more than one without.
    tolerance = max(TABLE[np.dtype(dtype)].tolerance, 1e-11 if engine == "reference" else 0) * 2
    largest = float(np.max(np.abs(dy)))
    terms = {
        "dx": largest * float(np.max(wanted["rstd"])) * 2, "dweight": largest, "dbias": largest
    }
    for name, value in found.items():
        if value is None:
            assert (case.norm, name) == ("rms", "dbias")
            continue
        value = from_layout(value, layout) if value.ndim == x.ndim else value
        scale = max(terms.get(name, 1e-300), float(np.max(np.abs(wanted[name]))))
        worst = float(np.max(np.abs(value.astype(np.longdouble) - wanted[name]))) / scale
        assert worst < tolerance, f"{name} is off by {worst:.2e} of its largest value"


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, kind, engine, with_residual):
    for layout in layouts(case):
        for threads in (1, 3):
            common = {"num_threads": threads} | ({"layout": layout} if layout else {})
            check(case, kind, dtype, engine, with_residual, **common)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("case", large_cases(), ids=str)
def test_large(case, kind, engine):
    for layout in layouts(case):
        common = {"num_threads": 2} | ({"layout": layout} if layout else {})
        check(case, kind, np.float32, engine, True, **common)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (9, 6)], ids=str)
def test_given_statistics(shape, kind, engine):
    case = Case("batch", shape)
    x, dy, weight, bias, residual, _ = arrays(case, np.float32)
    running = np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6)
    wanted = exact(case, kind, x, dy, residual, weight, bias, None, running)
    for layout in layouts(case):
        common = {"layout": layout, "backend": engine, "residual": to_layout(residual, layout)}
        common |= ACTIVATIONS[kind]
        lx = to_layout(x, layout)
        y, stats = fastnorm.batch_norm(lx, *running, weight, bias, return_stats=True, **common)
        found = fastnorm.batch_norm_backward(
            to_layout(dy, layout), lx, stats, weight, bias=bias, **common
        )
        for name, value in (("y", y), ("dx", found.dx), ("dresidual", found.dresidual)):
            off = np.abs(from_layout(value, layout).astype(np.longdouble) - wanted[name])
            assert np.max(off) < 2e-6 * np.max(np.abs(wanted[name])), name


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("case", [c for c in CASES if c.groups != 2 or c.shape != (4, 6)], ids=str)
def test_central_differences(case, kind):
    case = Case(case.norm, tuple(min(size, 6) for size in case.shape), case.groups, case.axes)
    x, dy, weight, bias, residual, dsum = arrays(case, np.float64)

    def loss():
        y, *rest = case.forward(
            x, weight, bias, residual=residual, return_stats=True, **ACTIVATIONS[kind]
        )
        return float(np.sum(y * dy) + (np.sum(rest[0] * dsum) if len(rest) == 2 else 0))

    _, normalized, stats = forward(case, x, weight, bias, residual, **ACTIVATIONS[kind])
    found = backward(
        case, dy, normalized, stats, weight, bias, residual, dsum, **ACTIVATIONS[kind]
    )
    wanted = {"dx": numerical(loss, x), "dweight": numerical(loss, weight)}
    if case.norm != "rms":
        wanted["dbias"] = numerical(loss, bias)
    of_residual = numerical(loss, residual)
    wanted["dresidual" if case.by_channel else "dx"] = of_residual
    for name, gradient in wanted.items():
        scale = max(1.0, np.max(np.abs(gradient)))
        assert np.max(np.abs(getattr(found, name) - gradient)) < 5e-7 * scale, name


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_pytorch(kind, engine):
    case = Case("batch", (4, 6, 5, 7))
    x, dy, weight, bias, residual, _ = arrays(case, np.float32)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, weight, bias, residual)]
    z = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:3], training=True)
    wanted = torch_activation(z + leaves[3], kind)
    wanted.backward(torch.from_numpy(dy))
    common = {"residual": residual, "backend": engine} | ACTIVATIONS[kind]
    y, stats = fastnorm.batch_norm(
        x, None, None, weight, bias, True, return_stats=True, **common
    )
    found = fastnorm.batch_norm_backward(dy, x, stats, weight, bias=bias, **common)
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=0, atol=2e-5)
    for name, a, leaf in zip(("dx", "dweight", "dbias", "dresidual"), found, leaves, strict=True):
        b = leaf.grad.numpy()
        assert np.max(np.abs(a - b)) < 2e-5 * max(1, np.max(np.abs(b))), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_from_end_to_end(kind, dtype, engine):
    """Every magnitude and sign, infinities and NaN, through statistics that change nothing."""
    z = np.concatenate([np.linspace(-30, 30, 6001), np.geomspace(1e-30, 1e30, 200)])
    z = np.concatenate([z, -z]).astype(dtype)[:, np.newaxis]
    unit = np.zeros(1, dtype), np.ones(1, dtype)
    common = {"backend": engine} | ACTIVATIONS[kind]
    y, stats = fastnorm.batch_norm(z, *unit, eps=0, return_stats=True, **common)
    slope = fastnorm.batch_norm_backward(np.ones_like(z), z, stats, **common).dx
    with np.errstate(all="ignore"):
        wanted = oracle.activation(z, None if kind == "none" else kind, 0.2)
    for found, exactly in zip((y, slope), wanted, strict=True):
        near = np.abs(z) < 1e9  # where the oracle's own terms do not overflow
        off = np.abs(found.astype(np.longdouble) - exactly)[near]
        assert np.max(off / np.maximum(1, np.abs(exactly[near]))) < 8 * np.finfo(dtype).eps
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(slope))
    ends = np.array([np.inf, -np.inf, np.nan], dtype)[:, np.newaxis]
    y = fastnorm.batch_norm(ends, *unit, eps=0, **common)
    assert np.isposinf(y[0])
    assert np.isnan(y[2])
    if kind in ("none", "leaky_relu"):
        assert np.isneginf(y[1])
    else:
        assert abs(y[1]) < 1e-30


@pytest.mark.skipif(isinstance(backends.load("native"), str), reason="no native library here")
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_levels_change_no_bit(kind, dtype, monkeypatch):
    native = backends.load("native")
    for case in (*CASES, Case("batch", (32, 20, 7, 7)), Case("group", (3, 64, 8, 8), 8)):
        for layout in layouts(case):
            x, dy, weight, bias, residual, dsum = arrays(case, dtype)
            x, dy, residual, dsum = (to_layout(a, layout) for a in (x, dy, residual, dsum))
            wanted = None
            for level in [n for name, n in LEVELS.items() if name <= native.isa_name()] or [0]:
                monkeypatch.setattr(native, "isa", level)
                for threads in (1, 3):
                    common = {"num_threads": threads, "backend": "native"} | ACTIVATIONS[kind]
                    common |= {"layout": layout} if layout else {}
                    y, normalized, stats = forward(case, x, weight, bias, residual, **common)
                    found = backward(
                        case, dy, normalized, stats, weight, bias, residual, dsum, **common
                    )
                    bits = [a.tobytes() for a in (y, *found) if a is not None]
                    wanted = wanted or bits
                    assert bits == wanted, (case, layout, level, threads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place(case, engine):
    """y into x or the residual, the sum into the other; dx into dy, dresidual into the residual."""
    common = {"backend": engine, "activation": "silu"}
    x, dy, weight, bias, residual, dsum = arrays(case, np.float32)
    y, normalized, stats = forward(case, x, weight, bias, residual, **common)
    gradients = backward(case, dy, normalized, stats, weight, bias, residual, dsum, **common)
    moves = [np.ascontiguousarray]
    if case.by_channel and len(case.shape) > 2:
        moves.append(moved_memory)
    for move in moves:
        for into in ("x", "residual"):
            own = {"x": move(x.copy()), "residual": move(residual.copy())}
            other = {"x": "residual", "residual": "x"}[into]
            outs = {"out": own[into]}
            if not case.by_channel:
                outs["out_sum"] = own[other]
            outs |= common
            found, total, _ = forward(case, own["x"], weight, bias, own["residual"], **outs)
            assert found is own[into]
            np.testing.assert_allclose(found, y, rtol=0, atol=2e-5)
            if not case.by_channel:
                assert total is own[other]
                assert np.array_equal(total, normalized)
        own = {name: move(a.copy()) for name, a in (("dy", dy), ("residual", residual))}
        last = move(dsum.copy())
        outs = {"out": own["dy"]}
        if case.by_channel:
            outs["out_residual"] = own["residual"]
        found = backward(
            case, own["dy"], move(normalized), stats, weight, bias, own["residual"], last, **outs,
            **common,
        )
        assert found.dx is outs["out"]
        np.testing.assert_allclose(found.dx, gradients.dx, rtol=0, atol=2e-5)
        if case.by_channel:
            assert found.dresidual is own["residual"]
            np.testing.assert_allclose(found.dresidual, gradients.dresidual, rtol=0, atol=2e-5)
            # dresidual in dy, and with it apart dx in x.
            own_dy, own_x = move(dy.copy()), move(x.copy())
            found = backward(
                case, own_dy, own_x, stats, weight, bias, move(residual), None, out=own_x,
                out_residual=own_dy, **common,
            )
            assert found.dresidual is own_dy
            assert found.dx is own_x
            np.testing.assert_allclose(own_x, gradients.dx, rtol=0, atol=2e-5)
            np.testing.assert_allclose(own_dy, gradients.dresidual, rtol=0, atol=2e-5)
        else:
            # Without an activation dx may be dsum.
            plain, inputs = {"backend": engine}, (case, dy, normalized, stats, weight, bias, None)
            wanted = backward(*inputs, dsum, **plain).dx
            last = dsum.copy()
            assert backward(*inputs, last, out=last, **plain).dx is last
            np.testing.assert_allclose(last, wanted, rtol=0, atol=2e-5)


def test_any_memory_order(engine):
    """The residual and dy need not lie as x does."""
    case = Case("batch", (3, 4, 5, 9))
    x, dy, weight, bias, residual, _ = arrays(case, np.float32)
    common = {"backend": engine, "activation": "gelu"}
    y, _, stats = forward(case, x, weight, bias, residual, **common)
    wanted = backward(case, dy, x, stats, weight, bias, residual, None, **common)
    for move in (moved_memory, lambda a: a[..., ::-1][..., ::-1], np.asfortranarray):
        again = forward(case, x, weight, bias, move(residual), **common)[0]
        np.testing.assert_allclose(again, y, rtol=0, atol=1e-6)
        found = backward(case, move(dy), x, stats, weight, bias, move(residual), None, **common)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_without_an_activation_the_residual_gets_dy(engine):
    case = Case("group", (2, 6, 35), 2)
    x, dy, weight, bias, residual, _ = arrays(case, np.float32)
    _, _, stats = forward(case, x, weight, bias, residual, backend=engine)
    plain = case.backward(dy, x, stats, weight, backend=engine)
    found = backward(case, dy, x, stats, weight, bias, residual, None, backend=engine)
    assert found.dresidual is dy
    assert np.array_equal(found.dx, plain.dx)
    into = np.empty_like(dy)
    again = backward(
        case, dy, x, stats, weight, bias, residual, None, backend=engine, out=dy.copy(),
        out_residual=into,
    )
    assert again.dresidual is into
    assert np.array_equal(into, dy)


@pytest.mark.parametrize("kind", ["none", "leaky_relu"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_training_step_in_place(layout, kind, engine):
    """The output in the place of the input, and from it alone the gradients (InPlace-ABN)."""
    case = Case("batch", (4, 6, 5, 7))
    x, dy, weight, bias = case.arrays(np.float32)
    weight[2] = -0.5
    common = {"layout": layout, "backend": engine} | ACTIVATIONS[kind]
    x, dy = to_layout(x, layout), to_layout(dy, layout)
    y, stats = case.forward(x, weight, bias, return_stats=True, **common)
    wanted = case.backward(dy, x, stats, weight, bias=bias, **common)
    own = x.copy()
    again, stats = case.forward(own, weight, bias, return_stats=True, out=own, **common)
    assert again is own
    assert np.array_equal(own, y)
    found = case.backward(dy, own, stats, weight, bias=bias, from_output=True, **common)
    np.testing.assert_allclose(own, x, atol=2e-5)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.max(np.abs(b)))


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"activation": "relu"}, "an activation other than leaky_relu"),
        ({"activation": "leaky_relu", "negative_slope": 0.0}, "negative_slope above 0"),
        ({"residual": np.ones((2, 3, 4))}, "a residual"),
        ({"weight": np.array([1.0, 0.0, 1.0])}, "a weight that is 0"),
        ({"out": None}, "x is read-only"),
    ],
)
def test_what_cannot_be_turned_back(extra, text):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    _, stats = fastnorm.batch_norm(x, training=True, return_stats=True)
    before = x.copy()
    if "read-only" in text:
        x.setflags(write=False)
    with pytest.raises(ValueError, match=text):
        fastnorm.batch_norm_backward(x, x, stats, from_output=True, **extra)
    assert np.array_equal(x, before)
