"""DELETE: distil the original without the class of each forget row (Zhou et al. 2025, arXiv 2503.23751).

KL(softmax(original logits, that of y being minus infinity) || model) on the forget rows alone.
"""

import torch
from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, divergence, step

NEVER = -1e10
"""For minus infinity, whose product with a probability of zero is not a number."""


def run(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """Minimise the divergence, `epochs` passes over the forget rows.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()  # batch norm would take the forget rows' statistics for those of all rows
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("forget"):
            with torch.no_grad():
                teacher = problem.original(rows.x).scatter(1, rows.y[:, None], NEVER)
            step(optimizer, divergence(model(rows.x), teacher))
    return model


METHOD = Method(
    run,
    "Zhou et al. 2025, arXiv 2503.23751",
    needs="forget rows",
    search={"epochs": (20, 10, 5), "rate": (0.03, 0.01, 0.1)},
    claim="Of the methods with forget rows alone it keeps the retain accuracy best.",
    holds=lambda rows: (
        rows["delete"]["retain_test"]
        >= max(
            rows[other]["retain_test"] for other in ("gradient ascent", "boundary shrink", "boundary expand", "l2ul")
        )
    ),
)
