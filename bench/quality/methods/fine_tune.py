"""Fine-tuning: go on training with the retain rows only, min CE(retain) (Golatkar et al. 2020, arXiv 1911.04933)."""

from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, cross_entropy, step


def run(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """Minimise CE(retain), `epochs` passes.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().train()
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("retain"):
            step(optimizer, cross_entropy(model, rows))
    return model.eval()


METHOD = Method(
    run,
    "Golatkar et al. 2020, arXiv 1911.04933",
    needs="retain rows",
    search={"epochs": (2, 1, 4), "rate": (0.1, 0.3, 1.0)},
    claim="Keeps what retraining loses: a higher accuracy on the forget rows than the retrained network has.",
    holds=lambda rows: rows["fine-tune"]["forget_train"] > rows["retrain"]["forget_train"],
    claimed_for=("class", "rows"),
)
