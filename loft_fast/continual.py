"""Forget requests one after another, each of which ends where one request for all of them would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.grouped_moments import GroupedMoments, Key, plain_keys
from loft_fast.projection import Projection
from loft_fast.solver import solve


class Continual:
    """What is retained, what was forgotten so far, and the projection that both ask for.

    A projection depends on the moments alone. So the order of requests does not matter, and none needs old data: where
    whole groups go, and with exact moments whatever goes, the last projection is bit for bit that of a single request.
    It is for the original model, in the place of the one before.

    The moments of what was forgotten are kept: the next request needs them. README, "What it does not promise", says
    what they give away.

    Args:
        moments: of all rows, by group; left as they are.
        warm_start: begin every search for an optimal loss where the last one ended (`solve(start=...)`). Projections
            then agree within the tolerance of `solve`, not bit for bit.
        options: as for `solve`: rank, head, about, erase, ...

    Attributes:
        retain: moments of the rows that are left.
        forgotten: moments of those that are not.
        projection: the last one; None before the first request.
    """

    def __init__(self, moments: GroupedMoments, *, warm_start: bool = False, **options: Any) -> None:
        if not isinstance(moments, GroupedMoments):
            raise InputError(f"moments: got {type(moments).__name__}, expected GroupedMoments")
        self.retain = moments.select(moments.keys())
        self.forgotten = moments.select([])
        self.projection: Projection | None = None
        self._warm_start, self._options = warm_start, options

    def forget(self, keys: Iterable[Key]) -> Projection:
        """Forget whole groups. One that was forgotten before is none any more, and changes nothing.

        Raises:
            InputError: a key that never was a group, nothing to forget, or what `solve` refuses; nothing has changed.
        """
        wanted = plain_keys(keys)
        left = [key for key in wanted if key in self.retain or key not in self.forgotten]
        return self._move(self.retain.without(left), self.retain.select(left))

    def forget_rows(self, x: Tensor, group: Tensor | Sequence[Key]) -> Projection:
        """Forget rows, (n, d), each from its group.

        Raises:
            InputError: as for `GroupedMoments.remove`, or what `solve` refuses; nothing has changed.
        """
        return self.forget_moments(self.retain.select([]).update(x, group))

    def forget_moments(self, part: GroupedMoments) -> Projection:
        """Forget the rows behind `part`, such as a client's, each from its group. Groups that are gone are left out.

        Raises:
            InputError: as for `retain - part`, or what `solve` refuses; nothing has changed.
        """
        if isinstance(part, GroupedMoments):
            part = part.without([key for key in part if key not in self.retain and key in self.forgotten])
        return self._move(self.retain - part, part)

    def _move(self, retain: GroupedMoments, part: GroupedMoments) -> Projection:
        if not part.count and self.projection is not None:
            return self.projection
        forgotten = self.forgotten + part
        start = self.projection if self._warm_start else None
        projection = solve(retain, forgotten, start=start, **self._options)
        self.retain, self.forgotten, self.projection = retain, forgotten, projection
        return projection
