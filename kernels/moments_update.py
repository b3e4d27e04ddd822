"""moments_update in Triton: one program per tile of the upper triangle, over all rows of one group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_fast.ops.reference import settle

_TILE = 32  # columns a side
_ROWS = 32  # rows multiplied at a time
_COPIED = 4096  # rows converted to float64 at a time
_CHUNK = 16  # multiplications summed in float32 before they go to float64


@triton.jit
def _moments_update(
    x_ptr,
    order_ptr,
    shift_ptr,
    rest_ptr,
    scatter_ptr,
    n,
    d,
    row_stride,
    col_stride,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    if j < i:  # the lower triangle is the mirror image that the program above the diagonal writes
        return
    columns_i = (i * TILE + tl.arange(0, TILE)).to(tl.int64)  # times a stride they may pass 2^31
    columns_j = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    in_i, in_j = columns_i < d, columns_j < d
    shift_i = tl.load(shift_ptr + columns_i, mask=in_i, other=0.0)
    shift_j = tl.load(shift_ptr + columns_j, mask=in_j, other=0.0)
    scatter = tl.zeros((TILE, TILE), dtype=tl.float64)
    rest = tl.zeros((TILE,), dtype=tl.float64)
    for start in range(0, n, ROWS * CHUNK):
        short = tl.zeros((TILE, TILE), dtype=tl.float32)
        for step in range(CHUNK):
            position = start + step * ROWS + tl.arange(0, ROWS)
            in_n = position < n
            row = tl.load(order_ptr + position, mask=in_n, other=0) * row_stride
            at_i = x_ptr + row[:, None] + columns_i[None, :] * col_stride
            at_j = x_ptr + row[:, None] + columns_j[None, :] * col_stride
            mask_i = in_n[:, None] & in_i[None, :]
            mask_j = in_n[:, None] & in_j[None, :]
            # The difference in float64: a mean far from zero costs no digits.
            z_i = tl.where(mask_i, tl.load(at_i, mask=mask_i, other=0.0).to(tl.float64) - shift_i[None, :], 0.0)
            z_j = tl.where(mask_j, tl.load(at_j, mask=mask_j, other=0.0).to(tl.float64) - shift_j[None, :], 0.0)
            rest += tl.sum(z_i, axis=0)
            short += tl.dot(tl.trans(z_i.to(tl.float32)), z_j.to(tl.float32), input_precision="ieee")
        scatter += short.to(tl.float64)
    # A tile on the diagonal is mirrored as well: its product may round (i, j) and (j, i) apart.
    mask = in_i[:, None] & in_j[None, :] & (columns_i[:, None] <= columns_j[None, :])
    upper = scatter_ptr + columns_i[:, None] * d + columns_j[None, :]
    lower = scatter_ptr + columns_j[None, :] * d + columns_i[:, None]
    result = tl.load(upper, mask=mask, other=0.0) + scatter
    tl.store(upper, result, mask=mask)
    tl.store(lower, result, mask=mask)
    if i == j:
        tl.store(rest_ptr + columns_i, rest, mask=in_i)


def launch(x: Tensor, count: Tensor, mean: Tensor, scatter: Sequence[Tensor], group: Tensor | None) -> None:
    """As `loft_fast.ops.moments_update`; x at most 32 bits wide."""
    d = x.shape[1]
    tiles = triton.cdiv(d, _TILE)
    if group is None:
        order = torch.arange(len(x), device=x.device)
        sizes = [len(x)]
    else:
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group, minlength=len(scatter)).tolist()
    start = 0
    for g, n in enumerate(sizes):
        if n:
            rows = order[start : start + n]
            center = _mean(x, rows)
            rest = torch.empty_like(center)
            _moments_update[(tiles, tiles)](
                x,
                rows,
                center,
                rest,
                scatter[g],
                n,
                d,
                *x.stride(),
                TILE=_TILE,
                ROWS=_ROWS,
                CHUNK=_CHUNK,
            )
            settle(n, center, rest, count[g], mean[g], scatter[g])
        start += n


def _mean(x: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([x[part].double().sum(0) for part in rows.split(_COPIED)]).sum(0) / len(rows)
