"""NegGrad+: descend on the retain rows while ascending on the forget rows (Kurmanji et al. 2023, arXiv 2302.09880)."""

from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, cross_entropy, step


def run(problem: Problem, *, epochs: int, rate: float, weight: float) -> nn.Module:
    """Minimise weight * CE(retain) - (1 - weight) * CE(forget), `epochs` passes over the retain rows.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().train()
    optimizer = adam(model, rate * problem.rate)
    forget = problem.endless("forget")
    for _ in range(epochs):
        for rows in problem.batches("retain"):
            loss = weight * cross_entropy(model, rows) - (1 - weight) * cross_entropy(model, next(forget))
            step(optimizer, loss)
    return model.eval()


METHOD = Method(
    run,
    "Kurmanji et al. 2023, arXiv 2302.09880",
    search={"epochs": (2, 1, 4), "rate": (0.1, 0.03, 0.3), "weight": (0.95, 0.99, 0.999)},
    claim="Forgets where fine-tuning does not: a lower accuracy on the forget rows than fine-tuning leaves.",
    holds=lambda rows: rows["neggrad+"]["forget_train"] < rows["fine-tune"]["forget_train"],
    claimed_for=("class", "rows"),
)
