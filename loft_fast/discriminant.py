"""The linear discriminant that class moments define: a classifier that has seen nothing but those."""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINK = 1e-2  # of the mean variance, added to every direction: there may be few rows a dimension


def linear_discriminant(
    within: Tensor, means: Tensor, counts: Tensor, labels: Tensor, outputs: int
) -> tuple[Tensor, Tensor]:
    """Weight (outputs, d) and bias (outputs,); outputs that are no label are never chosen.

    Args:
        within: (d, d) covariance inside the classes, pooled; it is shrunk in place.
        means: (k, d) of the classes; counts: (k,) of their rows; labels: (k,) which outputs they are.
    """
    # The floor is for features that are all the same, as behind a dead layer.
    within.diagonal().add_((_SHRINK * within.trace() / len(within)).clamp_min(1e-30))
    rows = torch.linalg.solve(within, means.T).T
    weight, bias = means.new_zeros(outputs, means.shape[1]), means.new_full((outputs,), -torch.inf)
    weight[labels] = rows
    bias[labels] = (counts / counts.sum()).log() - (rows * means).sum(1) / 2
    return weight, bias
