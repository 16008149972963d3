"""Hard numbers: large means, constants, extremes, NaN, empty and one-valued sets."""

import numpy as np
import oracle
import pytest

import fastnorm

LAYOUTS = ("NCHW", "NHWC")


def lay(x, layout):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if layout == "NHWC" else x


def unlay(x, layout):
    return np.moveaxis(x, -1, 1) if layout == "NHWC" else x


def batch_norm(x, layout, engine, eps=1e-5, **common):
    y, stats = fastnorm.batch_norm(
        lay(x, layout),
        training=True,
        eps=eps,
        layout=layout,
        return_stats=True,
        backend=engine,
        **common,
    )
    return unlay(y, layout), stats


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e4, 1e5, 1e6, 1e7, 1e8])
def test_large_mean(mean, layout, engine):
    """Right wherever float32 resolves the input, and no worse than PyTorch."""
    import torch

    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(16, 5, 23, 29))).astype(np.float32)
    exact = oracle.channel_norm(x, x, "batch", 0, None, None, 1e-5)
    y, stats = batch_norm(x, layout, engine)
    np.testing.assert_allclose(stats.var, exact["var"].astype(float), rtol=1e-6)
    np.testing.assert_allclose(stats.mean, exact["mean"].astype(float), rtol=1e-12)
    error = np.max(np.abs(y - exact["y"]))
    theirs = torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True).numpy()
    assert error <= max(1e-6, np.max(np.abs(theirs - exact["y"])))
    assert error < 1e-5


@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_mean_elsewhere(norm, mean, engine):
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(4, 8, 9, 11))).astype(np.float32)
    if norm == "group":
        exact = oracle.channel_norm(x, x, "group", 2, None, None, 1e-5)
        y, stats = fastnorm.group_norm(x, 2, return_stats=True, backend=engine)
    else:
        exact = oracle.row_norm(x, x, 3, None, None, 1e-5, norm == "layer")
        call = fastnorm.layer_norm if norm == "layer" else fastnorm.rms_norm
        y, stats = call(x, x.shape[1:], eps=1e-5, return_stats=True, backend=engine)
    np.testing.assert_allclose(stats.var, exact["var"].astype(float), rtol=1e-6)
    assert np.max(np.abs(y - exact["y"])) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [3.0, 1e3, 1e6])
