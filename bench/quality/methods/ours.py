"""This package for classes, as it comes: affine, certified, angle and rank found from moments and head."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor, nn

from bench.quality.methods.loft import moments
from bench.quality.methods.method import Method, classes_only
from bench.quality.networks import Chain, with_map
from bench.quality.problem import Problem
from loft_fast import GroupedMoments, Moments, Projection, close_outputs, fetch_moments, solve


def run(problem: Problem) -> nn.Module:
    """What `unlearn` does: the default of `solve` on moments by class, and the outputs of the classes closed."""
    return _projected(problem, problem.copy(), _solved(problem))


def erase(problem: Problem) -> nn.Module:
    """Asked for features in which a linear probe does not find the rows either."""
    return _projected(problem, problem.copy(), _solved(problem, erase=True))


def blocks(problem: Problem, *, angle: float) -> nn.Module:
    """Before that, the features behind every earlier block are projected at this angle, one block after another.

    Its own moments for every block, since a projection changes what comes after it.
    """
    model = problem.copy().eval()
    for index in range(len(model.blocks) - 1):
        start = time.perf_counter()
        parts = _moments(problem, model, f"blocks.{index}:output")
        if index == 0:  # the others are taken behind projections that this request made
            problem.prepared += time.perf_counter() - start
        model.blocks[index] = nn.Sequential(model.blocks[index], Channels(solve(*parts, angle=angle)))
    parts = _moments(problem, model, "fc")
    return _projected(problem, model, solve(*parts, head=model.fc, close=True))


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


def _moments(problem: Problem, model: nn.Module, site: str) -> list[Moments | GroupedMoments]:
    """Of the retain and the forget rows, by class."""
    return [fetch_moments(model, _pairs(problem, part), site, "label", progress=False) for part in ("retain", "forget")]


def _pairs(problem: Problem, part: str) -> Iterator[tuple[Tensor, Tensor]]:
    return ((rows.x, rows.y) for rows in problem.batches(part, size=1000))


class Channels(nn.Module):
    """A map of features (n, d), tokens (n, t, d), or the channels of maps (n, d, h, w)."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, z: Tensor) -> Tensor:
        """The same shape."""
        return self.change(z.movedim(1, -1)).movedim(-1, 1) if z.ndim == 4 else self.change(z)


METHOD = Method(run, "this package", needs="moments of the features", random=False, cumulative=True)
ERASE = Method(erase, "this package, erase=True", needs="moments of the features", random=False, cumulative=True)
BLOCKS = Method(
    blocks,
    "this package, at every block",
    needs="moments of the features of every block",
    search={"angle": (0.2, 0.1, 0.3)},
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
