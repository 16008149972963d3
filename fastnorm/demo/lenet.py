"""LeNet-5 with and without batch norm: train both, print a table, save a plot."""

import time

import numpy as np

from fastnorm import BatchNorm1d, BatchNorm2d
from fastnorm.demo.network import (
    Adam,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    softmax_cross_entropy,
)


def lenet5(image_shape, batch_norm, seed=0):
    """LeNet-5 for (C, 32, 32) images, or fitted to 8 x 8 ones.

    32 x 32: conv 6 k5, pool, conv 16 k5, pool, linear 400-120-84-10. On 8 x 8 two such
    convolutions leave nothing, so that there they are k3 with padding 1, and 64 values reach the
    first linear layer. Batch norm, where asked for, stands before each ReLU.
    """
    rng = np.random.default_rng(seed)
    channels, height, _ = image_shape
    size, padding = (5, 0) if height >= 32 else (3, 1)
    side = height
    for _ in range(2):
        side = (side + 2 * padding - size + 1) // 2
    layers = []

    def block(layer, norm, width):
        layers.append(layer)
        if batch_norm:
            layers.append(norm(width))
        layers.append(ReLU())

    block(Conv2d(channels, 6, size, rng, padding), BatchNorm2d, 6)
    layers.append(MaxPool2d())
    block(Conv2d(6, 16, size, rng, padding), BatchNorm2d, 16)
    layers += [MaxPool2d(), Flatten()]
    block(Linear(16 * side * side, 120, rng), BatchNorm1d, 120)
    block(Linear(120, 84, rng), BatchNorm1d, 84)
    layers.append(Linear(84, 10, rng))
    return Sequential(layers)


def accuracy(network, x, y, batch=512):
    """Percent of the images that the network, in evaluation, labels rightly."""
    network.set_training(False)
    right = sum(
        int(np.sum(network(x[at : at + batch]).argmax(axis=1) == y[at : at + batch]))
        for at in range(0, len(x), batch)
    )
    network.set_training(True)
    return 100.0 * right / len(x)


def train(images, batch_norm, epochs, rate, batch, seed, on_step=lambda loss: None):
    """Test accuracy (percent) after each epoch."""
    network = lenet5(images.train_x.shape[1:], batch_norm, seed)
    network.set_training(True)
    optimizer = Adam(network, rate)
    rng = np.random.default_rng(seed)
    history = []
    for _ in range(epochs):
        order = rng.permutation(len(images.train_x))
        for at in range(0, len(order) - 1, batch):
            chosen = order[at : at + batch]
            if len(chosen) < 2:  # batch norm needs more than one value per channel
                continue
            loss, gradient = softmax_cross_entropy(
                network(images.train_x[chosen]), images.train_y[chosen]
            )
            network.backward(gradient)
            optimizer.step()
            on_step(loss)
        history.append(accuracy(network, images.test_x, images.test_y))
    return history


def run(images, epochs=10, rate=0.01, batch=64, seed=0, plot="lenet5.png"):
    """Train both networks with a progress bar; print the table and save the plot."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    console.print(
        f"LeNet-5 on {images.name}: {len(images.train_x)} training and {len(images.test_x)} test"
        f" images, Adam {rate}, batches of {batch}, {epochs} epochs"
    )
    started = time.perf_counter()
    results = {}
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console) as progress:
        for name, batch_norm in (("without batch norm", False), ("with batch norm", True)):
            steps = epochs * -(-len(images.train_x) // batch)
            task = progress.add_task(name, total=steps, loss=float("nan"))
            results[name] = train(
                images,
                batch_norm,
                epochs,
                rate,
                batch,
                seed,
                lambda loss, task=task: progress.update(task, advance=1, loss=loss),
            )
            progress.update(task, completed=steps)
    _print_table(console, results)
    console.print(f"{time.perf_counter() - started:.1f} seconds")
    if plot:
        _save_plot(images.name, results, plot)
        console.print(f"plot saved to {plot}")
    return results


def _print_table(console, results):
    from rich.table import Table

    table = Table(title="test accuracy by epoch, percent")
    table.add_column("epoch", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    for epoch, row in enumerate(zip(*results.values(), strict=True), start=1):
        table.add_row(str(epoch), *(f"{value:.1f}" for value in row))
    console.print(table)


def _save_plot(title, results, path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, history in results.items():
        axes.plot(range(1, len(history) + 1), history, marker="o", label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=f"LeNet-5 on {title}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
