"""SCRUB: a student that disobeys its teacher on the forget rows only (Kurmanji et al. 2023, arXiv 2302.09880)."""

import torch
from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, cross_entropy, divergence, step

TEMPERATURE = 4
DISTIL, CLASSIFY = 0.5, 1.0


def run(problem: Problem, *, epochs: int, ascents: int, rate: float, parts: int) -> nn.Module:
    """Alternate, D being KL(original || model) of logits at temperature 4.

    In the first `ascents` passes: maximise D(forget). In all `epochs`: minimise CE(retain) + D(retain) / 2.
    rate: step size, as a multiple of the training's; a tenth of it after the third pass.
    parts: forget rows come in batches of the usual size divided by this.
    """
    model = problem.copy().train()
    optimizer = adam(model, rate * problem.rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    for epoch in range(epochs):
        if epoch < ascents:
            for rows in problem.batches("forget", size=max(2, problem.batch // parts)):
                step(optimizer, -disagreement(problem, model, rows.x))
        for rows in problem.batches("retain"):
            step(optimizer, CLASSIFY * cross_entropy(model, rows) + DISTIL * disagreement(problem, model, rows.x))
        schedule.step()
    return model.eval()


def disagreement(problem: Problem, model: nn.Module, x: Tensor) -> Tensor:
    """KL(original || model) of softened logits; the square of the temperature keeps the size of the gradient."""
    with torch.no_grad():
        teacher = problem.original(x)
    return TEMPERATURE**2 * divergence(model(x) / TEMPERATURE, teacher / TEMPERATURE)


METHOD = Method(
    run,
    "Kurmanji et al. 2023, arXiv 2302.09880",
    search={"epochs": (3, 2, 4), "ascents": (2, 1, 3), "rate": (0.3, 0.1, 0.03), "parts": (1, 4)},
    claim="Forgets where fine-tuning and a bad teacher do not: a lower accuracy on the forget rows than either.",
    holds=lambda rows: (
        rows["scrub"]["forget_train"] < min(rows[other]["forget_train"] for other in ("fine-tune", "bad teacher"))
    ),
    claimed_for=("class", "rows"),
)
