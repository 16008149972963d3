"""Masks and lengths: every norm over what counts alone, whatever lies in the padding."""

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, Case
from conftest import LEVELS
from test_fused import ACTIVATIONS
from test_gradients import numerical
from test_grid import from_layout, layouts, moved_memory, skip_what_it_does_not_serve, to_layout

import fastnorm
from fastnorm import backends
from fastnorm.dtypes import TABLE

# Small sets and large ones; blocks, splits, tiles; stretches of a run that count whole and in part.
CASES = [
    Case("batch", (5, 6)),
    Case("batch", (5, 6, 40)),
    Case("batch", (40, 37, 3, 3)),
    Case("batch", (3, 5, 61, 67)),
    Case("batch", (3, 2, 70001)),
    Case("batch", (300, 70, 5)),
    Case("batch", (40, 3, 17, 19)),
    Case("batch", (300, 17)),
    Case("batch", (40, 4100)),
    Case("batch", (9, 255, 61)),
    Case("instance", (5, 1, 700)),
    Case("instance", (5, 3, 700)),
    Case("instance", (4, 6, 40)),
    Case("instance", (3, 7, 13, 13)),
    Case("instance", (3, 4, 33, 35)),
    Case("group", (5, 6), 2),
    Case("group", (4, 6, 40), 3),
    Case("group", (3, 32, 33, 35), 8),
    Case("group", (3, 8, 101, 103), 2),
    Case("layer", (4, 33)),
    Case("layer", (5, 7, 96)),
    Case("layer", (70, 1000)),
    Case("layer", (3, 70001)),
    Case("layer", (4, 3, 5, 7), axes=2),
    Case("rms", (5, 7, 96)),
]
# Layer and RMS norm of the channels of (N, C, *spatial), as they lie.
ACROSS = [(3, 5, 7), (3, 96, 5, 13), (3, 700, 70), (1, 300, 130)]
KINDS = ["random", "prefix", "all"]


def mask_of(kind, shape):
    """Sample 1, if there is one, has nothing that counts, and sample 2 all, but where all do."""
    rng = np.random.default_rng(7)
    if kind == "all":
        return np.ones(shape, bool)
    if kind == "random" or len(shape) == 1:
        mask = rng.random(shape) < 0.6
    else:
        lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
        mask = np.arange(shape[-1]) < lengths[..., np.newaxis]
    mask[1:2], mask[2:3] = False, True
    return mask


def mask_shape(case):
    if case.by_channel:
        return case.shape[:1] + case.shape[2:]
    return case.shape[: len(case.shape) - case.axes]


def like_x(mask, case):
    """The mask like x."""
    if case.by_channel:
        return np.broadcast_to(mask[:, np.newaxis], case.shape)
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * case.axes), case.shape)


