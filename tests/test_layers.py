"""Layers against torch.nn: modes, state, gradients, laziness."""

import numpy as np
import pytest
import torch

import fastnorm

SHAPES = {"1d": (4, 3, 6), "2d": (4, 3, 6, 5), "3d": (4, 3, 2, 6, 5)}


def pairs():
    for rank, shape in SHAPES.items():
        for settings in (
            {},
            {"affine": False},
            {"momentum": None},
            {"track_running_stats": False},
            {"momentum": 0.3, "eps": 1e-3},
        ):
            yield f"BatchNorm{rank}", (3,), settings, shape
        for settings in ({}, {"affine": True}, {"affine": True, "track_running_stats": True}):
            yield f"InstanceNorm{rank}", (3,), settings, shape
            yield f"InstanceNorm{rank}", (3,), settings, shape[1:]
    yield "BatchNorm1d", (3,), {}, (5, 3)
    yield "GroupNorm", (3, 6), {}, (2, 6, 4, 4)
    yield "GroupNorm", (2, 6), {"affine": False}, (2, 6, 4)
    yield "LayerNorm", ((4, 5),), {}, (2, 3, 4, 5)
    yield "LayerNorm", (5,), {"bias": False}, (2, 3, 5)
    yield "LayerNorm", (5,), {"elementwise_affine": False}, (2, 3, 5)
    yield "RMSNorm", (5,), {}, (2, 3, 5)
    yield "RMSNorm", (5,), {"elementwise_affine": False, "eps": 0.1}, (2, 3, 5)
    yield "LocalResponseNorm", (3,), {"alpha": 0.1, "k": 2.0}, (2, 6, 4, 4)
    yield "LocalResponseNorm", (4,), {"alpha": 0.5, "beta": 0.5}, (2, 6, 4)


def close(ours, theirs, tolerance=2e-5):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs), initial=0) <= tolerance * max(1, np.max(np.abs(theirs)))


@pytest.mark.parametrize(
    ("name", "arguments", "settings", "shape"),
    list(pairs()),
    ids=[f"{n}-{'x'.join(map(str, s))}-{'-'.join(k) or 'default'}" for n, _, k, s in pairs()],
)
def test_against_pytorch(name, arguments, settings, shape):
    rng = np.random.default_rng(0)
    ours = getattr(fastnorm, name)(*arguments, **settings)
    theirs = getattr(torch.nn, name)(*arguments, **settings)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    random = {
        key: rng.uniform(0.5, 2, value.shape).astype(np.float32)
        for key, value in theirs.state_dict().items()
        if key != "num_batches_tracked"
    }
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in random.items()}, strict=False)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        x = rng.normal(1, 2, shape).astype(np.float32)
        dy = rng.normal(size=shape).astype(np.float32)
        tx = torch.from_numpy(x).requires_grad_()
        ty = theirs(tx)
        ty.backward(torch.from_numpy(dy))
        close(ours(x), ty)
        close(ours.backward(dy), tx.grad)
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value)
    for parameter, value in theirs.named_parameters():
        close(getattr(ours, f"grad_{parameter}"), value.grad)
    # And back: PyTorch takes our state as it is.
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    ours.zero_grad()
    if getattr(ours, "weight", None) is not None:
        assert ours.grad_weight is None


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_lazy(norm, rank):
    shape = SHAPES[rank]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    lazy = getattr(fastnorm, f"Lazy{norm}{rank}")(affine=True)
    plain = getattr(fastnorm, f"{norm}{rank}")(3, affine=True)
    assert np.array_equal(lazy(x), plain(x))
    assert lazy.num_features == 3
    assert set(lazy.state_dict()) == set(plain.state_dict())
    last = getattr(fastnorm, f"Lazy{norm}{rank}")(layout="NHWC")
    last(np.moveaxis(x, 1, -1))
    assert last.num_features == 3


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_layout_and_dtype(name):
    x = np.random.default_rng(0).normal(size=(4, 3, 6, 5))
    first = getattr(fastnorm, name)(3, dtype=np.float64)
    last = getattr(fastnorm, name)(3, layout="NHWC", dtype=np.float64)
    y = last(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), first(x), rtol=0, atol=1e-12)
    assert y.dtype == np.float64


