"""Newton's method on the frontier in float32: an angle and a subspace, both so close that a proof is all that is left.

With K = dM/dphi, M(phi + t) = cos t (M + tan t K) exactly, and perturbation theory gives the sum of the s largest
eigenvalues of M + tau K and their eigenspace to second order in tau, from one eigendecomposition of M
(Kato, Perturbation Theory for Linear Operators, ch. II). The sum's optimum is the next angle. Nothing here has to be
right: what it yields is proven in float64 (`proof`), and what cannot be proven only costs more solves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast.frontier import Point
from loft_fast.goals import Goal
from loft_fast.objective import Objective
from loft_fast.proof import prove

_SMALLEST = 128  # below this dimension a float64 solve of a single problem costs as little as a guess
_SMALLEST_OF_MANY = 32  # and many problems share the cost of guessing
_THINNINGS = (8, 4, 2)  # every second feature makes a problem that costs an eighth and has its optimum nearby
_FAR = 0.4  # radians; no model is trusted further than that
_NEAR = 0.1  # radians; a longer step is followed by another, since its error grows with the square
_PROVABLE = 0.05  # radians; beyond this the predicted subspace is too far off for a proof of 1e-6
_STRAIGHT = 0.012  # radians; up to this it is good enough to first order
_HALF_TURN = 0.5  # tangent of an angle that no series of two terms describes
_STILL = 1e-4  # radians; another step would not get closer in float32
_MAX_STEPS = 3

Offer = Callable[[int, float, Point | None], bool]
"""Called with a problem's number, an angle and the point proven there, if any; returns whether that is enough."""


def descend(objectives: Sequence[Objective], goal: Goal, rank: int, offer: Offer) -> None:
    """For every problem, offer angles ever closer to the optimum at this rank until one is good enough.

    The problems, all of one size, are stacked. Every offer costs one eigendecomposition of full size.
    """
    if objectives[0].dim < (_SMALLEST if len(objectives) == 1 else _SMALLEST_OF_MANY):
        return
    retain = torch.stack([one.retain.float() for one in objectives])
    forget = torch.stack([one.forget.float() for one in objectives])
    angles = _thinned(retain, forget, goal, rank)
    left = list(range(len(objectives)))
    for _ in range(_MAX_STEPS):
        models = _models(_pick(retain, left), _pick(forget, left), rank, [angles[i] for i in left])
        steps = [model.optimum(goal) for model in models]
        near = [k for k, step in enumerate(steps) if abs(step) < _PROVABLE]
        points: dict[int, Point | None] = {}
        for i, step in zip(left, steps, strict=True):
            angles[i] += step
        bases = [models[k].basis(steps[k]) for k in near]
        del models  # a proof needs as much memory as a model, and new memory costs time
        if near:
            problems = [left[k] for k in near]
            proofs = prove([objectives[i] for i in problems], [angles[i] for i in problems], torch.stack(bases))
            points = dict(zip(problems, proofs, strict=True))
        done = [offer(i, angles[i], points.get(i)) or abs(step) < _STILL for i, step in zip(left, steps, strict=True)]
        left = [i for i, enough in zip(left, done, strict=True) if not enough]
        if not left:
            return


def _pick(matrices: Tensor, which: list[int]) -> Tensor:
    return matrices if len(which) == len(matrices) else matrices[which]


