"""Rows that wait until there are enough of them: a few are not worth a pass over a state of d x d numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 256  # rows; more in one call are worth a pass of their own
_LEAST, _MOST = 256, 2048  # rows that may wait at a time: 2 d within these bounds, as much memory as the state


class Waiting:
    """A buffer of rows of one dtype.

    Attributes:
        count: rows waiting.
        room: rows that may wait.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.room = min(max(2 * dim, _LEAST), _MOST)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(count, d), those that wait, in the order they came; a view that the next `put` may write over."""
        assert self._rows is not None
        return self._rows[: self.count]

    def few(self, n: int) -> bool:
        """Whether n rows should wait. It depends on nothing else: equal streams end in equal bits."""
        return n <= min(_FEW, self.room // 2)

    def fits(self, rows: Tensor) -> bool:
        """Whether these can wait along with the others."""
        same = self._rows is None or self._rows.dtype == rows.dtype
        return self.count == 0 or (same and self.count + len(rows) <= self.room)

    def put(self, rows: Tensor) -> None:
        """Let these wait, which must fit."""
        if self._rows is None or self._rows.dtype != rows.dtype:
            self._rows = torch.empty(self.room, rows.shape[1], dtype=rows.dtype, device=rows.device)
        self._rows[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    def clear(self, free: bool) -> None:
        """Nobody waits any longer; with `free`, give back the memory as well."""
        self.count = 0
        if free:
            self._rows = None
