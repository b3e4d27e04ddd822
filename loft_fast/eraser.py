"""The least change of features after which no linear probe finds the forget rows: both sets then have one mean.

A linear probe, whatever its loss, gains nothing from features whose mean is the same for both labels, and from all
others it does (LEACE: Belrose et al. 2023, arXiv 2306.03819, theorems 3.1 and 3.2). So the direction between the means
has to go. Of the maps that lose it, the one that changes rows least puts back, in its place, what the other coordinates
say of it. LEACE counts the change over all rows, here it is that of the retain rows: nobody needs the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINK = 1e-3  # of the mean variance, added to every direction: there may be few rows a dimension
_TINY = 1e-12  # the same for a bound, where rounding is all that matters
_SAME = 1e-9  # of the longest offset: a direction that is shorter is none of its own


@dataclass(frozen=True)
class Eraser:
    """z -> center + lift basis^T (z - center), after which two means coincide.

    Attributes:
        basis: (d, s) float64, orthonormal columns: the coordinates that stay, orthogonal to the offset of the means.
        lift: (d, s) float64: the directions that each is put back along; basis^T lift is the identity.
        change: share of the retain variance by which retain rows move, in mean square.
        least: what no linear map about the center that makes the means coincide can go below.
    """

    basis: Tensor
    lift: Tensor
    change: float
    least: float


def least_change(retain: Tensor, offsets: Tensor, within: Tensor | None = None) -> Eraser:
    """The eraser for these moments.

    Args:
        retain: (d, d) float64, the retain covariance divided by its trace.
        offsets: (d, k), between k pairs of means.
        within: (d, s) orthonormal columns with s > k: only these coordinates stay; default: all.
    """
    lost, basis = _split(offsets)
    if within is not None:
        basis = within @ _split(within.T @ offsets)[1]
    lift = lifted(basis, retain)
    moved = torch.eye(len(retain), dtype=retain.dtype, device=retain.device) - lift @ basis.T
    change = float(((moved @ retain) * moved).sum().clamp(0, 1))
    least = float(torch.linalg.inv(lost.T @ _solve(retain, lost, _TINY)).trace())
    return Eraser(basis, lift, change, min(change, least))


def lifted(basis: Tensor, covariance: Tensor) -> Tensor:
    """Where to put coordinates (n, s) back, (d, s): what they were, and what they say of all that was dropped.

    Linear regression of the dropped part on the kept one, for rows of this covariance (d, d), a little shrunk.
    """
    seen = covariance @ basis
    inside = basis.T @ seen
    dropped = seen - basis @ inside
    return basis + _solve(inside, dropped.T, _SHRINK).T


def _solve(matrix: Tensor, right: Tensor, shrink: float) -> Tensor:
    shift = (shrink * matrix.trace() / len(matrix)).clamp_min(1e-30)
    matrix = matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.lstsq(matrix, right).solution if failed else torch.cholesky_solve(right, root)


def _split(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the span of these columns (s, k), and of what is orthogonal to it."""
    vectors, sizes, _ = torch.linalg.svd(columns)
    rank = int((sizes > _SAME * sizes[0]).sum())
    return vectors[:, :rank], vectors[:, rank:]
