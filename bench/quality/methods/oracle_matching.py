"""Oracle matching: an upper bound that is told the retrained network's logits (Georgiev et al. 2024, arXiv 2410.23232).

Mean squared difference of the logits from the oracle's on retain and forget rows. Datamodel matching, the paper's
method, predicts these logits by data attribution.
"""

import torch
from torch import nn
from torch.nn import functional

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, step


def run(problem: Problem, *, epochs: int, rate: float, share: float) -> nn.Module:
    """Minimise the difference, `epochs` passes over the forget rows and a random share of the retain rows.

    rate: step size, as a multiple of the training's.
    """
    if problem.oracle is None:
        raise ValueError("oracle matching: problem.oracle is None")
    model = problem.copy().eval()  # statistics of batch norm over retain and forget rows are not the oracle's
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows, forget in problem.pairs(share):
            x = torch.cat([rows.x, forget.x])
            with torch.no_grad():
                wanted = problem.oracle(x)
            step(optimizer, functional.mse_loss(model(x), wanted))
    return model


METHOD = Method(
    run,
    "Georgiev et al. 2024, arXiv 2410.23232",
    needs="retain and forget rows and the retrained network",
    search={"epochs": (4, 8, 2), "rate": (0.1, 0.3, 0.03), "share": (0.5, 0.25)},
    claim="Nothing is closer to the oracle: the smallest divergence from the retrained network's test predictions.",
    holds=lambda rows: (
        rows["oracle matching"]["kl"] <= min(row["kl"] for name, row in rows.items() if not name.startswith("retrain"))
    ),
    claimed_for=("class", "rows"),
)
