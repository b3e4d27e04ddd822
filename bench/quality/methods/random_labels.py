"""Random labels: CE(retain, y) + CE(forget, a random other class) (Graves et al. 2021, Amnesiac, arXiv 2010.10981)."""

import torch
from torch import nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, Rows, adam, cross_entropy, step


def run(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """Train on both parts together, the forget rows under wrong labels, `epochs` passes.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy()
    train_on_random_labels(problem, model, epochs, rate)
    return model.eval()


def train_on_random_labels(problem: Problem, model: nn.Module, epochs: int, rate: float) -> None:
    """The same for a model given; every time a forget row comes up it has another label."""
    model.train()
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for retain, forget in problem.pairs():
            labels = torch.cat([retain.y, problem.other_classes(forget.y)])
            # One batch of both, so that batch norm sees the mixture that it was trained on.
            step(optimizer, cross_entropy(model, Rows(torch.cat([retain.x, forget.x]), labels)))


METHOD = Method(
    run,
    "Graves et al. 2021, arXiv 2010.10981",
    search={"epochs": (2, 1, 4), "rate": (0.3, 0.1, 0.03, 1.0)},
    claim="The accuracy on a forgotten class falls to nearly nothing (below 10 %).",
    holds=lambda rows: rows["random labels"]["forget_train"] < 10,
)
