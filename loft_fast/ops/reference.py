"""The heavy operations in the plainest torch code that is right, in float64: what every backend is tested against.

Also the "torch" backend, for any device without a faster one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows converted to float64 at a time: bounds the copy, not the result.
_ROWS = 4096


def moments_update(x: Tensor, shift: Tensor, total: Tensor, scatter: list[Tensor], group: Tensor | None = None) -> None:
    """total[g] += sum (x_i - shift[g]) and scatter[g] += sum (x_i - shift[g])(x_i - shift[g])^T over the rows of g.

    Args:
        x: (n, d) rows, any float dtype.
        shift: (G, d) float64.
        total: (G, d) float64, accumulated in place.
        scatter: G tensors (d, d) float64, accumulated in place.
        group: (n,) int64 in [0, G), or None where G = 1.
    """
    for g, rows in _by_group(x, len(scatter), group):
        centered = rows.to(torch.float64) - shift[g]  # [rows, d]
        total[g] += centered.sum(0)
        product = centered.T @ centered
        # A general matrix product may round (i, j) and (j, i) apart.
        scatter[g] += product.triu() + product.triu(1).T


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
