"""What a method is given, and how it passes over the rows: batches that count the rows looked at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Rows:
    """Inputs x (n, ...) and classes y (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, chosen: Tensor) -> Rows:
        return Rows(self.x[chosen], self.y[chosen])


@dataclass
class Problem:
    """Make `original` forget the rows `forget` and keep the rest of its training rows, `retain`.

    Attributes:
        original: the trained network; its last layer is the linear `fc`. A method works on `problem.copy()`.
        retain, forget: the training rows, in two parts.
        validation: rows that the original was not trained on and no one is measured on.
        classes: outputs of the network.
        gone: classes of which no row stays; empty when rows are forgotten within classes.
        rate, batch: step size of Adam and rows a step, as the network was trained with.
        seed: of whatever a method draws at random.
        build: (classes) -> a network of this architecture with random weights.
        oracle: the network retrained without the forget rows, only for the method that measures against the ideal.
        prepared: seconds spent on what can be there before a request comes, such as moments of all rows by class.
        touched: rows looked at so far, every pass counted, by part.
    """

    original: nn.Module
    retain: Rows
    forget: Rows
    validation: Rows
    classes: int
    gone: tuple[int, ...]
    rate: float
    batch: int
    seed: int
    build: Callable[[int], nn.Module]
    oracle: nn.Module | None = None
    prepared: float = 0.0
    touched: dict[str, int] = field(default_factory=lambda: {"retain": 0, "forget": 0, "validation": 0})

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def copy(self) -> nn.Module:
        """The original, to be changed."""
        return copy.deepcopy(self.original)

    def fresh(self) -> nn.Module:
        """A network of the same architecture with new random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1000)
            return self.build(self.classes)

    def batches(self, part: str, share: float = 1.0, size: int | None = None) -> Iterator[Rows]:
        """One pass in random order over "retain", "forget" or "validation", or a random share of it, in batches."""
        rows = getattr(self, part)
        order = torch.randperm(len(rows), generator=self.generator)[: max(1, round(share * len(rows)))]
        for chosen in order.split(size or self.batch):
            self.touched[part] += len(chosen)
            yield rows[chosen]

    def endless(self, part: str, share: float = 1.0, size: int | None = None) -> Iterator[Rows]:
        """Passes without end."""
        while True:
            yield from self.batches(part, share, size)

    def pairs(self, share: float = 1.0) -> Iterator[tuple[Rows, Rows]]:
        """One pass over a share of the retain rows, and beside each batch so many forget rows that all come up."""
        steps = math.ceil(max(1, round(share * len(self.retain))) / self.batch)
        forget = self.endless("forget", size=math.ceil(len(self.forget) / steps))
        for rows in self.batches("retain", share):
            yield rows, next(forget)

    def other_classes(self, y: Tensor) -> Tensor:
        """For every label a random one of the other classes, (n,), none of them a class that goes."""
        allowed = torch.ones(len(y), self.classes)
        allowed[torch.arange(len(y)), y] = 0
        allowed[:, list(self.gone)] = 0
        return torch.multinomial(allowed, 1, generator=self.generator).squeeze(1)


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The optimiser of every method that takes steps, unless its paper insists on another."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def cross_entropy(model: nn.Module, rows: Rows) -> Tensor:
    """Mean cross-entropy of the rows."""
    return functional.cross_entropy(model(rows.x), rows.y)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of two sets of logits (n, classes)."""
    return functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def drift(problem: Problem, model: nn.Module, weights: list[Tensor]) -> Tensor:
    """Squared distance of the parameters from the original's, each times its weight."""
    triples = zip(weights, model.parameters(), problem.original.parameters(), strict=True)
    return sum((w * (p - p0.detach()).square()).sum() for w, p, p0 in triples)
