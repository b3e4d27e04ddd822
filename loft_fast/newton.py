"""Newton's method on the frontier in float32: an angle and a subspace, both so close that a proof is all that is left.

With K = dM/dphi, M(phi + t) = cos t (M + tan t K) exactly, and perturbation theory gives the sum of the s largest
eigenvalues of M + tau K and their eigenspace to second order in tau, from one eigendecomposition of M
(Kato, Perturbation Theory for Linear Operators, ch. II). The sum's optimum is the next angle. Nothing here has to be
right: what it yields is proven in float64 (`proof`), and what cannot be proven only costs more solves.

Why a full eigendecomposition, of which only s vectors are kept: with d = 768, s = 250 the gap at the cut is 1e-5 of the
spectrum's width. In float32 torch's eigh took 49 ms. SciPy's partial solver (syevr) took 77, as did its full one; ten
steps of a Chebyshev filter took 60 and were off by 0.07 in h, where 1e-7 is needed; five of LOBPCG, from a start 1e-3
off, 210 and 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loft_fast import ops
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
_STRAIGHT = 0.008  # radians; up to this it is good enough to first order
_HALF_TURN = 0.5  # tangent of an angle that no series of two terms describes
_EDGE = 8  # eigenvectors on either side of the cut that are predicted one by one, to tell where it is
_WINDOW = 16  # one in so many eigenvectors on either side of the cut is too close to it for a series
_STILL = 1e-4  # radians; another step would not get closer in float32
_MAX_STEPS = 3

Offer = Callable[[int, float, Point | None], bool]
"""Called with a problem's number, an angle and the point proven there, if any; returns whether that is enough."""


