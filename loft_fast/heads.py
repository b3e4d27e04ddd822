"""The linear layer that scores the classes, as a matrix and an offset in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loft_fast.errors import InputError

_SURE = 1e-6  # of the largest singular value: what float32 weights are sure of
_BELOW = 20.0  # the mean logit of the other classes: at most 2e-9 of the probability of the likeliest


def linear_head(head: nn.Module, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight (outputs, d) and bias (outputs,) in float64 of a Linear or 1x1 convolution."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or weight[0].numel() != dim:
        got = type(head).__name__ + (f" with weight {tuple(weight.shape)}" if isinstance(weight, Tensor) else "")
        raise InputError(f"head: got {got}, expected a linear head reading {dim} features")
    matrix = weight.detach().reshape(len(weight), dim).to(device, torch.float64)
    bias = getattr(head, "bias", None)
    return matrix, bias.detach().to(matrix) if isinstance(bias, Tensor) else matrix.new_zeros(len(matrix))


def with_closed(weight: Tensor, bias: Tensor, outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The head whose logits of these outputs are the mean of the others less 20; the others as they are."""
    stay = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    stay[list(outputs)] = False
    weight, bias = weight.clone(), bias.clone()
    weight[~stay] = weight[stay].mean(0)
    bias[~stay] = bias[stay].mean() - _BELOW
    return weight, bias


def closed_before(weight: Tensor, bias: Tensor, rounding: float) -> list[int]:
    """The outputs that `with_closed` closed, to within the rounding (relative) of a weight that was stored since."""
    lowest = int(bias.argmin())
    slack = 16 * rounding
    same = (bias - bias[lowest] <= slack * bias.abs().max()).nonzero().flatten()
    if len(same) > 1:
        apart = (weight[same] - weight[lowest]).abs().amax(1)
        same = same[apart <= slack * weight.abs().max()]
    stay = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    stay[same] = False
    # Offsets first: they tell of most heads that nothing is closed, without a look at the weights.
    if not (bias[stay].mean() - _BELOW - bias[lowest]).abs() <= slack * bias.abs().max():  # NaN, of no others, is not
        return []
    known = (weight[stay].mean(0) - weight[lowest]).abs().max() <= slack * weight.abs().max()
    return same.tolist() if bool(known) else []


def read_directions(weight: Tensor) -> Tensor:
    """(s, r) orthonormal columns: the directions in which outputs with these weights (outputs, s) differ.

    Probabilities hang on differences of logits alone, so r is less than the number of outputs; but at least 1.
    """
    _, sizes, directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    read = sizes > _SURE * sizes[0]
    read[0] = True
    return directions[read].T
