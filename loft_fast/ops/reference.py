"""The heavy operations in the plainest torch code that is right: in float64, what every backend is tested against.

Also the "torch" backend, for any device without a faster one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows converted to float64 at a time: bounds the copy, not the result.
_ROWS = 4096
LARGEST = 32767  # magnitude of a quantised number: kLargest in csrc/quantized_update.h


def moments_update(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None = None) -> None:
    """Merge the rows of each group g into count[g], mean[g] and scatter[g].

    Args:
        x: (n, d) rows, any float dtype.
        count: (G,) int64; mean: (G, d) float64; scatter: G tensors (d, d) float64. All are updated in place.
        group: (n,) int64 in [0, G), or None where G = 1.
    """
    for g, block in _by_group(x, len(scatter), group):
        rows = block.to(torch.float64)
        center = rows.mean(0)
        centered = rows - center  # [rows, d]
        product = centered.T @ centered
        # A general matrix product may round (i, j) and (j, i) apart.
        scatter[g] += product.triu() + product.triu(1).T
        settle(len(rows), center, centered.sum(0), count[g], mean[g], scatter[g])


def quantized_update(
    x: Tensor,
    scale: float,
    count: Tensor,
    total: Tensor,
    clipped: Tensor,
    product: list[Tensor],
    group: Tensor | None = None,
) -> None:
    """Add the rows of each group g, as integers, to count[g], total[g] and product[g].

    Args:
        x: (n, d) rows, any float dtype, no NaN. scale: what an integer of one stands for.
        count, clipped: (G,) int64; total: (G, d) int64; product: G tensors (d, d) int64. All are updated in place.
        group: (n,) int64 in [0, G), or None where G = 1.
    """
    for g, block in _by_group(x, len(product), group):
        rows, outside = quantize(block, scale)
        count[g] += len(rows)
        clipped[g] += outside
        # Integers below 2^53, and so exact in float64 in whatever order they are added.
        total[g] += rows.sum(0).long()
        product[g] += (rows.T @ rows).long()


def quantize(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x / scale, rounded half to even and clipped, as integers in float64; and how many were clipped, ()."""
    scaled = x.to(torch.float64) / scale
    bounded = scaled.clamp(-LARGEST, LARGEST)
    return bounded.round(), (bounded != scaled).sum()


def project(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    """center + (x - center) U U^T, in the dtype that all three share.

    Args:
        x: (n, d); basis: U, (d, s); center: (d,).
    """
    return torch.addmm(center, (x - center) @ basis, basis.T)


def symmetric_matmul(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """alpha X Y + beta X + gamma I, exactly symmetric; and (B, 2): its trace and the sum of its squares.

    Args:
        x, y: (B, d, d), symmetric and commuting; scale: (B, 3), the three factors. All of one dtype.
    """
    alpha, beta, gamma = (factor.view(-1, 1, 1) for factor in scale.unbind(1))
    product = alpha * (x @ y)
    product += beta * x
    product.diagonal(dim1=1, dim2=2).add_(gamma.squeeze(2))
    out = product.triu() + product.triu(1).mT
    wide = out.double()
    return out, torch.stack([wide.diagonal(dim1=1, dim2=2).sum(1), wide.square().sum((1, 2))], 1)


def moments_update_project(
    x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], basis: Tensor, center: Tensor, image: Tensor
) -> None:
    """Merge rows into moments, and add sum (x_i - center)(x_i - center)^T basis to image.

    Args:
        x: (n, d) rows, any float dtype. basis: (d, s); center: (d,).
        count: (1,) int64; mean: (1, d) float64; scatter: at most one (d, d) float64; image: (d, s) float64. All are
            updated in place.
    """
    for rows in x.split(_ROWS):
        block = rows.double()
        z = block - center.double()
        image += z.T @ (z @ basis.double())
        if not scatter:
            n = len(block)
            mean[0] += (block.mean(0) - mean[0]) * (n / (count[0].double() + n))
            count += n
    if scatter:
        moments_update(x, count, mean, scatter)


def symmetric_sum(out: Tensor, matrices: list[Tensor]) -> None:
    """out = its upper triangle, mirrored, and `matrices` one after another; all (d, d) float64."""
    out.copy_(out.triu() + out.triu(1).T)
    for matrix in matrices:
        out += matrix


def settle(n: int, center: Tensor, rest: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    """Finish a merge of n rows whose scatter about `center` has been added to `scatter` (Chan, Golub, LeVeque).

    Args:
        center: (d,) float64, near the mean of the rows; rest: (d,) float64, their sum about it.
        count: () int64, mean: (d,) float64, scatter: (d, d) float64; updated in place.
    """
    share = n / (count.double() + n)
    delta = (center - mean) + rest / n
    scatter -= square(rest / n**0.5)
    scatter += square(delta * (count * share).sqrt())
    mean += delta * share
    count += n


def square(v: Tensor) -> Tensor:
    """v v^T, exactly symmetric; addr_ is not, as it fuses the addition in some columns only."""
    return torch.outer(v, v)


def _by_group(x: Tensor, groups: int, group: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    if group is None:
        for rows in x.split(_ROWS):
            yield 0, rows
        return
    counts = torch.bincount(group, minlength=groups).tolist()
    order = torch.argsort(group, stable=True)
    for g, members in enumerate(order.split(counts)):
        for index in members.split(_ROWS):
            if len(index):
                yield g, x[index]


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """X^T Y, (P, a, b)."""
    return x.mT @ (x if y is None else y)


def inverse_form(matrix: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    """U^T N^-1 U and whether N is positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, border, upper=False)
    return half.mT @ half, failed == 0
