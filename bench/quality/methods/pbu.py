"""Partially blinded unlearning: ascent held back by a Gaussian posterior (Panda et al. 2024, arXiv 2403.16246).

-CE(forget) + fisher * sum F (weights - original)^2 + l2 * |weights - original|^2, F the diagonal Fisher information of
the forget rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.methods.method import Method, classes_only
from bench.quality.problem import Problem, adam, cross_entropy, drift, step


def run(problem: Problem, *, epochs: int, rate: float, fisher: float, l2: float) -> nn.Module:
    """Minimise the sum above, `epochs` passes over the forget rows.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()  # batch norm would take the forget rows' statistics for those of all rows
    weights = [fisher * diagonal + l2 for diagonal in fisher_diagonal(problem, model)]
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("forget"):
            step(optimizer, drift(problem, model, weights) - cross_entropy(model, rows))
    return model


def fisher_diagonal(problem: Problem, model: nn.Module) -> list[Tensor]:
    """Mean squared gradient of log p(label), the label drawn from the model, for every parameter.

    Under drawn labels gradients have mean zero and those of different rows are independent: the square of a batch's
    sum is, on average, the sum of its squares.
    """
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in problem.batches("forget"):
        logits = model(rows.x)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=problem.generator).squeeze(1)
        loss = functional.cross_entropy(logits, drawn, reduction="sum")
        for sum_, slope in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            sum_ += slope.square() / len(problem.forget)
    return total


METHOD = Method(
    run,
    "Panda et al. 2024, arXiv 2403.16246",
    needs="forget rows",
    search={"epochs": (5, 2, 10), "rate": (0.1, 0.03, 0.01), "fisher": (0.1, 1e5), "l2": (5.0, 1.0, 0.1)},
    applies=classes_only,
    claim="Forgets the class and keeps more of the others than gradient ascent.",
    holds=lambda rows: (
        rows["pbu"]["forget_test"] < 10 and rows["pbu"]["retain_test"] > rows["gradient ascent"]["retain_test"]
    ),
)
