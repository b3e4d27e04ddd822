"""A subspace from anywhere, made orthonormal in float64 and certified: no eigendecomposition of full size is needed.

Write M in a basis whose first s vectors are U, as [[T, R^T], [R, C]]. For any t with C < t <= T,

    M - t <= [[T - t + R^T (t - C)^-1 R, 0], [0, 0]],

since 2 x^T R^T y <= x^T R^T (t - C)^-1 R x + y^T (t - C) y; and the sum of the s largest eigenvalues of M is at most
s t plus the trace of the positive part of M - t. So it lies between tr T and tr T + tr R^T (t - C)^-1 R. That C < t is
proven by a Cholesky factorisation (Sylvester's law of inertia), which also solves for the second term.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loft_fast.frontier import Point
from loft_fast.objective import Objective


def prove(objective: Objective, angle: float, basis: Tensor) -> Point | None:
    """The point of a basis, (d, s), that nearly spans the top eigenspace of M(angle); its support is an upper bound.

    None where the basis is no top eigenspace, or too far from one for a proof.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    basis = basis.double()
    gram, failed = torch.linalg.cholesky_ex(basis.T @ basis)
    if failed:
        return None
    # Cholesky QR: for columns that are nearly orthonormal as accurate as Householder's, and products alone.
    basis = torch.linalg.solve_triangular(gram.T, basis, upper=True, left=False)
    matrix = (cos * objective.retain).sub_(objective.forget, alpha=sin)
    image = matrix @ basis
    inner = basis.T @ image  # T
    residual = image - basis @ inner  # R, in the coordinates of the features
    values = torch.linalg.eigvalsh(inner)
    size = float(values.abs().max())
    level = float(values[0]) - len(matrix) * torch.finfo(torch.float64).eps * size  # t
    projector = basis @ basis.T
    a, b = (float(torch.dot(one.flatten(), projector.flatten())) for one in (objective.retain, objective.forget))
    # t - M with U lifted out of the way: positive definite only if t - C is, and its inverse bounds that of t - C.
    lifted = projector.mul_(2 * size).sub_(matrix)
    lifted.diagonal().add_(level)
    factor, failed = torch.linalg.cholesky_ex(lifted)
    if failed:
        return None
    slack = torch.linalg.solve_triangular(factor, residual, upper=False).square_().sum()
    return Point(angle, float(inner.trace() + slack), min(max(a, 0.0), 1.0), min(max(b, 0.0), 1.0), basis)
