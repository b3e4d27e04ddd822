"""Forms of the inverse of a positive definite matrix, without the inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_square, check_tensor

_OP = "inverse_form"
_DTYPES = (torch.float64,)


def inverse_form(matrix: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    """U^T N^-1 U of every pair of a batch, and whether N is positive definite: the Schur complement of a border.

    Args:
        matrix: N, (P, d, d) float64, symmetric; d >= 1. border: U, (P, d, s) float64, s >= 1.

    Returns:
        (P, s, s) float64, which holds anything where N is not positive definite; and (P,) bool, where it is.

    Raises:
        InputError: an argument has a wrong type, shape, dtype or device.
    """
    many, d = check_square("matrix", matrix, _DTYPES, least=1)
    check_tensor("border", border, (many, d, None), _DTYPES, matrix)
    if border.shape[2] == 0:
        raise InputError(f"border: got shape {tuple(border.shape)}, expected (P, d, s) with s >= 1")
    return torch.ops.loft_fast.inverse_form(matrix, border)


@torch.library.custom_op("loft_fast::inverse_form", mutates_args=())
def _op(matrix: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    return backends.implementation(_OP, matrix.device, matrix.dtype)(matrix, border)


@_op.register_fake
def _fake(matrix: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    many, s = border.shape[0], border.shape[2]
    return border.new_empty(many, s, s), border.new_empty(many, dtype=torch.bool)


@backends.implements(_OP, "native", devices=("cpu",), dtypes=_DTYPES)
def _native(matrix: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    many, d, s = border.shape
    matrix, border = matrix.contiguous(), border.contiguous()
    out, positive = border.new_empty(many, s, s), torch.empty(many, dtype=torch.bool)
    addresses = out.data_ptr(), positive.data_ptr()
    backends.native_module().inverse_form(
        matrix.data_ptr(), border.data_ptr(), many, d, s, *addresses, torch.get_num_threads()
    )
    return out, positive


backends.implements(_OP, "torch", dtypes=_DTYPES)(reference.inverse_form)
