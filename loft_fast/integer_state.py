"""Exact moments: features as 16-bit integers, their sum and their products in 64 bits.

Integers add and subtract without rounding, so that a state depends on which rows it holds and on nothing else: not on
their order, on batches, threads, workers or merges, nor on rows that came and went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast import ops
from loft_fast.collective import Peers
from loft_fast.errors import InputError
from loft_fast.ops.arguments import largest_magnitude
from loft_fast.ops.quantized_update import MOST_ROWS
from loft_fast.ops.reference import LARGEST, square
from loft_fast.state import State, pack, unpack

_HEADROOM = 2.0  # later features may be so many times larger than the first block's, before any is clipped
_LIMITS = 1e-100, 1e100  # of magnitudes
_MARGIN = 1e-9  # relative rounding of a product of float64 variances


class IntegerState(State):
    """Sum (d,) and products (d, d) of features as integers q = round(x / scale), in int64.

    Attributes:
        scale: what an integer of one stands for, a power of two; None until it is calibrated.
    """

    dtype = torch.int64
    names = ("total", "product")
    op = "quantized_update"
    most_rows = MOST_ROWS

    def __init__(self, dim: int, device: torch.device | str | None, scale: float | None) -> None:
        super().__init__(dim, device)
        self.scale = scale

    @property
    def exact(self) -> float | bool:
        """True before calibration; else the largest magnitude that is not clipped."""
        return True if self.scale is None else LARGEST * self.scale

    def blank(self, first: Tensor | None = None) -> IntegerState:
        """The same kind of state, on the same device, of no rows; calibrated if it was, or if `first` is given."""
        scale = self.scale
        if scale is None and first is not None and len(first):
            limit = _HEADROOM * largest_magnitude(first)
            if not _LIMITS[0] <= limit <= _LIMITS[1]:
                largest = limit / _HEADROOM
                raise InputError(f"x: got features up to {largest:g}, which is nothing for exact=True to calibrate on")
            scale = scale_for(limit)
        return IntegerState(self.dim, self.device, scale)

    @property
    def mean(self) -> Tensor:
        """(d,) float64."""
        return self.vector.double() * ((self.scale or 0.0) / max(self.count, 1))

    @property
    def scatter(self) -> Tensor:
        """(d, d) float64, exactly symmetric."""
        if self.scale is None or self.matrix is None:
            return torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        products, rest = self._centered()
        return products.double().sub_(square(rest.double() / self.count**0.5)).mul_(self.scale**2)

    def _centered(self) -> tuple[Tensor, Tensor]:
        """Products about an integer near the mean, so that a large mean costs no digits, and the sum about it."""
        near = (self.vector.double() / self.count).round().long()
        cross = torch.outer(near, self.vector)
        # Intermediate results may wrap around; the sum, at most that of the squares, fits.
        products = (self.read_matrix() - cross).sub_(cross.T).add_(torch.outer(self.count * near, near))
        return products, self.vector - self.count * near

    def check(self, rows: Tensor) -> None:
        """Refuse rows with NaN or Inf."""
        largest_magnitude(rows)

    @staticmethod
    def add(states: Sequence[IntegerState], rows: Tensor, group: Tensor | None) -> None:
        """Add rows as integers."""
        scale = states[0].scale
        assert scale is not None
        count = torch.tensor([state.count for state in states], device=rows.device)
        clipped = torch.tensor([state.clipped for state in states], device=rows.device)
        total = torch.stack([state.vector for state in states])
        product = [state.own_matrix() for state in states]
        ops.quantized_update(rows, scale, count, total, clipped, product, group)
        for state, n, outside, vector in zip(states, count.tolist(), clipped.tolist(), total, strict=True):
            state.count, state.clipped, state.vector = n, outside, vector.clone()

    def pooled(self, parts: Sequence[IntegerState]) -> IntegerState:
        """Sums of all that is kept."""
        result = parts[0].to(self.device).twin()
        for part in parts[1:]:
            result.count += part.count
            result.clipped += part.clipped
            result.vector = result.vector + part.vector.to(self.device)
            result.own_matrix().add_(part.read_matrix().to(self.device))
        return result

    def summed(self, states: Sequence[IntegerState], counts: Tensor, peers: Peers) -> list[IntegerState]:
        """Sums of all that is kept: the same bits whatever the processes and their rows."""
        flat = torch.stack([state.flat().to(self.device) for state in states])
        return [self.from_flat(numbers) for numbers in peers.sum(flat)]

    def flat(self) -> Tensor:
        """All that is kept, as one vector: count, clipped, sum, and products from the upper triangle, in int64.

        Where such vectors are added, also modulo 2^64, so are the rows behind them.
        """
        head = self.vector.new_tensor([self.count, self.clipped])
        return torch.cat([head, self.vector, pack(self.read_matrix())])

    def from_flat(self, numbers: Tensor) -> IntegerState:
        """A state of this scale from such a vector, on this one's device."""
        result = self.blank()
        result.count, result.clipped = (int(number) for number in numbers[:2])
        result.vector = numbers[2 : 2 + self.dim].to(self.device, copy=True)
        result.matrix = unpack(numbers[2 + self.dim :].to(self.device), self.dim) if result.count else None
        return result

    def minus(self, part: IntegerState, name: str) -> IntegerState:
        """The rest, bit for bit what it would be had those rows never come."""
        rest = self.blank()
        rest.count, rest.clipped = self.count - part.count, self.clipped - part.clipped
        rest.vector = self.vector - part.vector
        matrix = self.read_matrix() - part.read_matrix()
        rest.matrix = matrix if rest.count or bool(matrix.any()) else None
        if not rest.consistent():
            raise InputError(f"{name}: these rows were never added (no rows can have the moments of the rest)")
        return rest

    def header(self, states: Sequence[IntegerState]) -> dict[str, str]:
        """The largest magnitude that is not clipped."""
        return {"exact": repr(self.exact)}

    @classmethod
    def described(cls, header: dict[str, str], dim: int, device: torch.device | str | None) -> IntegerState:
        """With the scale of the header."""
        text = header["exact"]
        state = cls(dim, device, None if text == "True" else check_exact(float(text)))
        if text != repr(state.exact):
            raise ValueError(text)
        return state

    def consistent(self) -> bool:
        """Whether rows of 16-bit integers can have these sums and products, all pairs of features looked at."""
        most = self.count * self.dim
        if not (0 <= self.count <= MOST_ROWS and 0 <= self.clipped <= most):
            return False
        squares = self.read_matrix().diagonal()
        if self.count == 0:
            return not bool(self.vector.any() or self.read_matrix().any())
        if self.scale is None or bool((self.vector.abs() > LARGEST * self.count).any()):
            return False
        # Sums of squares: as even or odd as the sum, bounded, and at least what their mean alone brings. All exact.
        products, rest = self._centered()
        variances = products.diagonal()
        possible = (squares >= 0) & (squares <= LARGEST**2 * self.count) & ((squares - self.vector) % 2 == 0)
        possible &= variances >= -(-rest.square() // self.count)
        if self.count == 1:  # one row is its own sum
            return bool(possible.all()) and not bool(products.any())
        spread = variances.double().clamp_min(0).sqrt()
        return bool(possible.all() and (products.abs() <= torch.outer(spread, spread) * (1 + _MARGIN)).all())


def scale_for(limit: float) -> float:
    """The smallest power of two by which numbers up to `limit` in magnitude become 16-bit integers."""
    fraction, exponent = math.frexp(limit / LARGEST)
    return math.ldexp(1.0, exponent - (fraction == 0.5))


def check_exact(exact: float | bool | None) -> float | None:
    """The scale that an argument `exact`, not None, asks for; None for True, which calibrates later."""
    if exact is True:
        return None
    if isinstance(exact, bool) or not isinstance(exact, int | float) or not _LIMITS[0] <= exact <= _LIMITS[1]:
        raise InputError(f"exact: got {exact!r}, expected None, True or the largest magnitude to represent, a number")
    return scale_for(float(exact))
