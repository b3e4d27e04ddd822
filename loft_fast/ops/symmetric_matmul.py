"""Products of symmetric matrices that commute: symmetric again, so half of them is enough."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_square, check_tensor

_OP = "symmetric_matmul"
_DTYPES = (torch.float32, torch.float64)

Factor = float | Tensor


def symmetric_matmul(
    x: Tensor, y: Tensor | None = None, alpha: Factor = 1.0, beta: Factor = 0.0, gamma: Factor = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha X Y + beta X + gamma I, exactly symmetric, for every pair of a batch; and two sums that come for free.

    The Triton kernel reads nothing for the product where alpha is zero.

    Args:
        x, y: (B, d, d) float32 or float64, symmetric, and of every pair X Y = Y X. y=None: X itself. d >= 1.
        alpha, beta, gamma: numbers, or (B,) tensors of x's dtype.

    Returns:
        The result, (B, d, d); its trace, (B,) float64; the sum of its squares, (B,) float64.

    Raises:
        InputError: an argument has a wrong type, shape, dtype or device.
    """
    many, d = check_square("x", x, _DTYPES, least=1)
    y = x if y is None else y
    check_tensor("y", y, (many, d, d), (x.dtype,), x)
    scale = x.new_empty(many, 3)
    for k, (name, factor) in enumerate((("alpha", alpha), ("beta", beta), ("gamma", gamma))):
        if isinstance(factor, Tensor):
            check_tensor(name, factor, (many,), (x.dtype,), x)
        scale[:, k] = factor
    out, sums = torch.ops.loft_fast.symmetric_matmul(x.contiguous(), y.contiguous(), scale)
    return out, sums[:, 0], sums[:, 1]


@torch.library.custom_op("loft_fast::symmetric_matmul", mutates_args=())
def _op(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return backends.implementation(_OP, x.device, x.dtype)(x, y, scale)


@_op.register_fake
def _fake(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 2, dtype=torch.float64)


@backends.implements(_OP, "triton", devices=("cuda",), dtypes=(torch.float32,))
def _triton(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    from loft_fast.kernels import symmetric_matmul as kernel

    return kernel.launch(x, y, scale)


backends.implements(_OP, "torch", dtypes=_DTYPES)(reference.symmetric_matmul)
