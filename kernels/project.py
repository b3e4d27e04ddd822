"""project in Triton: one kernel, in which every program sees its rows through."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_fast.kernels.choice import Blocks, blocks_for, precision_for
from loft_fast.kernels.tiles import multiply, there


@there
def launch(
    x: Tensor, basis: Tensor, center: Tensor, precision: str | None = None, blocks: Blocks | None = None
) -> Tensor:
    """As `loft_fast.ops.project`; x at most 32 bits wide.

    Args:
        precision: one of `choice.PRECISIONS`, for 32-bit products.
    """
    n, d = x.shape
    rank = basis.shape[1]
    blocks = blocks or blocks_for("project", x.dtype, d, x.device)
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if n == 0:
        return out
    scores = torch.empty(n, rank, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)
    project[(triton.cdiv(n, blocks.tile),)](
        x,
        basis.to(x.dtype).contiguous(),
        center.float().contiguous(),
        scores,
        out,
        n,
        d,
        rank,
        *x.stride(),
        TILE=blocks.tile,
        BLOCK=blocks.rows,
        BACK=True,
        PRECISION=precision_for(precision),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


def scores(x: Tensor, basis: Tensor, center: Tensor, precision: str, blocks: Blocks) -> Tensor:
    """(x - center) U alone, (n, s) float32."""
    n, d = x.shape
    rank = basis.shape[1]
    out = torch.empty(n, rank, dtype=torch.float32, device=x.device)
    project[(triton.cdiv(n, blocks.tile),)](
        x,
        basis,
        center,
        out,
        out,
        n,
        d,
        rank,
        *x.stride(),
        TILE=blocks.tile,
        BLOCK=blocks.rows,
        BACK=False,
        PRECISION=precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


@triton.jit(do_not_specialize=["n"])
def project(
    x_ptr,
    basis_ptr,
    center_ptr,
    scores_ptr,
    out_ptr,
    n,
    d,
    rank,
    row_stride,
    col_stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BACK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE rows: their scores (x - center) U, block by block, and with BACK center + scores U^T.

    The scores of TILE rows do not fit on chip for a large rank. They are written out and read again by the program that
    wrote them: from the second-level cache. A row may be longer than the largest float16 number, and so may its scores:
    they are multiplied as such over what makes them fit.
    """
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    here = (rows < n)[:, None]
    most = tl.zeros((TILE,), dtype=tl.float32)
    for first in range(0, rank, BLOCK):
        vectors = first + tl.arange(0, BLOCK)
        total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        for start in range(0, d, BLOCK):
            columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = columns < d
            mask = here & inside[None, :]
            z = tl.load(x_ptr + rows[:, None] * row_stride + columns[None, :] * col_stride, mask=mask, other=0.0)
            center = tl.load(center_ptr + columns, mask=inside, other=0.0)
            z = tl.where(mask, z.to(tl.float32) - center[None, :], 0.0)
            u = tl.load(
                basis_ptr + columns[:, None] * rank + vectors[None, :],
                mask=inside[:, None] & (vectors < rank)[None, :],
                other=0.0,
            )
            total = multiply(z.to(u.dtype), u, total, PRECISION)
        at = scores_ptr + rows[:, None] * rank + vectors[None, :]
        tl.store(at, total.to(scores_ptr.dtype.element_ty), mask=here & (vectors < rank)[None, :])
        if BACK and basis_ptr.dtype.element_ty == tl.float16:
            most = tl.maximum(most, tl.max(tl.abs(total), axis=1))
    if not BACK:
        return
    scale = tl.maximum(most / 32768.0, 1.0)[:, None]
    tl.debug_barrier()  # what other threads of this program have written is read now
    for start in range(0, d, BLOCK):
        columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = columns < d
        center = tl.load(center_ptr + columns, mask=inside, other=0.0)
        total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        for first in range(0, rank, BLOCK):
            vectors = first + tl.arange(0, BLOCK)
            within = vectors < rank
            score = tl.load(
                scores_ptr + rows[:, None] * rank + vectors[None, :], mask=here & within[None, :], other=0.0
            )
            u = tl.load(
                basis_ptr + columns[:, None] * rank + vectors[None, :],
                mask=inside[:, None] & within[None, :],
                other=0.0,
            )
            if u.dtype == tl.float16:
                score *= 1.0 / scale
            total = multiply(score.to(u.dtype), tl.trans(u), total, PRECISION)
        if basis_ptr.dtype.element_ty == tl.float16:
            total *= scale
        total += center[None, :]
        tl.store(
            out_ptr + rows[:, None] * d + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=here & inside[None, :],
        )
