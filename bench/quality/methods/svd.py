"""Class forgetting by singular values: suppress what only the class activates (Kodge et al. 2023, arXiv 2312.00761).

For every matrix W: W -> W (I - (I - P_r) P_f). P = V L V^T with V the right singular vectors of its inputs on retain
(r) or forget rows (f), L = a s / ((a - 1) s + 1) and s their shares of the sum of the squared singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.quality.layers import layer_inputs, principal
from bench.quality.methods.method import Method, classes_only
from bench.quality.problem import Problem


def run(problem: Problem, *, retain: float, forget: float, head: bool) -> nn.Module:
    """A sample of each part once; nothing is trained. retain, forget: a for each; head: whether `fc` is changed too."""
    model = problem.copy().eval()
    inputs = {part: layer_inputs(problem, part) for part in ("retain", "forget")}
    with torch.no_grad():
        for name, x in inputs["retain"].items():
            if name == "fc.weight" and not head:
                continue
            weight = model.get_parameter(name)
            matrix = weight.flatten(1)
            own = matrix - scaled(matrix, x, retain)
            weight.copy_((matrix - scaled(own, inputs["forget"][name], forget)).view_as(weight))
    return model


def scaled(matrix: Tensor, x: Tensor, scale: float) -> Tensor:
    """matrix P, where P comes from inputs x (n, d)."""
    vectors, values = principal(x)
    share = values.square() / values.square().sum()
    return (matrix @ vectors * (scale * share / ((scale - 1) * share + 1))) @ vectors.T


METHOD = Method(
    run,
    "Kodge et al. 2023, arXiv 2312.00761",
    needs="a sample of retain and forget rows",
    search={"retain": (100.0, 10.0, 1000.0), "forget": (3.0, 10.0, 30.0, 100.0), "head": (True, False)},
    applies=classes_only,
    claim="At most 1% of the class stays, for at most 1.5 points of retain test accuracy.",
    holds=lambda rows: (
        rows["svd"]["forget_test"] <= 1 and rows["svd"]["retain_test"] >= rows["original"]["retain_test"] - 1.5
    ),
)
