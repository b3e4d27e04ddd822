"""The matrices inside a network and what they are multiplied with, for methods that work layer by layer.

A matrix is (outputs, inputs): the weight of a convolution is flattened and its inputs are patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.problem import Problem

ROWS, POSITIONS = 1000, 5
"""Rows looked at, and positions kept of each, on average, where a layer reads more."""


def layer_inputs(problem: Problem, part: str) -> dict[str, Tensor]:
    """For every matrix of the original, by its parameter's name, inputs (n, d) on a sample of "retain" or "forget"."""
    model = problem.copy().eval()
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for weight, x in _read_by(layer, args[0]).items():
                chosen = torch.randperm(len(x), generator=problem.generator)[: POSITIONS * len(args[0])]
                found.setdefault(f"{name}.{weight}", []).append(x[chosen])

        layer.register_forward_pre_hook(keep)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            watch(name, layer)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # on the fast path a layer of a transformer does not call its parts
    with torch.no_grad():
        for rows in problem.batches(part, min(1.0, ROWS / len(getattr(problem, part))), size=100):
            model(rows.x)
    torch.backends.mha.set_fastpath_enabled(fast)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _read_by(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the layer's matrices are multiplied with when it is called on x."""
    if isinstance(layer, nn.Conv2d):
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return {"weight": patches.transpose(1, 2).flatten(0, 1)}
    if isinstance(layer, nn.MultiheadAttention):
        return {"in_proj_weight": x.flatten(0, 1), "out_proj.weight": _attended(layer, x).flatten(0, 1)}
    return {"weight": x.flatten(0, -2)}


def _attended(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention before its last matrix: (n, t, c) to (n, t, c). torch does that matrix without calling it."""
    mixed = functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    heads = mixed.unflatten(-1, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)  # [3, n, heads, t, c]
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (d, k) and singular values (k,) of x (n, d), largest first."""
    _, values, vectors = torch.linalg.svd(x, full_matrices=False)
    return vectors.T, values
