"""Forget requests one after another, each of which ends where one request for all of them would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.grouped_moments import GroupedMoments, Key, plain_keys
from loft_fast.nested import solve_within
from loft_fast.projection import Projection
from loft_fast.solver import solve

_STANDS = (
    "one dimension cannot be narrowed: the last projection stands, whatever it keeps of these rows, "
    "and the numbers are those of the request that led to it"
)


class Continual:
    """What is retained, what was forgotten so far, and the projection that both ask for.

    A projection depends on nothing but the moments of the rows that are left and of those that are not. So the order of
    requests does not matter, and none needs old data: where whole groups go, and with exact moments whatever goes, the
    last projection is bit for bit that of a single request. It is for the original model, in the place of the one
    before.

    For that, the moments of what was forgotten have to be kept. Without them, each projection is the best one inside
    the last: what was forgotten stays so, but a little more is lost of the rest, the order matters, and a `rank` that
    was asked for shrinks by one with each request, down to 1: the last projection then stands, as its certificate says,
    and what the rows of a request have in its one dimension stays.

    Args:
        moments: of all rows, by group; left as they are.
        keep_forgotten: keep the moments of what was forgotten.
        warm_start: begin every search for an optimal loss where the last one ended (`solve(start=...)`). Projections
            then agree within the tolerance of `solve`, not bit for bit.
        options: as for `solve`: rank, head, about, erase, ...

    Attributes:
        retain: moments of the rows that are left.
        forgotten: moments of those that are not; of no rows if they are not kept.
        projection: the last one; None before the first request.
    """

    def __init__(
        self, moments: GroupedMoments, *, keep_forgotten: bool = True, warm_start: bool = False, **options: Any
    ) -> None:
        if not isinstance(moments, GroupedMoments):
            raise InputError(f"moments: got {type(moments).__name__}, expected GroupedMoments")
        self.retain = moments.select(moments.keys())
        self.forgotten = moments.select([])
        self.projection: Projection | None = None
        self._keys_gone: set[Key] = set()
        self._keep_forgotten, self._warm_start, self._options = keep_forgotten, warm_start, options

    def forget(self, keys: Iterable[Key]) -> Projection:
        """Forget whole groups. One that was forgotten before is none any more, and changes nothing.

        Raises:
            InputError: a key that never was a group, nothing to forget, or what `solve` refuses; nothing has changed.
        """
        wanted = plain_keys(keys)
        left = [key for key in wanted if key not in self._keys_gone]
        return self._move(self.retain.without(left), self.retain.select(left), left)

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
            part = part.without([key for key in part if key in self._keys_gone])
        return self._move(self.retain - part, part, [])

    def _move(self, retain: GroupedMoments, part: GroupedMoments, keys: list[Key]) -> Projection:
        if not part.count and self.projection is not None:
            return self.projection
        forgotten = self.forgotten + part if self._keep_forgotten else self.forgotten
        start = self.projection if self._warm_start else None
        self.projection = solve_next(
            self.projection, retain, part, forgotten if self._keep_forgotten else None, start=start, **self._options
        )
        self.retain, self.forgotten = retain, forgotten
        self._keys_gone.update(keys)
        return self.projection


def solve_next(
    last: Projection | None,
    retain: GroupedMoments,
    part: GroupedMoments,
    forgotten: GroupedMoments | None,
    **options: Any,
) -> Projection:
    """The projection after a request for `part`; `forgotten` is all that was asked for, `part` included, if known.

    Raises:
        InputError: nothing is asked for, nothing is left, or what `solve` refuses.
    """
    for name, rows in (("retain", retain), ("forget", part)):
        if not rows.count:  # `solve` says so, too, but is not always asked, and `forgotten` may hold more than `part`
            raise InputError(f"{name}: the set is empty, expected at least one row")
    if forgotten is not None or last is None:
        return solve(retain, part if forgotten is None else forgotten, **options)
    if last.rank == 1:  # there is nothing left to give up, and a request must not fail for that
        return _standing(last)
    if options.get("rank") is not None:
        options["rank"] = min(options["rank"], last.rank - 1)
    return solve_within(last, retain, part, **options)


def _standing(last: Projection) -> Projection:
    """The last projection, whose certificate says that this request did not change it."""
    known = last.certificate
    if known is not None:
        known = replace(known, why=_STANDS)
    return Projection(last.basis, last.center, known, last.site, lift=last.lift, check=False)