def test_gradients_accumulate_until_zero_grad():
    layer = fastnorm.GroupNorm(2, 4)
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    layer(x)
    layer.backward(x)
    once = layer.grad_weight.copy()
    layer.backward(x)
    np.testing.assert_allclose(layer.grad_weight, 2 * once)
    layer.zero_grad()
    assert layer.grad_weight is None


def test_a_resnet_block_with_residual_and_activation():
    """relu(norm(x) + residual), and norm then relu, as torch.nn has them in two and three calls."""
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(size=(3, 4, 3, 6, 5)).astype(np.float32)[:3]
    for ours, theirs in (
        (fastnorm.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3)),
        (fastnorm.GroupNorm(3, 3, activation="relu"), torch.nn.GroupNorm(3, 3)),
        (fastnorm.LazyBatchNorm2d(activation="relu"), torch.nn.BatchNorm2d(3)),
        (
            fastnorm.InstanceNorm2d(3, affine=True, activation="relu"),
            torch.nn.InstanceNorm2d(3, affine=True),
        ),
    ):
        for extra in ((), (residual,)):
            leaves = [torch.from_numpy(a).requires_grad_() for a in (x, *extra)]
            theirs.zero_grad()
            ty = torch.relu(sum((theirs(leaves[0]), *leaves[1:])))
            ty.backward(torch.from_numpy(dy))
            close(ours(x, *extra), ty)
            ours.zero_grad()
            found = ours.backward(dy)
            for a, leaf in zip(found if extra else (found,), leaves, strict=True):
                close(a, leaf.grad)
            close(ours.grad_weight, theirs.weight.grad)
            close(ours.grad_bias, theirs.bias.grad)
    assert repr(fastnorm.RMSNorm(4, activation="silu")).endswith("activation='silu')")


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_transformer_block_with_residual(name):
    """total = x + residual goes on beside norm(total), and its gradient comes back."""
    rng = np.random.default_rng(0)
    x, residual, dy, dtotal = rng.normal(size=(4, 6, 9)).astype(np.float32)
    ours, theirs = getattr(fastnorm, name)(9, eps=1e-5), getattr(torch.nn, name)(9, eps=1e-5)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, residual)]
    total = leaves[0] + leaves[1]
    ty = theirs(total)
    torch.autograd.backward((ty, total), (torch.from_numpy(dy), torch.from_numpy(dtotal)))
    y, found_total = ours(x, residual)
    close(y, ty)
    close(found_total, total)
    dx = ours.backward(dy, dtotal)
    close(dx, leaves[0].grad)
    close(dx, leaves[1].grad)
    close(ours.grad_weight, theirs.weight.grad)


def test_one_sample_without_the_batch_axis_and_its_residual():
    x, residual, dy = np.random.default_rng(0).normal(size=(3, 3, 6, 5)).astype(np.float32)
    layer = fastnorm.InstanceNorm2d(3, activation="gelu")
    y = layer(x, residual)
    dx, dresidual = layer.backward(dy)
    wanted = layer(x[np.newaxis], residual[np.newaxis])[0]
    assert np.array_equal(y, wanted)
    assert dx.shape == dresidual.shape == x.shape


def test_parameters_are_the_arrays_that_the_layer_uses():
    """An optimizer that holds them sees load_state_dict, and the layer sees the optimizer."""
    layer = fastnorm.BatchNorm2d(3)
    held = dict(layer.named_parameters())
    assert list(held) == [name for name, _ in torch.nn.BatchNorm2d(3).named_parameters()]
    assert all(a is b for a, b in zip(layer.parameters(), held.values(), strict=True))
    state = {name: value + 2 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert np.array_equal(held["weight"], np.full(3, 3))
    assert layer.num_batches_tracked == 2
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)
    y = layer(x)
    for array in layer.parameters():
        array *= 2
    assert np.allclose(layer(x), 2 * y)
    assert not list(fastnorm.LayerNorm(5, elementwise_affine=False).parameters())
    assert [name for name, _ in fastnorm.RMSNorm(5).named_parameters()] == ["weight"]


def test_repr_is_pytorchs():
    for ours, theirs in (
        (fastnorm.BatchNorm2d(3), torch.nn.BatchNorm2d(3)),
        (fastnorm.GroupNorm(2, 4), torch.nn.GroupNorm(2, 4)),
    ):
        assert repr(ours).partition(", affine")[0] == repr(theirs).partition(", affine")[0]
