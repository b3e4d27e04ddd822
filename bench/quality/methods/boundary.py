"""Boundary unlearning, with the forget rows alone (Chen et al. 2023, arXiv 2303.11570).

Shrink: CE(forget, the nearest other class), found by one step of the fast gradient sign method. Expand:
CE(forget, a shadow class), an output that is added for it and cut off in the end.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, Rows, adam, cross_entropy, step

SOURCE = "Chen et al. 2023, arXiv 2303.11570"


def shrink(problem: Problem, *, epochs: int, rate: float, bound: float) -> nn.Module:
    """Move the forget rows over the nearest boundary, `epochs` passes.

    rate: step size, as a multiple of the training's. bound: length of the sign step, in standard deviations.
    """
    model = problem.copy().eval()  # batch norm would take the forget rows' statistics for those of all rows
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("forget"):
            step(optimizer, cross_entropy(model, Rows(rows.x, nearest_class(problem, rows, bound))))
    return model


def nearest_class(problem: Problem, rows: Rows, bound: float) -> Tensor:
    """What the original makes of x + bound * std * sign(gradient of CE), (n,): neither y nor a class that goes."""
    x = rows.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(functional.cross_entropy(problem.original(x), rows.y), x)
    with torch.no_grad():
        logits = problem.original(rows.x + bound * rows.x.std() * slope.sign())
    logits[torch.arange(len(rows)), rows.y] = -torch.inf
    logits[:, list(problem.gone)] = -torch.inf
    return logits.argmax(1)


def expand(problem: Problem, *, epochs: int, rate: float) -> nn.Module:
    """Send the forget rows to a class of their own, `epochs` passes, and drop it.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()
    head = model.fc
    model.fc = with_shadow(problem, head)
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("forget"):
            step(optimizer, cross_entropy(model, Rows(rows.x, torch.full_like(rows.y, problem.classes))))
    with torch.no_grad():
        head.weight.copy_(model.fc.weight[:-1])
        head.bias.copy_(model.fc.bias[:-1])
    model.fc = head
    return model


def with_shadow(problem: Problem, head: nn.Linear) -> nn.Linear:
    """The head with one more output, its weights as large as the others'."""
    wider = nn.Linear(head.in_features, head.out_features + 1)
    with torch.no_grad():
        drawn = torch.randn(1, head.in_features, generator=problem.generator)
        wider.weight.copy_(torch.cat([head.weight, head.weight.std() * drawn]))
        wider.bias.copy_(torch.cat([head.bias, head.bias.mean()[None]]))
    return wider


SHRINK = Method(
    shrink,
    SOURCE,
    needs="forget rows",
    search={"epochs": (10, 5, 20), "rate": (0.03, 0.01, 0.1), "bound": (0.4, 0.2, 1.0)},
    random=True,
    claim="Loses less on the retain rows than gradient ascent.",
    holds=lambda rows: rows["boundary shrink"]["retain_test"] > rows["gradient ascent"]["retain_test"],
)
EXPAND = Method(
    expand,
    SOURCE,
    needs="forget rows",
    search={"epochs": (10, 5, 20), "rate": (0.03, 0.01, 0.1)},
    claim="Shrinking forgets more: expanding leaves at least as much accuracy on the forgotten class.",
    holds=lambda rows: rows["boundary expand"]["forget_train"] >= rows["boundary shrink"]["forget_train"],
)
