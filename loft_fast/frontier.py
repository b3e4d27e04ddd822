"""The frontier of what a projector can keep of the retain and of the forget variance: one family of eigenproblems.

For a projector P let a = tr(PA) and b = tr(PB). The convex hull of all reachable (a, b) has the support function

    h(phi) = max_P cos(phi) a - sin(phi) b,   0 <= phi <= pi/2,

the sum of the `rank` largest (rank=None: of the positive) eigenvalues of M(phi) = cos(phi) A - sin(phi) B, reached by
their eigenspace. Every h(phi) bounds every trade-off from below; every eigenspace is a point on the frontier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast import ops
from loft_fast.objective import Objective


@dataclass(frozen=True)
class Point:
    """A subspace on the frontier.

    Attributes:
        angle: the phi it is extreme for, in radians.
        support: h(phi), or an upper bound of it.
        retain_kept: a = tr(PA), share of the retain variance kept.
        forget_kept: b = tr(PB), share of the forget variance kept.
        basis: (d, s) float64, orthonormal columns.
    """

    angle: float
    support: float
    retain_kept: float
    forget_kept: float
    basis: Tensor

    @property
    def rank(self) -> int:
        """Dimension s of the subspace."""
        return self.basis.shape[1]


class Frontier:
    """Points of the frontier on demand; counts the eigen-solves they cost."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.eigen_solves = 0
        varies = (objective.retain.diagonal() > 0) | (objective.forget.diagonal() > 0)
        self._live, self._dead = varies.nonzero().flatten(), (~varies).nonzero().flatten()

    def at(self, angle: float, rank: int | None = None) -> Point:
        """The extreme point for one angle: top `rank` eigenspace of M(angle), or its positive part (rank >= 1)."""
        values, vectors = self.spectrum(angle)
        keep = rank if rank is not None else _positive(values)
        basis = vectors[:, len(values) - keep :]
        return self._point(angle, float(values[len(values) - keep :].sum()), basis)

    def rough_basis(self, angle: float) -> Tensor:
        """The basis of the positive part of M(angle) from float32, at half the cost: for trying an angle out."""
        values, vectors = self.spectrum(angle, torch.float32)
        return vectors[:, len(values) - _positive(values) :]

    def spectrum(self, angle: float, precision: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of M(angle), in float64 whatever they were computed in."""
        self.eigen_solves += 1
        matrix = math.cos(angle) * self.objective.retain - math.sin(angle) * self.objective.forget
        dead = len(self._dead)
        if not dead:
            return _eigh(matrix.to(precision))
        # Units that never fire, a third of a ReLU layer at times, are eigenvectors as they stand: of eigenvalue zero.
        values, vectors = _eigh(matrix[self._live][:, self._live].to(precision))
        order = torch.cat([values, matrix.new_zeros(dead)]).sort()
        whole = torch.zeros_like(matrix)
        whole[self._live, : len(values)] = vectors
        whole[self._dead, torch.arange(len(values), len(matrix), device=matrix.device)] = 1.0
        return order.values, whole[:, order.indices]

    def _point(self, angle: float, support: float, basis: Tensor) -> Point:
        # One of a, b from its matrix, the other from the support: divided by the larger of cos and sin, so stable.
        cos, sin = math.cos(angle), math.sin(angle)
        if sin >= cos:
            retain = kept(self.objective.retain, basis)
            forget = (cos * retain - support) / sin
        else:
            forget = kept(self.objective.forget, basis)
            retain = (support + sin * forget) / cos
        return Point(angle, support, min(max(retain, 0.0), 1.0), min(max(forget, 0.0), 1.0), basis)

    def measured(self, basis: Tensor) -> Point:
        """What any subspace keeps. Its angle is that of no trade-off: 0."""
        retain = kept(self.objective.retain, basis)
        return Point(0.0, retain, retain, kept(self.objective.forget, basis), basis)

    def between(self, low: Point, high: Point, loss: Callable[[float, float], float]) -> Point:
        """The subspace of least loss(a, b) on the Grassmann geodesic from low to high (equal ranks).

        Where M(phi) is degenerate at the cut, both ends lie in one eigenspace and so does the whole geodesic: it sweeps
        the flat side of the frontier that no single eigen-solve can land on.
        """
        left, cosines, right = torch.linalg.svd(low.basis.T @ high.basis)
        start, end = low.basis @ left, high.basis @ right.T
        turning = cosines < 1 - 1e-14  # the planes that differ; the rest stays as it is
        still, a_dirs = start[:, ~turning], start[:, turning]
        residual = end[:, turning] - a_dirs * cosines[turning]
        # Twice: one Gram-Schmidt pass loses orthogonality where the angle is small.
        residual = residual - start @ (start.T @ residual)
        sines = residual.norm(dim=0).clamp_min(1e-300)
        b_dirs = residual / sines
        theta = torch.atan2(sines, cosines[turning])

        def quadratic(matrix: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
            at, bt = matrix @ a_dirs, matrix @ b_dirs
            return kept(matrix, still), (a_dirs * at).sum(0), (a_dirs * bt).sum(0), (b_dirs * bt).sum(0)

        forms = [quadratic(self.objective.retain), quadratic(self.objective.forget)]

        def value(t: float) -> float:
            c, s = torch.cos(t * theta), torch.sin(t * theta)
            a, b = (f + float((c * c * aa + 2 * c * s * ab + s * s * bb).sum()) for f, aa, ab, bb in forms)
            return loss(a - 1e-13, b)  # the basis below is rounded once more: stay on the safe side of a limit on a

        t = minimise(value)
        basis = torch.cat([still, a_dirs * torch.cos(t * theta) + b_dirs * torch.sin(t * theta)], dim=1)
        basis = torch.linalg.qr(basis).Q
        angle = (low.angle + high.angle) / 2
        a, b = kept(self.objective.retain, basis), kept(self.objective.forget, basis)
        return Point(angle, math.cos(angle) * a - math.sin(angle) * b, a, b, basis)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = ops.eigh(matrix.unsqueeze(0))
    return values[0].double(), vectors[0].double()


def _positive(values: Tensor) -> int:
    """How many eigenvalues are positive, at least one; what rounding makes of a zero does not count."""
    noise = len(values) * torch.finfo(torch.float64).eps * float(values.abs().max())
    return max(1, int((values > noise).sum()))


def kept(matrix: Tensor, basis: Tensor) -> float:
    """tr(U^T matrix U)."""
    return float(((matrix @ basis) * basis).sum())


def minimise(value: Callable[[float], float], samples: int = 33, steps: int = 60) -> float:
    """The argument in [0, 1] of least `value`: a grid, then golden section around its best cell."""
    grid = [i / (samples - 1) for i in range(samples)]
    best = min(range(samples), key=lambda i: value(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(samples - 1, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    x, y = high - ratio * (high - low), low + ratio * (high - low)
    fx, fy = value(x), value(y)
    for _ in range(steps):
        if fx <= fy:
            high, y, fy = y, x, fx
            x = high - ratio * (high - low)
            fx = value(x)
        else:
            low, x, fx = x, y, fy
            y = low + ratio * (high - low)
            fy = value(y)
    return min((grid[best], x, y), key=value)
