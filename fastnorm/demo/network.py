"""What LeNet-5 needs beside normalization: convolution, pooling, linear, ReLU, Adam, in NumPy.

Every layer has forward (as a call), backward(dy) -> dx, named_parameters, and gradients named
grad_<parameter>, like fastnorm's own layers, which stand between these unchanged.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

F = np.float32


class Weighted:
    """A layer with a weight and a bias."""

    def named_parameters(self):
        return ("weight", self.weight), ("bias", self.bias)


class Unweighted:
    """A layer without parameters."""

    def named_parameters(self):
        return ()


class Linear(Weighted):
    """y = x @ weight.T + bias, initialised as PyTorch does: uniform within 1/sqrt(inputs)."""

    def __init__(self, inputs, outputs, rng):
        bound = 1 / np.sqrt(inputs)
        self.weight = rng.uniform(-bound, bound, (outputs, inputs)).astype(F)
        self.bias = rng.uniform(-bound, bound, outputs).astype(F)

    def __call__(self, x):
        self.x = x
        return x @ self.weight.T + self.bias

    def backward(self, dy):
        self.grad_weight = dy.T @ self.x
        self.grad_bias = dy.sum(axis=0)
        return dy @ self.weight


class Conv2d(Weighted):
    """A square convolution as one matrix product over windows taken by stride tricks."""

    def __init__(self, inputs, outputs, size, rng, padding=0):
        bound = 1 / np.sqrt(inputs * size * size)
        self.weight = rng.uniform(-bound, bound, (outputs, inputs, size, size)).astype(F)
        self.bias = rng.uniform(-bound, bound, outputs).astype(F)
        self.size = size
        self.padding = padding

    def _windows(self, x, padding):
        """(N, H, W, C*size*size): the patch that each output position sees."""
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = sliding_window_view(x, (self.size, self.size), axis=(2, 3))
        n, _, h, w = windows.shape[:4]
        return windows.transpose(0, 2, 3, 1, 4, 5).reshape(n, h, w, -1)

    def __call__(self, x):
        self.columns = self._windows(x, self.padding)
        y = self.columns @ self.weight.reshape(len(self.weight), -1).T + self.bias
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    def backward(self, dy):
        rows = dy.transpose(0, 2, 3, 1).reshape(-1, dy.shape[1])
        columns = self.columns.reshape(len(rows), -1)
        self.grad_weight = (rows.T @ columns).reshape(self.weight.shape)
        self.grad_bias = rows.sum(axis=0)
        # The gradient is a convolution with the kernel turned round and the channels swapped.
        turned = self.weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        windows = self._windows(dy, self.size - 1 - self.padding)
        dx = windows @ turned.reshape(len(turned), -1).T
        return np.ascontiguousarray(dx.transpose(0, 3, 1, 2))


class MaxPool2d(Unweighted):
    """The largest of each 2 x 2 square."""

    def __call__(self, x):
        n, c, h, w = x.shape
        squares = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        squares = squares.transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
        self.shape = x.shape
        self.winner = squares.argmax(axis=-1)[..., None]
        return np.take_along_axis(squares, self.winner, -1)[..., 0]

    def backward(self, dy):
        n, c, h, w = dy.shape
        squares = np.zeros((n, c, h, w, 4), dy.dtype)
        np.put_along_axis(squares, self.winner, dy[..., None], -1)
        dx = np.zeros(self.shape, dy.dtype)
        squares = squares.reshape(n, c, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        dx[:, :, : 2 * h, : 2 * w] = squares.reshape(n, c, 2 * h, 2 * w)
        return dx


class ReLU(Unweighted):
    def __call__(self, x):
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy):
        return dy * self.positive


class Flatten(Unweighted):
    def __call__(self, x):
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        return dy.reshape(self.shape)


class Sequential:
    """Layers one behind the other."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def set_training(self, training):
        for layer in self.layers:
            if hasattr(layer, "train"):
                layer.train(training)

    def parameters(self):
        """(layer, name, array) of every parameter."""
        for layer in self.layers:
            for name, array in layer.named_parameters():
                yield layer, name, array


def softmax_cross_entropy(logits, labels):
    """The mean loss, and its gradient by the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    probability = np.exp(shifted)
    probability /= probability.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.mean(np.log(np.maximum(probability[rows, labels], 1e-30)))
    probability[rows, labels] -= 1
    return float(loss), probability / F(len(labels))


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, network, rate=0.01, betas=(0.9, 0.999), eps=1e-8):
        self.slots = [
            (layer, name, array, np.zeros_like(array), np.zeros_like(array))
            for layer, name, array in network.parameters()
        ]
        self.rate, self.betas, self.eps, self.steps = rate, betas, eps, 0

    def step(self):
        self.steps += 1
        slow, fast = self.betas[1], self.betas[0]
        rate = self.rate * np.sqrt(1 - slow**self.steps) / (1 - fast**self.steps)
        for layer, name, parameter, first, second in self.slots:
            gradient = getattr(layer, f"grad_{name}")
            first += F(1 - fast) * (gradient - first)
            second += F(1 - slow) * (gradient * gradient - second)
            parameter -= (rate * first / (np.sqrt(second) + self.eps)).astype(F)
        for layer, *_ in self.slots:
            if hasattr(layer, "zero_grad"):
                layer.zero_grad()
