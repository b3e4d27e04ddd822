"""The numbers behind the report's pictures, small enough for a JSON file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loft_fast.demo.compare import Outcome, Problem
from loft_fast.frontier import Frontier
from loft_fast.goals import Distance
from loft_fast.objective import build_objective
from loft_fast.peers.riemannian_adam import LEARNING_RATE, STEPS, Descent, descend
from loft_fast.projection import Certificate
from loft_fast.solver import solve

SAMPLES = 10
ANGLES = 33
RATES = (0.1, LEARNING_RATE, 10.0)
"""Learning rates of Riemannian Adam: below, at and above the published default."""


def predictions(problem: Problem, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A few forgotten test images (pixels 0 to 255 as hexadecimal digits) and what every model makes of all of them."""
    x, y = problem.digits.split(problem.forget)["forget_test"]
    share = -(-SAMPLES // len(problem.forget))
    rows = torch.cat([torch.nonzero(y == digit).flatten()[:share] for digit in problem.forget])[:SAMPLES]
    answers = {outcome.method: outcome.predict(x) for outcome in outcomes}
    return {
        "images": [bytes(pixels.tolist()).hex() for pixels in (x[rows] * 255).round().byte().flatten(1)],
        "labels": y[rows].tolist(),
        "answers": {method: answer[rows].tolist() for method, answer in answers.items()},
        "counts": {method: answer.bincount(minlength=10).tolist() for method, answer in answers.items()},
    }


def spectra(problem: Problem, certificate: Certificate) -> dict[str, Any]:
    """Eigenvalues of A and B, and the shares (a, b) of every direction, where `certificate` cuts; largest first."""
    objective = build_objective(*problem.known_moments, about="retain")
    _, vectors = Frontier(objective).spectrum(certificate.angle)
    directions = vectors.flip(1)
    return {
        "retain": _short(torch.linalg.eigvalsh(objective.retain).flip(0)),
        "forget": _short(torch.linalg.eigvalsh(objective.forget).flip(0)),
        "retain_shares": _short(((objective.retain @ directions) * directions).sum(0)),
        "forget_shares": _short(((objective.forget @ directions) * directions).sum(0)),
        "kept": certificate.rank,
        "angle": certificate.angle,
    }


def frontier(problem: Problem) -> dict[str, Any]:
    """The published objective at the published method's rank: what can be reached, the optimum, and the descents."""
    objective = build_objective(*problem.known_moments, about="own")
    curve = [Frontier(objective).at(math.pi / 2 * step / (ANGLES - 1), problem.rank) for step in range(ANGLES)]
    best = solve(*problem.known_moments, rank=problem.rank, about="own").certificate
    assert best is not None
    runs = {
        rate: descend(objective.retain, objective.forget, problem.rank, learning_rate=rate, seed=problem.seed)
        for rate in RATES
    }
    return {
        "rank": problem.rank,
        "goal": str(Distance()),
        "curve": [[1 - point.retain_kept, point.forget_kept] for point in curve],
        "optimum": [1 - best.retain_kept, best.forget_kept],
        "loss": best.loss,
        "lower_bound": best.lower_bound,
        "eigen_solves": best.eigen_solves,
        "seconds": best.seconds,
        "descents": [_descent(rate, run) for rate, run in runs.items()],
    }


def _descent(rate: float, run: Descent) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "published": rate == LEARNING_RATE,
        "steps": STEPS,
        "loss": run.loss,
        "seconds": run.seconds,
        "path": [[1 - a, b] for a, b in run.path],
    }


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
