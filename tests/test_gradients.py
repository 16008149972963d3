"""Gradients against central differences in float64, and against PyTorch in float32."""

import numpy as np
import pytest
import torch
from cases import Case, small_cases
from test_grid import from_layout, layouts, to_layout

CASES = [c for c in small_cases() if np.prod(c.shape) < 800]


def numerical(f, array, step=1e-5):
    """Central differences of the scalar f() by each element of array."""
    gradient = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        before = array[index]
        array[index] = before + step
        up = f()
        array[index] = before - step
        down = f()
        array[index] = before
        gradient[index] = (up - down) / (2 * step)
    return gradient


def few_values(case):
    """Sets of one or two values have no gradient to speak of: dx is all cancellation."""
    return case.norm == "group" and len(case.shape) == 2 and case.shape[1] // case.groups < 3


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize(
    "case",
    [
        Case(c.norm, tuple(min(s, 6) for s in c.shape), c.groups, c.axes)
        for c in CASES
        if np.prod(c.shape) < 400 and not few_values(c)
    ],
    ids=str,
)
def test_central_differences(case, weighted):
    x, dy, weight, bias = case.arrays(np.float64, weighted=weighted)
    if weighted:
        weight *= 10  # far from 1

    def loss():
        return float(np.sum(case.forward(x, weight, bias, backend="native") * dy))

    _, stats = case.forward(x, weight, bias, return_stats=True)
    found = case.backward(dy, x, stats, weight)
    wanted = {"dx": numerical(loss, x)}
    if weighted:
        wanted["dweight"] = numerical(loss, weight)
        if bias is not None:
            wanted["dbias"] = numerical(loss, bias)
    for name, gradient in wanted.items():
        scale = max(1.0, np.max(np.abs(gradient)))
        assert np.max(np.abs(getattr(found, name) - gradient)) < 2e-7 * scale, name


def torch_gradients(case, x, dy, weight, bias):
    functional = torch.nn.functional
    x, weight, bias = (
        None if a is None else torch.from_numpy(a).requires_grad_() for a in (x, weight, bias)
    )
    shape = case.shape[len(case.shape) - case.axes :]
    if case.norm == "batch":
        y = functional.batch_norm(x, None, None, weight, bias, training=True)
    elif case.norm == "instance":
        y = functional.instance_norm(x, weight=weight, bias=bias)
    elif case.norm == "group":
        y = functional.group_norm(x, case.groups, weight, bias)
    elif case.norm == "layer":
        y = functional.layer_norm(x, shape, weight, bias)
    else:
        y = functional.rms_norm(x, shape, weight, 1e-5)
    y.backward(torch.from_numpy(dy))
    leaves = [leaf.grad.numpy() if leaf is not None else None for leaf in (x, weight, bias)]
    return [y.detach().numpy(), *leaves]


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("case", [c for c in CASES if not few_values(c)], ids=str)
def test_pytorch(case, engine, weighted):
    x, dy, weight, bias = case.arrays(np.float32, weighted=weighted)
    wanted = torch_gradients(case, x, dy, weight, bias)
    for layout in layouts(case):
        common = {"backend": engine} | ({"layout": layout} if layout else {})
        lx, ldy = to_layout(x, layout), to_layout(dy, layout)
        y, stats = case.forward(lx, weight, bias, return_stats=True, **common)
        dx, dweight, dbias = case.backward(ldy, lx, stats, weight, **common)
        found = [from_layout(y, layout), from_layout(dx, layout), dweight, dbias]
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
            if b is not None:
                assert np.max(np.abs(a - b)) < 2e-5 * max(1, np.max(np.abs(b))), name
