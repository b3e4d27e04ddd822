"""This package, for rows within classes: say of them what a network that never saw them would say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem
from loft_fast import match_retrained


@dataclass(frozen=True)
class Loader:
    """Batches (x, y) of a part of the training rows, as often as one asks."""

    problem: Problem
    part: str

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.problem.batches(self.part):
            yield rows.x, rows.y


def run(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """The default of `match_retrained`; rate: step size, as a multiple of the training's."""
    model = problem.copy()
    parts = (Loader(problem, part) for part in ("retain", "forget", "validation"))
    match_retrained(model, *parts, epochs=epochs, rate=rate * problem.rate, progress=False)
    return model.eval()


METHOD = Method(
    run,
    "this package",
    needs="retain, forget and validation rows",
    search={"epochs": (6, 4), "rate": (0.8, 0.3, 0.5)},
    applies=lambda problem: not problem.gone,
)
