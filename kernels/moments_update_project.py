"""moments_update_project in Triton: rows are read from memory once; what is read again comes from the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_fast.kernels import project
from loft_fast.kernels.choice import Blocks, blocks_for, precision_for
from loft_fast.kernels.moments_update import block, piece_rows, ranges, shifts, update
from loft_fast.kernels.pieces import addresses_of, cut
from loft_fast.kernels.tiles import multiply, there

_CACHED = 16 << 20  # bytes of rows at a time, that stay in a second-level cache while they are used


@there
def launch(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    scatter: list[Tensor],
    basis: Tensor,
    center: Tensor,
    image: Tensor,
    precision: str | None = None,
    blocks: Blocks | None = None,
) -> None:
    """As `loft_fast.ops.moments_update_project`; x at most 32 bits wide. Does not wait for the device."""
    d, rank = basis.shape
    precision = precision_for(precision)
    sizes = blocks or blocks_for("moments_update", x.dtype, d, x.device)
    thin = blocks or blocks_for("moments_update_project", x.dtype, d, x.device)
    tiles = triton.cdiv(d, sizes.tile)
    triangle = tiles * (tiles + 1) // 2 if scatter else 0
    addresses = addresses_of(scatter, x.device) if scatter else None
    for rows in x.split(max(1, _CACHED // (d * x.element_size()))):
        length = piece_rows(len(rows), triangle + tiles * triton.cdiv(rank, thin.tile), sizes, x.device)
        pieces = cut(len(rows), length, None, 1, x.device)
        scores = project.scores(rows, basis, center, precision, thin)
        shift, far = shifts(rows, pieces, 1)
        for low, high in ranges(pieces, triangle * sizes.tile**2 * 8 + d * rank * 8):
            update(rows, pieces, low, high, shift, far, addresses, count, mean, precision, sizes)
            parts = torch.empty(high - low, d, rank, dtype=torch.float64, device=x.device)
            cross[(triton.cdiv(d, thin.tile) * triton.cdiv(rank, thin.tile) * (high - low),)](
                rows,
                center,
                scores,
                parts,
                pieces.start[low:],
                pieces.end[low:],
                d,
                rank,
                *rows.stride(),
                TILE=thin.tile,
                ROWS=thin.rows,
                FLUSH=sizes.flush,
                PRECISION=precision,
                num_warps=thin.warps,
                num_stages=thin.stages,
            )
            image += parts.sum(0)


@triton.jit
def cross(
    x_ptr,
    center_ptr,
    scores_ptr,
    out_ptr,
    start_ptr,
    end_ptr,
    d,
    rank,
    row_stride,
    col_stride,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of Z^T scores, (d, rank) float64, over one piece of rows; scores (n, rank) float32, row by row."""
    wide = tl.cdiv(rank, TILE)
    tiles = tl.cdiv(d, TILE) * wide
    t, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start, end = tl.load(start_ptr + piece), tl.load(end_ptr + piece)
    columns = ((t // wide) * TILE + tl.arange(0, TILE)).to(tl.int64)
    vectors = (t % wide) * TILE + tl.arange(0, TILE)
    center = tl.load(center_ptr + columns, mask=columns < d, other=0.0)
    out = out_ptr + piece.to(tl.int64) * d * rank + columns[:, None] * rank + vectors[None, :]
    inside = (columns < d)[:, None] & (vectors < rank)[None, :]
    for begin in range(start, end, FLUSH):
        short = tl.zeros((TILE, TILE), dtype=tl.float32)
        for position in range(begin, tl.minimum(begin + FLUSH, end), ROWS):
            positions = position + tl.arange(0, ROWS).to(tl.int64)
            here = (positions < end)[:, None]
            mask = here & (columns < d)[None, :]
            z = block(x_ptr, positions * row_stride, columns, col_stride, center, mask, True, True)
            score = tl.load(
                scores_ptr + positions[:, None] * rank + vectors[None, :],
                mask=here & (vectors < rank)[None, :],
                other=0.0,
            )
            short = multiply(tl.trans(z), score, short, PRECISION)
        # Nothing is there yet the first time, when begin - start is zero.
        before = tl.load(out, mask=inside & (columns[:, None] < (begin - start) * d), other=0.0)
        tl.store(out, before + short.to(tl.float64), mask=inside)
