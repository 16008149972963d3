"""float16 and bfloat16: conversions bit for bit, parameters of another type, the extremes."""

import numpy as np
import pytest
from cases import Case
from conftest import LEVELS

import fastnorm
from fastnorm import backends
from fastnorm.dtypes import TABLE

SHORT = [dtype for dtype in TABLE if dtype.itemsize == 2]
BITS = np.arange(1 << 16, dtype=np.uint16)

pytestmark = pytest.mark.parametrize("dtype", SHORT, ids=str)


@pytest.fixture
def engine(engine, dtype):
    if backends.refusal(engine, dtype) is not None:
        pytest.skip(f"{engine} does not serve {dtype}")
    return engine


def through(x, weight=None, layout="NHWC", **common):
    """x, by a normalization that changes nothing but scales by weight."""
    channels = x.shape[-1] if layout == "NHWC" else x.shape[1]
    known = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return fastnorm.batch_norm(x, *known, weight, eps=0.0, layout=layout, **common)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_value_comes_back(dtype, engine, layout):
    above = {"float16": 0x7C00, "bfloat16": 0x7F80}[str(dtype)]  # Inf; and behind it, NaN
    x = BITS[above >= (BITS & 0x7FFF)].view(dtype).reshape(1, 1, -1)
    if layout == "NHWC":
        x = np.moveaxis(x, 1, -1)
    y = through(x, layout=layout, backend=engine)
    wide = x.astype(np.float32)
    assert np.array_equal(y.astype(np.float32), wide)
    nan = np.array([0x7FFF, 0xFFFF], np.uint16).view(dtype).reshape(1, 1, 2)
    assert np.all(np.isnan(through(nan, backend=engine)))
    subnormal = (wide != 0) & (np.abs(wide) < float(np.finfo(np.float16).tiny))
    assert np.any(subnormal)


