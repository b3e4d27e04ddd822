"""What a `Moments` keeps of the rows it has seen: a count, a vector and a symmetric matrix, of one of two kinds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from loft_fast.collective import Peers

_Function = TypeVar("_Function", bound=Callable[..., Any])
_State = TypeVar("_State", bound="State")


def lasting(function: _Function) -> _Function:
    """Run `function` without inference mode and autograd: its tensors may be changed and used anywhere later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class State(ABC):
    """Count, vector and matrix.

    Attributes:
        dim: number of features d.
        count: rows seen.
        clipped: numbers that were clipped.
        exact: None, or as the argument of `Moments`.
        vector: (d,), never written in place.
        matrix: (d, d), symmetric; None while it is zero, so that a group costs nothing until it has data.
    """

    dtype: ClassVar[torch.dtype]
    names: ClassVar[tuple[str, str]]
    """What a file calls the vector and the matrix."""
    op: ClassVar[str]
    """The operation behind `add`."""
    most_rows: ClassVar[int]

    def __init__(self, dim: int, device: torch.device | str | None) -> None:
        self.dim = dim
        self.count = self.clipped = 0
        self.vector = torch.zeros(dim, dtype=self.dtype, device=device)
        self.matrix: Tensor | None = None
        self._shared = False
        self._digest = "", 0

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.vector.device

    @property
    @abstractmethod
    def exact(self) -> float | bool | None:
        """None for float64; True before calibration; else the largest magnitude that is not clipped."""

    @abstractmethod
    def blank(self: _State, first: Tensor | None = None) -> _State:
        """The same kind of state, on the same device, of no rows, ready for rows such as `first`."""

    def twin(self: _State) -> _State:
        """The same state; the matrix is shared until one of the two changes."""
        new = object.__new__(type(self))
        self._shared = True
        new.__dict__.update(self.__dict__)
        return new

    def take(self: _State, other: _State) -> None:
        """Become what `other` is, which is not used any more."""
        self.__dict__.update(other.__dict__)

    def to(self: _State, device: torch.device) -> _State:
        """The same state on another device."""
        if device == self.device:
            return self
        new = self.twin()
        new.vector = self.vector.to(device)
        if self.matrix is not None:
            new.matrix, new._shared = self.matrix.to(device), False
        return new

    def own_matrix(self, zero: bool = True) -> Tensor:
        """The matrix, allocated and not shared, so that it may be written; without `zero`, a new one holds anything."""
        if self.matrix is None:
            self.matrix = self.vector.new_empty(self.dim, self.dim)
            if zero:
                self.matrix.zero_()
        elif self._shared:
            self.matrix = self.matrix.clone()
        self._shared = False
        return self.matrix

    def digest(self) -> str:
        """SHA-256 of all of it, in hexadecimal."""
        known, count = self._digest
        if not known or count != self.count:  # rows are added in place, and only ever added
            found = hashlib.sha256(f"{self.dim} {self.exact} {self.count} {self.clipped} ".encode())
            for tensor in (self.vector, pack(self.read_matrix())):
                found.update(tensor.cpu().numpy().data)
            self._digest = known, _ = found.hexdigest(), self.count
        return known

    def read_matrix(self) -> Tensor:
        """The matrix, not to be written."""
        return self.vector.new_zeros(self.dim, self.dim) if self.matrix is None else self.matrix

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """(d,) float64."""

    @property
    @abstractmethod
    def scatter(self) -> Tensor:
        """(d, d) float64, exactly symmetric."""

    @abstractmethod
    def check(self, rows: Tensor) -> None:
        """Refuse values that `add` would refuse, before they wait for it."""

    @staticmethod
    @abstractmethod
    def add(states: Sequence[Any], rows: Tensor, group: Tensor | None) -> None:
        """Add row i to states[group[i]], or all rows to states[0]; all or nothing."""

    @abstractmethod
    def pooled(self: _State, parts: Sequence[_State]) -> _State:
        """The state of the rows of all `parts`, which hold some each, on this one's device."""

    @abstractmethod
    def summed(self: _State, states: Sequence[_State], counts: Tensor, peers: Peers) -> list[_State]:
        """What `states` are over all processes, with counts (processes, len(states)), on this one's device."""

    @abstractmethod
    def minus(self: _State, part: _State, name: str) -> _State:
        """The state of the rows without those of `part`, from an argument `name`; refuses what cannot have been."""

    @abstractmethod
    def header(self: _State, states: Sequence[_State]) -> dict[str, str]:
        """What a file of such states has to say of them besides their tensors."""

    @classmethod
    @abstractmethod
    def described(cls: type[_State], header: dict[str, str], dim: int, device: torch.device | str | None) -> _State:
        """A state of no rows from such a header; ValueError or KeyError if that is not what it says."""

    @abstractmethod
    def consistent(self) -> bool:
        """Whether there can be rows with this state, as far as can be told in little time."""


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle, row by row, of (d, d) as (d(d+1)/2,): half the bytes of a symmetric matrix."""
    d = matrix.shape[-1]
    return matrix[torch.ones(d, d, dtype=torch.bool, device=matrix.device).triu()]


def unpack(packed: Tensor, d: int) -> Tensor:
    """The inverse of `pack`."""
    full = torch.zeros(d, d, dtype=packed.dtype, device=packed.device)
    upper = torch.ones(d, d, dtype=torch.bool, device=packed.device).triu()
    full[upper] = packed
    return full + full.triu(1).T
