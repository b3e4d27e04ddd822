"""Count, mean and scatter of a stream of rows, which merge and come apart again exactly as the sets of rows do."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from loft_fast import backends, files
from loft_fast.all_reduce import agree, sum_states
from loft_fast.backends import FLOATS
from loft_fast.collective import TIMEOUT, Peers
from loft_fast.errors import FileFormatError, InputError
from loft_fast.float_state import FloatState
from loft_fast.integer_state import IntegerState, check_exact
from loft_fast.ops.arguments import check_integer
from loft_fast.ops.reference import square
from loft_fast.state import State, lasting, pack, unpack
from loft_fast.waiting import Waiting

_MOST_FEATURES = 2**20  # that a file may claim: a state without rows costs memory, too, and its matrix none in a file
# Reading may finish an update, and two threads may read at once.
_SETTLING = threading.Lock()


class Moments:
    """Streaming count, mean and scatter of rows in R^dim.

    Updates of a few rows are collected, and worked off together once there are about d of them or when `mean` or
    `scatter` is needed: the result is that of one update with all of them.

    Exact moments hold features as 16-bit integers, and sums of them: their state is bit for bit the same for the same
    rows, whatever their order, batches, threads, workers and merges, and whichever other rows were added and removed
    in between. A step is at most `exact` / 16383; as with any rounding, variances grow by about a
    twelfth of its square. At most 2^32 rows.

    Args:
        dim: number of features d, at least 1.
        device: where the state lives; blocks are moved there. Default: the CPU.
        exact: None keeps the state in float64. A number keeps integers, for features up to this magnitude: larger ones
            are clipped and counted. True does so with twice the largest magnitude of the first update's rows; where
            workers are to be merged, give all of them the `exact` of one.

    Attributes:
        count: rows seen, n.
        mean: (d,) float64, sum z / n; zeros while n = 0.
        scatter: (d, d) float64, sum (z - mean)(z - mean)^T, exactly symmetric.
        exact: None, True before the first row, or the largest magnitude that is not clipped.
        clipped: feature values that were too large, and were clipped.
        site: where in a model the rows came from, if `fetch_moments` or a file said so.

    Raises:
        InputError: on any call with input of the wrong dimension or type, or with NaN or Inf; the state is unchanged.
    """

    @lasting
    def __init__(self, dim: int, device: torch.device | str | None = None, exact: float | bool | None = None) -> None:
        check_integer("dim", dim)
        self.dim = dim
        self._state: State = FloatState(dim, device) if exact is None else IntegerState(dim, device, check_exact(exact))
        self._waiting = Waiting(dim)
        self.site: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._state.device

    @property
    def count(self) -> int:
        """Rows seen, n."""
        return self._state.count + self._waiting.count

    @property
    def mean(self) -> Tensor:
        """(d,) float64, sum z / n; read only."""
        return self._settled().mean

    @property
    def scatter(self) -> Tensor:
        """(d, d) float64, sum (z - mean)(z - mean)^T, exactly symmetric; read only."""
        return self._settled().scatter

    @property
    def exact(self) -> float | bool | None:
        """None for float64; True before calibration; else the largest magnitude that is not clipped."""
        return self._state.exact

    @property
    def clipped(self) -> int:
        """Feature values that were too large for `exact`, and were clipped."""
        return self._settled().clipped

    def __repr__(self) -> str:
        exact = "" if self.exact is None else f", exact={self.exact}, clipped={self.clipped}"
        return f"Moments(dim={self.dim}, count={self.count}, device={str(self.device)!r}{exact})"

    # ---- the stream ----

    def update(self, x: Tensor) -> Moments:
        """Add rows. x: (n, d) or (..., d), any float dtype, n >= 0. Returns self."""
        rows = as_rows(x, self.dim, self.device)
        part = self if self.exact is not True else self._blank(rows)
        accumulate([part], rows)
        if part is not self:
            self._become(part)
        return self

    def remove(self, x: Tensor) -> Moments:
        """Take rows away that were added before. Returns self.

        The inverse of `update`: bit for bit where moments are exact, otherwise up to rounding.
        """
        self._become(subtract(self, self._blank().update(x), "x"))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add all rows behind `other`, in place. Returns self."""
        self._become(self + other)
        return self

    @lasting
    def all_reduce(self, group: ProcessGroup | None = None, timeout: float = TIMEOUT) -> Moments:
        """Become the moments of the rows of all processes, in all of them at once. Returns self.

        All processes call this together, with moments of one `dim` and one `exact`, with or without rows. Exact moments
        are then bit for bit those of one process that has seen all rows; others up to rounding. In every process they
        are the same. d(d+3)/2 + 2 numbers of 8 bytes are summed.

        Args:
            group: of torch.distributed (gloo or nccl); None: all processes.
            timeout: seconds to wait for the slowest process, in each of a few exchanges.

        Raises:
            DistributedError: a process has failed or is late; these moments are unchanged.
            InputError: torch.distributed is not initialised, or moments that cannot be summed; unchanged, too.
        """
        peers = Peers(group, timeout)
        return self._reduce(peers, agree(peers, self._introduction()))

    def _introduction(self) -> dict[str, Any]:
        return introduce("Moments", self, {None: self})

    def _reduce(self, peers: Peers, said: list[dict[str, Any]]) -> Moments:
        self._become(sum_moments(peers, self, {None: self}, said)[None])
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
        return self._with(self._settled().twin())

    def _with(self, state: State) -> Moments:
        """Moments from the same site, with another state."""
        new = object.__new__(type(self))
        new.dim, new.site = self.dim, self.site
        new._state, new._waiting = state, Waiting(self.dim)
        return new

    def _blank(self, first: Tensor | None = None) -> Moments:
        """Moments of no rows, of the same kind and from the same site, ready for rows like those of `first`."""
        return self._with(lasting(self._state.blank)(first))

    def _become(self, other: Moments) -> None:
        state = other._settled()
        self._waiting.clear(free=True)
        self._state = state.twin()
        self.site = self.site or other.site

    @lasting
    def _hold(self, rows: Tensor) -> None:
        """Let a few rows wait."""
        if not self._waiting.fits(rows):
            self._settled(free=False)
        self._waiting.put(rows)

    def _settled(self, free: bool = True) -> State:
        """The state, once rows that wait have been worked off; with `free`, their memory is given back."""
        if self._waiting.count:
            self._work_off(free)
        return self._state

    @lasting
    def _work_off(self, free: bool) -> None:
        with _SETTLING:
            if self._waiting.count:  # or another thread was faster
                self._state.add([self._state], self._waiting.rows, None)
                self._waiting.clear(free)

    def _check_partner(self, other: object) -> None:
        if not isinstance(other, Moments):
            raise InputError(f"other: got {type(other).__name__}, expected Moments")
        if other.dim != self.dim:
            raise InputError(f"other: got dim {other.dim}, expected {self.dim}")
        check_kind(self.exact, other.exact)

    # ---- what is read off ----

    def covariance(self, ddof: int = 1) -> Tensor:
        """scatter / (count - ddof), (d, d) float64.

        Raises:
            InputError: count <= ddof, or ddof is not an integer >= 0.
        """
        check_integer("ddof", ddof, 0)
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
        files.write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Moments:
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is missing, truncated, damaged, foreign or inconsistent.
        """
        return cls._read(path, device)

    def to_bytes(self) -> bytes:
        """What `save` writes, for a message or a database."""
        return files.to_bytes("moments", *describe([self], self))

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device | str | None = None) -> Moments:
        """Read what `to_bytes` made. Data that claim to be more than they are cost no memory.

        Raises:
            FileFormatError: the data are truncated, damaged, foreign or inconsistent.
        """
        return cls._read(files.bytes_of(data), device)

    @classmethod
    def _read(cls, source: str | os.PathLike[str] | bytes, device: torch.device | str | None) -> Moments:
        _, parts = restore(source, *files.read_tensors(source, "moments", tensor_names), device)
        if len(parts) != 1:
            raise contradiction(source)
        return parts[0]

    def digest(self) -> str:
        """SHA-256 of the state, in hexadecimal. Of exact moments: the same if and only if the rows are.

        That is, as integers, and up to what no sum and no products tell apart. Where they came from does not matter.
        """
        return self._settled().digest()


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
    for part, n in zip(parts, counts, strict=True):
        check_count("x", part.count + n, part)
    if not any(few):
        return _add(parts, rows, group)
    state = parts[0]._state
    state.check(rows)
    backends.choose(state.op, rows.device, rows.dtype)  # refuse now what could not be worked off later
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
    parts[0]._state.add([part._settled() for part in parts], rows, group)


def check_kind(mine: float | bool | None, theirs: float | bool | None) -> None:
    """Refuse an argument `other` whose moments are not kept as one's own are."""
    uncalibrated = mine is True or theirs is True
    if mine != theirs and not (uncalibrated and None not in (mine, theirs)):
        raise InputError(f"other: got moments with exact={theirs}, expected exact={mine}")


