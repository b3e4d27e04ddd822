"""LEACE: the least-squares map after which no linear probe finds the concept (Belrose et al. 2023, 2306.03819)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.peers.leace import Leace
from bench.quality.methods.method import Method
from bench.quality.networks import features, linear_map, with_map
from bench.quality.problem import Problem


def run(problem: Problem, *, concepts: str) -> nn.Module:
    """Concepts: "is forget", or one for every class that has rows to forget ("classes")."""
    parts = []
    for part in ("retain", "forget"):
        for rows in problem.batches(part, size=1000):
            gone = torch.full_like(rows.y, part == "forget", dtype=torch.bool)
            parts.append((features(problem.original, rows.x), rows.y, gone))
    z, y, gone = (torch.cat(column) for column in zip(*parts, strict=True))
    labels = gone.unsqueeze(1) if concepts == "is forget" else _one_hot(y, gone)
    eraser = Leace(z, labels)
    offset = eraser(torch.zeros(1, z.shape[1], dtype=torch.float64))[0]
    matrix = (eraser(torch.eye(z.shape[1], dtype=torch.float64)) - offset).T
    return with_map(problem.copy(), linear_map(matrix, offset))


def _one_hot(y: Tensor, gone: Tensor) -> Tensor:
    return (y.unsqueeze(1) == y[gone].unique()) & gone.unsqueeze(1)


METHOD = Method(
    run,
    "Belrose et al. 2023, arXiv 2306.03819",
    needs="features of all rows",
    search={"concepts": ("classes", "is forget")},
    random=False,
    cumulative=True,
    claim="No linear probe finds the concept: its AUC at the site is at most 0.55.",
    holds=lambda rows: rows["leace"]["probe_linear"] <= 0.55,
)
