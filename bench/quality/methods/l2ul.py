"""L2UL: learning to unlearn from the forget rows alone (Cha et al. 2024, arXiv 2301.11578).

-CE(forget) + CE(adversarial examples, their target) + (penalty / 2) sum (1 - importance) (weights - original)^2. The
adversarial examples stand for the retain rows; importance is |gradient of |logits|_2| on the forget rows, 0 to 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, Rows, adam, cross_entropy, drift, step

COPIES, STEPS = 4, 10
"""Adversarial examples of each forget row, and steps to make them."""


def run(problem: Problem, *, epochs: int, rate: float, radius: float, penalty: float) -> nn.Module:
    """Minimise the sum above until no forget row is classified right, at most `epochs` passes.

    rate: step size, as a multiple of the training's. radius: of the adversarial examples, in standard deviations.
    """
    model = problem.copy().eval()  # batch norm would take these rows' statistics for those of all rows
    free = free_weights(problem, model)
    adversarial = adversarial_rows(problem, radius)
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        right = 0
        forget = problem.endless("forget", size=max(1, problem.batch // COPIES))
        for chosen in torch.randperm(len(adversarial), generator=problem.generator).split(problem.batch):
            rows = next(forget)
            logits = model(rows.x)
            right += int((logits.argmax(1) == rows.y).sum())
            loss = COPIES * cross_entropy(model, adversarial[chosen]) - functional.cross_entropy(logits, rows.y)
            step(optimizer, loss / (COPIES + 1) + penalty / 2 * drift(problem, model, free))
        if not right:
            break
    return model


def adversarial_rows(problem: Problem, radius: float) -> Rows:
    """`COPIES` passes over the forget rows, each row moved towards a random other class."""
    made = []
    for _ in range(COPIES):
        for rows in problem.batches("forget"):
            target = problem.other_classes(rows.y)
            made.append(Rows(towards(problem, rows.x, target, radius), target))
    return Rows(torch.cat([rows.x for rows in made]), torch.cat([rows.y for rows in made]))


def towards(problem: Problem, x: Tensor, target: Tensor, radius: float) -> Tensor:
    """Down CE(x, target) in steps of equal length, projected to a ball around x."""
    radius = radius * x.std() * x[0].numel() ** 0.5
    moved = x
    for _ in range(STEPS):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(problem.original(moved), target), moved)
        off = (moved.detach() - x).flatten(1) - 2.5 * radius / STEPS * functional.normalize(slope.flatten(1))
        moved = x + off.renorm(2, 0, radius).view_as(x)
    return moved


def free_weights(problem: Problem, model: nn.Module) -> list[Tensor]:
    """1 - importance of every parameter, importance being scaled to 0 to 1 within it."""
    importance = [torch.zeros_like(p) for p in model.parameters()]
    for rows in problem.batches("forget"):
        slopes = torch.autograd.grad(model(rows.x).norm(dim=1).sum(), list(model.parameters()))
        for total, slope in zip(importance, slopes, strict=True):
            total += slope.abs()
    return [1 - (i - i.min()) / (i.max() - i.min()).clamp_min(1e-12) for i in importance]


METHOD = Method(
    run,
    "Cha et al. 2024, arXiv 2301.11578",
    needs="forget rows",
    search={"epochs": (10, 5), "rate": (0.03, 0.01, 0.003), "radius": (0.5, 0.3), "penalty": (1.0, 0.1, 10.0)},
    claim="Misclassifies the forget rows and loses less on the retain rows than gradient ascent.",
    holds=lambda rows: (
        rows["l2ul"]["forget_train"] < 10 and rows["l2ul"]["retain_test"] > rows["gradient ascent"]["retain_test"]
    ),
    claimed_for=("class", "rows"),
)