def test_rounding_is_to_nearest_even(dtype, engine):
    """Halfway and its neighbours, between every two neighbouring values, and random numbers."""
    near = np.sort(BITS[:0x7C00].view(dtype).astype(np.float64))
    near = near[np.isfinite(near)]
    middle = (near[:-1] + near[1:]) / 2
    rng = np.random.default_rng(0)
    numbers = rng.uniform(-1, 1, 10007) * 2.0 ** rng.integers(-40, 40, 10007)
    values = np.concatenate([middle, middle * (1 + 2**-20), middle * (1 - 2**-20), -middle,
                             numbers])
    weight = values.astype(np.float32)
    with np.errstate(over="ignore"):
        wanted = weight.astype(dtype)
    y = through(np.ones((1, 1, weight.size), dtype), weight, backend=engine)
    assert np.array_equal(y.ravel().view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_stays_where_it_is(dtype, engine, layout):
    """Vectors that hold one are rounded another way."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4001)).astype(np.float32)
    weight = np.array([1, 0.375, 3.25], np.float32)  # products are exact in float32
    gaps = rng.uniform(size=x.shape) < 0.01
    x[gaps] = np.nan
    x = x.astype(dtype)
    wanted = (x.astype(np.float32) * weight[:, None]).astype(dtype)
    if layout == "NHWC":
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y = through(x, weight, layout=layout, backend=engine)
    y = np.moveaxis(y, -1, 1) if layout == "NHWC" else y
    assert np.array_equal(np.isnan(y.astype(np.float32)), gaps)
    assert np.array_equal(y.view(np.uint16)[~gaps], wanted.view(np.uint16)[~gaps])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_of_any_payload_stays_one(dtype, engine, layout):
    """Rounded as a number, one whose bits are all set would come out as -0."""
    weight = np.ones(3, np.float32)
    weight.view(np.uint32)[1:] = 0x7FFFFFFF, 0xFFFFFFFF
    x = np.ones((1, 3, 101), dtype)
    if layout == "NHWC":
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y = through(x, weight, layout=layout, backend=engine).astype(np.float32)
    y = np.moveaxis(y, -1, 1) if layout == "NHWC" else y
    assert np.all(np.isnan(y[:, 1:]))
    assert np.all(y[:, 0] == 1)


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 31, 33, 100])
def test_nothing_behind_the_end_is_touched(dtype, engine, length):
    room = np.full(3 * length + 64, 7, dtype)
    x = np.arange(3 * length).astype(dtype).reshape(1, 3, length)
    out = room[: 3 * length].reshape(1, 3, length)
    through(x, layout="NCHW", out=out, backend=engine)
    assert np.array_equal(out, x)
    assert np.all(room[3 * length :] == dtype.type(7))


@pytest.mark.parametrize(
    "case", [Case("batch", (6, 20, 7, 7)), Case("group", (2, 12, 9), 4), Case("layer", (9, 70))],
    ids=str,
)
def test_parameters_in_float32_and_none(dtype, engine, case):
    x, dy, weight, bias = case.arrays(np.float32)
    x, dy = x.astype(dtype), dy.astype(dtype)
    exact = case.exact(x, dy, weight, bias)
    y, stats = case.forward(x, weight, bias, return_stats=True, backend=engine)
    gradients = case.backward(dy, x, stats, weight, backend=engine)
    assert y.dtype == gradients.dx.dtype == dtype
    assert gradients.dweight.dtype == gradients.dbias.dtype == np.float32
    for found, name in ((gradients.dweight, "dweight"), (gradients.dbias, "dbias")):
        wanted = exact[name]
        assert np.max(np.abs(found - wanted)) < 1e-6 * np.max(np.abs(wanted)) + 1e-5
    tolerance = TABLE[dtype].tolerance * np.max(np.abs(exact["y"]))
    assert np.max(np.abs(y.astype(np.float64) - exact["y"])) < tolerance


def test_squares_do_not_overflow(dtype, engine):
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], (4, 3, 50)) * rng.uniform(3e4, 6e4, (4, 3, 50))).astype(dtype)
    y, stats = fastnorm.batch_norm(x, training=True, return_stats=True, backend=engine)
    var = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert np.max(np.abs(stats.var / var - 1)) < 1e-6
    assert np.max(np.abs(y.astype(np.float64))) < 3


FORMS = [("batch", "NCHW"), ("batch", "NHWC"), ("group", "NCHW"), ("group", "NHWC"),
         ("layer", "NCHW"), ("layer", "NHWC")]


@pytest.mark.parametrize("deviations", [0, 1, 2.5, 4, 40])
@pytest.mark.parametrize(("norm", "layout"), FORMS)
def test_means_some_deviations_from_zero(dtype, engine, norm, layout, deviations):
    """Near ones may be left in the sums: squares of 16 bits are exact. A constant is the bias."""
    x = np.random.default_rng(0).normal(deviations, 1, (6, 80, 9, 11))
    x[:, 7] = 0.01 if norm == "batch" else x[:, 6]
    x = x.astype(dtype)
    axes = {"batch": (0, 2, 3), "group": (2, 3, 4), "layer": 1}[norm]
    sets = x.astype(float).reshape((6, 8, 10, 9, 11) if norm == "group" else x.shape)
    mean, var = sets.mean(axes), sets.var(axes)
    at = x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    common = {"return_stats": True, "backend": engine}
    if norm == "layer":
        y, stats = fastnorm.layer_norm(at, 80, axis=1 if layout == "NCHW" else -1, **common)
    elif norm == "group":
        y, stats = fastnorm.group_norm(at, 8, layout=layout, **common)
    else:
        y, stats = fastnorm.batch_norm(at, training=True, layout=layout, **common)
        constant = y[:, 7] if layout == "NCHW" else y[..., 7]
        assert np.all(constant == 0)
    assert np.allclose(np.reshape(stats.mean, mean.shape), mean, rtol=1e-6, atol=1e-6)
    assert np.allclose(np.reshape(stats.var, var.shape), var, rtol=2e-5, atol=1e-12)
    y = (y if layout == "NCHW" else np.moveaxis(y, -1, 1)).astype(float).reshape(sets.shape)
    wanted = (sets - np.expand_dims(mean, axes)) / np.sqrt(np.expand_dims(var, axes) + 1e-5)
    assert np.max(np.abs(y - wanted)) < TABLE[dtype].tolerance * np.max(np.abs(wanted))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_tiny_products_are_the_same_at_every_level(dtype, layout, monkeypatch):
    """Those of bfloat16 that end below float32's last place, where a fused multiply-add rounds
    once what others round twice."""
    native = backends.load("native")
    if isinstance(native, str):
        pytest.skip(native)
    rng = np.random.default_rng(0)
    x, dy = (rng.integers(-99, 99, (2, 8, 9, 64)) * 2.0**-power for power in (80, 73))
    x, dy = x.astype(dtype), dy.astype(dtype)
    if layout == "NHWC":
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    found = set()
    for level in [n for name, n in LEVELS.items() if name <= native.isa_name()] or [0]:
        monkeypatch.setattr(native, "isa", level)
        common = {"layout": layout, "backend": "native"}
        _, stats = fastnorm.batch_norm(x, training=True, return_stats=True, **common)
        gradients = fastnorm.batch_norm_backward(dy, x, stats, np.full(8, 2.0**70, "f"), **common)
        found.add(b"".join(a.tobytes() for a in (*gradients, stats.mean, stats.rstd)))
    assert len(found) == 1


def test_layers_and_running_statistics(dtype):
    x = np.random.default_rng(0).normal(3, 2, (8, 5, 6, 7)).astype(dtype)
    short, wide = fastnorm.BatchNorm2d(5), fastnorm.BatchNorm2d(5)
    for _ in range(3):
        y = short(x)
        wide(x.astype(np.float32))
    assert y.dtype == dtype
    assert np.allclose(short.running_var, wide.running_var, rtol=1e-6)
    assert short.backward(x).dtype == dtype
    assert short.grad_weight.dtype == np.float32
