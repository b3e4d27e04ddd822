"""Moments in float64: mean and scatter, merged by the identity of Chan, Golub and LeVeque (1979, 1983).

Read backwards it removes, up to rounding. Every block is centred on its own mean before it is multiplied, so a mean far
larger than the spread costs no digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast import backends, ops
from loft_fast.collective import Peers
from loft_fast.errors import InputError
from loft_fast.ops.arguments import largest_magnitude
from loft_fast.ops.reference import square
from loft_fast.state import State, pack, unpack

# The largest magnitudes whose squares a kernel can sum over a block without overflow, in float64 and in float32.
_LARGEST_DOUBLE, _LARGEST_FLOAT = 1e150, 1e17
# Rows of which nothing is larger are multiplied in float64: the least differences between numbers of this size, 1e-7 of
# it, still have squares that float32 holds.
_SMALLEST_FLOAT = 1e-9
# Relative errors of a variance (512 additions in float32: 3e-5 at worst, in the whole and again in what is removed)
# and, after a long stream, of a mean: a removal that leaves a variance further below zero than they explain took away
# rows that were never there.
_VARIANCE_ERROR, _MEAN_ERROR = 1e-4, 1e-12
_MANY = 16  # rows a feature above which a check of them costs more than merging into a fresh state and checking that


class FloatState(State):
    """Mean (d,) and scatter (d, d) in float64.

    Attributes:
        residue: what rounding in earlier removals may have left on the scatter's diagonal.
    """

    dtype = torch.float64
    names = ("mean", "scatter")
    op = "moments_update"
    most_rows = 2**62
    exact = None

    def __init__(self, dim: int, device: torch.device | str | None, residue: float = 0.0) -> None:
        super().__init__(dim, device)
        self.residue = residue

    def blank(self, first: Tensor | None = None) -> FloatState:
        """The same kind of state, on the same device, of no rows."""
        return FloatState(self.dim, self.device)

    @property
    def mean(self) -> Tensor:
        """(d,) float64."""
        return self.vector

    @property
    def scatter(self) -> Tensor:
        """(d, d) float64, exactly symmetric."""
        return self.read_matrix()

    def check(self, rows: Tensor) -> None:
        """Refuse rows with NaN or Inf, and rows whose squares could overflow."""
        _checked(rows)

    @staticmethod
    def add(states: Sequence[FloatState], rows: Tensor, group: Tensor | None) -> None:
        """Check rows and merge them, at the price of one pass over them where there are many."""
        if all(state.count == 0 for state in states):  # nothing can be lost: merge first, check what came of it
            _merge(states, rows, group, check=True)
        elif len(rows) > _MANY * rows.shape[1] * len(states):
            fresh = [state.blank() for state in states]
            _merge(fresh, rows, group, check=True)
            for state, more in zip(states, fresh, strict=True):
                if more.count:
                    state.take(state.pooled([state, more]) if state.count else more)
        else:
            _merge(states, _multipliable(rows, _checked(rows)), group)

    def pooled(self, parts: Sequence[FloatState]) -> FloatState:
        """Summed in the order given."""
        if len(parts) == 1:
            return parts[0].to(self.device).twin()
        result = self.blank()
        parts = [part.to(self.device) for part in parts]
        counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=self.device)
        means = torch.stack([part.mean for part in parts])
        result.count = sum(part.count for part in parts)
        result.residue = sum(part.residue for part in parts)
        # Offsets from the first mean, not from zero: a mean of 1e6 times the spread keeps its digits.
        offsets = means - means[0]
        drift = (counts @ offsets) / result.count
        result.vector = means[0] + drift
        spread = (offsets - drift) * counts.sqrt().unsqueeze(1)
        result.matrix = spread.T @ spread
        ops.symmetric_sum(result.matrix, [part.scatter for part in parts])
        return result

    def summed(self, states: Sequence[FloatState], counts: Tensor, peers: Peers) -> list[FloatState]:
        """Means first, by rank; then the scatters about what they pool to."""
        own = torch.stack([torch.cat([state.mean, state.mean.new_tensor([state.residue])]) for state in states])
        theirs = peers.gather(own.to(self.device))  # (processes, states, d + 1)
        weights = counts.to(self.device, torch.float64).unsqueeze(-1)
        total = weights.sum(0)
        first = (weights > 0).int().argmax(0, keepdim=True).expand(1, len(states), self.dim)
        # Offsets from the first mean, as in `pooled`.
        means, shift = theirs[:, :, :-1], theirs[:, :, :-1].gather(0, first).squeeze(0)
        mean = shift + (weights * (means - shift)).sum(0) / total.clamp_min(1)
        packed = []
        for state, center in zip(states, mean, strict=True):
            here = state.to(self.device)
            packed.append(pack(here.scatter + square((here.mean - center) * here.count**0.5)))
        result = []
        for n, center, residue, scatter in zip(
            counts.sum(0).tolist(), mean, theirs[:, :, -1].sum(0).tolist(), peers.sum(torch.stack(packed)), strict=True
        ):
            new = self.blank()
            if n:
                new.count, new.vector, new.residue = n, center.clone(), residue
                new.matrix = unpack(scatter, self.dim)
            result.append(new)
        return result

    def minus(self, part: FloatState, name: str) -> FloatState:
        """The rest, if its variances are possible."""
        left = self.count - part.count
        mean = self.mean + (self.mean - part.mean) * (part.count / left) if left else self.mean
        weight = left * part.count / self.count if left else part.count
        scatter = self.scatter - part.scatter - square((part.mean - mean) * weight**0.5)
        before = self.scatter.diagonal() + self.count * (self.mean - mean).square()
        mean_error = _MEAN_ERROR * self.mean.abs() * (self.count / max(left, 1))
        slack = _VARIANCE_ERROR * before + max(left, 1) * mean_error.square()
        slack = slack.clamp(min=max(self.residue, part.residue))
        rest = scatter.diagonal()
        if bool((rest < -slack).any()) or (left < 2 and bool((rest > slack).any())):  # one row alone has no variance
            raise InputError(f"{name}: these rows were never added (the variance of the rest is impossible)")
        result = self.blank()
        if left:
            result.count, result.vector, result.matrix, result.residue = left, mean, scatter, float(slack.max())
        return result

    def header(self, states: Sequence[FloatState]) -> dict[str, str]:
        """The residue."""
        return {"residue": repr(max((state.residue for state in states), default=0.0))}

    @classmethod
    def described(cls, header: dict[str, str], dim: int, device: torch.device | str | None) -> FloatState:
        """With the residue of the header."""
        return cls(dim, device, float(header["residue"]))

    def consistent(self) -> bool:
        """Whether count, mean and scatter can belong together."""
        finite = bool(torch.isfinite(self.vector).all() and torch.isfinite(self.scatter).all())
        empty = not bool(self.vector.any() or self.scatter.any())
        counted = self.count > 0 or (self.count == 0 and empty)
        return finite and counted and self.clipped == 0 and 0 <= self.residue < float("inf")


def _merge(states: Sequence[FloatState], rows: Tensor, group: Tensor | None, check: bool = False) -> None:
    """Merge rows into the states. With `check`, of which states that are empty are left so where the rows are bad."""
    count = torch.tensor([state.count for state in states], device=rows.device)
    mean = torch.stack([state.mean for state in states])
    reads = backends.choose("moments_update", rows.device, rows.dtype) != "native"  # what no row has come to yet
    try:
        scatter = [state.own_matrix(zero=reads) for state in states]
        ops.moments_update(rows, count, mean, scatter, group)
        if check:
            # No row is further from the mean than the square root of the scatter; NaN and Inf show in the mean.
            deviation = torch.stack([matrix.diagonal() for matrix in scatter]).clamp_min(0).sqrt()
            most = float((mean.abs() + 1.001 * deviation).max())
            if not most <= _limit(rows):
                _checked(rows)
            wider = _multipliable(rows, most)
            if wider is not rows:
                for state in states:
                    state.matrix = None
                return _merge(states, wider, group)
        for state, total, center in zip(states, count.tolist(), mean, strict=True):
            state.count, state.vector = total, center.clone()
    finally:
        for state in states:
            if not state.count:
                state.matrix = None


def _checked(rows: Tensor) -> float:
    """The largest magnitude, if it is none that `FloatState.check` refuses."""
    largest, limit = largest_magnitude(rows), _limit(rows)
    if largest > limit:
        raise InputError(
            f"x: got features up to {largest:.1e}, expected at most {limit:.0e}, or their squares overflow"
        )
    return largest


def _multipliable(rows: Tensor, largest: float) -> Tensor:
    """The rows, in a type that holds their squares."""
    return rows.double() if largest < _SMALLEST_FLOAT else rows


def _limit(rows: Tensor) -> float:
    return _LARGEST_DOUBLE if rows.dtype == torch.float64 else _LARGEST_FLOAT
