"""How a chance depends on one number: a logistic regression, for where a library for it would be asked too much."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PULL = 0.01  # of the slope towards 0, as by a normal prior of deviation 10
_STEPS = 50


def logistic(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """P(y = 1 | x), fitted to x (n,) in float64 and y (n,), of 0 and 1 and neither alone, by Newton's method."""
    columns, weight = torch.stack([torch.ones_like(x), x], 1), torch.stack([y.mean().logit(), torch.zeros_like(y[0])])
    pull = torch.tensor([0.0, _PULL]).to(x)
    for _ in range(_STEPS):
        p = (columns @ weight).sigmoid()
        curvature = (columns.T * (p * (1 - p))) @ columns + pull.diag()
        step = torch.linalg.solve(curvature, columns.T @ (y - p) - pull * weight)
        weight = weight + step / step.abs().max().clamp_min(1)  # a full one may lead too far
    return lambda at: (weight[0] + weight[1] * at).sigmoid()