def test_values_far_from_the_first_ones(step, layout, engine):
    """A channel whose first values say nothing of its mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3, 40, 40)).astype(np.float32)
    x[1:] += np.float32(step)
    exact = oracle.channel_norm(x, x, "batch", 0, None, None, 1e-5)
    y, stats = batch_norm(x, layout, engine)
    # At worst a lane adds 128 nearly equal values in float32, each time half a unit off.
    np.testing.assert_allclose(stats.var, exact["var"].astype(float), rtol=128 * 2.0**-25)
    assert np.max(np.abs(y - exact["y"])) < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3e7, 1e30, 1e-30])
def test_constant_channels_are_exactly_the_bias(value, dtype, engine):
    x = np.full((3, 4, 7, 5), value, dtype)
    x[:, 1] = np.random.default_rng(0).normal(size=(3, 7, 5))
    weight = np.linspace(1, 4, 4).astype(dtype)
    bias = np.linspace(-0.3, 0.7, 4).astype(dtype)
    constant = [0, 2, 3]
    for layout in LAYOUTS:
        for norm in ("batch_norm", "instance_norm"):
            call = getattr(fastnorm, norm)
            extra = {"training": True} if norm == "batch_norm" else {}
            y = call(
                lay(x, layout), weight=weight, bias=bias, layout=layout, backend=engine, **extra
            )
            wanted = np.broadcast_to(bias[constant, None, None], (3, 3, 7, 5))
            assert np.array_equal(unlay(y, layout)[:, constant], wanted)
    row = np.full((3, 37), value, dtype)
    assert np.array_equal(fastnorm.layer_norm(row, 37, backend=engine), np.zeros_like(row))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e30, 1e37, 1e-25, 1e-38, 1e-42])
def test_extreme_scales(scale, layout, engine):
    """Squares that leave float32, and subnormal inputs."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(-3, 3, (8, 3, 20, 20)) * scale).astype(np.float32)
    eps = 1e-300 if scale > 1e-37 else 1e-60  # rstd itself must fit float32
    exact = oracle.channel_norm(x, x, "batch", 0, None, None, eps)
    y, stats = batch_norm(x, layout, engine, eps=eps)
    np.testing.assert_allclose(stats.var, exact["var"].astype(float), rtol=1e-6)
    assert np.max(np.abs(y - exact["y"])) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_nan_and_inf_stay_in_their_own_statistic(norm, bad, layout, engine):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 9, 10)).astype(np.float32)

    def run(values):
        common = {"layout": layout, "backend": engine, "return_stats": True}
        values = lay(values, layout)
        if norm == "batch":
            return fastnorm.batch_norm(values, training=True, **common)
        if norm == "instance":
            return fastnorm.instance_norm(values, **common)
        return fastnorm.group_norm(values, 3, **common)

    clean, clean_stats = run(x)
    dirty = x.copy()
    dirty[1, 2, 3, 4] = bad
    y, stats = run(dirty)
    y, clean = unlay(y, layout), unlay(clean, layout)
    hit = np.zeros(x.shape, bool)
    hit[slice(None) if norm == "batch" else 1, 2 : 4 if norm == "group" else 3] = True
    assert np.array_equal(y[~hit], clean[~hit])
    assert not np.any(np.isfinite(y[hit]))
    assert np.sum(~np.isfinite(stats.var)) == 1
    assert np.sum(stats.var == clean_stats.var) == stats.var.size - 1


FAR_FROM_ZERO = [
    ("batch", (64, 40, 3, 5)),
    ("batch", (9, 6, 40, 41)),
    ("batch", (200, 300)),
    ("instance", (6, 20, 4, 4)),
    ("instance", (5, 8, 7, 9)),
    ("instance", (2, 3, 90, 91)),
    ("group", (4, 12, 5, 5)),
    ("group", (2, 6, 120, 121)),
    ("layer", (70, 64)),
    ("layer", (9, 700)),
    ("layer", (3, 9000)),
    ("layer over channels", (3, 40, 50)),
    ("layer over channels", (2, 96, 7, 7)),
]


