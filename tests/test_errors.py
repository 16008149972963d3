"""Bad input: an error that says what came and what was expected, and nothing written."""

import math

import numpy as np
import pytest

import fastnorm

F = np.float32


def image(*shape):
    return np.random.default_rng(0).normal(size=shape or (2, 6, 4, 5)).astype(F)


X = image()
STATS = fastnorm.batch_norm(X, training=True, return_stats=True)[1]
RMS = fastnorm.rms_norm(X, 5, return_stats=True)[1]
OUT = np.full(X.shape, 7, F)
MEAN, VAR = np.full(6, 7, F), np.full(6, 7, F)


def read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


def train(x=X, **arguments):
    return fastnorm.batch_norm(x, MEAN, VAR, training=True, **({"out": OUT} | arguments))


BAD = {
    "list": (lambda: train([1.0, 2.0]), TypeError, "numpy.asarray"),
    "integers": (lambda: train(np.ones((2, 3), int)), TypeError, "int64.*astype"),
    "complex": (lambda: train(np.ones((2, 3), complex)), TypeError, "complex128"),
    "objects": (lambda: train(np.ones((2, 3), object)), TypeError, "object"),
    "masked": (
        lambda: train(np.ma.masked_equal(np.eye(4, 6, dtype=F), 0)),
        TypeError,
        "MaskedArray.*mask=",
    ),
    "booleans": (lambda: train(np.ones((2, 3), bool)), TypeError, "bool"),
    "one axis": (lambda: train(np.ones(3, F)), ValueError, "at least 2 axes"),
    "weight too long": (
        lambda: train(weight=np.ones(7, F)),
        ValueError,
        r"weight has shape \(7,\), expected \(6,\) = channels of x \(2, 6, 4, 5\)",
    ),
    "weight of the other layout": (
        lambda: train(weight=np.ones(5, F)),
        ValueError,
        r"did you mean layout='NHWC'\?",
    ),
    "weight of the other layout, last": (
        lambda: train(layout="NHWC", weight=np.ones(6, F)),
        ValueError,
        "did you mean layout='NCHW'",
    ),
    "bias matrix": (lambda: train(bias=np.ones((6, 1), F)), ValueError, "bias has shape"),
    "bias integers": (lambda: train(bias=np.ones(6, int)), TypeError, "bias has dtype int64"),
    "weight list": (lambda: train(weight=[1.0] * 6), TypeError, "weight is a list"),
    "unknown layout": (lambda: train(layout="NHCW"), ValueError, "'NHCW', expected one of 'NCHW'"),
    "layout list": (lambda: train(layout=["NCHW"]), ValueError, "layout is"),
    "unknown backend": (lambda: train(backend="mkl"), ValueError, "unknown backend 'mkl'.*native"),
    "eps NaN": (lambda: train(eps=math.nan), ValueError, "eps is nan, expected a finite"),
    "eps infinite": (lambda: train(eps=math.inf), ValueError, "eps"),
    "eps zero": (lambda: train(eps=0.0), ValueError, "eps is 0.0, expected more than 0"),
    "eps text": (lambda: train(eps="1e-5"), TypeError, "eps is '1e-5'"),
    "eps none": (lambda: train(eps=None), TypeError, "eps is None"),
    "momentum NaN": (lambda: train(momentum=math.nan), ValueError, "momentum is nan"),
    "momentum none": (lambda: train(momentum=None), TypeError, "momentum is None"),
    "threads negative": (lambda: train(num_threads=-1), ValueError, "num_threads is -1"),
    "threads float": (lambda: train(num_threads=1.5), TypeError, "num_threads is 1.5"),
    "convention": (lambda: train(convention="tf"), ValueError, "'torch' or 'keras'"),
    "one value": (lambda: train(image(1, 6, 1, 1)), ValueError, "one value for each channel"),
    "out shape": (lambda: train(out=image(2, 6, 4, 4)), ValueError, "out has shape"),
    "out dtype": (lambda: train(out=np.empty(X.shape)), ValueError, "dtype float64"),
    "out list": (lambda: train(out=[]), TypeError, "out is a list"),
    "out read-only": (lambda: train(out=read_only(X)), ValueError, "out is read-only"),
    "out broadcast": (
        lambda: train(out=np.lib.stride_tricks.as_strided(np.zeros(1, F), X.shape, (0,) * 4)),
        ValueError,
        "several elements share memory",
    ),
    "running read-only": (
        lambda: fastnorm.batch_norm(X, read_only(MEAN), VAR, training=True),
        ValueError,
        "running_mean is read-only",
    ),
    "running the same": (
        lambda: fastnorm.batch_norm(X, MEAN, MEAN, training=True),
        ValueError,
        "running_mean shares memory with running_var",
    ),
    "eval without statistics": (
        lambda: fastnorm.batch_norm(X, out=OUT),
        ValueError,
        "did you mean training=True",
    ),
    "eval without variance": (
        lambda: fastnorm.batch_norm(X, MEAN, out=OUT),
        ValueError,
        "running_var is None",
    ),
    "instance without statistics": (
        lambda: fastnorm.instance_norm(X, use_input_stats=False, out=OUT),
        ValueError,
        "use_input_stats=False",
    ),
    "groups": (lambda: fastnorm.group_norm(X, 4, out=OUT), ValueError, "divisor of the 6 channels"),
    "groups zero": (lambda: fastnorm.group_norm(X, 0, out=OUT), ValueError, "num_groups is 0"),
    "groups float": (lambda: fastnorm.group_norm(X, 2.0, out=OUT), TypeError, "num_groups is 2.0"),
    "normalized_shape": (
        lambda: fastnorm.layer_norm(X, (4, 4), out=OUT),
        ValueError,
        "trailing axes of x",
    ),
    "normalized_shape empty": (
        lambda: fastnorm.layer_norm(X, (), out=OUT),
        ValueError,
        "is \\(\\)",
    ),
    "normalized_shape text": (
        lambda: fastnorm.rms_norm(X, "a", out=OUT),
        TypeError,
        "int or several",
    ),
    "normalized_shape long": (
        lambda: fastnorm.rms_norm(X, (1, 2, 6, 4, 5), out=OUT),
        ValueError,
        "trailing",
    ),
    "layer weight": (
        lambda: fastnorm.layer_norm(X, (4, 5), np.ones(5, F), out=OUT),
        ValueError,
        "normalized_shape",
    ),
    "dy shape": (
        lambda: fastnorm.batch_norm_backward(X[:1], X, STATS, out=OUT),
        ValueError,
        "dy has shape",
    ),
    "dy dtype": (
        lambda: fastnorm.batch_norm_backward(X.astype(float), X, STATS, out=OUT),
        ValueError,
        "dtype float64",
    ),
    "stats of another norm": (
        lambda: fastnorm.group_norm_backward(X, X, STATS, 2, out=OUT),
        ValueError,
        r"stats.mean has shape \(6,\), expected \(2, 2\)",
    ),
    "stats missing": (
        lambda: fastnorm.batch_norm_backward(X, X, None, out=OUT),
        TypeError,
        "return_stats=True",
    ),
    "activation": (
        lambda: train(activation="swish"),
        ValueError,
        "activation is 'swish', expected 'relu', 'leaky_relu', 'silu', 'gelu' or None",
    ),
    "activation list": (lambda: train(activation=["relu"]), ValueError, "activation is"),
    "approximate": (
        lambda: train(activation="gelu", approximate="erf"),
        ValueError,
        "approximate is 'erf', expected 'none' or 'tanh'",
    ),
    "slope": (
        lambda: train(activation="leaky_relu", negative_slope=math.nan),
        ValueError,
        "negative_slope is nan",
    ),
    "residual shape": (lambda: train(residual=X[:1]), ValueError, "residual has shape"),
    "residual dtype": (lambda: train(residual=X.astype(float)), ValueError, "dtype float64"),
    "residual list": (lambda: train(residual=[1.0]), TypeError, "residual is a list"),
    "layer activation": (
        lambda: fastnorm.GroupNorm(2, 6, activation="tanh"), ValueError, "GroupNorm: activation",
    ),
    "sum without residual": (
        lambda: fastnorm.layer_norm(X, 5, out_sum=OUT), ValueError, "out_sum without residual",
    ),
    "sum and out the same": (
        lambda: fastnorm.layer_norm(X, 5, residual=X, out=OUT, out_sum=OUT),
        ValueError,
        "out_sum shares memory with out",
    ),
    "out_residual without residual": (
        lambda: fastnorm.batch_norm_backward(X, X, STATS, out_residual=OUT),
        ValueError,
        "out_residual without residual",
    ),
    "dx in x behind an activation": (
        lambda: fastnorm.batch_norm_backward(OUT, X, STATS, activation="relu", out=X),
        ValueError,
        "out shares memory with x",
    ),
    "dx in dsum behind an activation": (
        lambda: fastnorm.rms_norm_backward(
            X, X, RMS, 5, dsum=OUT, activation="relu", out=OUT
        ),
        ValueError,
        "out shares memory with dsum",
    ),
    "dx in dy that is the residual's": (
        lambda: fastnorm.batch_norm_backward(OUT, X, STATS, residual=X, out=OUT),
        ValueError,
        "dy, which is the residual's gradient",
    ),
    "dresidual in x": (
        lambda: fastnorm.batch_norm_backward(
            OUT, X, STATS, residual=OUT, activation="relu", out_residual=X
        ),
        ValueError,
        "out_residual shares memory with x",
    ),
    "backward bias": (
        lambda: fastnorm.batch_norm_backward(OUT, X, STATS, bias=np.ones(5, F), activation="relu"),
        ValueError,
        "bias has shape",
    ),
    "dsum shape": (
        lambda: fastnorm.rms_norm_backward(OUT, X, RMS, 5, dsum=X[:1]), ValueError, "dsum has shape"
    ),
    "lrn size": (lambda: fastnorm.local_response_norm(X, 0, out=OUT), ValueError, "size is 0"),
    "lrn rank": (lambda: fastnorm.local_response_norm(X[0, 0, 0], 2), ValueError, "2 axes"),
    "normalize dim": (lambda: fastnorm.normalize(X, dim=4, out=OUT), ValueError, "dim is 4"),
    "normalize p": (lambda: fastnorm.normalize(X, p=0, out=OUT), ValueError, "p is 0"),
    "threads setting": (lambda: fastnorm.set_num_threads(-2), ValueError, "num_threads is -2"),
    "layer rank": (lambda: fastnorm.BatchNorm2d(6)(X[0]), ValueError, "4-D"),
    "layer dtype": (lambda: fastnorm.BatchNorm2d(6, dtype=int), TypeError, "dtype is int64"),
    "layer groups": (lambda: fastnorm.GroupNorm(4, 6), ValueError, "divisor"),
    "backward first": (lambda: fastnorm.BatchNorm2d(6).backward(X), RuntimeError, "before forward"),
    "state keys": (
        lambda: fastnorm.LayerNorm(4).load_state_dict({"weight": np.ones(4)}),
        ValueError,
        "bias",
    ),
    "state shape": (
        lambda: fastnorm.RMSNorm(4).load_state_dict({"weight": np.ones(5)}),
        ValueError,
        r"\(5,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, text = BAD[case]
    before = X.copy()
    with pytest.raises(kind, match=text):
        call()
    assert np.all(OUT == 7)
    assert np.all(MEAN == 7)
    assert np.all(VAR == 7)
    assert np.array_equal(X, before)


ARRAY = r"is a numpy.ndarray of shape \(64,\) and dtype float32, expected"
MISPLACED = {
    "num_groups": lambda x, w: fastnorm.group_norm(x, w, w),
    "normalized_shape": lambda x, w: fastnorm.rms_norm(x, w),
    "eps": lambda x, w: fastnorm.layer_norm(x, (1, 1), None, None, w),
    "training": lambda x, w: fastnorm.batch_norm(x, w, w, w, w, w),
    "momentum": lambda x, w: fastnorm.batch_norm(x, w, w, w, w, True, w),
    "use_input_stats": lambda x, w: fastnorm.instance_norm(x, w, w, w, w, w),
    "axis": lambda x, w: fastnorm.layer_norm(x, 64, axis=w),
    "num_threads": lambda x, w: fastnorm.batch_norm(x, training=True, num_threads=w),
    "ghost_size": lambda x, w: fastnorm.batch_norm(x, training=True, ghost_size=w),
    "activation": lambda x, w: fastnorm.batch_norm(x, training=True, activation=w),
    "layout": lambda x, w: fastnorm.batch_norm(x, training=True, layout=w),
    "size": lambda x, w: fastnorm.local_response_norm(x, w),
    "p": lambda x, w: fastnorm.normalize(x, w),
    "dim": lambda x, w: fastnorm.normalize(x, 2.0, w),
    "num_features": lambda x, w: fastnorm.BatchNorm2d(w),
    "num_channels": lambda x, w: fastnorm.GroupNorm(8, w),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_an_array_in_the_place_of_another_argument_is_told_by_its_shape(what):
    x, w = np.zeros((2, 64, 1, 1), F), np.ones(64, F)
    with pytest.raises((TypeError, ValueError), match=f": {what} {ARRAY}") as told:
        MISPLACED[what](x, w)
    assert len(str(told.value)) < 200


def test_overlapping_out():
    memory = image(3, 6, 4, 5)
    before = memory.copy()
    with pytest.raises(ValueError, match="out shares memory with x"):
        fastnorm.group_norm(memory[:2], 2, out=memory[1:])
    assert np.array_equal(memory, before)
    weight = image(2, 6)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        fastnorm.batch_norm(weight, None, None, weight[0], training=True, out=weight)


def test_interleaved_out_is_no_overlap():
    memory = image(2, 6, 4, 10)
    wanted = fastnorm.group_norm(memory[..., ::2].copy(), 2)
    assert np.array_equal(fastnorm.group_norm(memory[..., ::2], 2, out=memory[..., 1::2]), wanted)


def test_a_refused_input_leaves_the_layer_alone():
    layer = fastnorm.BatchNorm2d(6, momentum=None)
    with pytest.raises(ValueError, match="channels of x"):
        layer(image(2, 5, 4, 4))
    assert layer.num_batches_tracked == 0
    lazy = fastnorm.LazyBatchNorm2d()
    with pytest.raises(ValueError, match="4-D"):
        lazy(image(2, 5))
    assert lazy.num_features is None


SLIPS = {  # what is changed in a good call: a function of a random generator
    "x": lambda rng: [None, 3, "x", [[1.0]], np.ones(3, int)][rng.integers(5)],
    "weight": lambda rng: np.ones(rng.choice([0, 1, 5, 7, 60]), F),
    "bias": lambda rng: np.ones((6, 1) if rng.random() < 0.5 else 6, rng.choice([int, bool])),
    "running_mean": lambda rng: read_only(MEAN) if rng.random() < 0.5 else np.ones(5, F),
    "running_var": lambda rng: [1.0] * 6 if rng.random() < 0.5 else MEAN,
    "eps": lambda rng: rng.choice([0.0, -1.0, math.nan, math.inf, -math.inf]),
    "momentum": lambda rng: rng.choice([math.nan, math.inf]) if rng.random() < 0.5 else "0.1",
    "layout": lambda rng: rng.choice(["NCWH", "nchw", "", "NHCW"]),
    "out": lambda rng: rng.choice([3, "out"]) if rng.random() < 0.5 else image(2, 6, 4, 6),
    "backend": lambda rng: rng.choice(["mkl", "Native", ""]) + "?",
    "num_threads": lambda rng: int(rng.choice([-1, -100, 1 << 20])),
    "convention": lambda rng: rng.choice(["tf", "Torch"]),
    "residual": lambda rng: image(2, 6, 5, 4) if rng.random() < 0.5 else X.astype(float),
    "activation": lambda rng: rng.choice(["swish", "ReLU", "tanh"]),
    "statistics": lambda rng: rng.choice(["moving", "Batch"]),
    "nan_policy": lambda rng: rng.choice(["omit", "warn"]),
    "ghost_size": lambda rng: rng.choice([0, -3]) if rng.random() < 0.5 else 1.5,
}


def test_a_thousand_random_bad_calls():
    """One to three slips in a good call: an error each time, and nothing written."""
    rng = np.random.default_rng(0)
    before = X.copy()
    good = {"running_mean": MEAN, "running_var": VAR, "out": OUT, "training": True}
    for _ in range(1000):
        names = rng.choice(list(SLIPS), rng.integers(1, 4), replace=False)
        slips = {name: SLIPS[name](rng) for name in names}
        x = slips.pop("x", X)
        with pytest.raises((TypeError, ValueError)):
            fastnorm.batch_norm(x, **(good | slips))
        assert np.all(OUT == 7)
        assert np.all(MEAN == 7)
        assert np.all(VAR == 7)
    assert np.array_equal(X, before)
