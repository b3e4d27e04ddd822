"""LOFT as published: its objective, linear, by its authors' optimiser (arXiv 2601.22456)."""

from __future__ import annotations

import time

from torch import nn

from bench.peers.riemannian_adam import descend
from bench.quality.methods.method import Method
from bench.quality.networks import features, with_map
from bench.quality.problem import Problem
from loft_fast import GroupedMoments, Projection
from loft_fast.objective import build_objective


def moments(problem: Problem) -> tuple[GroupedMoments, GroupedMoments]:
    """Moments by class of the features of the retain and of the forget rows; they are there before a request comes."""
    found, start = [], time.perf_counter()
    for part in ("retain", "forget"):
        groups = GroupedMoments(problem.original.fc.in_features)
        for rows in problem.batches(part, size=1000):
            groups.update(features(problem.original, rows.x), rows.y)
        found.append(groups)
    problem.prepared += time.perf_counter() - start
    return found[0], found[1]


def run(problem: Problem, *, rank: float, rate: float) -> nn.Module:
    """z -> U U^T z, 50 steps of Riemannian Adam; rank: as a multiple of the number of classes that stay."""
    retain, forget = moments(problem)
    objective = build_objective(retain.total(), forget.total(), about="own")
    directions = max(1, min(round(rank * len(retain)), objective.dim - 1))
    basis = descend(objective.retain, objective.forget, directions, seed=problem.seed, learning_rate=rate).basis
    return with_map(problem.copy(), Projection(basis, objective.center))


METHOD = Method(
    run,
    "arXiv 2601.22456",
    needs="moments of the features",
    cumulative=True,
    search={"rank": (1.0, 0.5, 2.0, 4.0), "rate": (1.0, 0.1, 10.0)},
    claim="One class goes at a gap to the retrained model of at most two points.",
    holds=lambda rows: rows["paper"]["gap"] <= 2,
)
