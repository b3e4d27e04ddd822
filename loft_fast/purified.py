"""The optimum from matrix products alone: projectors by purification at angles that a secant picks.

For devices on which many products cost less than one eigendecomposition. As with `newton`, nothing here has to be
right: what it yields is proven in float64 (`proof`), and what cannot be proven only costs more solves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.frontier import Point
from loft_fast.goals import Goal
from loft_fast.newton import Offer
from loft_fast.objective import Objective
from loft_fast.ops.topk_projector import TopK, Window, topk_projector
from loft_fast.proof import orthonormal, prove

_MAX_STEPS = 8
_NEAR = 3e-4  # radians; the loss is flat to second order, so that this is near enough for a proof of 1e-6
_MARGIN = 4.0  # times what the level moved per radian last time: how far it may lie from where it was


def pays(objective: Objective) -> bool:
    """Whether a measurement says that products are faster than eigendecompositions here."""
    device = objective.retain.device
    if backends.choose("symmetric_matmul", device, torch.float32) != "triton":
        return False
    from loft_fast.kernels.choice import table

    least = table()["projector_from"]
    return least is not None and objective.dim >= least


def search(objectives: Sequence[Objective], goal: Goal, rank: int, offer: Offer, start: float | None = None) -> None:
    """For every problem, offer angles ever closer to the optimum at this rank until one is good enough.

    The problems, all of one size, are stacked. `start`: an angle to begin at.
    """
    retain = torch.stack([one.retain.float() for one in objectives])
    forget = torch.stack([one.forget.float() for one in objectives])
    paths = [_Path(math.pi / 4 if start is None else start) for _ in objectives]
    left = list(range(len(objectives)))
    for _ in range(_MAX_STEPS):
        turn = retain.new_tensor([paths[i].angle for i in left]).view(-1, 1, 1)
        a, b = (retain, forget) if len(left) == len(objectives) else (retain[left], forget[left])
        found = topk_projector(torch.addcmul(turn.cos() * a, turn.sin(), b, value=-1), rank, _window(paths, left))
        near = []
        for k, (i, keep, drop) in enumerate(zip(left, _kept(found, a), _kept(found, b), strict=True)):
            paths[i].add(goal.residual(paths[i].angle, keep, drop), found.level[k], found.radius[k])
            if abs(paths[i].residuals[-1]) < _NEAR:
                near.append(k)
        points: dict[int, Point | None] = {}
        if near:
            which = [left[k] for k in near]
            proofs = prove(
                [objectives[i] for i in which],
                [paths[i].angle for i in which],
                _spanned(found.projector[near], rank),
                levels=[found.level[k] for k in near],
            )
            points = dict(zip(which, proofs, strict=True))
        for i in left:
            offer(i, paths[i].angle, points.get(i))
        # Nothing better is to be had in float32 near the optimum: there is no second proof.
        left = [i for i in left if i not in points]
        if not left:
            return
        for i in left:
            paths[i].step()


class _Path:
    """The angles of one problem so far, and what was found there."""

    def __init__(self, angle: float) -> None:
        self.angle = angle
        self.angles, self.residuals, self.levels = list[float](), list[float](), list[float]()
        self.radius = 1.0

    def add(self, residual: float, level: float, radius: float) -> None:
        self.angles.append(self.angle)
        self.residuals.append(residual)
        self.levels.append(level)
        self.radius = radius

    def step(self) -> None:
        """To the next angle: the optimum lies between this one and this one plus the residual."""
        far = self.angle + self.residuals[-1]
        low, high = min(self.angle, far), max(self.angle, far)
        following = (low + high) / 2
        if len(self.angles) > 1 and self.residuals[-1] != self.residuals[-2]:
            inverse = (self.angles[-1] - self.angles[-2]) / (self.residuals[-1] - self.residuals[-2])
            following = self.angle - self.residuals[-1] * inverse
        self.angle = min(max(following, low), high)

    @property
    def reach(self) -> tuple[float, float] | None:
        """Where the level will lie, judging by how it moved; None where it has not yet moved."""
        if len(self.levels) < 2 or self.angles[-1] == self.angles[-2]:
            return None
        speed = abs((self.levels[-1] - self.levels[-2]) / (self.angles[-1] - self.angles[-2]))
        width = _MARGIN * speed * abs(self.angle - self.angles[-1]) + 1e-6 * self.radius
        return self.levels[-1] - width, self.levels[-1] + width


def _window(paths: list[_Path], left: list[int]) -> Window | None:
    """Where all levels are to be looked for, once all have moved."""
    low, high = [], []
    for i in left:
        reach = paths[i].reach
        if reach is None:
            return None
        low.append(reach[0])
        high.append(reach[1])
    return Window(low, high, [paths[i].radius for i in left])


def _kept(found: TopK, matrices: Tensor) -> list[float]:
    """tr(P A) of each problem."""
    return (found.projector * matrices).sum(2).sum(1, dtype=torch.float64).tolist()


def _spanned(projector: Tensor, rank: int) -> Tensor:
    """(P, d, s) float64, nearly orthonormal: from the projection of random vectors, which spans the range."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(projector.shape[-1], rank, generator=generator, device="cpu").to(projector)
    basis, _ = orthonormal((projector @ vectors).double())
    return basis
