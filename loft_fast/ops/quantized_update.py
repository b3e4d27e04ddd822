"""Exact moments: rows as 16-bit integers, their sum and their products in 64 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import (
    check_group,
    check_indices,
    check_state,
    check_tensor,
    largest_magnitude,
    native_rows,
)

_OP = "quantized_update"
MOST_ROWS = 2**32  # of a group: their products, each below 2^30, stay below 2^62


def quantized_update(
    x: Tensor,
    scale: float,
    count: Tensor,
    total: Tensor,
    clipped: Tensor,
    product: list[Tensor],
    group: Tensor | None = None,
) -> None:
    """Add rows as integers to running sums, per group: in whatever order and pieces they come, the bits are the same.

    Every number x becomes q = x / scale, rounded half to even and clipped to +-32767. Afterwards count[g],
    total[g] = sum q_i and product[g] = sum q_i q_i^T are those of all rows that group g has seen, and clipped[g] is how
    many of their numbers were clipped.

    Args:
        x: (n, d) float16, bfloat16, float32 or float64; any strides; n >= 0.
        scale: a power of two between 2^-500 and 2^500, so that x / scale is exact.
        count, clipped: (G,) contiguous int64, updated in place.
        total: (G, d) contiguous int64, updated in place.
        product: G symmetric contiguous tensors (d, d) int64, updated in place.
        group: (n,) int64, the group of each row in [0, G), or None where G = 1.

    Raises:
        InputError: an argument has a wrong type, shape, dtype, device, layout or value, x has NaN or Inf, or a group
            would have more than 2^32 rows; the state is unchanged.
    """
    check_tensor("x", x, (None, None), backends.FLOATS, x)
    n, d = x.shape
    if d == 0:
        raise InputError(f"x: got shape {tuple(x.shape)}, expected (n, d) with d >= 1")
    if not isinstance(scale, float) or not 2.0**-500 <= scale <= 2.0**500 or math.frexp(scale)[0] != 0.5:
        raise InputError(f"scale: got {scale!r}, expected a power of two between 2^-500 and 2^500, a float")
    if not isinstance(product, list | tuple) or not product:
        raise InputError(f"product: got {product!r}, expected a list of one ({d}, {d}) tensor per group")
    groups = len(product)
    check_state("count", count, (groups,), torch.int64, x)
    check_state("total", total, (groups, d), torch.int64, x)
    check_state("clipped", clipped, (groups,), torch.int64, x)
    for g, matrix in enumerate(product):
        check_state(f"product[{g}]", matrix, (d, d), torch.int64, x)
    check_group(group, n, groups, x)
    torch.ops.loft_fast.quantized_update(x.detach(), scale, count, total, clipped, list(product), group)


@torch.library.custom_op(
    "loft_fast::quantized_update",
    mutates_args=("count", "total", "clipped", "product"),
    schema="(Tensor x, float scale, Tensor(a!) count, Tensor(b!) total, Tensor(c!) clipped, Tensor(d!)[] product, "
    "Tensor? group) -> ()",
)
def _op(
    x: Tensor,
    scale: float,
    count: Tensor,
    total: Tensor,
    clipped: Tensor,
    product: list[Tensor],
    group: Tensor | None,
) -> None:
    if x.shape[0] == 0:
        return
    # Values are checked here, not in the wrapper: a graph being traced has none.
    new = torch.tensor([len(x)], device=x.device)
    check_indices(group, len(product))
    if group is not None:
        new = torch.bincount(group, minlength=len(product))
    if bool((count > MOST_ROWS - new).any()):
        raise InputError(f"x: got {len(x)} rows, expected at most {MOST_ROWS} of a group in all")
    largest_magnitude(x)
    backends.implementation(_OP, x.device, x.dtype)(x, scale, count, total, clipped, product, group)


@_op.register_fake
def _fake(*_: object) -> None:
    return None


@backends.implements(_OP, "native", devices=("cpu",))
def _native(
    x: Tensor,
    scale: float,
    count: Tensor,
    total: Tensor,
    clipped: Tensor,
    product: list[Tensor],
    group: Tensor | None,
) -> None:
    group = None if group is None else group.contiguous()
    backends.native_module().quantized_update(
        *native_rows(x),
        1 / scale,
        0 if group is None else group.data_ptr(),
        count.data_ptr(),
        total.data_ptr(),
        clipped.data_ptr(),
        [matrix.data_ptr() for matrix in product],
        torch.get_num_threads(),
    )


@backends.implements(_OP, "cuda", devices=("cuda",), by_request=True)
def _cuda(*arguments: Any) -> None:
    from loft_fast.kernels import cuda

    cuda.quantized_update(*arguments)


backends.implements(_OP, "torch")(reference.quantized_update)
