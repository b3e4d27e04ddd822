"""LOFT as published (arXiv 2601.22456): Riemannian Adam on the Stiefel manifold, from a random orthogonal start.

The paper's settings: geoopt's optimiser, 50 to 100 steps, learning rate 1 to 10, weight decay 0.05.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast.errors import MissingExtraError

STEPS = 50
LEARNING_RATE = 1.0
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Descent:
    """Where the descent ended and the way there.

    Attributes:
        basis: (d, s) float64, orthonormal columns: the last iterate.
        loss: (1 - a)^2 + b^2 of the last iterate.
        path: (a, b) after every step, the start first.
        seconds: wall time of the steps.
    """

    basis: Tensor
    loss: float
    path: list[tuple[float, float]]
    seconds: float


def descend(
    retain: Tensor,
    forget: Tensor,
    rank: int,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> Descent:
    """Minimise (1 - tr U^T A U)^2 + (tr U^T B U)^2 over U in R^{d x rank} with orthonormal columns.

    Args:
        retain: A, (d, d), trace 1. forget: B, (d, d), trace 1.
    """
    try:
        import geoopt
    except ImportError as error:
        raise MissingExtraError("the published method needs geoopt: pip install 'loft-fast[demo]'") from error
    start = torch.randn(retain.shape[0], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The descent runs in float32, as the authors' does; only what is reported is float64.
    a_matrix, b_matrix = retain.float(), forget.float()
    u = geoopt.ManifoldParameter(torch.linalg.qr(start).Q.to(a_matrix), manifold=geoopt.Stiefel())
    optimizer = geoopt.optim.RiemannianAdam([u], lr=learning_rate, weight_decay=WEIGHT_DECAY)
    path = []
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        a, b = ((matrix @ u) * u for matrix in (a_matrix, b_matrix))
        a, b = a.sum(), b.sum()
        path.append((a.item(), b.item()))
        ((1 - a) ** 2 + b**2).backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    # The last retraction is orthonormal to float32 only; an exact one makes its loss comparable.
    basis = torch.linalg.qr(u.detach().double()).Q
    a_end, b_end = (float(((matrix @ basis) * basis).sum()) for matrix in (retain, forget))
    return Descent(basis, (1 - a_end) ** 2 + b_end**2, [*path, (a_end, b_end)], seconds)