def check_count(name: str, count: int, part: Moments) -> None:
    """Refuse more rows than such moments can hold."""
    if count > part._state.most_rows:
        raise InputError(f"{name}: that would be {count} rows, expected at most {part._state.most_rows} in all")


@lasting
def pool(parts: list[Moments], name: str = "other") -> Moments:
    """Moments of the union of disjoint parts, where the first lives. Parts in float64 are summed in the order given."""
    check_count(name, sum(part.count for part in parts), parts[0])
    states = [state for state in (part._settled() for part in parts) if state.count]
    if states:
        return parts[0]._with(parts[0]._state.pooled(states))
    calibrated = next((part for part in parts if part.exact is not True), parts[0])
    return parts[0]._with(calibrated._state.to(parts[0].device).blank())


@lasting
def subtract(whole: Moments, part: Moments, name: str) -> Moments:
    """Moments of the rows of `whole` without those of `part`, which came in the caller's argument `name`."""
    if part.count > whole.count:
        raise InputError(f"{name}: cannot remove {part.count} rows from moments of {whole.count}")
    if not part.count:
        return whole.copy()
    return whole._with(whole._settled().minus(part._settled().to(whole.device), name))


def introduce(kind: str, blank: Moments, parts: Mapping[Any, Moments]) -> dict[str, Any]:
    """What `agree` wants to hear of moments of this kind."""
    counts = [part.count for part in parts.values()]
    return {
        "kind": kind,
        "dim": blank.dim,
        "exact": blank.exact,
        "site": blank.site,
        "keys": list(parts),
        "counts": counts,
    }


