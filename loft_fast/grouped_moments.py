"""One `Moments` per group (class, client, source) from one pass, so that forgetting a group is dropping its entry."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from loft_fast import files
from loft_fast.all_reduce import agree
from loft_fast.bundles import Bundles
from loft_fast.bundles import Key as Key
from loft_fast.collective import TIMEOUT, Peers
from loft_fast.errors import InputError
from loft_fast.moments import (
    Moments,
    accumulate,
    as_rows,
    check_kind,
    contradiction,
    describe,
    introduce,
    pool,
    restore,
    subtract,
    sum_moments,
    tensor_names,
)
from loft_fast.state import lasting


class GroupedMoments:
    """Streaming moments per group key.

    Keys are integers or strings. Keys that are class indices line up with the outputs of a classifier's head, which
    lets `solve` predict accuracies from moments alone.

    Args:
        dim: number of features d, at least 1.
        device: where the states live. Default: the CPU.
        exact: as for `Moments`; one scale for all groups.

    Raises:
        InputError: on any call with bad input; no group has changed then.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, exact: float | bool | None = None) -> None:
        self._empty = Moments(dim, device, exact)
        self._parts: dict[Key, Moments] = {}
        self._bundles = Bundles()

    @classmethod
    def of(cls, parts: Mapping[Key, Moments], like: GroupedMoments | None = None) -> GroupedMoments:
        """Groups from the moments of each; memory is shared until one of the two changes.

        Args:
            parts: by key, all of one `dim` and one `exact`.
            like: of the same kind; needed if there are no parts.
        """
        first = next(iter(parts.values()), None)
        if first is None and like is None:
            raise InputError("parts: got none, expected the moments of at least one group")
        empty = (like._empty if first is None and like is not None else first)._blank()  # type: ignore[union-attr]
        result = cls._made(empty, {})
        for key, part in zip(plain_keys(parts, "parts"), parts.values(), strict=True):
            if not isinstance(part, Moments) or part.dim != result.dim:
                raise InputError(f"parts: got {part!r} of group {key!r}, expected Moments of dim {result.dim}")
            check_kind(result.exact, part.exact)
            result._parts[key] = part.copy()
        return result

    @property
    def dim(self) -> int:
        """Number of features d."""
        return self._empty.dim

    @property
    def device(self) -> torch.device:
        """Where the states live."""
        return self._empty.device

    @property
    def site(self) -> str | None:
        """Where in a model the rows came from, if `fetch_moments` or a file said so."""
        return self._empty.site

    @site.setter
    def site(self, site: str | None) -> None:
        self._empty.site = site

    @property
    def count(self) -> int:
        """Rows over all groups."""
        return sum(part.count for part in self._parts.values())

    @property
    def exact(self) -> float | bool | None:
        """None for float64; True before calibration; else the largest magnitude that is not clipped."""
        return self._empty.exact

    @property
    def clipped(self) -> int:
        """Feature values that were too large for `exact`, and were clipped."""
        return sum(part.clipped for part in self._parts.values())

    def keys(self) -> list[Key]:
        """All keys, integers in order, then strings in order: the same whatever the order of the stream."""
        return sorted(self._parts, key=lambda key: (isinstance(key, str), key))

    def __getitem__(self, key: Key) -> Moments:
        part = self._parts[self._known([key])[0]].copy()
        part.site = self.site
        return part

    def __contains__(self, key: object) -> bool:
        return key in self._parts

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        exact = "" if self.exact is None else f", exact={self.exact}, clipped={self.clipped}"
        return f"GroupedMoments(dim={self.dim}, groups={len(self)}, count={self.count}{exact})"

    # ---- the stream ----

    def update(self, x: Tensor, group: Tensor | Sequence[Key]) -> GroupedMoments:
        """Add rows to their groups. x: (n, d) or (..., d), any float dtype; group: one key per row. Returns self."""
        rows = as_rows(x, self.dim, self.device)
        keys, index = index_groups(group, len(rows))
        if not len(rows):
            return self
        empty = self._empty._blank(rows)
        parts = [self._parts[key] if key in self._parts else empty.copy() for key in keys]
        accumulate(parts, rows, index.to(self.device))
        self._empty = empty
        self._parts.update(zip(keys, parts, strict=True))
        self._bundles.drop(keys)
        return self

    def remove(self, x: Tensor, group: Tensor | Sequence[Key]) -> GroupedMoments:
        """Take away rows that were added before, each from its group; as for `Moments`."""
        return self._become(self._minus(self._blank().update(x, group), "x", "group"))

    def merge(self, other: GroupedMoments) -> GroupedMoments:
        """Add all groups of `other`, key by key, in place. Returns self."""
        return self._become(self + other)

    @lasting
    def all_reduce(self, group: ProcessGroup | None = None, timeout: float = TIMEOUT) -> GroupedMoments:
        """Become the moments of the rows of all processes, group by group; as for `Moments`. Returns self.

        A process need not have all groups, nor any. About 64 MiB of them are summed at once.
        """
        peers = Peers(group, timeout)
        return self._reduce(peers, agree(peers, self._introduction()))

    def _introduction(self) -> dict[str, Any]:
        return introduce("GroupedMoments", self._empty, {key: self._parts[key] for key in self.keys()})

    def _reduce(self, peers: Peers, said: list[dict[str, Any]]) -> GroupedMoments:
        parts = sum_moments(peers, self._empty, self._parts, said)
        like = next(iter(parts.values()), self._empty)
        return self._become(self._made(like._blank(), parts))

    # ---- the algebra ----

    def __add__(self, other: GroupedMoments) -> GroupedMoments:
        self._check_partner(other)
        result = self.select(self.keys())
        if self.exact is True:
            result._empty = self._empty._with(other._empty._state)
        for key in other:
            result._parts[key] = pool(
                [result._parts.get(key, result._empty), other._parts[key]], f"other (group {key!r})"
            )
        result._bundles.drop(other)
        return result

    def __sub__(self, other: GroupedMoments) -> GroupedMoments:
        self._check_partner(other)
        return self._minus(other, "other", "other")

    def _minus(self, other: GroupedMoments, rows_name: str, keys_name: str) -> GroupedMoments:
        """self - other, for an `other` made from arguments of these names."""
        result = self.select(self.keys())
        for key in self._known(other.keys(), keys_name):
            result._parts[key] = subtract(result._parts[key], other._parts[key], f"{rows_name} (group {key!r})")
        result._bundles.drop(other)
        return result

    def _become(self, other: GroupedMoments) -> GroupedMoments:
        self._empty, self._parts, self._bundles = other._empty, other._parts, other._bundles
        return self

    def _blank(self) -> GroupedMoments:
        """No groups, of the same kind."""
        return self._made(self._empty.copy(), {})

    @classmethod
    def _made(cls, empty: Moments, parts: dict[Key, Moments]) -> GroupedMoments:
        result = object.__new__(cls)
        result._empty, result._parts, result._bundles = empty, parts, Bundles()
        return result

    # ---- groups in and out ----

    def select(self, keys: Iterable[Key]) -> GroupedMoments:
        """Only these groups; memory is shared with self until one of the two changes."""
        result = self._blank()
        result._parts = {key: self._parts[key].copy() for key in self._known(keys)}
        result._bundles = self._bundles.among(result._parts)
        return result

    def without(self, keys: Iterable[Key]) -> GroupedMoments:
        """All groups but these; memory is shared with self until one of the two changes."""
        dropped = set(self._known(keys))
        return self.select([key for key in self.keys() if key not in dropped])

    def total(self) -> Moments:
        """Moments of all rows. On the CPU bit for bit the same whether a group was never seen or forgotten.

        Where there are many groups, k, about sqrt(k) sums of some of them are kept: after a change, or in what
        `without` returns, only sums that it concerns are made again.
        """
        return self._bundles.total(self._empty, self._parts, self.keys())

    def forget(self, keys: Iterable[Key]) -> GroupedMoments:
        """Drop these groups for good. Returns self."""
        return self._become(self.without(keys))

    def join(self, others: Iterable[GroupedMoments]) -> GroupedMoments:
        """These groups and those of `others`.

        Raises:
            InputError: two have the same key, or are not of one kind.
        """
        result = self.select(self.keys())
        for other in others:
            self._check_partner(other)
            shared = next((key for key in other if key in result), None)
            if shared is not None:
                raise InputError(f"others: got the group {shared!r} twice, expected keys that differ")
            result._parts.update(other._parts)
        return result

    def map(self, function: Callable[[Moments], Moments]) -> GroupedMoments:
        """What `function` makes of every group, which must be of one kind; it is called with one of no rows as well."""
        return self._made(function(self._empty), {key: function(self[key]) for key in self.keys()})

    def _known(self, keys: Iterable[Key], name: str = "keys") -> list[Key]:
        """`keys` (the argument `name`) as plain numbers and strings, each of which is a group here."""
        plain = plain_keys(keys, name)
        unknown = [key for key in plain if key not in self._parts]
        if unknown:
            raise InputError(f"{name}: no group {unknown[0]!r}; there are {_preview(self.keys(), unknown[0])}")
        return plain

    def _check_partner(self, other: object) -> None:
        if not isinstance(other, GroupedMoments):
            raise InputError(f"other: got {type(other).__name__}, expected GroupedMoments")
        if other.dim != self.dim:
            raise InputError(f"other: got dim {other.dim}, expected {self.dim}")
        check_kind(self.exact, other.exact)

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        files.write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> GroupedMoments:
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is missing, truncated, damaged, foreign or inconsistent.
        """
        return cls._read(path, device)

    def to_bytes(self, **more: str) -> bytes:
        """What `save` writes, for a message or a database; with `more` in its header, but what is there already."""
        keys = self.keys()
        tensors, header = describe([self._parts[key] for key in keys], self._empty)
        return files.to_bytes("grouped_moments", tensors, {**more, "keys": json.dumps(keys), **header})

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device | str | None = None) -> GroupedMoments:
        """Read what `to_bytes` made, as for `Moments`."""
        return cls._read(files.bytes_of(data), device)

    @classmethod
    def _read(cls, source: str | os.PathLike[str] | bytes, device: torch.device | str | None) -> GroupedMoments:
        tensors, header = files.read_tensors(source, "grouped_moments", tensor_names)
        empty, parts = restore(source, tensors, header, device)
        try:
            keys = json.loads(header["keys"])
            fits = isinstance(keys, list) and all(type(key) in (int, str) for key in keys)
            fits = fits and len(set(keys)) == len(keys) == len(parts)
        except (KeyError, ValueError, RecursionError):  # the last from brackets without end
            fits = False
        if not fits:
            raise contradiction(source)
        return cls._made(empty, dict(zip(keys, parts, strict=True)))

    def digest(self) -> str:
        """SHA-256 of all groups and their keys, in hexadecimal; of exact moments the same if and only if the rows are.

        As for `Moments`; groups of no rows do not matter.
        """
        parts = [[key, self._parts[key].digest()] for key in self.keys() if self._parts[key].count]
        return hashlib.sha256(json.dumps([self.dim, self.exact, parts]).encode()).hexdigest()


def plain_keys(keys: Iterable[Key], name: str = "keys") -> list[Key]:
    """`keys` (the argument `name`) as plain numbers and strings."""
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise InputError(f"{name}: got {keys!r}, expected a list of keys")
    plain = [_plain(key) for key in keys]
    wrong = [key for key in plain if type(key) not in (int, str)]
    if wrong:
        raise InputError(f"{name}: got the key {wrong[0]!r}, expected integers or strings")
    return plain


def _preview(keys: list[Key], wanted: Key) -> str:
    """Some of the keys, names that look like the wanted one first."""
    names = [key for key in keys if isinstance(key, str)]
    near: list[Key] = [*difflib.get_close_matches(str(wanted), names, n=3)]
    shown = ", ".join(repr(key) for key in [*near, *(key for key in keys if key not in near)][:10])
    return (shown + (", ..." if len(keys) > 10 else "")) or "none"


def index_groups(group: Tensor | Sequence[Key], n: int) -> tuple[list[Key], Tensor]:
    """Distinct keys and, for each of n rows, the index of its key: (n,) int64."""
    if isinstance(group, Tensor):
        if group.is_floating_point() or group.is_complex():
            raise InputError(f"group: got dtype {group.dtype}, expected integer keys")
        flat = group.detach().reshape(-1)
        _check_length(len(flat), n)
        keys, index = _distinct(flat)
        return [int(key) for key in keys.tolist()], index
    if isinstance(group, str) or not isinstance(group, Iterable):
        raise InputError(f"group: got {type(group).__name__}, expected one key per row ({n})")
    listed = plain_keys(group, "group")
    _check_length(len(listed), n)
    position = {key: i for i, key in enumerate(dict.fromkeys(listed))}
    return list(position), torch.tensor([position[key] for key in listed], dtype=torch.int64)


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys in order, and for each of n keys where it stands among them: (n,) int64."""
    if len(keys) and keys.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        low, high = (int(bound) for bound in torch.aminmax(keys))
        if high - low < len(keys):  # class indices: marking them off costs less than sorting
            place = keys.long() - low
            there = torch.zeros(high - low + 1, dtype=torch.bool, device=keys.device)
            there[place] = True
            return there.nonzero().flatten() + low, (there.cumsum(0) - 1)[place]
    return torch.unique(keys, return_inverse=True)


def _plain(key: Any) -> Any:
    """The Python value of a NumPy or torch scalar; anything else as it is, for the caller to judge."""
    try:
        return key.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # no scalar, or more than one number
        return key


def _check_length(got: int, n: int) -> None:
    if got != n:
        raise InputError(f"group: got {got} keys for {n} rows, expected one per row")
