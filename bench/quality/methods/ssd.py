"""Selective synaptic dampening: shrink what matters more to the forget rows (Foster et al. 2023, arXiv 2308.07707).

Where F_forget > select F_all a weight is multiplied by min(dampen F_all / F_forget, 1), F being the diagonal Fisher
information: the mean over batches of the squared gradient of CE, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, Rows, cross_entropy


def run(problem: Problem, *, select: float, dampen: float) -> nn.Module:
    """One pass over all rows and one more over the forget rows; nothing is trained."""
    model = problem.copy().eval()
    everything = fisher_diagonal(model, mixed_batches(problem))
    forget = fisher_diagonal(model, problem.batches("forget"))
    with torch.no_grad():
        for weight, f_all, f_forget in zip(model.parameters(), everything, forget, strict=True):
            factor = (dampen * f_all / f_forget).clamp_max(1)
            weight.mul_(torch.where(f_forget > select * f_all, factor, 1.0))
    return model


def fisher_diagonal(model: nn.Module, batches: Iterable[Rows]) -> list[Tensor]:
    """Mean over the batches of the squared gradient of a batch's mean CE, for every parameter."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    count = 0
    for rows in batches:
        slopes = torch.autograd.grad(cross_entropy(model, rows), list(model.parameters()))
        for sum_, slope in zip(total, slopes, strict=True):
            sum_ += slope.square()
        count += 1
    return [sum_ / count for sum_ in total]


def mixed_batches(problem: Problem) -> list[Rows]:
    """One pass over the retain and the forget rows together: gradients of one class alone do not cancel out."""
    parts = [rows for part in ("retain", "forget") for rows in problem.batches(part)]
    rows = Rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    order = torch.randperm(len(rows), generator=problem.generator)
    return [rows[chosen] for chosen in order.split(problem.batch)]


METHOD = Method(
    run,
    "Foster et al. 2023, arXiv 2308.07707",
    search={"select": (10.0, 20.0, 50.0, 100.0), "dampen": (1.0, 0.5, 0.1)},
    claim="Forgets the class without training: faster than bad teacher, at two points of retain accuracy at most.",
    holds=lambda rows: (
        rows["ssd"]["forget_test"] < 10
        and rows["ssd"]["retain_test"] >= rows["original"]["retain_test"] - 2
        and rows["ssd"]["seconds"] < rows["bad teacher"]["seconds"]
    ),
)
