"""Bad teacher: imitate the original, but a random network on the forget rows (Chundawat et al. 2023, arXiv 2205.08096).

KL(original || model) on a share of the retain rows and KL(random || model) on the forget rows, in one batch.
"""

import torch
from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, divergence, step


def run(problem: Problem, *, epochs: int, rate: float, share: float) -> nn.Module:
    """Minimise both divergences, `epochs` passes over the forget rows and each time over a new `share` of the others.

    rate: step size, as a multiple of the training's.
    """
    model, bad = problem.copy().train(), problem.fresh().eval()
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for retain, forget in problem.pairs(share):
            with torch.no_grad():
                taught = torch.cat([problem.original(retain.x), bad(forget.x)])
            step(optimizer, divergence(model(torch.cat([retain.x, forget.x])), taught))
    return model.eval()


METHOD = Method(
    run,
    "Chundawat et al. 2023, arXiv 2205.08096",
    search={"epochs": (2, 1, 4), "rate": (0.1, 0.03, 0.3), "share": (0.3, 1.0)},
    claim="Forgets a class and keeps the others: forget accuracy below 10 %, retain accuracy within 3 of the original.",
    holds=lambda rows: (
        rows["bad teacher"]["forget_test"] < 10
        and rows["bad teacher"]["retain_test"] > rows["original"]["retain_test"] - 3
    ),
)
