"""UNSIR: impair with noise that stands for the class, then repair (Tarun et al. 2021, arXiv 2111.08947).

The noise maximises CE(noise, class) - 0.1 |noise|^2; impairing trains on it, under the class's label, and on retain
rows; repairing trains on the retain rows alone. The forget rows themselves are not looked at.
"""

import torch
from torch import nn
from torch.nn import functional

from bench.quality.methods.method import Method, classes_only
from bench.quality.problem import Problem, Rows, adam, cross_entropy, step

STEPS, STEP, DECAY = 40, 0.1, 0.1
NOISY = 0.6
"""Rows of noise beside one retain row in the impairing pass."""


def run(problem: Problem, *, rate: float, share: float, repairs: int) -> nn.Module:
    """One impairing pass at twice the rate and `repairs` repairing passes, each over a `share` of the retain rows.

    rate: step size of the repair, as a multiple of the training's.
    """
    model = problem.copy()
    noise = error_maximising(problem)
    model.train()
    optimizer = adam(model, 2 * rate * problem.rate)
    for rows in problem.batches("retain", share):
        chosen = torch.randint(len(noise), (round(NOISY * len(rows)),), generator=problem.generator)
        x, y = torch.cat([rows.x, noise.x[chosen]]), torch.cat([rows.y, noise.y[chosen]])
        step(optimizer, cross_entropy(model, Rows(x, y)))
    optimizer = adam(model, rate * problem.rate)
    for _ in range(repairs):
        for rows in problem.batches("retain", share):
            step(optimizer, cross_entropy(model, rows))
    return model.eval()


def error_maximising(problem: Problem) -> Rows:
    """A batch of noise for each class that goes, learnt in units of the inputs' standard deviation."""
    y = torch.tensor(problem.gone).repeat_interleave(problem.batch)
    noise = torch.randn(len(y), *problem.retain.x.shape[1:], generator=problem.generator).requires_grad_()
    scale = problem.retain.x.std()
    original = problem.copy().requires_grad_(False)  # only the noise is to have a gradient
    optimizer = torch.optim.Adam([noise], lr=STEP)
    for _ in range(STEPS):
        size = noise.square().flatten(1).sum(1).mean()
        step(optimizer, DECAY * size - functional.cross_entropy(original(scale * noise), y))
    return Rows(scale * noise.detach(), y)


METHOD = Method(
    run,
    "Tarun et al. 2021, arXiv 2111.08947",
    needs="retain rows",
    search={"rate": (1.0, 0.3, 0.1), "share": (0.3, 1.0), "repairs": (1, 2)},
    applies=classes_only,
    claim="Forgets the class almost wholly: an accuracy on its test rows below 5 %.",
    holds=lambda rows: rows["unsir"]["forget_test"] < 5,
)
