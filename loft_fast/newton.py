"""Newton's method on the frontier in float32: an angle and a subspace, both so close that a proof is all that is left.

With K = dM/dphi, M(phi + t) = cos t (M + tan t K) exactly, and perturbation theory gives the sum of the s largest
eigenvalues of M + tau K to second order in tau, and their eigenspace to first order, from one eigendecomposition of M
(Kato, Perturbation Theory for Linear Operators, ch. II). The sum's optimum is the next angle. Nothing here has to be
right: what it yields is proven in float64 (`proof`), and what cannot be proven only costs more solves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast.frontier import Point
from loft_fast.goals import Goal
from loft_fast.objective import Objective
from loft_fast.proof import prove

_SMALLEST = 128  # below this dimension a float64 solve costs as little as a guess
_THINNINGS = (8, 4, 2)  # every second feature makes a problem that costs an eighth and has its optimum nearby
_FAR = 0.4  # radians; no model is trusted further than that
_NEAR = 0.1  # radians; a longer step is followed by another, since its error grows with the square
_PROVABLE = 0.03  # radians; the subspace is of first order only, beyond this a proof of 1e-6 is out of its reach
_STILL = 1e-4  # radians; another step would not get closer in float32
_MAX_STEPS = 3


def descend(objective: Objective, goal: Goal, rank: int) -> Iterator[tuple[float, Point | None]]:
    """Angles ever closer to the optimum at this rank, each with a proven point if there is one.

    Every pair costs one eigendecomposition of full size.
    """
    if objective.dim < _SMALLEST:
        return
    retain, forget = objective.retain.float(), objective.forget.float()
    angle = _thinned(retain, forget, goal, rank)
    for _ in range(_MAX_STEPS):
        model = _model(retain, forget, rank, angle)
        step = model.optimum(goal, angle)
        angle += step
        yield angle, prove(objective, angle, model.basis(step)) if abs(step) < _PROVABLE else None
        if abs(step) < _STILL:
            return


def _thinned(retain: Tensor, forget: Tensor, goal: Goal, rank: int) -> float:
    """The angle that the problems of every eighth, fourth and second feature point to.

    Their optima are off by about one over the number of features: from d/4 and d/2 follows d.
    """
    angle, found = math.pi / 4, list[float]()
    for thinning in _THINNINGS:
        a, b = (matrix[::thinning, ::thinning] for matrix in (retain, forget))
        if min(a.trace(), b.trace()) <= 0:
            continue
        a, b = a / a.trace(), b / b.trace()
        for _ in range(_MAX_STEPS):
            step = _model(a, b, max(1, rank // thinning), angle).optimum(goal, angle)
            angle += step
            if abs(step) < _NEAR:
                break
        found.append(angle)
    if len(found) == len(_THINNINGS) and abs(found[-1] - found[-2]) < _NEAR:
        angle = min(max(2 * found[-1] - found[-2], 0.0), math.pi / 2)
    return angle


@dataclass(frozen=True)
class _Model:
    """The sum of the largest eigenvalues of M + tau K, e0 + e1 tau + e2 tau^2; their space, U + tau U'."""

    terms: tuple[float, float, float]
    space: Tensor
    derivative: Tensor

    def basis(self, t: float) -> Tensor:
        """The predicted eigenspace at angle + t, not orthonormal."""
        return self.space + math.tan(t) * self.derivative

    def kept(self, angle: float, t: float) -> tuple[float, float]:
        """The predicted (a, b) of the extreme point at angle + t: from h = a cos - b sin and its derivative."""
        e0, e1, e2 = self.terms
        tau = math.tan(t)
        value = e0 + tau * (e1 + tau * e2)
        slope = e1 + 2 * tau * e2
        h, dh = math.cos(t) * value, -math.sin(t) * value + slope / math.cos(t)
        cos, sin = math.cos(angle + t), math.sin(angle + t)
        return cos * h - sin * dh, -sin * h - cos * dh

    def optimum(self, goal: Goal, angle: float) -> float:
        """The step to where the goal's residual, as predicted, crosses zero; by bisection."""
        low, high = max(-_FAR, -angle), min(_FAR, math.pi / 2 - angle)
        for _ in range(40):
            t = (low + high) / 2
            low, high = (t, high) if goal.residual(angle + t, *self.kept(angle, t)) > 0 else (low, t)
        return low


def _model(retain: Tensor, forget: Tensor, rank: int, angle: float) -> _Model:
    cos, sin = math.cos(angle), math.sin(angle)
    values, vectors = torch.linalg.eigh((cos * retain).sub_(forget, alpha=sin))
    slope = (-sin * retain).sub_(forget, alpha=cos)  # K
    cut = len(values) - rank
    dropped, kept = vectors[:, :cut], vectors[:, cut:]
    slope_kept = slope @ kept
    coupling = dropped.T @ slope_kept  # [d - s, s]
    # A gap below rounding says nothing; what is mixed across it matters as little.
    gaps = (values[cut:] - values[:cut, None]).clamp_min(1e-6 * float(values.abs().max()))
    turn = coupling / gaps
    terms = (float(values[cut:].double().sum()), _dot(kept, slope_kept), _dot(turn, coupling))
    return _Model(terms, kept, dropped @ turn)


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
