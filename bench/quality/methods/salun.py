"""SalUn: random labels, changing only the weights that matter to the forget rows (Fan et al. 2023, arXiv 2310.12508).

The mask holds the top half of |gradient of CE(forget)| at the original weights.
"""

import torch
from torch import Tensor, nn

from bench.quality.methods.method import Method
from bench.quality.methods.random_labels import train_on_random_labels
from bench.quality.problem import Problem, cross_entropy


def run(problem: Problem, *, epochs: int, rate: float, salient: float) -> nn.Module:
    """Train on random labels for `epochs` passes, the `salient` share of the weights free and the others fixed.

    rate: step size, as a multiple of the training's.
    """
    model = problem.copy().eval()
    mask = saliency_mask(problem, model, salient)
    # Adam does not move a weight whose gradient was always zero.
    hooks = [p.register_hook(lambda slope, m=m: slope * m) for p, m in zip(model.parameters(), mask, strict=True)]
    train_on_random_labels(problem, model, epochs, rate)
    for hook in hooks:
        hook.remove()
    return model.eval()


def saliency_mask(problem: Problem, model: nn.Module, salient: float) -> list[Tensor]:
    """For every parameter which of its weights are in the top share of |gradient of CE(forget)|."""
    slopes = [torch.zeros_like(p) for p in model.parameters()]
    for rows in problem.batches("forget"):
        loss = len(rows) * cross_entropy(model, rows)
        for total, slope in zip(slopes, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += slope
    slopes = [slope.abs() for slope in slopes]
    everything = torch.cat([slope.flatten() for slope in slopes])
    threshold = everything.kthvalue(max(1, round((1 - salient) * len(everything)))).values
    return [slope > threshold for slope in slopes]


METHOD = Method(
    run,
    "Fan et al. 2023, arXiv 2310.12508",
    search={"epochs": (2, 1, 4), "rate": (0.3, 0.1, 0.03, 1.0), "salient": (0.5, 0.3, 0.1)},
    claim="Closer to the retrained network than random labels: a smaller mean gap of the accuracies.",
    holds=lambda rows: gap(rows, "salun") < gap(rows, "random labels"),
    claimed_for=("class", "rows"),
)


def gap(rows: dict[str, dict[str, float]], method: str) -> float:
    """Mean distance to the retrained network over retain and forget rows, test rows and attack, as the paper has it."""
    parts = ("retain_train", "forget_train", "retain_test", "mia")
    return sum(abs(rows[method][part] - rows["retrain"][part]) for part in parts) / len(parts)
