"""Count, mean and scatter of a stream of rows, which merge and come apart again exactly as the sets of rows do.

Merging is the identity of Chan, Golub and LeVeque (1979, 1983); read backwards it removes. Every block is centred on
its own mean before it is multiplied, so a mean far larger than the spread costs no digits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from loft_fast import backends, files, ops
from loft_fast.backends import FLOATS
from loft_fast.errors import FileFormatError, InputError
from loft_fast.ops.reference import square
from loft_fast.waiting import Waiting

# The largest magnitudes whose squares a kernel can sum over a block without overflow, in float64 and in float32.
_LARGEST_DOUBLE, _LARGEST_FLOAT = 1e150, 1e17
# Relative errors of a variance (512 additions in float32: 3e-5 at worst, in the whole and again in what is removed)
# and, after a long stream, of a mean: a removal that leaves a variance further below zero than they explain took away
# rows that were never there.
_VARIANCE_ERROR, _MEAN_ERROR = 1e-4, 1e-12
_MANY = 16  # rows a feature that cost more to look through than a state to put aside
# Reading may finish an update, and two threads may read at once.
_SETTLING = threading.Lock()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def lasting(function: _Function) -> _Function:
    """Run `function` without inference mode and autograd: its tensors may be changed and used anywhere later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class Moments:
    """Streaming count, mean and scatter of rows in R^dim, state in float64.

    Updates of a few rows are collected, and worked off together once there are about d of them or when `mean` or
    `scatter` is needed: the result is that of one update with all of them.

    Args:
        dim: number of features d, at least 1.
        device: where the state lives; blocks are moved there. Default: the CPU.

    Attributes:
        count: rows seen, n.
        mean: (d,) float64, sum z / n; zeros while n = 0.
        scatter: (d, d) float64, sum (z - mean)(z - mean)^T, exactly symmetric.
        site: where in a model the rows came from, if `fetch_moments` or a file said so.

    Raises:
        InputError: on any call with input of the wrong dimension or type, or with NaN or Inf; the state is unchanged.
    """

    @lasting
    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise InputError(f"dim: got {dim!r}, expected an integer >= 1")
        self.dim = dim
        self._seen = 0  # rows in the state that follows
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter: Tensor | None = None  # allocated by the first row: a key costs nothing until it has data
        self._waiting = Waiting(dim)
        self._shared = False
        self._residue = 0.0  # what rounding in earlier removals may have left on the scatter's diagonal
        self.site: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._mean.device

    @property
    def count(self) -> int:
        """Rows seen, n."""
        return self._seen + self._waiting.count

    @property
    def mean(self) -> Tensor:
        """(d,) float64, sum z / n; read only."""
        self._settle()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """(d, d) float64, sum (z - mean)(z - mean)^T, exactly symmetric; read only."""
        self._settle()
        if self._scatter is None:
            return torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        return self._scatter

    def __repr__(self) -> str:
        return f"Moments(dim={self.dim}, count={self.count}, device={str(self.device)!r})"

    # ---- the stream ----

    def update(self, x: Tensor) -> Moments:
        """Add rows. x: (n, d) or (..., d), any float dtype, n >= 0. Returns self."""
        accumulate([self], as_rows(x, self.dim, self.device))
        return self

    def remove(self, x: Tensor) -> Moments:
        """Take rows away that were added before; the inverse of `update` up to rounding. Returns self."""
        rows = as_rows(x, self.dim, self.device)
        self._become(subtract(self, Moments(self.dim, self.device).update(rows), "x"))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add all rows behind `other`, in place. Returns self."""
        self._become(self + other)
        return self

    # ---- the algebra ----

    def __add__(self, other: Moments) -> Moments:
        self._check_partner(other)
        return pool([self, other])

    def __sub__(self, other: Moments) -> Moments:
        self._check_partner(other)
        return subtract(self, other, "other")

    def copy(self) -> Moments:
        """An independent Moments with the same state; memory is shared until one of the two changes."""
        self._settle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _waiting=Waiting(self.dim))
        self._shared = twin._shared = True
        return twin

    def _become(self, other: Moments) -> None:
        other._settle()
        self._waiting.clear(free=True)
        self._seen, self._mean, self._scatter = other._seen, other._mean, other._scatter
        self._residue = other._residue
        self.site = self.site or other.site
        self._shared = other._shared = True

    def _own_scatter(self) -> Tensor:
        """The scatter matrix, allocated and not shared with a copy, so that it may be written."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        elif self._shared:
            self._scatter = self._scatter.clone()
        self._shared = False
        return self._scatter

    @lasting
    def _hold(self, rows: Tensor) -> None:
        """Let a few rows wait."""
        if not self._waiting.fits(rows):
            self._settle(free=False)
        self._waiting.put(rows)

    def _settle(self, free: bool = True) -> None:
        """Work off the rows that wait, and with `free` give back their memory."""
        if self._waiting.count:
            self._work_off(free)

    @lasting
    def _work_off(self, free: bool) -> None:
        with _SETTLING:
            if self._waiting.count:  # or another thread was faster
                _merge([self], self._waiting.rows)
                self._waiting.clear(free)

    def _check_partner(self, other: object) -> None:
        if not isinstance(other, Moments):
            raise InputError(f"other: got {type(other).__name__}, expected Moments")
        if other.dim != self.dim:
            raise InputError(f"other: got dim {other.dim}, expected {self.dim}")

    # ---- what is read off ----

    def covariance(self, ddof: int = 1) -> Tensor:
        """scatter / (count - ddof), (d, d) float64.

        Raises:
            InputError: count <= ddof, or ddof is not an integer >= 0.
        """
        if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof < 0:
            raise InputError(f"ddof: got {ddof!r}, expected an integer >= 0")
        if self.count <= ddof:
            raise InputError(f"ddof: a covariance with ddof={ddof} needs more than {ddof} rows, got {self.count}")
        return self.scatter / (self.count - ddof)

    def second_moment(self, about: Tensor) -> Tensor:
        """mean of (z - about)(z - about)^T = scatter / count + (mean - about)(mean - about)^T, (d, d) float64.

        Raises:
            InputError: no rows yet, or `about` is not a (d,) tensor.
        """
        if self.count == 0:
            raise InputError("second_moment: these moments hold no rows")
        if not isinstance(about, Tensor) or about.shape != (self.dim,):
            got = f"shape {tuple(about.shape)}" if isinstance(about, Tensor) else type(about).__name__
            raise InputError(f"about: got {got}, expected a tensor of shape ({self.dim},)")
        offset = self.mean - about.to(self.mean)
        return (self.scatter / self.count).add_(square(offset))

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        header = {"count": str(self.count), "residue": repr(self._residue), "site": self.site or ""}
        files.write_tensors(path, "moments", {"mean": self.mean, "scatter": pack(self.scatter)}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Moments:
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is missing, truncated, foreign or inconsistent.
        """
        tensors, header = files.read_tensors(path, "moments", ("mean", "scatter"))
        return restore(path, int_header(path, header, "count"), tensors["mean"], tensors["scatter"], header, device)


# ---- shared with GroupedMoments ----


def as_rows(x: Tensor, dim: int, device: torch.device) -> Tensor:
    """x as (n, d) on `device`; refuses what is not a float tensor of that width."""
    if not isinstance(x, Tensor):
        raise InputError(f"x: got {type(x).__name__}, expected a torch.Tensor of shape (..., {dim})")
    if x.dtype not in FLOATS:
        raise InputError(f"x: got dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if x.ndim < 2 or x.shape[-1] != dim:
        raise InputError(f"x: got shape {tuple(x.shape)}, expected (n, {dim}) or (..., {dim})")
    return x.detach().reshape(-1, dim).to(device)


@lasting
def accumulate(parts: list[Moments], rows: Tensor, group: Tensor | None = None) -> None:
    """Add row i of `rows` (n, d) to parts[group[i]], or all rows to parts[0]; every part must be distinct.

    Whether the rows of a part wait is a matter of how many they are: what other parts get has no influence on its bits.
    """
    if not len(rows):
        return
    counts = [len(rows)] if group is None else torch.bincount(group, minlength=len(parts)).tolist()
    few = [part._waiting.few(n) for part, n in zip(parts, counts, strict=True)]
    if not any(few):
        return _add(parts, rows, group)
    _check_values(rows)
    backends.choose("moments_update", rows.device, rows.dtype)  # refuse now what could not be worked off later
    if group is None:
        return parts[0]._hold(rows)
    pieces = rows[group.argsort(stable=True)].split(counts)
    large = [g for g, wait in enumerate(few) if not wait]
    if large:
        sizes = torch.tensor([counts[g] for g in large], device=rows.device)
        index = torch.arange(len(large), device=rows.device).repeat_interleave(sizes)
        _add([parts[g] for g in large], torch.cat([pieces[g] for g in large]), index)
    for part, piece, wait in zip(parts, pieces, few, strict=True):
        if wait:
            part._hold(piece)


def _add(parts: list[Moments], rows: Tensor, group: Tensor | None) -> None:
    """Check rows and merge them, at the price of one pass over them where there are many."""
    for part in parts:
        part._settle()
    if all(part._seen == 0 for part in parts):  # nothing can be lost: merge first, check what came of it
        _merge(parts, rows, group, check=True)
    elif len(rows) > _MANY * rows.shape[1] * len(parts):
        fresh = [Moments(part.dim, part.device) for part in parts]
        _merge(fresh, rows, group, check=True)
        for part, more in zip(parts, fresh, strict=True):
            part._become(pool([part, more]))
    else:
        _check_values(rows)
        _merge(parts, rows, group)


def _merge(parts: list[Moments], rows: Tensor, group: Tensor | None = None, check: bool = False) -> None:
    """Merge rows into the states. With `check`, of which states that are empty are left so where the rows are bad."""
    count = torch.tensor([part._seen for part in parts], device=rows.device)
    mean = torch.stack([part._mean for part in parts])
    scatter = [part._own_scatter() for part in parts]
    ops.moments_update(rows, count, mean, scatter, group)
    if check:
        # No row is further from the mean than the square root of the scatter; NaN and Inf show in the mean.
        deviation = torch.stack([matrix.diagonal() for matrix in scatter]).clamp_min(0).sqrt()
        if not float((mean.abs() + 1.001 * deviation).max()) <= _limit(rows):
            try:
                _check_values(rows)
            except InputError:
                for part in parts:
                    part._scatter = None
                raise
    for part, total, center in zip(parts, count.tolist(), mean, strict=True):
        part._seen, part._mean = total, center.clone()


def _limit(rows: Tensor) -> float:
    return _LARGEST_DOUBLE if rows.dtype == torch.float64 else _LARGEST_FLOAT


def _check_values(rows: Tensor) -> None:
    """Refuse rows with NaN or Inf, and rows whose squares could overflow."""
    largest = max(abs(float(bound)) for bound in torch.aminmax(rows))
    limit = _limit(rows)
    if largest <= limit:
        return
    bad = int((~torch.isfinite(rows)).any(1).sum())
    if bad:
        raise InputError(f"x: {bad} of {len(rows)} rows contain NaN or Inf, expected finite features")
    raise InputError(f"x: got features up to {largest:.1e}, expected at most {limit:.0e}, or their squares overflow")


@lasting
def pool(parts: list[Moments]) -> Moments:
    """Moments of the union of disjoint parts, summed in the order given (Chan, Golub, LeVeque)."""
    result = Moments(parts[0].dim, parts[0].device)
    result.site = parts[0].site
    parts = [part for part in parts if part.count]
    if not parts:
        return result
    if len(parts) == 1:
        result._become(parts[0])
        return result
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=result.device)
    means = torch.stack([part.mean.to(result.device) for part in parts])
    result._seen = sum(part.count for part in parts)
    result._residue = sum(part._residue for part in parts)
    # Offsets from the first mean, not from zero: a mean of 1e6 times the spread keeps its digits.
    offsets = means - means[0]
    drift = (counts @ offsets) / result._seen
    result._mean = means[0] + drift
    spread = (offsets - drift) * counts.sqrt().unsqueeze(1)
    scatter = spread.T @ spread
    ops.symmetric_sum(scatter, [part.scatter.to(result.device) for part in parts])
    result._scatter = scatter
    return result


@lasting
def subtract(whole: Moments, part: Moments, name: str) -> Moments:
    """Moments of the rows of `whole` without those of `part`, which came in the caller's argument `name`."""
    left = whole.count - part.count
    if left < 0:
        raise InputError(f"{name}: cannot remove {part.count} rows from moments of {whole.count}")
    result = Moments(whole.dim, whole.device)
    result.site = whole.site
    theirs = part.mean.to(whole.device)
    if left:
        mean = whole.mean + (whole.mean - theirs) * (part.count / left)
        step = (theirs - mean) * (left * part.count / whole.count) ** 0.5
    else:
        mean = whole.mean
        step = (theirs - mean) * part.count**0.5
    scatter = whole.scatter - part.scatter.to(whole.device) - square(step)
    before = whole.scatter.diagonal() + whole.count * (whole.mean - mean).square()
    mean_error = _MEAN_ERROR * whole.mean.abs() * (whole.count / max(left, 1))
    slack = _VARIANCE_ERROR * before + max(left, 1) * mean_error.square()
    slack = slack.clamp(min=max(whole._residue, part._residue))
    rest = scatter.diagonal()
    if bool((rest < -slack).any()) or (left < 2 and bool((rest > slack).any())):  # one row alone has no variance
        raise InputError(f"{name}: these rows were never added (the variance of the rest is impossible)")
    if left:
        result._seen, result._mean, result._scatter, result._residue = left, mean, scatter, float(slack.max())
    return result


def pack(scatter: Tensor) -> Tensor:
    """The upper triangle, row by row, of (d, d) as (d(d+1)/2,): half the bytes of a symmetric matrix."""
    d = scatter.shape[-1]
    return scatter[torch.ones(d, d, dtype=torch.bool, device=scatter.device).triu()]


def unpack(packed: Tensor, d: int) -> Tensor:
    """The inverse of `pack`."""
    full = torch.zeros(d, d, dtype=packed.dtype, device=packed.device)
    upper = torch.ones(d, d, dtype=torch.bool, device=packed.device).triu()
    full[upper] = packed
    return full + full.triu(1).T


def int_header(path: str | os.PathLike[str], header: dict[str, str], name: str) -> int:
    """The whole number that the header of the file at `path` has under `name`."""
    try:
        return int(header[name])
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"path: {str(path)!r} has no valid {name!r} in its header") from error


@lasting
def restore(
    path: str | os.PathLike[str],
    count: int,
    mean: Tensor,
    packed: Tensor,
    header: dict[str, str],
    device: torch.device | str | None,
) -> Moments:
    """A Moments from what a file holds, or FileFormatError if the pieces contradict each other."""
    d = len(mean) if mean.ndim == 1 else 0
    fits = d >= 1 and packed.shape == (d * (d + 1) // 2,) and mean.dtype == packed.dtype == torch.float64
    fits = fits and bool(torch.isfinite(mean).all() and torch.isfinite(packed).all())
    try:
        residue = float(header.get("residue", "0"))
    except ValueError:
        residue = -1.0
    fits = fits and 0 <= residue < float("inf") and 0 <= count < 2**63
    if not fits or (count == 0 and bool(mean.any() or packed.any())):
        raise FileFormatError(f"path: {str(path)!r} holds moments that contradict themselves")
    result = Moments(d, device)
    result._seen = count
    result._mean = mean.to(result.device, copy=True)  # what was read under inference mode may not be used outside
    result._scatter = unpack(packed.to(result.device), d)
    result._residue = residue
    result.site = header.get("site") or None
    return result
