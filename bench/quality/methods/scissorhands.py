"""Scissorhands: start the weights that react most to the forget rows anew, then repair (Wu & Harandi 2024, 2401.06187).

1. The `trimmed` share of the weights with the largest |gradient of CE(forget) * weight| gets new random values.
2. CE(retain) - weight * CE(forget) is minimised. A gradient that points against the direction of forgetting, the
   gradient m of -CE(forget) at the start of the pass, is turned to the nearest that does not.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.networks import Chain
from bench.quality.problem import Problem, Rows, adam, cross_entropy

MARGIN = 0.5
"""Least multiple of m that is added to a gradient when it is turned."""
NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def run(problem: Problem, *, trimmed: float, epochs: int, rate: float, weight: float) -> nn.Module:
    """Trim, then repair for `epochs` passes over the retain rows.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()  # batch norm would take the forget rows' statistics for those of all rows
    trim(problem, model, trimmed)
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        memory = forget_slope(problem, model)
        for rows, forget in zip_longest(problem.batches("retain"), problem.batches("forget")):
            if rows is None:
                break
            loss = cross_entropy(model, rows)
            if forget is not None:
                loss = loss - weight * cross_entropy(model, forget)
            optimizer.zero_grad()
            loss.backward()
            if forget is not None:
                turn(model, memory)
            optimizer.step()
    return model


def trim(problem: Problem, model: Chain, share: float) -> None:
    """Draw the most sensitive share of the weights anew, but for norm layers and the first half of the blocks."""
    rows = next(problem.batches("forget"))
    weights = list(model.parameters())
    slopes = torch.autograd.grad(cross_entropy(model, rows), weights)
    sensitive = [(slope * p).abs().detach() for p, slope in zip(weights, slopes, strict=True)]
    everything = flat(sensitive)
    threshold = everything.kthvalue(max(1, round((1 - share) * len(everything)))).values
    late = [*model.blocks[len(model.blocks) // 2 :], model.fc]
    norms = {id(p) for layer in model.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    free = {id(p) for block in late for p in block.parameters()} - norms
    with torch.no_grad():
        for p, s, new in zip(weights, sensitive, problem.fresh().parameters(), strict=True):
            if id(p) in free:
                p.copy_(torch.where(s > threshold, new, p))


def forget_slope(problem: Problem, model: nn.Module) -> Tensor:
    """m: the gradient of -CE on a batch of forget rows, all parameters in one vector."""
    rows: Rows = next(problem.batches("forget"))
    return -flat(list(torch.autograd.grad(cross_entropy(model, rows), list(model.parameters()))))


def turn(model: nn.Module, memory: Tensor) -> None:
    """Where the gradient g has g m < 0 add max(-g m / |m|^2, MARGIN) m: gradient episodic memory with one entry."""
    slope = flat([p.grad for p in model.parameters()])
    product = slope @ memory
    if product < 0:
        slope += max(float(-product / (memory @ memory + 1e-3)), MARGIN) * memory
        torch.nn.utils.vector_to_parameters(slope, [p.grad for p in model.parameters()])


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


METHOD = Method(
    run,
    "Wu & Harandi 2024, arXiv 2401.06187",
    search={"trimmed": (0.03, 0.1, 0.01), "epochs": (2, 1, 4), "rate": (0.1, 0.3, 1.0), "weight": (0.05, 0.01, 0.1)},
    claim="Closer to the retrained network than SalUn: a smaller mean gap of accuracies and attack.",
    holds=lambda rows: rows["scissorhands"]["gap"] < rows["salun"]["gap"],
    claimed_for=("class", "rows"),
)
