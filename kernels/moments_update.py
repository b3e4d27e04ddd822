"""moments_update in Triton: one triangle of tiles times pieces of the rows, merged into float64 in a fixed order.

Of each piece of the rows, which are of one group, one program for each tile of the upper triangle multiplies, and one
for each block of columns sums. What is multiplied is exact: 32-bit rows as differences from a row near their mean,
16-bit rows as they are or, where a column lies far from zero, as a difference that 16 bits hold exactly (Sterbenz
1974). Rows too far from the others for that, which the sums see, have their group multiplied once more, in 32 bits.
Products are summed in float32 over `Blocks.flush` rows, beyond that in float64; of rows as they are, whose products may
all have one sign, so that the sum does not drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_fast.kernels.choice import Blocks, blocks_for, precision_for, processors
from loft_fast.kernels.pieces import Pieces, addresses_of, cut
from loft_fast.kernels.tiles import MOST, multiply, there, triangle_tile

_SAMPLE = 256  # rows of a group that tell where its mean is, spread over all of them
_COLUMNS = 64  # of means that one program works out
_STRIP = 16  # rows of a tile that one program merges: as many float64 numbers as registers hold
_WORKSPACE = 256 << 20  # bytes of partial results at a time
_INEXACT = tl.constexpr(2)  # mark of a group far from zero of which 16 bits do not hold every difference


@there
def launch(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    scatter: Sequence[Tensor],
    group: Tensor | None,
    precision: str | None = None,
    blocks: Blocks | None = None,
) -> None:
    """As `loft_fast.ops.moments_update`; x at most 32 bits wide. Does not wait for the device.

    Args:
        precision: one of `choice.PRECISIONS` for the products of 32-bit rows; 16-bit rows are multiplied as they are.
        blocks: sizes; None: from the table.
    """
    d, groups = x.shape[1], len(scatter)
    blocks = blocks or blocks_for("moments_update", x.dtype, d, x.device)
    precision = precision_for(precision)
    tiles = triton.cdiv(d, blocks.tile)
    triangle = tiles * (tiles + 1) // 2
    length = blocks.piece if group is not None else piece_rows(len(x), triangle, blocks, x.device)
    pieces = cut(len(x), length, group, groups, x.device)
    shift, far = shifts(x, pieces, groups)
    addresses = addresses_of(scatter, x.device)
    for low, high in ranges(pieces, triangle * blocks.tile**2 * 8):
        update(x, pieces, low, high, shift, far, addresses, count, mean, precision, blocks)


def ranges(pieces: Pieces, size: int) -> Iterator[tuple[int, int]]:
    """From which piece to which at a time, where the results of one take `size` bytes."""
    at_once = min(max(1, _WORKSPACE // max(size, 1)), MOST)
    for low in range(0, len(pieces), at_once):
        yield low, min(low + at_once, len(pieces))


def update(
    x: Tensor,
    pieces: Pieces,
    low: int,
    high: int,
    shift: Tensor,
    far: Tensor,
    addresses: Tensor | None,
    count: Tensor,
    mean: Tensor,
    precision: str,
    blocks: Blocks,
) -> None:
    """Merge the pieces low to high into states; without addresses of scatters, into counts and means alone."""
    d, groups, many = x.shape[1], len(count), high - low
    tiles = triton.cdiv(d, blocks.tile)
    triangle = tiles * (tiles + 1) // 2 if addresses is not None else 0
    partial = x.new_empty(many, triangle, blocks.tile, blocks.tile, dtype=torch.float64)
    rest = x.new_empty(many, d, dtype=torch.float64)
    versions = [(True, True, tiles, blocks)] if x.element_size() == 4 else []
    if not versions:
        versions = [(False, False, tiles, blocks), (True, False, tiles, blocks)]
        if triangle:
            versions.append((True, True, 0, widened(blocks)))
            precision = "tf32x3"
    for center, wide, sums, sizes in versions:
        gram[(triangle + sums, many)](
            x,
            pieces.order,
            pieces.start[low:],
            pieces.end[low:],
            pieces.group[low:],
            shift,
            far,
            partial,
            rest,
            d,
            triangle,
            *x.stride(),
            TILE=sizes.tile,
            ROWS=sizes.rows,
            FLUSH=sizes.flush,
            GATHER=pieces.order is not None,
            CENTER=center,
            WIDE=wide,
            EVEN=d % sizes.tile == 0,
            PRECISION=precision,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    where = (pieces.start, pieces.end, pieces.first, pieces.last, low, high)
    if triangle:
        strip = min(blocks.tile, _STRIP)
        merge[(triangle * (blocks.tile // strip) * groups,)](
            partial, rest, shift, addresses, count, mean, *where, d, triangle, TILE=blocks.tile, STRIP=strip
        )
    means[(triton.cdiv(d, _COLUMNS) * groups,)](rest, shift, count, mean, *where, d, COLUMNS=_COLUMNS)
    count += pieces.sizes(low, high)


def widened(blocks: Blocks) -> Blocks:
    """Sizes for differences of 32 bits from rows of 16: of the same tiles, with room for numbers twice the size."""
    return replace(blocks, rows=min(blocks.rows, 32), stages=2)


def piece_rows(n: int, triangle: int, blocks: Blocks, device: torch.device) -> int:
    """Rows of a piece, so that all processors have work for several rounds, and a piece is worth its merging."""
    pieces = min(triton.cdiv(4 * processors(device), triangle), triton.cdiv(n, blocks.piece))
    return triton.cdiv(triton.cdiv(n, max(1, pieces)), blocks.rows) * blocks.rows


def shifts(x: Tensor, pieces: Pieces, groups: int) -> tuple[Tensor, Tensor]:
    """What to subtract from rows of each group, (G, d) float32 in x's digits; whether any of it is not zero, (G,).

    `update` marks there the groups of 16-bit rows of which it finds that the differences are not exact.
    """
    d = x.shape[1]
    shift = torch.zeros(groups, d, device=x.device)
    far = torch.zeros(groups, dtype=torch.int32, device=x.device)
    sample[(triton.cdiv(d, _COLUMNS) * groups,)](
        x,
        pieces.order,
        pieces.begin,
        pieces.stop,
        shift,
        far,
        d,
        *x.stride(),
        SAMPLE=_SAMPLE,
        COLUMNS=_COLUMNS,
        GATHER=pieces.order is not None,
        WIDE=x.element_size() == 4,
    )
    return shift, far


@triton.jit
def sample(
    x_ptr,
    order_ptr,
    begin_ptr,
    stop_ptr,
    shift_ptr,
    far_ptr,
    d,
    row_stride,
    col_stride,
    SAMPLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Means of a sample of each group, or zero where 16-bit differences from them would not be exact."""
    part, g = tl.program_id(0) % tl.cdiv(d, COLUMNS), tl.program_id(0) // tl.cdiv(d, COLUMNS)
    columns = (part * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = columns < d
    begin = tl.load(begin_ptr + g)
    n = tl.load(stop_ptr + g) - begin
    if n == 0:
        return
    # Differences from the first row: of columns far from zero, the spread would drown in the squares.
    origin = tl.zeros((COLUMNS,), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    squares = tl.zeros((COLUMNS,), dtype=tl.float32)
    taken = tl.minimum(n, SAMPLE)
    for k in range(taken):
        row = begin + k * n // taken
        if GATHER:
            row = tl.load(order_ptr + row)
        value = tl.load(x_ptr + row * row_stride + columns * col_stride, mask=inside, other=0.0).to(tl.float32)
        if k == 0:
            origin = value
        total += value - origin
        squares += (value - origin) * (value - origin)
    offset = total / taken
    mean = (origin + offset).to(x_ptr.dtype.element_ty).to(tl.float32)
    if not WIDE:
        # Only there is a 16-bit difference exact, and only there is it worth anything.
        variance = squares / taken - offset * offset
        mean = tl.where(mean * mean > 16 * variance, mean, 0.0)
    tl.store(shift_ptr + g * d + columns, mean, mask=inside)
    if tl.max((mean != 0).to(tl.int32), axis=0) != 0:
        tl.store(far_ptr + g, 1)


@triton.jit
def _rows(order_ptr, position, end, row_stride, GATHER: tl.constexpr):
    """Where rows begin."""
    if GATHER:
        position = tl.load(order_ptr + position, mask=position < end, other=0)
    return position * row_stride


@triton.jit
def block(x_ptr, at_row, columns, col_stride, shift, mask, CENTER: tl.constexpr, WIDE: tl.constexpr):
    """(ROWS, TILE) of x, less the shift."""
    z = tl.load(x_ptr + at_row[:, None] + (columns * col_stride)[None, :], mask=mask, other=0.0)
    if CENTER:
        difference = tl.where(mask, z.to(tl.float32) - shift[None, :], 0.0)
        z = difference if WIDE else difference.to(z.dtype)
    return z


@triton.jit
def gram(
    x_ptr,
    order_ptr,
    start_ptr,
    end_ptr,
    group_ptr,
    shift_ptr,
    far_ptr,
    partial_ptr,
    rest_ptr,
    d,
    triangle,
    row_stride,
    col_stride,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FLUSH: tl.constexpr,
    GATHER: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one piece of rows: a tile of Z^T Z, or the sums of a block of columns.

    `triangle` programs along the first axis are for tiles and the rest for sums. Consecutive programs read the same
    rows, which the second-level cache then has. Of 16-bit rows CENTER serves groups far from zero, and the other
    version the rest; a later one, WIDE, those of the former that were found to be inexact.
    """
    t, piece = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_ptr + piece), tl.load(end_ptr + piece)
    if start == end:
        return
    group = tl.load(group_ptr + piece)
    if x_ptr.dtype.element_ty != tl.float32:
        far = tl.load(far_ptr + group)
        if WIDE:
            if far != _INEXACT:
                return
        elif (far != 0) != CENTER:
            return
    shift_ptr += group * d
    if t < triangle:
        i, j = triangle_tile(t)
        columns_i = (i * TILE + tl.arange(0, TILE)).to(tl.int64)  # times a stride they may pass 2^31
        columns_j = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
        shift_i = tl.load(shift_ptr + columns_i, mask=columns_i < d, other=0.0)
        shift_j = tl.load(shift_ptr + columns_j, mask=columns_j < d, other=0.0)
        square = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        out = partial_ptr + (piece.to(tl.int64) * triangle + t) * TILE * TILE + square
        for begin in range(start, end, FLUSH):
            short = tl.zeros((TILE, TILE), dtype=tl.float32)
            for position in range(begin, tl.minimum(begin + FLUSH, end), ROWS):
                positions = position + tl.arange(0, ROWS).to(tl.int64)
                at_row = _rows(order_ptr, positions, end, row_stride, GATHER)
                here = (positions < end)[:, None]
                mask_i = here & (EVEN or (columns_i < d)[None, :])
                mask_j = here & (EVEN or (columns_j < d)[None, :])
                z_i = block(x_ptr, at_row, columns_i, col_stride, shift_i, mask_i, CENTER, WIDE)
                z_j = block(x_ptr, at_row, columns_j, col_stride, shift_j, mask_j, CENTER, WIDE)
                short = multiply(tl.trans(z_i), z_j, short, PRECISION, APART=not CENTER)
            # Nothing is there yet the first time: begin - start is zero, and no element below it.
            before = tl.load(out, mask=square < (begin - start) * TILE * TILE, other=0.0)
            tl.store(out, before + short.to(tl.float64))
    else:
        columns = ((t - triangle) * TILE + tl.arange(0, TILE)).to(tl.int64)
        inside = columns < d
        shift = tl.load(shift_ptr + columns, mask=inside, other=0.0).to(tl.float64)
        rest = tl.zeros((TILE,), dtype=tl.float64)
        inexact = tl.zeros((TILE,), dtype=tl.int32)
        for position in range(start, end, 8):
            positions = position + tl.arange(0, 8).to(tl.int64)
            at_row = _rows(order_ptr, positions, end, row_stride, GATHER)
            mask = (positions < end)[:, None] & inside[None, :]
            z = tl.load(x_ptr + at_row[:, None] + (columns * col_stride)[None, :], mask=mask, other=0.0)
            difference = tl.where(mask, z.to(tl.float64) - shift[None, :], 0.0)
            rest += tl.sum(difference, axis=0)
            if CENTER and not WIDE:
                inexact |= tl.max((difference.to(z.dtype).to(tl.float64) != difference).to(tl.int32), axis=0)
        if CENTER and not WIDE and tl.max(inexact, axis=0) != 0:
            tl.store(far_ptr + group, _INEXACT)
        tl.store(rest_ptr + piece.to(tl.int64) * d + columns, rest, mask=inside)


@triton.jit
def _range(start_ptr, end_ptr, first_ptr, last_ptr, g, low, high):
    """The pieces of group g among low to high, and how many rows they have."""
    first, last = tl.maximum(tl.load(first_ptr + g), low), tl.minimum(tl.load(last_ptr + g), high)
    n = tl.zeros((), dtype=tl.int64)
    for piece in range(first, last):
        n += tl.load(end_ptr + piece) - tl.load(start_ptr + piece)
    return first, last, n


@triton.jit
def _rest(rest_ptr, first, last, low, columns, d):
    """Sum over pieces of what is left after the shift."""
    total = tl.zeros(columns.shape, dtype=tl.float64)
    for piece in range(first, last):
        total += tl.load(rest_ptr + (piece - low) * d + columns, mask=columns < d, other=0.0)
    return total


@triton.jit(do_not_specialize=["low", "high"])  # or every other number of pieces would be compiled for
def merge(
    partial_ptr,
    rest_ptr,
    shift_ptr,
    scatter_ptr,
    count_ptr,
    mean_ptr,
    start_ptr,
    end_ptr,
    first_ptr,
    last_ptr,
    low,
    high,
    d,
    triangle,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Add the scatter of a group's pieces to its state (Chan, Golub, LeVeque), both triangles: STRIP rows of a tile."""
    t, strip = tl.program_id(0) % triangle, tl.program_id(0) // triangle
    part, g = strip % (TILE // STRIP), strip // (TILE // STRIP)
    first, last, n = _range(start_ptr, end_ptr, first_ptr, last_ptr, g, low, high)
    if n == 0:
        return
    i, j = triangle_tile(t)
    rows = part * STRIP + tl.arange(0, STRIP)
    columns_i = (i * TILE + rows).to(tl.int64)
    columns_j = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    within = rows[:, None] * TILE + tl.arange(0, TILE)[None, :]
    added = tl.zeros((STRIP, TILE), dtype=tl.float64)
    for piece in range(first, last):
        added += tl.load(partial_ptr + ((piece - low) * triangle + t) * TILE * TILE + within)
    rest_i = _rest(rest_ptr, first, last, low, columns_i, d)
    rest_j = _rest(rest_ptr, first, last, low, columns_j, d)
    new, old = n.to(tl.float64), tl.load(count_ptr + g).to(tl.float64)
    delta_i = _delta(shift_ptr, mean_ptr, rest_i / new, g, columns_i, d)
    delta_j = _delta(shift_ptr, mean_ptr, rest_j / new, g, columns_j, d)
    added -= rest_i[:, None] * (rest_j / new)[None, :]
    added += delta_i[:, None] * (delta_j * (old * new / (old + new)))[None, :]
    # A tile on the diagonal is mirrored as well: its product may round (i, j) and (j, i) apart.
    mask = (columns_j < d)[None, :] & (columns_i[:, None] <= columns_j[None, :])
    matrix = tl.load(scatter_ptr + g).to(tl.pointer_type(tl.float64))
    upper = matrix + columns_i[:, None] * d + columns_j[None, :]
    added += tl.load(upper, mask=mask, other=0.0)
    tl.store(upper, added, mask=mask)
    lower = (columns_j < d)[:, None] & (columns_j[:, None] > columns_i[None, :])
    tl.store(matrix + columns_j[:, None] * d + columns_i[None, :], tl.trans(added), mask=lower)


@triton.jit
def _delta(shift_ptr, mean_ptr, offset, g, columns, d):
    """From the mean of the state to that of the pieces."""
    shift = tl.load(shift_ptr + g * d + columns, mask=columns < d, other=0.0).to(tl.float64)
    return (shift - tl.load(mean_ptr + g * d + columns, mask=columns < d, other=0.0)) + offset


@triton.jit(do_not_specialize=["low", "high"])
def means(
    rest_ptr,
    shift_ptr,
    count_ptr,
    mean_ptr,
    start_ptr,
    end_ptr,
    first_ptr,
    last_ptr,
    low,
    high,
    d,
    COLUMNS: tl.constexpr,
):
    """The mean of each state, after its scatter; before its count."""
    part, g = tl.program_id(0) % tl.cdiv(d, COLUMNS), tl.program_id(0) // tl.cdiv(d, COLUMNS)
    first, last, n = _range(start_ptr, end_ptr, first_ptr, last_ptr, g, low, high)
    if n == 0:
        return
    columns = (part * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    new, old = n.to(tl.float64), tl.load(count_ptr + g).to(tl.float64)
    delta = _delta(shift_ptr, mean_ptr, _rest(rest_ptr, first, last, low, columns, d) / new, g, columns, d)
    at = mean_ptr + g * d + columns
    tl.store(at, tl.load(at, mask=columns < d, other=0.0) + delta * (new / (old + new)), mask=columns < d)
