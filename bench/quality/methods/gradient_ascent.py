"""Gradient ascent: go up the loss of the forget rows, max CE(forget) (Thudi et al. 2022, arXiv 2109.13398)."""

from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, cross_entropy, step


def run(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """Maximise CE(forget), `epochs` passes over the forget rows.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()  # batch norm would take the forget rows' statistics for those of all rows
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("forget"):
            step(optimizer, -cross_entropy(model, rows))
    return model


METHOD = Method(
    run,
    "Thudi et al. 2022, arXiv 2109.13398",
    needs="forget rows",
    search={"epochs": (5, 2, 10), "rate": (0.03, 0.1, 0.01, 0.003)},
    claim="Forgets what fine-tuning does not, and pays with the retain rows: less accuracy on both than fine-tuning.",
    holds=lambda rows: all(
        rows["gradient ascent"][part] < rows["fine-tune"][part] for part in ("forget_train", "retain_train")
    ),
)