@pytest.mark.parametrize("first", [0, 6], ids=["", "first values apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm", "shape"), FAR_FROM_ZERO, ids=str)
def test_far_from_zero(norm, shape, layout, first, engine):
    """The mean is no float32: what its rounding leaves is many of the digits of y and of the
    gradients. (gcc 12 has made 0 of it, in one loop of vectors.) And where the first values of
    every set are so many deviations away, sums about them say little of the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(1e4 + 1 / 3, 0.05, shape)
    places = x if len(shape) == 2 else x.reshape(*shape[:2], -1)
    places[..., :8] += 0.05 * first
    x = x.astype(np.float32)
    dy = rng.normal(1, 1, shape).astype(np.float32)
    common = {"return_stats": True, "backend": engine}
    if norm.startswith("layer"):
        axis = 1 if norm.endswith("channels") else -1
        rows, rows_dy = np.moveaxis(x, axis, -1), np.moveaxis(dy, axis, -1)
        exact = oracle.row_norm(rows, rows_dy, 1, None, None, 1e-5, True)
        y, stats = fastnorm.layer_norm(x, shape[axis], axis=axis, **common)
        found = fastnorm.layer_norm_backward(
            dy, x, stats, shape[axis], axis=axis, backend=engine
        )
        given = {"y": np.moveaxis(y, axis, -1), "dx": np.moveaxis(found.dx, axis, -1)}
    else:
        exact = oracle.channel_norm(x, dy, norm, 3, None, None, 1e-5)
        common["layout"] = layout
        if norm == "batch":
            y, stats = fastnorm.batch_norm(lay(x, layout), training=True, **common)
        elif norm == "instance":
            y, stats = fastnorm.instance_norm(lay(x, layout), **common)
        else:
            y, stats = fastnorm.group_norm(lay(x, layout), 3, **common)
        backward = getattr(fastnorm, f"{norm}_norm_backward")
        groups = (3,) if norm == "group" else ()
        found = backward(
            lay(dy, layout), lay(x, layout), stats, *groups, layout=layout, backend=engine
        )
        given = {"y": unlay(y, layout), "dx": unlay(found.dx, layout)}
    for name, value in (*given.items(), ("dweight", found.dweight)):
        wanted = np.asarray(exact[name], np.float64)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, engine):
    shape = (0, 3, 4, 4) if layout == "NCHW" else (0, 4, 4, 3)
    x = np.empty(shape, np.float32)
    running_mean, running_var = np.full(3, 7.0), np.full(3, 5.0)
    y, stats = fastnorm.batch_norm(
        x,
        running_mean,
        running_var,
        training=True,
        layout=layout,
        return_stats=True,
        backend=engine,
    )
    assert y.shape == shape
    assert np.all(running_mean == 7)
    assert np.all(running_var == 5)
    gradients = fastnorm.batch_norm_backward(x, x, stats, layout=layout, backend=engine)
    assert gradients.dx.shape == shape
    assert np.all(gradients.dweight == 0)
    assert np.all(gradients.dbias == 0)
    assert fastnorm.group_norm(x, 3, layout=layout, backend=engine).shape == shape
    assert fastnorm.instance_norm(x, layout=layout, backend=engine).shape == shape
    assert fastnorm.layer_norm(np.empty((0, 5), np.float32), 5, backend=engine).shape == (0, 5)


def test_one_value_per_set_is_the_bias(engine):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    bias = np.arange(4, dtype=np.float32)
    y = fastnorm.group_norm(x, 4, None, bias, backend=engine)
    assert np.array_equal(y, np.broadcast_to(bias, (3, 4)))
    for call in (
        lambda: fastnorm.batch_norm(x[:1], training=True, backend=engine),
        lambda: fastnorm.instance_norm(x, backend=engine),
    ):
        with pytest.raises(ValueError, match="one value for each channel"):
            call()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_running_statistics(convention, layout, engine):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (4, 5, 6, 7)).astype(np.float32)
    for dtype in (np.float32, np.float64):
        mean, var = np.full(5, 0.5, dtype), np.full(5, 2.0, dtype)
        momentum = 0.1 if convention == "torch" else 0.9
        fastnorm.batch_norm(
            lay(x, layout),
            mean,
            var,
            training=True,
            momentum=momentum,
            layout=layout,
            backend=engine,
            convention=convention,
        )
        ddof = 1 if convention == "torch" else 0
        wide = x.astype(float)
        np.testing.assert_allclose(mean, 0.45 + 0.1 * wide.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(var, 1.8 + 0.1 * wide.var((0, 2, 3), ddof=ddof), rtol=1e-6)


def test_parameters_of_any_mix_of_types_and_strides(engine):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 6)).astype(np.float32)
    weight = rng.normal(size=10)[::2]
    bias = rng.normal(size=5).astype(np.float32)
    mean = np.zeros(10)[::2]
    y = fastnorm.batch_norm(x, mean, None, weight, bias, True, backend=engine)
    exact = oracle.channel_norm(x, x, "batch", 0, weight, bias, 1e-5)
    assert np.max(np.abs(y - exact["y"])) < 1e-5
    np.testing.assert_allclose(mean, 0.1 * exact["mean"].astype(float), rtol=1e-6, atol=1e-8)
