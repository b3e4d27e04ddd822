"""A subspace from anywhere, made orthonormal in float64 and certified: no eigendecomposition of full size is needed.

Write M in a basis whose first s vectors are U, as [[T, R^T], [R, C]]. For any t with C < t <= T,

    M - t <= [[T - t + R^T (t - C)^-1 R, 0], [0, 0]],

since 2 x^T R^T y <= x^T R^T (t - C)^-1 R x + y^T (t - C) y; and the sum of the s largest eigenvalues of M is at most
s t plus the trace of the positive part of M - t. So it lies between tr T and tr T + tr R^T (t - C)^-1 R. That C < t is
proven by a Cholesky factorisation (Sylvester's law of inertia), which also solves for the second term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast.frontier import Point
from loft_fast.objective import Objective


def prove(objectives: Sequence[Objective], angles: Sequence[float], bases: Tensor) -> list[Point | None]:
    """For each problem the point of its basis, which nearly spans the top eigenspace of M(angle).

    None where the basis is no top eigenspace, or too far from one for a proof. A point's support is an upper bound.

    Args:
        objectives: P problems of d features. angles: theirs.
        bases: (P, d, s), full column rank.
    """
    retain, forget = _stack([one.retain for one in objectives]), _stack([one.forget for one in objectives])
    turn = torch.tensor(angles, dtype=torch.float64, device=retain.device).view(-1, 1, 1)
    matrix = (turn.cos() * retain).addcmul_(turn.sin(), forget, value=-1)
    bases = bases.double()
    gram, failed = torch.linalg.cholesky_ex(bases.mT @ bases)
    gram[failed > 0] = torch.eye(gram.shape[-1]).to(gram)
    # Cholesky QR: for columns that are nearly orthonormal as accurate as Householder's, and products alone.
    bases = torch.linalg.solve_triangular(gram.mT, bases, upper=True, left=False)
    image = matrix @ bases
    inner = bases.mT @ image  # T
    residual = image - bases @ inner  # R, in the coordinates of the features
    proven = (failed == 0) & inner.isfinite().all(-1).all(-1)
    inner[~proven] = 0
    values = torch.linalg.eigvalsh(inner)
    size = values.abs().amax(-1)
    level = values[:, 0] - matrix.shape[-1] * torch.finfo(torch.float64).eps * size  # t
    projector = bases @ bases.mT
    shares = [torch.einsum("pij,pij->p", one, projector).clamp(0, 1) for one in (retain, forget)]
    # t - M with U lifted out of the way: positive definite only if t - C is, and its inverse bounds that of t - C.
    lifted = projector.mul_(2 * size.view(-1, 1, 1)).sub_(matrix)
    lifted.diagonal(dim1=-2, dim2=-1).add_(level.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(lifted)
    slack = torch.linalg.solve_triangular(factor, residual, upper=False).square_().sum((-2, -1))
    support = inner.diagonal(dim1=-2, dim2=-1).sum(-1) + slack
    proven &= (failed == 0) & support.isfinite()
    numbers = torch.stack([support, *shares]).T.tolist()
    return [
        Point(angle, h, a, b, basis) if fine else None
        for fine, angle, (h, a, b), basis in zip(proven.tolist(), angles, numbers, bases, strict=True)
    ]


def _stack(matrices: list[Tensor]) -> Tensor:
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