def exact(case, x, dy, valid, weight, bias, kind="none", residual=None, dsum=None):
    """The oracle's answer, channels first. dresidual is of by_channel cases."""
    n, c = case.shape[:2] if len(case.shape) > 1 else (1, 1)
    wide = [a.astype(np.longdouble) for a in (x, dy)]
    arrays = [*wide, valid]
    unit = case.shape
    if case.norm == "group":
        unit = (n, case.groups, c // case.groups, -1)
    axes = {
        "batch": (0, *range(2, x.ndim)), "instance": tuple(range(2, x.ndim)), "group": (2, 3),
    }.get(case.norm, tuple(range(x.ndim - case.axes, x.ndim)))
    channel = (1, c) + (1,) * (x.ndim - 2) if case.by_channel else case.param_shape
    parameters = [
        np.broadcast_to((np.full(case.param_shape, otherwise) if p is None else p)
                        .astype(np.longdouble).reshape(channel), case.shape).reshape(unit)
        for p, otherwise in ((weight, 1.0), (bias, 0.0))
    ]
    eps, centred = 1e-5, case.norm != "rms"
    if residual is not None and not case.by_channel:
        arrays[0] = wide[0] + residual.astype(np.longdouble)
    cut = [a.reshape(unit) for a in arrays]
    z = oracle.masked_norm(*cut, axes, *parameters, eps, centred)["y"].reshape(case.shape)
    if residual is not None and case.by_channel:
        z = z + np.where(valid, residual, 0).astype(np.longdouble)
    y, steepness = oracle.activation(z, None if kind == "none" else kind, 0.2)
    cut[1] = np.where(valid, wide[1] * steepness, 0).reshape(unit)
    found = oracle.masked_norm(*cut, axes, *parameters, eps, centred)
    over = tuple(a for a in range(x.ndim) if a != 1)
    if not case.by_channel:
        over = tuple(range(x.ndim - case.axes))
    stats_shape = {"batch": (c,), "instance": (n, c), "group": (n, case.groups)}.get(
        case.norm, mask_shape(case)
    )
    return {
        "y": np.where(valid, y, 0),
        "dx": found["dx"].reshape(case.shape)
        + (0 if dsum is None else np.where(valid, dsum, 0).astype(np.longdouble)),
        "dresidual": cut[1].reshape(case.shape),
        "sum": np.where(valid, arrays[0], 0),
        **{s: found[s].reshape(stats_shape) for s in ("mean", "var", "rstd")},
        **{p: np.sum(found[p].reshape(case.shape), axis=over) for p in ("dweight", "dbias")},
    }


def poisoned(array, valid):
    """What does not count is NaN, infinite or huge."""
    array = array.copy()
    bad = np.resize(np.array([np.nan, np.inf, -np.inf, 6e4]).astype(array.dtype), valid.size)
    return np.where(valid, array, bad.reshape(valid.shape))


def close(found, wanted, names, dtype, engine, dy):
    tolerance = 4 * TABLE[np.dtype(dtype)].tolerance
    if engine == "reference":
        tolerance = max(tolerance, 1e-11)
    heavy = 4 * float(np.max(np.abs(dy)))
    terms = {"dx": heavy * float(np.max(wanted["rstd"])), "dweight": heavy, "dresidual": heavy}
    for name in names:
        value, right = found[name], wanted[name]
        if value is None:
            continue
        assert value.shape == right.shape, name
        scale = max(float(np.max(np.abs(right), initial=0)), terms.get(name, 1e-300))
        worst = float(np.max(np.abs(value.astype(np.longdouble) - right), initial=0)) / scale
        assert worst < tolerance, f"{name} is off by {worst:.1e} of its largest value"


@pytest.mark.parametrize("mask_kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, dtype, mask_kind, engine):
    skip_what_it_does_not_serve(engine, dtype)
    mask = mask_of(mask_kind, mask_shape(case))
    valid = like_x(mask, case)
    x, dy, weight, bias = case.arrays(dtype)
    wanted = exact(case, x, dy, valid, weight, bias)
    x, dy = poisoned(x, valid), poisoned(dy, valid)
    heavy = np.where(valid, dy, 0)
    for layout in layouts(case):
        for in_place in (False, True):
            for move in (np.array, moved_memory) if layout == "NCHW" else (np.array,):
                common = {"backend": engine, "num_threads": 2, "mask": mask}
                lx, ldy = (move(a).copy(order="K") for a in (x, dy))
                if layout:
                    common["layout"] = layout
                    if move is not moved_memory:
                        lx, ldy = (np.array(to_layout(a, layout)) for a in (x, dy))
                kept = lx.copy(order="K")
                y, stats = case.forward(
                    lx, weight, bias, return_stats=True, out=lx if in_place else None, **common
                )
                found = case.backward(
                    ldy, kept, stats, weight, out=ldy if in_place else None, **common
                )
                values = {
                    "y": from_layout(y, layout), "dx": from_layout(found.dx, layout),
                    "dweight": found.dweight, "dbias": found.dbias, "mean": stats.mean,
                    "var": stats.var, "rstd": stats.rstd,
                }
                close(values, wanted, values, dtype, engine, heavy)
                for name in ("y", "dx"):
                    assert np.all(np.where(valid, 0, values[name]) == 0), name


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ACROSS, ids=str)
def test_channels_of_an_image_at_every_place(shape, dtype, norm, engine):
    skip_what_it_does_not_serve(engine, dtype)
    case = Case(norm, (shape[0], *shape[2:], shape[1]))
    mask = mask_of("random", mask_shape(case))
    valid = like_x(mask, case)
    x, dy, weight, bias = case.arrays(dtype)
    wanted = exact(case, x, dy, valid, weight, bias, "gelu")
    lx, ldy = (
        np.ascontiguousarray(np.moveaxis(poisoned(a, valid), -1, 1)) for a in (x, dy)
    )
    common = {"backend": engine, "axis": 1, "mask": mask} | ACTIVATIONS["gelu"]
    y, stats = case.forward(lx, weight, bias, return_stats=True, **common)
    extra = {} if norm == "rms" else {"bias": bias}
    found = case.backward(ldy, lx, stats, weight, **extra, **common)
    values = {
        "y": np.moveaxis(y, 1, -1), "dx": np.moveaxis(found.dx, 1, -1), "dweight": found.dweight,
        "dbias": found.dbias, "mean": stats.mean, "var": stats.var, "rstd": stats.rstd,
    }
    close(values, wanted, values, dtype, engine, np.where(valid, dy, 0))


@pytest.mark.parametrize("kind", ["none", "silu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", [c for c in CASES if np.prod(c.shape) < 20000], ids=str)
def test_with_residual_and_activation(case, dtype, kind, engine):
    mask = mask_of("random", mask_shape(case))
    valid = like_x(mask, case)
    x, dy, weight, bias = case.arrays(dtype)
    residual, dsum = case.arrays(dtype, 5)[:2]
    wanted = exact(case, x, dy, valid, weight, bias, kind, residual, dsum if not case.by_channel
                   else None)
    heavy = np.where(valid, dy, 0)
    x, dy, residual, dsum = (poisoned(a, valid) for a in (x, dy, residual, dsum))
    for layout in layouts(case):
        common = {"backend": engine, "mask": mask} | ACTIVATIONS[kind]
        lx, ldy, lresidual = x, dy, residual
        if layout:
            common["layout"] = layout
            lx, ldy, lresidual = (to_layout(a, layout) for a in (x, dy, residual))
        y, *total, stats = case.forward(
            lx, weight, bias, residual=lresidual, return_stats=True, **common
        )
        extra = {"dsum": dsum} if total else {"residual": lresidual}
        if case.norm != "rms":
            extra["bias"] = bias
        found = case.backward(ldy, *total or (lx,), stats, weight, **extra, **common)
        values = dict(zip(("dx", "dweight", "dbias", "dresidual"), found, strict=False))
        values |= {"y": y} | ({"sum": total[0]} if total else {})
        values = {
            name: from_layout(a, layout) if a is not None and a.ndim == x.ndim > 1 else a
            for name, a in values.items()
        }
        close(values, wanted, values, dtype, engine, heavy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(isinstance(backends.load("native"), str), reason="no native library here")
def test_threads_and_levels_change_no_bit(dtype, monkeypatch):
    native = backends.load("native")
    for case in CASES:
        x, dy, weight, bias = case.arrays(dtype)
        mask = mask_of("random", mask_shape(case))
        for layout in layouts(case):
            common = {"backend": "native", "mask": mask} | ({"layout": layout} if layout else {})
            lx, ldy = (to_layout(a, layout) if layout else a for a in (x, dy))
            wanted = None
            for level in (n for name, n in LEVELS.items() if name <= native.isa_name()):
                monkeypatch.setattr(native, "isa", level)
                for common["num_threads"] in (1, 2, 5):
                    y, stats = case.forward(lx, weight, bias, return_stats=True, **common)
                    found = case.backward(ldy, lx, stats, weight, **common)
                    arrays = (y, stats.mean, stats.var, *found)
                    bits = [a.tobytes() for a in arrays if a is not None]
                    wanted = wanted or bits
                    assert bits == wanted, f"{case}, {layout}, level {level}, {common}"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_far_from_zero_and_constant(layout, engine):
    """What sums in float32 lose is taken again in double, of what counts alone; and a constant
    has exactly its mean and no variance."""
    x = np.random.default_rng(0).normal(1e4, 1, (4, 3, 50)).astype(np.float32)
    x[:, 1] = 123.456
    mask = mask_of("random", (4, 50))
    kept = x.astype(np.longdouble).transpose(0, 2, 1)[mask]
    x = np.where(mask[:, np.newaxis], x, np.float32(1e30))
    _, stats = fastnorm.batch_norm(
        to_layout(x, layout), training=True, mask=mask, return_stats=True, backend=engine,
        layout=layout,
    )
    assert np.allclose(stats.mean, kept.mean(0).astype(float), rtol=1e-9)
    assert np.allclose(stats.var, kept.var(0).astype(float), rtol=1e-5, atol=1e-9)
    assert stats.mean[1] == np.float32(123.456)
    assert stats.var[1] == 0


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_running_statistics_are_those_of_the_packed_batch_in_pytorch(layout, engine):
    lengths = [7, 0, 12, 1]
    x = np.random.default_rng(0).normal(1, 2, (4, 5, 12)).astype(np.float32)
    mask = np.arange(12) < np.array(lengths)[:, np.newaxis]
    packed = torch.from_numpy(x.transpose(0, 2, 1)[mask])
    theirs = torch.nn.BatchNorm1d(5)
    ours = fastnorm.BatchNorm1d(5, layout=layout, backend=engine)
    wanted = theirs(packed)
    y = from_layout(ours(to_layout(x, layout), lengths=lengths), layout)
    assert np.allclose(y.transpose(0, 2, 1)[mask], wanted.detach().numpy(), atol=1e-5)
    assert np.allclose(ours.running_mean, theirs.running_mean.numpy(), atol=1e-6)
    assert np.allclose(ours.running_var, theirs.running_var.numpy(), atol=1e-5)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    wanted.backward(torch.from_numpy(dy.transpose(0, 2, 1)[mask]))
    dx = from_layout(ours.backward(to_layout(dy, layout)), layout)
    assert np.all(dx.transpose(0, 2, 1)[~mask] == 0)
    assert np.allclose(ours.grad_weight, theirs.weight.grad.numpy(), atol=1e-4)
    assert np.allclose(ours.grad_bias, theirs.bias.grad.numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_instance_norm_moves_by_the_samples_in_which_something_counts(layout, engine):
    x = np.random.default_rng(0).normal(1, 2, (4, 5, 12)).astype(np.float32)
    lengths = np.array([7, 0, 12, 3])
    mean, var = np.zeros(5), np.ones(5)
    fastnorm.instance_norm(
        to_layout(x, layout), mean, var, lengths=lengths, layout=layout, backend=engine
    )
    each = [x[n, :, :length].astype(float) for n, length in enumerate(lengths) if length]
    assert np.allclose(mean, 0.1 * np.mean([e.mean(1) for e in each], axis=0), atol=1e-6)
    found = np.mean([e.var(1, ddof=1) for e in each], axis=0)
    assert np.allclose(var, 0.9 + 0.1 * found, atol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nothing_counts(layout, engine):
    x = to_layout(np.full((4, 5, 12), np.nan, np.float32), layout)
    mean, var = np.full(5, 3.0), np.full(5, 4.0)
    mask = np.zeros((4, 12), bool)
    common = {"layout": layout, "backend": engine, "mask": mask}
    for statistics in ("batch", "running"):
        for ghost_size in (None, 3):
            y, stats = fastnorm.batch_norm(
                x, mean, var, training=True, return_stats=True, statistics=statistics,
                ghost_size=ghost_size if statistics == "batch" else None, **common,
            )
            assert not np.any(y)
            assert np.all(mean == 3)
            assert np.all(var == 4)
            if statistics == "batch":
                assert not (np.any(stats.mean))
                assert not (np.any(stats.var))
                assert not (np.any(stats.rstd))
    _, stats = fastnorm.batch_norm(x, training=True, return_stats=True, **common)
    for gradient in fastnorm.batch_norm_backward(x, x, stats, **common):
        assert not np.any(gradient)


@pytest.mark.parametrize("nan_policy", ["propagate", "skip"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_ghost_batches(layout, nan_policy, engine):
    x, dy = np.random.default_rng(0).normal(1, 2, (2, 7, 5, 12)).astype(np.float32)
    mask = mask_of("random", (7, 12))
    lx, ldy = to_layout(x, layout), to_layout(dy, layout)
    common = {"layout": layout, "backend": engine}
    running = np.zeros(5), np.ones(5)
    y, stats = fastnorm.batch_norm(
        lx, *running, training=True, ghost_size=3, mask=mask, return_stats=True,
        nan_policy=nan_policy, **common,
    )
    found = fastnorm.batch_norm_backward(ldy, lx, stats, ghost_size=3, mask=mask, **common)
    means, variances, shares = [], [], []
    for at in range(0, 7, 3):
        part = slice(at, at + 3)
        own, of_part = fastnorm.batch_norm(
            lx[part], training=True, mask=mask[part], return_stats=True, **common
        )
        assert np.allclose(y[part], own, atol=1e-6)
        dx = fastnorm.batch_norm_backward(ldy[part], lx[part], of_part, mask=mask[part], **common)
        assert np.allclose(found.dx[part], dx.dx, atol=1e-6)
        count = np.count_nonzero(mask[part])
        means.append(of_part.mean)
        variances.append(of_part.var * count / (count - 1))
        shares.append(count)
    assert np.allclose(running[0], 0.1 * np.average(means, axis=0, weights=shares), atol=1e-6)
    moved = 0.9 + 0.1 * np.average(variances, axis=0, weights=shares)
    assert np.allclose(running[1], moved, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if np.prod(c.shape) < 300], ids=str)
def test_central_differences(case, engine):
    x, dy, weight, bias = case.arrays(np.float64)
    mask = mask_of("random", mask_shape(case))

    def loss():
        return float(np.sum(case.forward(x, weight, bias, backend=engine, mask=mask) * dy))

    _, stats = case.forward(x, weight, bias, return_stats=True, backend=engine, mask=mask)
    found = case.backward(dy, x, stats, weight, backend=engine, mask=mask)
    scale = max(1.0, np.max(np.abs(found.dx)))
    # Sets of one or two values are all cancellation.
    tolerance = 1e-4 if case.norm == "group" and len(case.shape) == 2 else 1e-6
    assert np.max(np.abs(found.dx - numerical(loss, x))) < tolerance * scale
    assert np.allclose(found.dweight, numerical(loss, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        fastnorm.BatchNorm1d(6), fastnorm.LazyBatchNorm1d(), fastnorm.GroupNorm(2, 6),
        fastnorm.InstanceNorm1d(6, affine=True), fastnorm.LayerNorm(6, axis=1),
        fastnorm.RMSNorm(6, axis=1), fastnorm.BatchNorm1d(6, activation="relu"),
    ],
    ids=repr,
)
def test_layers(layer):
    x, dy, residual = np.random.default_rng(0).normal(1, 2, (3, 4, 6, 9)).astype(np.float32)
    lengths = np.array([9, 4, 0, 5])
    mask = np.arange(9) < lengths[:, np.newaxis]
    with_residual = isinstance(layer, fastnorm.BatchNorm1d)
    inputs = (x, residual) if with_residual else (x,)
    y = layer(*inputs, lengths=lengths)
    dx = layer.backward(dy)
    assert np.array_equal(y, layer(*inputs, mask=mask))
    again = layer.backward(dy)
    for one, two in zip(dx, again, strict=True) if with_residual else [(dx, again)]:
        assert np.array_equal(one, two)
        assert not np.any(one.transpose(0, 2, 1)[~mask])
    assert not np.any(y.transpose(0, 2, 1)[~mask])
    assert np.any(y)
    if isinstance(layer, fastnorm.InstanceNorm1d):
        assert np.allclose(layer(x[1], lengths=4), y[1])
        assert np.allclose(layer(x[1], mask=mask[1]), y[1])
        assert np.allclose(layer.backward(dy[1]), dx[1])


X = np.ones((4, 5, 12), np.float32)
MASK = np.ones((4, 12), bool)


@pytest.mark.parametrize(
    ("error", "told", "given"),
    [
        (TypeError, "mask is a list, expected a numpy.ndarray", {"mask": MASK.tolist()}),
        (TypeError, "dtype uint8, expected bool; did you", {"mask": MASK.astype(np.uint8)}),
        (ValueError, r"shape \(4, 5\), expected \(4, 12\)", {"mask": np.ones((4, 5), bool)}),
        (ValueError, "mask and lengths", {"mask": MASK, "lengths": [1, 2, 3, 4]}),
        (TypeError, "expected ints", {"lengths": [1.0, 2, 3, 4]}),
        (ValueError, r"shape \(3,\), expected \(4,\)", {"lengths": [1, 2, 3]}),
        (ValueError, "expected 0 to 12", {"lengths": [1, 2, 3, 13]}),
        (ValueError, "expected 0 to 12", {"lengths": [1, 2, 3, -1]}),
        (ValueError, "one sequence axis", {"lengths": [1, 2, 3, 4], "x": X[..., np.newaxis]}),
        (ValueError, "shares memory with mask", {
            "mask": X.view(bool).ravel()[:48].reshape(4, 12), "out": X, "x": X.copy()}),
    ],
)
def test_errors(error, told, given):
    given = dict(given)
    x = given.pop("x", X)
    out = given.pop("out", np.full_like(x, 7))
    before = out.tobytes()
    with pytest.raises(error, match=told):
        fastnorm.batch_norm(x, training=True, out=out, **given)
    assert out.tobytes() == before