def search(objectives: Sequence[Objective], goal: Goal, rank: int, offer: Offer, start: float | None = None) -> None:
    """For every problem, offer angles ever closer to the optimum at this rank until one is good enough.

    The problems, all of one size, are stacked. Every offer costs one eigendecomposition of full size. The first is made
    at `start`, or where smaller problems point to.
    """
    if objectives[0].dim < (_SMALLEST if len(objectives) == 1 else _SMALLEST_OF_MANY):
        return
    retain = torch.stack([one.retain.float() for one in objectives])
    forget = torch.stack([one.forget.float() for one in objectives])
    angles = _thinned(retain, forget, goal, rank) if start is None else [start] * len(objectives)
    left = list(range(len(objectives)))
    for _ in range(_MAX_STEPS):
        models = _Models(_pick(retain, left), _pick(forget, left), rank, [angles[i] for i in left])
        steps = models.optima(goal)
        for i, step in zip(left, steps, strict=True):
            angles[i] += step
        near = [k for k, step in enumerate(steps) if abs(step) < _PROVABLE]
        points: dict[int, Point | None] = {}
        if near:
            problems = [left[k] for k in near]
            bases, edges = models.bases(near, [steps[k] for k in near])
            proofs = prove([objectives[i] for i in problems], [angles[i] for i in problems], bases, edges)
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
            models = _Models(_pick(a, left), _pick(b, left), max(1, rank // thinning), [angles[i] for i in left])
            steps = models.optima(goal)
            for i, step in zip(left, steps, strict=True):
                angles[i] += step
            left = [i for i, step in zip(left, steps, strict=True) if abs(step) >= _NEAR]
        for i in varied:
            found[i].append(angles[i])
    for i, path in enumerate(found):
        if len(path) == len(_THINNINGS) and abs(path[-1] - path[-2]) < _NEAR:
            angles[i] = min(max(2 * path[-1] - path[-2], 0.0), math.pi / 2)
    return angles


class _Models:
    """What one eigendecomposition each says about the angles around those of P problems.

    Args:
        retain, forget: (P, d, d). rank: s. angles: P of them.
    """

    def __init__(self, retain: Tensor, forget: Tensor, rank: int, angles: list[float]) -> None:
        self.angles, self.cut = angles, retain.shape[-1] - rank
        turns = _column(angles, retain)
        cos, sin = turns.cos(), turns.sin()
        self.matrix = (cos * retain).addcmul_(sin, forget, value=-1)  # M
        slope = (-sin * retain).addcmul_(cos, forget, value=-1)  # K
        values, vectors = ops.eigh(self.matrix)
        kept, dropped = vectors[..., self.cut :], vectors[..., : self.cut]
        slope_kept = ops.gram(slope, kept)  # the slope is symmetric
        coupling = ops.gram(dropped, slope_kept)  # [P, d - s, s]
        self._parts = values, vectors, slope, slope_kept, coupling
        # The sum of the largest eigenvalues of M + tau K is e0 + e1 tau + e2 tau^2.
        e0 = values[:, self.cut :].sum(1, dtype=torch.float64)
        e2 = _dots(coupling / self._gaps(values), coupling)
        self.terms: list[list[float]] = torch.stack([e0, _dots(kept, slope_kept), e2]).T.tolist()

    def optima(self, goal: Goal) -> list[float]:
        """For every problem the step to where the goal's residual, as predicted, crosses zero."""
        return [self._optimum(i, angle, goal) for i, angle in enumerate(self.angles)]

    def _optimum(self, i: int, angle: float, goal: Goal) -> float:
        step = _root(
            lambda t: goal.residual(angle + t, *self.shares(i, t)),
            max(-_FAR, -angle),
            min(_FAR, math.pi / 2 - angle),
        )
        return step if math.isfinite(step) else 0.0

    def shares(self, i: int, t: float) -> tuple[float, float]:
        """The predicted (a, b) of the extreme point at angles[i] + t: from h = a cos - b sin and its derivative."""
        e0, e1, e2 = self.terms[i]
        tau = math.tan(t)
        value = e0 + tau * (e1 + tau * e2)
        slope = e1 + 2 * tau * e2
        h, dh = math.cos(t) * value, -math.sin(t) * value + slope / math.cos(t)
        cos, sin = math.cos(self.angles[i] + t), math.sin(self.angles[i] + t)
        return cos * h - sin * dh, -sin * h - cos * dh

    def bases(self, which: list[int], steps: list[float]) -> tuple[Tensor, Tensor]:
        """For these problems the eigenspaces predicted at angle + step, and the eigenvectors on either side of the cut.

        Eigenvectors near the cut mix across it as if there were no gap: the eigenproblem of M(angle + step) in their
        span is solved as it is. For the others the eigenspace is that of kept + dropped X with the Riccati equation
        X E_kept - E_dropped X = M_dk + offdiagonal (M_dd X - X M_kk) - ..., of which two terms are taken.

        Returns:
            (P, d, s) and (P, d, 2 w), not quite orthonormal.
        """
        values, vectors, slope, slope_kept, coupling = (_pick(one, which) for one in self._parts)
        turns = _column(steps, values)
        cos, sin = turns.cos(), turns.sin()
        matrix = (cos * _pick(self.matrix, which)).addcmul_(sin, slope)
        cut, d = self.cut, values.shape[1]
        wide = min(max(1, d // _WINDOW), cut, d - cut)
        window, edge = (slice(cut - n, cut + n) for n in (wide, min(wide, _EDGE)))
        # Across a small gap rounding counts: here the product itself, not what the eigenvectors promise of it.
        near = vectors[..., window]
        image_near = ops.gram(matrix, near)
        energies = cos.squeeze(-1) * values
        energies[:, window], mix = ops.eigh(near.mT @ image_near)
        near, image_near = near @ mix, image_near @ mix
        vectors = torch.cat([vectors[..., : window.start], near, vectors[..., window.stop :]], -1)

        mixed = vectors.mT @ image_near[..., edge.start - window.start : edge.stop - window.start]
        mixed[:, window] = 0
        mixed = _bounded(mixed.div_(energies[:, None, edge] - energies[..., None]).nan_to_num_())
        edges = vectors[..., edge] + vectors @ mixed

        kept, dropped = vectors[..., cut:], vectors[..., :cut]
        image = (kept * energies[:, None, cut:]).addcmul_(sin, slope_kept)
        image[..., :wide] = image_near[..., wide:]
        coupling = sin * coupling
        coupling[..., :wide] = dropped.mT @ image[..., :wide]
        coupling[:, cut - wide :] = dropped[..., cut - wide :].mT @ image
        coupling[:, cut - wide :, :wide] = 0
        energies[:, cut:] = (kept * image).sum(1)
        gaps = self._gaps(energies)
        turn = _bounded(coupling / gaps)
        if max(map(abs, steps)) > _STRAIGHT:
            among = ops.gram(kept, image)
            among.diagonal(dim1=1, dim2=2).zero_()
            more = ops.gram(dropped, ops.gram(matrix, ops.gram(dropped.mT, turn)))
            more -= energies[:, :cut, None] * turn + turn @ among
            turn = _bounded(more.add_(coupling).div_(gaps))
        return kept + ops.gram(dropped.mT, turn), edges

    def _gaps(self, energies: Tensor) -> Tensor:
        """Differences of energies, (P, d - s, s); where below rounding, what they mix matters as little."""
        gaps = energies[:, None, self.cut :] - energies[:, : self.cut, None]
        # M itself may be zero, of two sets alike; A, of trace one, has an eigenvalue of at least 1 / d.
        return gaps.clamp_min_(1e-6 * max(float(energies.abs().max()), 1 / energies.shape[-1]))


def _bounded(tangents: Tensor) -> Tensor:
    return tangents.clamp_(-_HALF_TURN, _HALF_TURN)


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """(P, 1, 1)."""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, 1, 1)


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


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2), dtype=torch.float64)
