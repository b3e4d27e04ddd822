"""A first angle close to the optimum, by Newton's method in float32 on a model of the frontier.

With K = dM/dphi, M(phi + t) = cos t (M + tan t K) exactly, and perturbation theory gives the sum of the s largest
eigenvalues of M + tau K to third order in tau from one eigendecomposition of M (Kato, Perturbation Theory for Linear
Operators, ch. II). The model's optimum is the next angle. Nothing here has to be right: the certificate comes later, in
float64, and a bad first angle only costs more solves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast.goals import Goal
from loft_fast.objective import Objective

_SMALLEST = 128  # below this dimension a float64 solve costs as little as a guess
_THINNINGS = (4, 2)  # every second feature makes a problem that costs an eighth and has its optimum nearby
_FAR = 0.4  # radians; no model is trusted further than that
_NEAR = 0.1  # radians; a longer step is followed by another, since its error grows with the third power
_MAX_STEPS = 3


def first_angle(objective: Objective, goal: Goal, rank: int) -> tuple[float, int]:
    """An angle near the optimum at this rank, and the eigendecompositions of full size that it cost."""
    angle = math.pi / 4
    if objective.dim < _SMALLEST:
        return angle, 0
    retain, forget = objective.retain.float(), objective.forget.float()
    for step in _THINNINGS:
        thin = [matrix[::step, ::step] for matrix in (retain, forget)]
        traces = [float(matrix.trace()) for matrix in thin]
        if min(traces) > 0:
            angle, _ = _descend(thin[0] / traces[0], thin[1] / traces[1], goal, max(1, rank // step), angle)
    return _descend(retain, forget, goal, rank, angle)


def _descend(retain: Tensor, forget: Tensor, goal: Goal, rank: int, angle: float) -> tuple[float, int]:
    for count in range(1, _MAX_STEPS + 1):
        previous = angle
        angle = _model(retain, forget, rank, previous).optimum(goal, previous)
        if abs(angle - previous) < _NEAR:
            return angle, count
    return angle, _MAX_STEPS


@dataclass(frozen=True)
class _Model:
    """The sum of the largest eigenvalues of M + tau K: first + second tau + third tau^2 + fourth tau^3."""

    terms: tuple[float, float, float, float]

    def kept(self, angle: float, t: float) -> tuple[float, float]:
        """The predicted (a, b) of the extreme point at angle + t: from h = a cos - b sin and its derivative."""
        e0, e1, e2, e3 = self.terms
        tau = math.tan(t)
        value = e0 + tau * (e1 + tau * (e2 + tau * e3))
        slope = e1 + tau * (2 * e2 + 3 * tau * e3)
        h, dh = math.cos(t) * value, -math.sin(t) * value + slope / math.cos(t)
        cos, sin = math.cos(angle + t), math.sin(angle + t)
        return cos * h - sin * dh, -sin * h - cos * dh

    def optimum(self, goal: Goal, angle: float) -> float:
        """The angle where the goal's residual, as predicted, crosses zero; by bisection."""
        low, high = max(-_FAR, -angle), min(_FAR, math.pi / 2 - angle)
        for _ in range(40):
            t = (low + high) / 2
            low, high = (t, high) if goal.residual(angle + t, *self.kept(angle, t)) > 0 else (low, t)
        return angle + low


def _model(retain: Tensor, forget: Tensor, rank: int, angle: float) -> _Model:
    cos, sin = math.cos(angle), math.sin(angle)
    values, vectors = torch.linalg.eigh(cos * retain - sin * forget)
    slope = -sin * retain - cos * forget  # K
    cut = len(values) - rank
    dropped, kept = vectors[:, :cut], vectors[:, cut:]
    slope_kept = slope @ kept
    coupling = dropped.T @ slope_kept  # [d - s, s]
    # A gap below rounding says nothing; what is mixed across it matters as little.
    gaps = (values[cut:] - values[:cut, None]).clamp_min(1e-6 * float(values.abs().max()))
    turn = coupling / gaps
    turned = dropped @ turn  # [d, s]
    return _Model(
        (
            float(values[cut:].double().sum()),
            _dot(kept, slope_kept),
            _dot(turn, coupling),
            _dot(turned, slope @ turned) - _dot(turn.T @ turn, kept.T @ slope_kept),
        )
    )


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
