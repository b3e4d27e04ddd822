"""Residual feature alignment: a LoRA that adds nothing to retain features (Qin et al. 2024, arXiv 2411.08443).

With f + r the features that the original f and low-rank additions to the backbone's matrices make:
|r|^2 after every block on the retain rows + shift * |f + r - mean retain f|^2 before the head on the forget rows.
From the paper's abstract: the form of both losses is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from bench.quality.methods.method import Method
from bench.quality.networks import Chain
from bench.quality.problem import Problem, adam, step


class LowRank(nn.Module):
    """W -> W + up down, zero at the start, for W (outputs, ...)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the addition."""
        return weight + (self.up @ self.down).view_as(weight)


def run(problem: Problem, *, epochs: int, rate: float, rank: int, shift: float) -> nn.Module:
    """Minimise the sum above over the low-rank additions, `epochs` passes over the retain rows; then merge them.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()  # batch norm that follows the batch would be a change that merging cannot keep
    model.requires_grad_(False)
    adapted = adapt(model.blocks, rank, problem.generator)
    center = mean_retain_features(problem)
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows, forget in problem.pairs():
            loss = misalignment(model, problem.original, rows.x)
            step(optimizer, loss + shift * relative(model.blocks(forget.x), center.expand(len(forget), -1)))
    for layer, name in adapted:
        parametrize.remove_parametrizations(layer, name)
    merged = problem.copy()  # the parameters of `model` are no longer in the original's order
    merged.load_state_dict(model.state_dict())
    return merged.eval()


def adapt(blocks: nn.Module, rank: int, generator: torch.Generator) -> list[tuple[nn.Module, str]]:
    """Give every matrix of linear, convolution and attention layers an addition; which ones got it."""
    found: list[tuple[nn.Module, str]] = []
    for layer in blocks.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found.append((layer, "weight"))
        elif isinstance(layer, nn.MultiheadAttention):
            found.append((layer, "in_proj_weight"))
    for layer, name in found:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), rank, generator))
    return found


def misalignment(model: Chain, original: Chain, x: Tensor) -> Tensor:
    """Mean over the blocks of the squared difference of what they give, relative to what the original gives."""
    total, made, wanted = torch.zeros(()), x, x
    for block, fixed in zip(model.blocks, original.blocks, strict=True):
        made = block(made)
        with torch.no_grad():
            wanted = fixed(wanted)
        total = total + relative(made, wanted)
    return total / len(model.blocks)


def relative(made: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance in units of the squared length."""
    return functional.mse_loss(made, wanted) / wanted.square().mean()


@torch.no_grad()
def mean_retain_features(problem: Problem) -> Tensor:
    """Before the head, of a tenth of the retain rows, (d,)."""
    return torch.cat([problem.original.blocks(rows.x) for rows in problem.batches("retain", 0.1)]).mean(0)


METHOD = Method(
    run,
    "Qin et al. 2024, arXiv 2411.08443",
    search={"epochs": (2, 1, 4), "rate": (1.0, 0.3, 3.0), "rank": (8, 4, 16), "shift": (0.3, 0.1, 0.03)},
    claim="Forgets the class and keeps the rest: retain test accuracy within a point of the original's.",
    holds=lambda rows: (
        rows["residual alignment"]["forget_test"] < 10
        and rows["residual alignment"]["retain_test"] >= rows["original"]["retain_test"] - 1
    ),
)