def sum_moments(
    peers: Peers, blank: Moments, parts: Mapping[Any, Moments], said: list[dict[str, Any]]
) -> dict[Any, Moments]:
    """Moments by key of the rows of all processes, in float64 or of the scale that one of them has."""
    exact = next((one["exact"] for one in said if one.get("exact", True) is not True), blank.exact)
    site = next((one["site"] for one in said if one.get("site")), None)
    like = Moments(blank.dim, blank.device, exact)
    like.site = site
    states = {key: part._settled() for key, part in parts.items()}
    return {key: like._with(state) for key, state in sum_states(peers, like._state, states, said).items()}


def tensor_names(header: dict[str, str]) -> tuple[str, ...]:
    """The tensors that a file with this header holds."""
    return ("count", "clipped", *_kind(header).names)


def _kind(header: dict[str, str]) -> type[State]:
    return IntegerState if "exact" in header else FloatState


def describe(parts: list[Moments], like: Moments) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file of these, which are all of the same kind and from the same site as `like`."""
    states = [part._settled() for part in parts]
    blank = like._state
    empty = blank.vector.new_zeros(0, blank.dim * (blank.dim + 1) // 2)
    tensors = {
        "count": torch.tensor([state.count for state in states], dtype=torch.int64),
        "clipped": torch.tensor([state.clipped for state in states], dtype=torch.int64),
        blank.names[0]: torch.stack([state.vector for state in states]) if states else empty[:, : blank.dim],
        blank.names[1]: torch.stack([pack(state.read_matrix()) for state in states]) if states else empty,
    }
    return tensors, {"dim": str(blank.dim), "site": like.site or "", **blank.header(states)}


@lasting
def restore(
    source: str | os.PathLike[str] | bytes,
    tensors: dict[str, Tensor],
    header: dict[str, str],
    device: torch.device | str | None,
) -> tuple[Moments, list[Moments]]:
    """Moments of no rows, and those that `describe` was given; FileFormatError where the pieces do not fit together."""
    count, clipped, vector, packed = tensors.values()
    kind = _kind(header)
    groups, d = vector.shape if vector.ndim == 2 else (0, 0)
    fits = header.get("dim") == str(d) and 1 <= d <= _MOST_FEATURES and packed.shape == (groups, d * (d + 1) // 2)
    fits = fits and count.shape == clipped.shape == (groups,)
    fits = fits and [one.dtype for one in tensors.values()] == 2 * [torch.int64] + 2 * [kind.dtype]
    if not fits:
        raise contradiction(source)
    try:
        blank = Moments(d, device)
        blank._state = kind.described(header, d, device)
        blank.site = header.get("site") or None
        parts = []
        for g in range(groups):
            state = kind.described(header, d, device)
            state.count, state.clipped = int(count[g]), int(clipped[g])
            # A copy: what was read under inference mode may not be used outside.
            state.vector = vector[g].to(state.device, copy=True)
            state.matrix = unpack(packed[g].to(state.device), d)
            if not state.consistent():
                raise contradiction(source)
            parts.append(blank._with(state))
    except (KeyError, ValueError) as error:
        raise contradiction(source) from error
    return blank, parts


def contradiction(source: str | os.PathLike[str] | bytes) -> FileFormatError:
    """What to raise for a file whose pieces do not fit together."""
    return FileFormatError(f"{files.name_of(source)} holds moments that contradict themselves")
