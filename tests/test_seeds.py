"""The systems that fastnorm reproduces, held to their figures and formulas."""

import numpy as np
import oracle
import pytest
import torch

import fastnorm
from examples import classics

F = np.float32


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(F)


@pytest.mark.parametrize(
    ("layer", "spatial"),
    [
        (fastnorm.BatchNorm1d, ()),
        (fastnorm.BatchNorm1d, (3,)),
        (fastnorm.BatchNorm2d, (3, 2)),
        (fastnorm.BatchNorm3d, (2, 3, 2)),
    ],
)
def test_initial_state_and_constant_maps(layer, spatial):
    """Maps of constant value 1..C, batch 3, momentum 0.1, two iterations."""
    bn = layer(4)
    assert (bn.eps, bn.momentum, bn.affine, bn.track_running_stats) == (1e-5, 0.1, True, True)
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        assert np.array_equal(getattr(bn, name), np.full(4, value, F))
    x = np.empty((3, 4, *spatial), F)
    x[:] = np.arange(1, 5).reshape(4, *[1] * len(spatial))
    for mean_of_2, var in ((0.2, 0.9), (0.38, 0.81)):
        assert np.all(bn(x) == 0)
        np.testing.assert_allclose(bn.running_mean[1], mean_of_2, rtol=1e-6)
        np.testing.assert_allclose(bn.running_var, var, rtol=1e-6)
    plain = layer(4, affine=False)
    assert plain.weight is None
    assert plain.bias is None


def test_four_modes():
    x = normal(8, 3, 4, 4)
    for tracking in (True, False):
        bn = fastnorm.BatchNorm2d(3, track_running_stats=tracking)
        batch = bn(x)
        moved = bn.running_mean.copy() if tracking else None
        inference = bn.eval()(x)
        if tracking:
            assert np.any(moved != 0)
            assert np.array_equal(bn.running_mean, moved)
            assert np.max(np.abs(inference - batch)) > 0.1
        else:
            assert bn.running_mean is None
            assert np.array_equal(inference, batch)


def test_hand_check():
    """Normalized with the biased variance; running_var is the unbiased one."""
    x = np.random.default_rng(0).random((2, 3, 4, 4)).astype(F)
    bn = fastnorm.BatchNorm2d(3, momentum=1.0)
    y = bn(x)
    wide = x.astype(float)
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3))
    wanted = (wide - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, wide.var((0, 2, 3), ddof=1), rtol=1e-6)


def test_paper_algorithm_2():
    """momentum=None: E[x] and Var[x] are the averages over the training batches."""
    bn = fastnorm.BatchNorm2d(3, momentum=None)
    batches = [normal(4, 3, 5, 5, seed=seed) for seed in range(6)]
    for batch in batches:
        bn(batch)
    m = 4 * 25
    means = np.mean([b.astype(float).mean((0, 2, 3)) for b in batches], axis=0)
    variances = m / (m - 1) * np.mean([b.astype(float).var((0, 2, 3)) for b in batches], axis=0)
    np.testing.assert_allclose(bn.running_mean, means, rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, variances, rtol=1e-5)
    bn.weight[:] = [1, 2, 3]
    x = batches[0]
    scale = (bn.weight / np.sqrt(variances + bn.eps))[:, None, None]
    wanted = scale * x + (bn.bias[:, None, None] - means[:, None, None] * scale)
    np.testing.assert_allclose(bn.eval()(x), wanted, rtol=0, atol=1e-5)


