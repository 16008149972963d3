"""Which statistics batch norm normalizes with, and how the running ones move."""

import numpy as np
import oracle
import pytest
import torch

import fastnorm

LAYOUTS = ("NCHW", "NHWC")
SHAPE = (7, 5, 4, 3)
rng = np.random.default_rng(0)
X, DY, RESIDUAL = rng.normal(1, 2, (3, *SHAPE))
WEIGHT, BIAS = rng.normal(1, 0.5, (2, 5))


def lie(a, layout):
    return np.ascontiguousarray(np.moveaxis(a, 1, -1)) if layout == "NHWC" else a.copy()


def back(a, layout):
    return np.moveaxis(a, -1, 1) if layout == "NHWC" else a


def running():
    return np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5)


def population(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_without_moving(layout, engine):
    mean, var = running()
    y = fastnorm.batch_norm(
        lie(X, layout), mean, var, WEIGHT, BIAS, True, update=False, layout=layout, backend=engine
    )
    wanted = fastnorm.batch_norm(X, None, None, WEIGHT, BIAS, True, backend="reference")
    np.testing.assert_allclose(back(y, layout), wanted, atol=1e-12)
    assert np.array_equal((mean, var), running())
    in_eval = fastnorm.batch_norm(
        lie(X, layout), mean, var, WEIGHT, BIAS, False, statistics="batch", layout=layout,
        backend=engine,
    )
    assert np.array_equal(in_eval, y)
    assert np.array_equal((mean, var), running())


@pytest.mark.parametrize("convention", ["torch", "keras"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_that_move(layout, convention, engine):
    """They normalize as they were, then move; frozen, they only normalize."""
    mean, var = running()
    common = {"layout": layout, "backend": engine, "statistics": "running", "return_stats": True}
    frozen, stats = fastnorm.batch_norm(
        lie(X, layout), mean, var, WEIGHT, BIAS, True, update=False, **common
    )
    assert stats.given
    assert np.array_equal((mean, var), running())
    own = lie(X, layout)
    y, _ = fastnorm.batch_norm(
        own, mean, var, WEIGHT, BIAS, True, convention=convention, out=own, **common
    )
    assert y is own
    np.testing.assert_allclose(y, frozen, atol=1e-12)
    batch_mean, batch_var = population(X)
    share = 0.1 if convention == "torch" else 0.9
    unbiased = 84 / 83 if convention == "torch" else 1
    old_mean, old_var = running()
    np.testing.assert_allclose(mean, (1 - share) * old_mean + share * batch_mean)
    np.testing.assert_allclose(var, (1 - share) * old_var + share * batch_var * unbiased)


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_nan_policy(policy, engine):
    x = X.copy()
    x[2, 1, 0, 0] = np.nan
    x[3, 4, 0, 0] = np.inf
    mean, var = running()

    def call():
        return fastnorm.batch_norm(x, mean, var, training=True, nan_policy=policy, backend=engine)

    if policy == "raise":
        with pytest.raises(FloatingPointError, match="2 of 5 channels are not finite"):
            call()
        assert np.array_equal((mean, var), running())
        return
    y = call()
    assert np.all(np.isnan(y[:, 1]))
    assert np.all(np.isfinite(y[:, [0, 2, 3]]))
    good_mean, good_var = running()
    fastnorm.batch_norm(X, good_mean, good_var, training=True, backend=engine)
    np.testing.assert_allclose(mean[[0, 2, 3]], good_mean[[0, 2, 3]], rtol=1e-12)
    np.testing.assert_allclose(var[[0, 2, 3]], good_var[[0, 2, 3]], rtol=1e-12)
    if policy == "skip":
        assert np.array_equal(mean[[1, 4]], running()[0][[1, 4]])
        assert np.array_equal(var[[1, 4]], running()[1][[1, 4]])
    else:
        assert not np.any(np.isfinite(var[[1, 4]]))


@pytest.mark.parametrize("ghost_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_ghost_batches(layout, ghost_size, fused, engine):
    """Each, the short last one too, is a batch norm of its own."""
    mean, var = running()
    common = {"layout": layout, "backend": engine, "ghost_size": ghost_size}
    after = {"residual": lie(RESIDUAL, layout), "activation": "silu"} if fused else {}
    x = lie(X, layout)
    y, stats = fastnorm.batch_norm(
        x, mean, var, WEIGHT, BIAS, True, return_stats=True, **common, **after
    )
    if fused:
        after["bias"] = BIAS
    found = fastnorm.batch_norm_backward(lie(DY, layout), x, stats, WEIGHT, **common, **after)
    parts = [slice(at, at + ghost_size) for at in range(0, 7, ghost_size)]
    assert stats.mean.shape == stats.rstd.shape == (len(parts), 5)
    dweight, dbias, moved = np.zeros(5), np.zeros(5), np.zeros((2, 5))
    for row, part in enumerate(parts):
        wide = (a.astype(np.longdouble) for a in (WEIGHT, BIAS))
        exact = oracle.channel_norm(X[part], DY[part], "batch", 0, *wide, 1e-5)
        wanted, dz = exact["y"], DY[part].astype(np.longdouble)
        if fused:
            wanted, steepness = oracle.activation(exact["y"] + RESIDUAL[part], "silu")
            dz = dz * steepness
            exact = oracle.channel_norm(X[part], dz, "batch", 0, WEIGHT, BIAS, 1e-5)
            np.testing.assert_allclose(
                back(found.dresidual, layout)[part], dz.astype(float), atol=1e-12
            )
        np.testing.assert_allclose(back(y, layout)[part], wanted.astype(float), atol=1e-12)
        np.testing.assert_allclose(
            back(found.dx, layout)[part], exact["dx"].astype(float), atol=1e-11
        )
        np.testing.assert_allclose(stats.mean[row], exact["mean"].astype(float), atol=1e-13)
        dweight += exact["dweight"].astype(float)
        dbias += exact["dbias"].astype(float)
        samples = len(X[part])
        count = samples * 12
        moved += np.array([exact["mean"], exact["var"] * count / (count - 1)], float) * samples / 7
    np.testing.assert_allclose(found.dweight, dweight, atol=1e-10)
    np.testing.assert_allclose(found.dbias, dbias, atol=1e-10)
    np.testing.assert_allclose((mean, var), 0.9 * np.array(running()) + 0.1 * moved, atol=1e-12)
    again = fastnorm.batch_norm(x, mean, var, training=False, **common)
    plain = fastnorm.batch_norm(x, mean, var, training=False, layout=layout, backend=engine)
    assert np.array_equal(again, plain)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 5, 300, 1100, 4100])
@pytest.mark.parametrize("samples", [1, 2, 40])
@pytest.mark.parametrize("counts", [True, False, None], ids=["valid", "padding", "unmasked"])
def test_frozen_rows(counts, samples, channels, dtype, engine):
    """Few rows, a single one too, and columns up to where they are cut into strips."""
    seed = np.random.default_rng(channels)
    x, dy, residual = seed.normal(1, 2, (3, samples, channels)).astype(dtype)
    mean, weight, bias = seed.normal(1, 0.5, (3, channels)).astype(dtype)
    var = seed.uniform(0.5, 2, channels).astype(dtype)
    common = {"backend": engine, "num_threads": 2}
    if counts is not None:
        common["mask"] = np.full(samples, counts)
    forth = {"statistics": "running", "update": False, "return_stats": True, **common}
    y, stats = fastnorm.batch_norm(x, mean, var, weight, bias, True, **forth)
    z = fastnorm.batch_norm(
        x, mean, var, weight, bias, True, residual=residual, activation="relu", **forth
    )[0]
    found = fastnorm.batch_norm_backward(dy, x, stats, weight, **common)
    dz = fastnorm.batch_norm_backward(dy, x, stats, weight, bias=bias, activation="relu", **common)
    rstd = 1 / np.sqrt(var.astype(float) + 1e-5)
    xhat = (x - mean.astype(float)) * rstd
    wanted = xhat * weight + bias
    gated = dy * (wanted > 0)
    counted = 1.0 if counts is None else float(counts)
    close = {"rtol": 1e-5, "atol": 1e-4 if dtype == np.float32 else 1e-11}
    np.testing.assert_allclose(y, counted * wanted, **close)
    np.testing.assert_allclose(z, counted * np.maximum(wanted + residual, 0), **close)
    np.testing.assert_allclose(found.dx, counted * dy * rstd * weight, **close)
    np.testing.assert_allclose(found.dweight, counted * (dy * xhat).sum(0), **close)
    np.testing.assert_allclose(found.dbias, counted * dy.astype(float).sum(0), **close)
    np.testing.assert_allclose(dz.dx, counted * gated * rstd * weight, **close)
    np.testing.assert_allclose(dz.dbias, counted * gated.sum(0), **close)


def test_ghost_batches_in_place():
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    y, stats = fastnorm.batch_norm(x, training=True, ghost_size=3, return_stats=True)
    wanted = fastnorm.batch_norm_backward(dy, x, stats, ghost_size=3)
    own = dy.copy()
    found = fastnorm.batch_norm_backward(own, x, stats, ghost_size=3, out=own)
    assert found.dx is own
    assert np.array_equal(own, wanted.dx)
    assert fastnorm.batch_norm(x, training=True, ghost_size=3, out=x) is x
    assert np.array_equal(x, y)


def test_an_empty_batch_moves_nothing():
    mean, var = running()
    empty = np.empty((0, 5, 4, 3))
    for settings in ({"ghost_size": 2}, {"nan_policy": "skip"}, {"statistics": "running"}):
        y = fastnorm.batch_norm(empty, mean, var, training=True, **settings)
        assert y.shape == empty.shape
        assert np.array_equal((mean, var), running())


def test_frozen_layer_is_pytorchs_in_eval():
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    ours = fastnorm.BatchNorm2d(5, statistics="running", update=False)
    theirs = torch.nn.BatchNorm2d(5).eval()
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(ours(x), ty.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.backward(dy), tx.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.grad_weight, theirs.weight.grad.numpy(), rtol=1e-4)
    assert ours.num_batches_tracked == 0
    assert np.all(ours.running_var == 1)


def test_ghost_layer():
    x, dy = X.astype(np.float32), DY.astype(np.float32)
    layer = fastnorm.BatchNorm2d(5, ghost_size=4, nan_policy="skip")
    y = layer(x)
    assert layer.backward(dy).shape == x.shape
    np.testing.assert_allclose(y[:4].mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y[4:].mean((0, 2, 3)), 0, atol=1e-6)
    assert layer.num_batches_tracked == 1
    bad = x.copy()
    bad[0, 2] = np.nan
    before = layer.running_mean.copy()
    layer(bad)
    assert np.all(np.isfinite(layer.running_mean))
    assert layer.running_mean[2] == before[2]


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"statistics": "moving"}, ValueError, "None or 'batch' or 'running'"),
        ({"nan_policy": "ignore"}, ValueError, "'propagate' or 'skip' or 'raise'"),
        ({"ghost_size": 0}, ValueError, "ghost_size is 0"),
        ({"ghost_size": 2.0}, TypeError, "ghost_size is 2.0"),
        ({"ghost_size": True}, TypeError, "ghost_size is True"),
    ],
)
def test_bad_input(settings, kind, text):
    mean, var = running()
    with pytest.raises(kind, match=text):
        fastnorm.batch_norm(X, mean, var, training=True, **settings)
    assert np.array_equal((mean, var), running())


def test_bad_ghosts():
    flat = X[:, :, 0, 0].copy()
    with pytest.raises(ValueError, match="a ghost batch has one value"):
        fastnorm.batch_norm(flat, training=True, ghost_size=3)  # 7 = 3 + 3 + 1
    out = np.full((6, 5, 4, 3), 7.0)
    with pytest.raises(ValueError, match="out has shape"):
        fastnorm.batch_norm(X, training=True, ghost_size=3, out=out)
    assert np.all(out == 7)
    _, stats = fastnorm.batch_norm(X, training=True, ghost_size=3, return_stats=True)
    with pytest.raises(ValueError, match=r"stats.mean has shape \(3, 5\), expected \(4, 5\)"):
        fastnorm.batch_norm_backward(DY, X, stats, ghost_size=2)
