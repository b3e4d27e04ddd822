"""A subspace from anywhere, made orthonormal in float64 and certified: no eigendecomposition of full size is needed.

Write M in a basis whose first s vectors are U, as [[T, R^T], [R, C]]. For any t with C < t,

    M - t <= [[Q, 0], [0, 0]],   Q = T - t + R^T (t - C)^-1 R,

since 2 x^T R^T y <= x^T R^T (t - C)^-1 R x + y^T (t - C) y; and the sum of the s largest eigenvalues of M is at most
s t plus the trace of the positive part of M - t. So where Q >= 0 it lies between tr T and s t + tr Q.

With a lift c that makes N = t - M + c U U^T positive definite, C < t, and Q = c - (U^T N^-1 U)^-1 (the Schur complement
of the lower block, and the identity of Sherman, Morrison and Woodbury): a Cholesky factorisation of N tells all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast import ops
from loft_fast.frontier import Point
from loft_fast.objective import Objective


def prove(
    objectives: Sequence[Objective],
    angles: Sequence[float],
    bases: Tensor,
    edges: Tensor | None = None,
    levels: Sequence[float] | None = None,
) -> list[Point | None]:
    """For each problem the point of its basis, which nearly spans the top eigenspace of M(angle).

    None where the basis is no top eigenspace, or too far from one for a proof. A point's support is an upper bound.

    Args:
        objectives: P problems of d features. angles: theirs.
        bases: (P, d, s), nearly orthonormal.
        edges: (P, d, 2 w), full column rank, nearly spanning the eigenvectors s - w + 1 to s + w from the largest. They
            tell a level between the eigenvalues s and s + 1; another one proves nothing.
        levels: such levels, where they are known without edges.
    """
    retain, forget = _stack([one.retain for one in objectives]), _stack([one.forget for one in objectives])
    turn = torch.tensor(angles, dtype=torch.float64, device=retain.device).view(-1, 1, 1)
    matrix = (turn.cos() * retain).addcmul_(turn.sin(), forget, value=-1)
    level = turn.new_tensor(levels).view(-1, 1, 1) if edges is None else _level(matrix, edges.double())
    lift = 2 * torch.linalg.matrix_norm(matrix, keepdim=True)
    bases, proven = orthonormal(bases.double())
    projector = ops.gram(bases.mT)
    shares = [_inner(one, projector).clamp(0, 1) for one in (retain, forget)]
    lifted = projector.mul_(lift).sub_(matrix)  # N
    lifted.diagonal(dim1=-2, dim2=-1).add_(level.flatten(1))
    inverse, positive = ops.inverse_form(lifted, bases)  # U^T N^-1 U
    proven &= positive
    factor, failed = torch.linalg.cholesky_ex(inverse)
    proven &= failed == 0
    eye = torch.eye(inverse.shape[-1]).to(inverse)
    trace = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).square_().sum((-2, -1))
    _, failed = torch.linalg.cholesky_ex(inverse - eye / lift)  # Q >= 0
    support = len(eye) * (level + lift).flatten() - trace
    proven &= (failed == 0) & support.isfinite()
    numbers = torch.stack([support, *shares]).T.tolist()
    return [
        Point(angle, h, a, b, basis) if fine else None
        for fine, angle, (h, a, b), basis in zip(proven.tolist(), angles, numbers, bases, strict=True)
    ]


def orthonormal(bases: Tensor) -> tuple[Tensor, Tensor]:
    """Bases (P, d, s) float64 of the same spaces, orthonormal; and which are: those without full rank are left alone.

    Cholesky QR: for columns that are nearly orthonormal as accurate as Householder's, and products alone. For others
    what it misses grows with the square of their condition, and a second time makes up for it.
    """
    root, failed = torch.linalg.cholesky_ex(ops.gram(bases))
    root[failed > 0] = torch.eye(root.shape[-1]).to(root)
    return torch.linalg.solve_triangular(root.mT, bases, upper=True, left=False), failed == 0


def _level(matrix: Tensor, edges: Tensor) -> Tensor:
    """t, (P, 1, 1): halfway between the two Ritz values in the middle; 0 where the edges have no full rank."""
    wide = edges.shape[-1] // 2
    edges, _ = orthonormal(edges)
    ritz = torch.linalg.eigvalsh((edges.mT @ (matrix @ edges)).nan_to_num_())
    return ritz[:, wide - 1 : wide + 1].mean(1).view(-1, 1, 1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """tr(X^T Y) for each pair of two stacks."""
    return (x.flatten(1).unsqueeze(1) @ y.flatten(1).unsqueeze(2)).flatten()


def _stack(matrices: list[Tensor]) -> Tensor:
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
