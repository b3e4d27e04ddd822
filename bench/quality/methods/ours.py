"""This package, as it comes: affine, certified, angle and rank found from moments and head."""

from __future__ import annotations

from torch import nn

from bench.quality.methods.loft import moments
from bench.quality.methods.method import Method
from bench.quality.networks import with_map
from bench.quality.problem import Problem
from loft_fast import solve


def run(problem: Problem) -> nn.Module:
    """The default of `solve`, from moments by class."""
    return with_map(problem.copy(), solve(*moments(problem), head=problem.original.fc))


def erase(problem: Problem) -> nn.Module:
    """Asked for features in which a linear probe does not find the rows either."""
    return with_map(problem.copy(), solve(*moments(problem), head=problem.original.fc, erase=True))


METHOD = Method(run, "this package", needs="moments of the features", random=False, cumulative=True)
ERASE = Method(erase, "this package, erase=True", needs="moments of the features", random=False, cumulative=True)
