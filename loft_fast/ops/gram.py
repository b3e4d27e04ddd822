"""Products of the columns of matrices with each other, or with those of others."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_tensor

_OP = "gram"
_DTYPES = (torch.float32, torch.float64)


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """X^T Y of every pair of a batch.

    Args:
        x: (P, n, a) float32 or float64, any strides.
        y: (P, n, b) of x's dtype, any strides. None: X itself, and half of the products are enough.

    Returns:
        (P, a, b) of x's dtype; X^T X is exactly symmetric from the native backend.

    Raises:
        InputError: an argument has a wrong type, shape, dtype or device.
    """
    check_tensor("x", x, (None, None, None), _DTYPES, x)
    if y is not None:
        check_tensor("y", y, (x.shape[0], x.shape[1], None), (x.dtype,), x)
    return torch.ops.loft_fast.gram(x, y)


@torch.library.custom_op("loft_fast::gram", mutates_args=())
def _op(x: Tensor, y: Tensor | None) -> Tensor:
    return backends.implementation(_OP, x.device, x.dtype)(x, y)


@_op.register_fake
def _fake(x: Tensor, y: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], (x if y is None else y).shape[2])


@backends.implements(_OP, "native", devices=("cpu",), dtypes=_DTYPES)
def _native(x: Tensor, y: Tensor | None) -> Tensor:
    out = _fake(x, y)
    native = backends.native_module()
    run = native.gram if x.dtype == torch.float32 else native.gram_double
    other = (None, x.stride()) if y is None else (y.data_ptr(), y.stride())
    sizes = (*x.shape, out.shape[2])
    run(x.data_ptr(), x.stride(), *other, *sizes, out.data_ptr(), torch.get_num_threads())
    return out


backends.implements(_OP, "torch", dtypes=_DTYPES)(reference.gram)