def _thinned(retain: Tensor, forget: Tensor, goal: Goal, rank: int) -> list[float]:
    """The angles that the problems of every eighth, fourth and second feature point to.

    Their optima are off by about one over the number of features: from d/4 and d/2 follows d.
    """
    angles, found = [math.pi / 4] * len(retain), [list[float]() for _ in retain]
    for thinning in _THINNINGS:
        a, b = (matrix[:, ::thinning, ::thinning] for matrix in (retain, forget))
        traces = torch.stack([one.diagonal(dim1=-2, dim2=-1).sum(-1) for one in (a, b)])
        a, b = (one / trace.view(-1, 1, 1) for one, trace in zip((a, b), traces, strict=True))
        left = varied = [i for i, least in enumerate(traces.amin(0).tolist()) if least > 0]
        for _ in range(_MAX_STEPS):
            if not left:
                break
            models = _models(_pick(a, left), _pick(b, left), max(1, rank // thinning), [angles[i] for i in left])
            steps = [model.optimum(goal) for model in models]
            for i, step in zip(left, steps, strict=True):
                angles[i] += step
            left = [i for i, step in zip(left, steps, strict=True) if abs(step) >= _NEAR]
        for i in varied:
            found[i].append(angles[i])
    for i, path in enumerate(found):
        if len(path) == len(_THINNINGS) and abs(path[-1] - path[-2]) < _NEAR:
            angles[i] = min(max(2 * path[-1] - path[-2], 0.0), math.pi / 2)
    return angles


@dataclass(frozen=True)
class _Model:
    """What one eigendecomposition says about the angles around.

    Attributes:
        angle: of M = cos(angle) A - sin(angle) B.
        terms: the sum of the largest eigenvalues of M + tau K is e0 + e1 tau + e2 tau^2.
        kept, dropped: (d, s) and (d, d - s), the eigenvectors of M.
        turn: (d - s, s), the eigenspace of M + tau K is spanned by kept + tau dropped turn + O(tau^2).
        gaps: (d - s, s), the differences of the eigenvalues.
        slope: K, (d, d). slope_kept: K kept, (d, s).
    """

    angle: float
    terms: tuple[float, float, float]
    kept: Tensor
    dropped: Tensor
    turn: Tensor
    gaps: Tensor
    slope: Tensor
    slope_kept: Tensor

    def basis(self, t: float) -> Tensor:
        """The predicted eigenspace at angle + t, (d, s), not orthonormal."""
        tau = math.tan(t)
        turn = tau * self.turn
        if abs(t) > _STRAIGHT:
            # The Riccati equation of the eigenspace, turn * gaps = tau (K_dk + K_dd turn - turn K_kk - ...), once more.
            known = turn.clamp(-_HALF_TURN, _HALF_TURN)
            more = self.dropped.mT @ (self.slope @ (self.dropped @ known)) - known @ (self.kept.mT @ self.slope_kept)
            turn = torch.where(known == turn, turn + tau * more / self.gaps, turn)
        return self.kept + self.dropped @ turn

    def shares(self, t: float) -> tuple[float, float]:
        """The predicted (a, b) of the extreme point at angle + t: from h = a cos - b sin and its derivative."""
        e0, e1, e2 = self.terms
        tau = math.tan(t)
        value = e0 + tau * (e1 + tau * e2)
        slope = e1 + 2 * tau * e2
        h, dh = math.cos(t) * value, -math.sin(t) * value + slope / math.cos(t)
        cos, sin = math.cos(self.angle + t), math.sin(self.angle + t)
        return cos * h - sin * dh, -sin * h - cos * dh

    def optimum(self, goal: Goal) -> float:
        """The step to where the goal's residual, as predicted, crosses zero."""
        return _root(
            lambda t: goal.residual(self.angle + t, *self.shares(t)),
            max(-_FAR, -self.angle),
            min(_FAR, math.pi / 2 - self.angle),
        )


def _root(value: Callable[[float], float], low: float, high: float) -> float:
    """Where `value`, positive on the left of it, crosses zero; an end where it does not. The Illinois method."""
    at_low, at_high = value(low), value(high)
    if at_low <= 0 or at_high >= 0:
        return low if at_low <= 0 else high
    middle, side = low, 0
    for _ in range(60):
        middle = low + (high - low) * at_low / (at_low - at_high)
        now = value(middle)
        if abs(now) < 1e-13 or high - low < 1e-13:
            break
        # An end that stays twice loses half its weight, or it would stay forever.
        if now > 0:
            at_high /= 2 if side > 0 else 1
            low, at_low, side = middle, now, 1
        else:
            at_low /= 2 if side < 0 else 1
            high, at_high, side = middle, now, -1
    return middle


def _models(retain: Tensor, forget: Tensor, rank: int, angles: list[float]) -> list[_Model]:
    """The models of P problems, retain and forget (P, d, d), each at its angle."""
    turns = torch.tensor(angles, dtype=retain.dtype, device=retain.device).view(-1, 1, 1)
    cos, sin = turns.cos(), turns.sin()
    values, vectors = torch.linalg.eigh((cos * retain).addcmul_(sin, forget, value=-1))
    slope = (-sin * retain).addcmul_(cos, forget, value=-1)  # K
    cut = values.shape[1] - rank
    dropped, kept = vectors[..., :cut], vectors[..., cut:]
    slope_kept = slope @ kept
    coupling = dropped.mT @ slope_kept  # [P, d - s, s]
    # A gap below rounding says nothing; what is mixed across it matters as little.
    gaps = (values[:, None, cut:] - values[:, :cut, None]).clamp_min_(1e-6 * float(values.abs().max()))
    turn = coupling / gaps
    terms = [values[:, cut:].sum(1, dtype=torch.float64), _dots(kept, slope_kept), _dots(turn, coupling)]
    numbers = torch.stack(terms).T.tolist()
    parts = zip(angles, numbers, kept, dropped, turn, gaps, slope, slope_kept, strict=True)
    return [_Model(angle, (e0, e1, e2), *rest) for angle, (e0, e1, e2), *rest in parts]


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2), dtype=torch.float64)
