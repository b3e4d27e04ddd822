"""This package for classes, as it comes: affine, certified, angle and rank found from moments and head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.quality.methods.loft import moments
from bench.quality.methods.method import Method, classes_only
from bench.quality.networks import Chain, with_map
from bench.quality.problem import Problem
from loft_fast import Projection, close_outputs, erase_layers, fetch_moments, solve

BATCH = 1000
CHECKED = 4000  # retain rows that tell what a projection costs


def run(problem: Problem) -> nn.Module:
    """What `unlearn` does: the default of `solve` on moments by class, and the outputs of the classes closed."""
    return _projected(problem, problem.copy(), _solved(problem))


def erase(problem: Problem) -> nn.Module:
    """Asked for features in which a linear probe does not find the rows either."""
    return _projected(problem, problem.copy(), _solved(problem, erase=True))


def blocks(problem: Problem) -> nn.Module:
    """Before that, the features behind every earlier block lose what the retain rows can spare."""
    model = problem.copy().eval()
    retain, forget, check = _Pairs(problem, "retain"), _Pairs(problem, "forget"), _Pairs(problem, "retain", CHECKED)
    sites = [f"blocks.{index}:output" for index in range(len(model.blocks) - 1)]
    for one in erase_layers(model, retain, forget, sites, check=check, progress=False):
        one.attached.remove()
        index = sites.index(one.site)
        model.blocks[index] = nn.Sequential(model.blocks[index], Channels(one.projection))
    parts = [fetch_moments(model, rows, "fc", "label", progress=False) for rows in (retain, forget)]
    projection = solve(*parts, head=model.fc, close=True)
    close_outputs(model, problem.gone, "fc")
    return with_map(model, projection.trim(model.fc))


def closed(problem: Problem) -> nn.Module:
    """The outputs alone."""
    model = problem.copy().eval()
    close_outputs(model, problem.gone, "fc")
    return model


def _solved(problem: Problem, erase: bool = False) -> Projection:
    return solve(*moments(problem), head=problem.original.fc, erase=erase, close=True)


def _projected(problem: Problem, model: Chain, projection: Projection) -> nn.Module:
    close_outputs(model, problem.gone, "fc")
    return with_map(model, projection)


class _Pairs:
    """Batches of rows and classes, as often as asked for: of all rows, or of so many, the same each time."""

    def __init__(self, problem: Problem, part: str, most: int | None = None):
        rows, self.touched, self.part = getattr(problem, part), problem.touched, part
        self.rows = rows[torch.randperm(len(rows), generator=problem.generator)[:most]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.rows.x.split(BATCH), self.rows.y.split(BATCH), strict=True):
            self.touched[self.part] += len(y)
            yield x, y


class Channels(nn.Module):
    """A map of features (n, d), tokens (n, t, d), or the channels of maps (n, d, h, w)."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, z: Tensor) -> Tensor:
        """The same shape."""
        return self.change(z.movedim(1, -1)).movedim(-1, 1) if z.ndim == 4 else self.change(z)


METHOD = Method(run, "this package", needs="moments of the features", random=False, cumulative=True)
ERASE = Method(
    erase,
    "this package, erase=True",
    needs="moments of the features",
    random=False,
    cumulative=True,
    applies=classes_only,
)
BLOCKS = Method(
    blocks,
    "this package, at every block",
    needs="features of every block",
    random=False,
    cumulative=True,
    applies=classes_only,
)
CLOSED = Method(
    closed,
    "for comparison: the classes are still in the features",
    needs="nothing",
    random=False,
    cumulative=True,
    applies=classes_only,
)
