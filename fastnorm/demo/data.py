"""Images as (N, C, H, W) float32 in [-1, 1], with integer labels."""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def digits(seed=0):
    """The 1,797 handwritten digits of 8 x 8 that scikit-learn ships; a fifth is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = (bunch.images[:, np.newaxis] / 8 - 1).astype(np.float32)
    parts = train_test_split(
        x, bunch.target, test_size=0.2, random_state=seed, stratify=bunch.target
    )
    train_x, test_x, train_y, test_y = parts
    return Images("handwritten digits, 8x8", train_x, train_y, test_x, test_y)


def cifar10(folder):
    """The CIFAR-10 python batches: data_batch_1 to data_batch_5 and test_batch.

    The batches are pickles: give only files that you trust. Raises FileNotFoundError where none
    are in the folder or in its cifar-10-batches-py.
    """
    folder = Path(folder)
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    train = sorted(folder.glob("data_batch_*"))
    if not train or not (folder / "test_batch").exists():
        raise FileNotFoundError(
            f"{folder} holds no CIFAR-10 python batches (data_batch_1, test_batch)"
        )
    parts = [_batch(path) for path in train]
    train_x = np.concatenate([x for x, _ in parts])
    train_y = np.concatenate([y for _, y in parts])
    return Images("CIFAR-10, 32x32", train_x, train_y, *_batch(folder / "test_batch"))


def _batch(path):
    with path.open("rb") as file:
        content = pickle.load(file, encoding="bytes")
    x = np.asarray(content[b"data"], np.float32).reshape(-1, 3, 32, 32) / 127.5 - 1
    return x, np.asarray(content[b"labels"], np.int64)
