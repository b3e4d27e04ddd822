"""What the heavy operations cost at least: multiply-adds, bytes, and the time that a machine's ceilings allow for them.

Needs no GPU. The ceilings are to be measured on the machine in question; none are built in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loft_fast.ops.arguments import check_integer

PRODUCTS = 70  # of a projector by purification: 60 to 80 on spectra with a relative gap of 1e-6


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most.

    Attributes:
        bandwidth: bytes a second, read and written. rate: floating-point operations a second in matrix products.
    """

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Cost:
    """Of one call, counting each input read once and each output written once.

    Attributes:
        operations: floating-point or integer operations, two for a multiply-add. moved: bytes.
    """

    operations: int
    moved: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.moved + other.moved)

    def seconds(self, ceilings: Ceilings) -> float:
        """No version runs faster (roofline: Williams, Waterman and Patterson 2009)."""
        return max(self.operations / ceilings.rate, self.moved / ceilings.bandwidth)

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two is the limit: "memory" or "arithmetic"."""
        return "memory" if self.moved / ceilings.bandwidth > self.operations / ceilings.rate else "arithmetic"


def moments_update(n: int, d: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """Half of the products X^T X; rows read, states of float64 read and written."""
    _check(n=n, d=d, groups=groups)
    return Cost(n * d * (d + 1), n * d * dtype.itemsize + 2 * 8 * groups * (d * d + d + 1))


def quantized_update(n: int, d: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """As `moments_update`, with each product of 16-bit integers made of four products of bytes."""
    return Cost(4 * n * d * (d + 1), moments_update(n, d, groups, dtype).moved)


def symmetric_matmul(d: int, many: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """Half of each product; one matrix read (a square), one written."""
    _check(d=d, many=many)
    return Cost(many * d * d * (d + 1), 2 * many * d * d * dtype.itemsize)


def topk_projector(d: int, many: int = 1, dtype: torch.dtype = torch.float32, products: int = PRODUCTS) -> Cost:
    """Products by purification, each of which reads and writes all."""
    _check(products=products)
    one = symmetric_matmul(d, many, dtype)
    return Cost(products * one.operations, products * one.moved)


def project(n: int, d: int, rank: int, dtype: torch.dtype = torch.float32) -> Cost:
    """Two thin products; rows read and written, and the basis read."""
    _check(n=n, d=d, rank=rank)
    return Cost(4 * n * d * rank, (2 * n * d + d * rank + d) * dtype.itemsize)


def moments_update_project(n: int, d: int, rank: int, scatter: bool = True, dtype: torch.dtype = torch.float32) -> Cost:
    """Rows read once for X^T X, if that is wanted, and X^T (X U)."""
    _check(n=n, d=d, rank=rank)
    state = d * d if scatter else 0
    products = n * d * (d + 1) if scatter else 0
    moved = n * d * dtype.itemsize + d * rank * 4 + 2 * 8 * (state + d * rank + d + 1)
    return Cost(products + 4 * n * d * rank, moved)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        check_integer(name, size, 0)
