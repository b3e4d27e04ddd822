"""Retention-based masking: keep only the weights that matter to the retain rows (Ding et al. 2024, arXiv 2410.03833).

Fine-tuning starts from mask * original, the mask holding the top share of |gradient of CE(retain)|: what the forget
rows left in the other weights, and fine-tuning would not touch, is gone. From the paper's abstract and summaries of it:
the share that is kept is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, cross_entropy, step


def run(problem: Problem, *, salient: float, epochs: int, rate: float) -> nn.Module:
    """Zero all but the `salient` share of the matrices' entries, then minimise CE(retain), `epochs` passes.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()
    mask_matrices(problem, model, salient)
    model.train()
    optimizer = adam(model, rate * problem.rate)
    for _ in range(epochs):
        for rows in problem.batches("retain"):
            step(optimizer, cross_entropy(model, rows))
    return model.eval()


def mask_matrices(problem: Problem, model: nn.Module, share: float) -> None:
    """Zero the entries below the top share of |gradient of CE(retain)|; biases and norm layers stay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    slopes: list[Tensor] = [torch.zeros_like(p) for p in matrices]
    for rows in problem.batches("retain"):
        loss = len(rows) * cross_entropy(model, rows)
        for total, slope in zip(slopes, torch.autograd.grad(loss, matrices), strict=True):
            total += slope
    everything = torch.cat([slope.abs().flatten() for slope in slopes])
    threshold = everything.kthvalue(max(1, round((1 - share) * len(everything)))).values
    with torch.no_grad():
        for p, slope in zip(matrices, slopes, strict=True):
            p.mul_(slope.abs() > threshold)


METHOD = Method(
    run,
    "Ding et al. 2024, arXiv 2410.03833",
    needs="retain rows",
    search={"salient": (0.1, 0.3, 0.5), "epochs": (2, 1, 3), "rate": (0.3, 0.1, 1.0)},
    claim="Forgets what fine-tuning keeps, at no more than a point of retain accuracy.",
    holds=lambda rows: (
        rows["rbm"]["forget_train"] < rows["fine-tune"]["forget_train"]
        and rows["rbm"]["retain_train"] >= rows["fine-tune"]["retain_train"] - 1
    ),
    claimed_for=("class", "rows"),
)
