"""ESC: erase the principal directions of the forget features (Lee et al. 2025, arXiv 2504.02199).

z -> z - U U^T z before the head, U being the first left singular vectors of the forget features; folds into the head.
ESC-T learns which entries M of all singular vectors V to keep, z -> (M * V) (M * V)^T z, until no forget row is right.
How M is applied is our reading: that file of the authors' code was not at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.layers import principal
from bench.quality.methods.method import Method, classes_only
from bench.quality.networks import features, linear_map, with_map
from bench.quality.problem import Problem, Rows


def run(problem: Problem, *, dropped: float) -> nn.Module:
    """Erase the first `dropped` share of the directions, at least one."""
    rows = forget_features(problem)
    vectors, _ = principal(rows.x)
    erased = vectors[:, : max(1, int(dropped * len(vectors)))]
    return changed(problem, torch.eye(len(vectors)) - erased @ erased.T)


def train(problem: Problem, *, epochs: int, rate: float, threshold: float) -> nn.Module:
    """Ascend CE of the rows that are still right over the mask; then keep the entries above the threshold.

    rate: step size, as a multiple of the training's (of Adam's, hence so large).
    """
    rows = forget_features(problem)
    vectors = torch.linalg.svd(rows.x.T)[0]
    mask = torch.ones_like(vectors)
    head = problem.original.fc
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=problem.generator).split(problem.batch):
            problem.touched["forget"] += len(chosen)
            mask -= rate * problem.rate * ascent(head, vectors, mask, rows[chosen])
            mask.clamp_(0, 1)
        if not (head(rows.x @ kept(vectors, mask)).argmax(1) == rows.y).any():
            break
    return changed(problem, kept(vectors, (mask > threshold).float()))


def ascent(head: nn.Linear, vectors: Tensor, mask: Tensor, rows: Rows) -> Tensor:
    """The gradient of -CE over the mask, of the rows that are right."""
    mask = mask.clone().requires_grad_()
    logits = head(rows.x @ kept(vectors, mask))
    right = logits.argmax(1) == rows.y
    if not right.any():
        return torch.zeros_like(mask)
    return torch.autograd.grad(-functional.cross_entropy(logits[right], rows.y[right]), mask)[0]


def kept(vectors: Tensor, mask: Tensor) -> Tensor:
    """(d, d), symmetric."""
    return (mask * vectors) @ (mask * vectors).T


def forget_features(problem: Problem) -> Rows:
    """What the head reads of every forget row."""
    parts = [(features(problem.original, rows.x), rows.y) for rows in problem.batches("forget", size=1000)]
    z, y = (torch.cat(column).clone() for column in zip(*parts, strict=True))  # out of inference mode
    return Rows(z, y)


def changed(problem: Problem, matrix: Tensor) -> nn.Module:
    """The original with z -> matrix z before the head."""
    return with_map(problem.copy(), linear_map(matrix, torch.zeros(len(matrix))))


METHOD = Method(
    run,
    "Lee et al. 2025, arXiv 2504.02199",
    needs="features of the forget rows",
    search={"dropped": (0.03, 0.015, 0.002, 0.06)},
    random=False,
    cumulative=True,
    applies=classes_only,
    claim="Deletes the class without training: no more than 5% right, at two points of retain accuracy at most.",
    holds=lambda rows: (
        rows["esc"]["forget_test"] <= 5 and rows["esc"]["retain_test"] >= rows["original"]["retain_test"] - 2
    ),
)
TRAINED = Method(
    train,
    "Lee et al. 2025, arXiv 2504.02199",
    needs="features of the forget rows",
    search={"epochs": (20, 50), "rate": (300.0, 100.0, 1000.0), "threshold": (0.8, 0.7, 0.9)},
    cumulative=True,
    applies=classes_only,
    claim="Keeps more than ESC and deletes the class as well.",
    holds=lambda rows: rows["esc-t"]["forget_test"] <= 5 and rows["esc-t"]["retain_test"] >= rows["esc"]["retain_test"],
)
