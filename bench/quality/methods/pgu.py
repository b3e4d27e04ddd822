"""Projected-gradient unlearning: ascend where retain inputs hardly reach (Hoang et al. 2023, arXiv 2312.04095).

For the matrix W of every layer let the columns of V be the first right singular vectors of the retain inputs to it,
as many as hold the `kept` share of the sum of the singular values. Then W -= rate G (I - V V^T), G being the gradient
of -log(1 - p + OFFSET) - ENTROPY H on the forget rows, p the probability of the label and H the entropy of the output.
The retain inputs are a sample, and there is no recovery afterwards, as in the authors' script for classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.quality.layers import layer_inputs, principal
from bench.quality.methods.method import Method
from bench.quality.problem import Problem, Rows

OFFSET, ENTROPY, DECAY = 0.05, 0.2, 0.1
"""Of the loss, and what the step size is multiplied with from the first to the last pass."""


def run(problem: Problem, *, epochs: int, rate: float, kept: float) -> nn.Module:
    """A sample of the retain rows once, then `epochs` passes over the forget rows with plain gradient steps.

    rate: first step size, as a multiple of the training's (of Adam's, hence so large). Biases and norm layers stay.
    """
    model = problem.copy().eval()
    bases = {name: core(x, kept) for name, x in layer_inputs(problem, "retain").items()}
    weights = [model.get_parameter(name) for name in bases]
    for epoch in range(epochs):
        size = rate * problem.rate * DECAY ** (epoch / epochs)
        for rows in problem.batches("forget"):
            slopes = torch.autograd.grad(forgetting_loss(model, rows), weights)
            with torch.no_grad():
                for weight, slope, basis in zip(weights, slopes, bases.values(), strict=True):
                    slope = slope.flatten(1)
                    weight -= size * (slope - slope @ basis @ basis.T).view_as(weight)
    return model


def core(x: Tensor, kept: float) -> Tensor:
    """(d, k): the first right singular vectors of x (n, d)."""
    vectors, values = principal(x)
    return vectors[:, : int((values.cumsum(0) <= kept * values.sum()).sum()) + 1]


def forgetting_loss(model: nn.Module, rows: Rows) -> Tensor:
    """Small where the label is improbable and the output undecided."""
    logs = model(rows.x).log_softmax(1)
    label = logs.gather(1, rows.y[:, None]).exp()
    entropy = -(logs.exp() * logs).sum(1)
    return -(1 - label + OFFSET).log().mean() - ENTROPY * entropy.mean()


METHOD = Method(
    run,
    "Hoang et al. 2023, arXiv 2312.04095",
    needs="forget rows and a sample of retain rows",
    search={"epochs": (20, 10, 40), "rate": (300.0, 100.0, 1000.0), "kept": (0.9, 0.95, 0.8)},
    claim="Behaves like the retrained network: retain and forget test accuracy within two points of it.",
    holds=lambda rows: all(
        abs(rows["pgu"][part] - rows["retrain"][part]) <= 2 for part in ("retain_test", "forget_test")
    ),
)