def test_four_normalizations_on_one_input():
    x = normal(3, 8, 5, 6)
    wide = x.astype(float)

    def standard(a, axes):
        return (a - a.mean(axes, keepdims=True)) / np.sqrt(a.var(axes, keepdims=True) + 1e-5)

    grouped = standard(wide.reshape(3, 2, 4, 5, 6), (2, 3, 4)).reshape(x.shape)
    pairs = (
        (fastnorm.batch_norm(x, training=True), standard(wide, (0, 2, 3))),
        (fastnorm.layer_norm(x, x.shape[1:]), standard(wide, (1, 2, 3))),
        (fastnorm.instance_norm(x), standard(wide, (2, 3))),
        (fastnorm.group_norm(x, 2), grouped),
        (fastnorm.group_norm(x, 1), standard(wide, (1, 2, 3))),
        (fastnorm.group_norm(x, 8), standard(wide, (2, 3))),
    )
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [16, 2])
def test_group_batch_norm(groups):
    """Unbiased deviation, and eps outside the root."""
    layer = classics.GroupBatchNorm2d(32, group_num=groups)
    layer.weight[:] = normal(32, 1, 1)
    layer.bias[:] = normal(32, 1, 1, seed=1)
    assert layer.weight.shape == (32, 1, 1)
    x = normal(4, 32, 6, 7)
    wide = x.astype(float).reshape(4, groups, -1)
    mean, std = wide.mean(2, keepdims=True), wide.std(2, ddof=1, keepdims=True)
    wanted = ((wide - mean) / (std + 1e-10)).reshape(x.shape) * layer.weight + layer.bias
    np.testing.assert_allclose(layer(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_ssd_l2_normalization(layout):
    layer = classics.L2Norm(6, layout=layout)
    assert np.all(layer.weight == 20)
    layer.weight[:] = normal(6)
    x = normal(2, 4, 5, 6)
    dy = normal(2, 4, 5, 6, seed=1)
    tx = torch.from_numpy(x).requires_grad_()
    weight = torch.from_numpy(layer.weight.copy()).requires_grad_()
    ty = tx / tx.norm(dim=-1, keepdim=True) * weight
    ty.backward(torch.from_numpy(dy))
    move = (lambda a: np.moveaxis(a, -1, 1)) if layout == "NCHW" else (lambda a: a)
    np.testing.assert_allclose(layer(move(x)), move(ty.detach().numpy()), rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.backward(move(dy)), move(tx.grad.numpy()), rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.grad_weight, weight.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_local_response_norm(size, layout):
    x = normal(2, 7, 4, 3)
    wanted = torch.nn.functional.local_response_norm(torch.from_numpy(x), size, 0.3, 0.6, 1.5)
    given = x if layout == "NCHW" else np.moveaxis(x, 1, -1)
    out = np.empty(given.shape, F)
    y = fastnorm.local_response_norm(given, size, 0.3, 0.6, 1.5, layout=layout, out=out)
    assert y is out
    np.testing.assert_allclose(
        y if layout == "NCHW" else np.moveaxis(y, -1, 1), wanted.numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, np.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_normalize(p, dim):
    x = normal(4, 5, 6)
    x[0] = 0
    wanted = torch.nn.functional.normalize(torch.from_numpy(x), p, dim).numpy()
    np.testing.assert_allclose(fastnorm.normalize(x, p, dim), wanted, rtol=1e-5, atol=1e-7)
    own = x.copy()
    assert fastnorm.normalize(own, p, dim, out=own) is own
    np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-7)
    assert np.all(np.isfinite(fastnorm.normalize(x * F(1e30))))


def test_d2l_batch_norm():
    """moving = momentum*moving + (1 - momentum)*batch, with the biased variance."""
    for shape, axes in (((6, 3), 0), ((4, 3, 5, 5), (0, 2, 3))):
        x = normal(*shape)
        moving_mean, moving_var = np.zeros(3, F), np.ones(3, F)
        weight, bias = normal(3), normal(3, seed=1)
        y = fastnorm.batch_norm(
            x, moving_mean, moving_var, weight, bias, True, 0.9, 1e-5, convention="keras"
        )
        wide = x.astype(float)
        np.testing.assert_allclose(moving_mean, 0.1 * wide.mean(axes), rtol=1e-5)
        np.testing.assert_allclose(moving_var, 0.9 + 0.1 * wide.var(axes), rtol=1e-5)
        exact = oracle.channel_norm(x, x, "batch", 0, weight, bias, 1e-5)
        assert np.max(np.abs(y - exact["y"])) < 1e-5


@pytest.mark.parametrize("block", ["conv", "linear"])
def test_blocks_in_a_network(block):
    """conv - batch norm - ReLU, and batch norm behind a linear layer, with gradients through."""
    from fastnorm.demo import network

    rng = np.random.default_rng(0)
    if block == "conv":
        ours = [network.Conv2d(2, 4, 3, rng, padding=1), fastnorm.BatchNorm2d(4), network.ReLU()]
        theirs = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        )
        x, dy = normal(3, 2, 6, 6), normal(3, 4, 6, 6, seed=1)
    else:
        ours = [network.Linear(6, 4, rng), fastnorm.BatchNorm1d(4), network.ReLU()]
        theirs = torch.nn.Sequential(
            torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()
        )
        x, dy = normal(5, 6), normal(5, 4, seed=1)
    with torch.no_grad():
        theirs[0].weight.copy_(torch.from_numpy(ours[0].weight))
        theirs[0].bias.copy_(torch.from_numpy(ours[0].bias))
    net = network.Sequential(ours)
    tx = torch.from_numpy(x).requires_grad_()
    ty = theirs(tx)
    ty.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(net(x), ty.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(net.backward(dy), tx.grad.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        ours[0].grad_weight, theirs[0].weight.grad.numpy(), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(
        ours[1].grad_weight, theirs[1].weight.grad.numpy(), rtol=0, atol=1e-4
    )
