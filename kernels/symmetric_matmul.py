"""symmetric_matmul in Triton: half the tiles of a product of commuting symmetric matrices, with an epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_fast.kernels.choice import Blocks, blocks_for, precision_for
from loft_fast.kernels.tiles import MOST, multiply, there, triangle_tile


@there
def launch(
    x: Tensor, y: Tensor, scale: Tensor, precision: str | None = None, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """As `loft_fast.ops.symmetric_matmul` with contiguous x, y (B, d, d) float32 and scale (B, 3) float32.

    Args:
        precision: one of `choice.PRECISIONS`, for 32-bit products.
    """
    many, d = x.shape[0], x.shape[1]
    if many > MOST:
        split = zip(*(one.split(MOST) for one in (x, y, scale)), strict=True)
        outs, sums = zip(*(launch(*part, precision, blocks) for part in split), strict=True)
        return torch.cat(outs), torch.cat(sums)
    blocks = blocks or blocks_for("symmetric_matmul", x.dtype, d, x.device)
    tiles = triton.cdiv(d, blocks.tile)
    triangle = tiles * (tiles + 1) // 2
    out = torch.empty_like(x)
    sums = torch.empty(many, triangle, 2, dtype=torch.float32, device=x.device)
    symmetric_matmul[(triangle, many)](
        x,
        y,
        out,
        scale,
        sums,
        d,
        TILE=blocks.tile,
        DEPTH=blocks.rows,
        EVEN=d % blocks.tile == 0 and d % blocks.rows == 0,
        PRECISION=precision_for(precision),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out, sums.sum(1, dtype=torch.float64)


@triton.jit
def symmetric_matmul(
    x_ptr,
    y_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    d,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the upper triangle of alpha X Y + beta X + gamma I, its mirror image, and its share of two sums."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = triangle_tile(t)
    x_ptr += b * d * d
    y_ptr += b * d * d
    out_ptr += b * d * d
    alpha = tl.load(scale_ptr + 3 * b)
    beta = tl.load(scale_ptr + 3 * b + 1)
    gamma = tl.load(scale_ptr + 3 * b + 2)
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    in_rows, in_columns = (rows < d)[:, None], (columns < d)[:, None]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    # Without a product there is nothing to read for it: what has converged is copied.
    for start in range(0, tl.where(alpha == 0.0, 0, d), DEPTH):
        depth = (start + tl.arange(0, DEPTH)).to(tl.int64)
        at_x = x_ptr + rows[:, None] * d + depth[None, :]
        at_y = y_ptr + columns[:, None] * d + depth[None, :]  # Y[k, j] is Y[j, k], which lies in a row
        if EVEN:
            a, c = tl.load(at_x), tl.load(at_y)
        else:
            a = tl.load(at_x, mask=in_rows & (depth < d)[None, :], other=0.0)
            c = tl.load(at_y, mask=in_columns & (depth < d)[None, :], other=0.0)
        total = multiply(a, tl.trans(c), total, PRECISION)
    at = rows[:, None] * d + columns[None, :]
    inside = in_rows & (columns < d)[None, :]
    total = alpha * total + beta * tl.load(x_ptr + at, mask=inside, other=0.0)
    diagonal = rows[:, None] == columns[None, :]
    total += tl.where(diagonal, gamma, 0.0)
    # A tile on the diagonal is mirrored as well: its product may round (i, j) and (j, i) apart.
    upper = inside & (rows[:, None] <= columns[None, :])
    tl.store(out_ptr + at, total, mask=upper)
    lower = in_columns & (rows < d)[None, :] & (columns[:, None] > rows[None, :])
    tl.store(out_ptr + columns[:, None] * d + rows[None, :], tl.trans(total), mask=lower)
    trace = tl.sum(tl.where(diagonal & inside, total, 0.0))
    squares = tl.sum(tl.where(upper, total * total, 0.0) * tl.where(diagonal, 1.0, 2.0))
    at_sums = sums_ptr + (b * tl.num_programs(0) + t) * 2
    tl.store(at_sums, trace)
    tl.store(at_sums + 1, squares)
