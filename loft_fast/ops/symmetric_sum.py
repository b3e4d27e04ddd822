"""Sums of many symmetric matrices: the pooling of groups, which only their reading bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_tensor

_OP = "symmetric_sum"


def symmetric_sum(out: Tensor, matrices: list[Tensor]) -> None:
    """out += the sum of `matrices`, added in the order given: every backend gives the same bits.

    Args:
        out: (d, d) contiguous float64, updated in place; its upper triangle counts, and is mirrored to the lower one.
        matrices: (d, d) contiguous float64, exactly symmetric; none of them shares memory with `out`.

    Raises:
        InputError: an argument has a wrong type, shape, dtype, device or layout; `out` is unchanged.
    """
    check_tensor("out", out, (None, None), (torch.float64,), out)
    named = {"out": out, **{f"matrices[{i}]": matrix for i, matrix in enumerate(matrices)}}
    for name, matrix in named.items():
        check_tensor(name, matrix, (len(out), len(out)), (torch.float64,), out)
        if not matrix.is_contiguous():
            raise InputError(f"{name}: got strides {tuple(matrix.stride())}, expected a contiguous tensor")
    torch.ops.loft_fast.symmetric_sum(out, list(matrices))


@torch.library.custom_op(
    "loft_fast::symmetric_sum", mutates_args=("out",), schema="(Tensor(a!) out, Tensor[] matrices) -> ()"
)
def _op(out: Tensor, matrices: list[Tensor]) -> None:
    backends.implementation(_OP, out.device, out.dtype)(out, matrices)


@_op.register_fake
def _fake(out: Tensor, matrices: list[Tensor]) -> None:
    return None


@backends.implements(_OP, "native", devices=("cpu",), dtypes=(torch.float64,))
def _native(out: Tensor, matrices: list[Tensor]) -> None:
    addresses = [matrix.data_ptr() for matrix in matrices]
    backends.native_module().symmetric_sum(out.data_ptr(), addresses, len(out), torch.get_num_threads())


backends.implements(_OP, "torch")(reference.symmetric_sum)
