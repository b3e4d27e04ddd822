"""A request: what the store is to hold once it is answered, and the entry that says so."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from loft_fast.continual import solve_next
from loft_fast.errors import InputError
from loft_fast.fingerprint import fingerprint
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.projection import Projection
from loft_fast.sites import find_site
from loft_fast.store.contents import Contents, check_sizes
from loft_fast.store.keys import pseudonym
from loft_fast.store.ledger import Entry, now
from loft_fast.unlearn import predicting_head

Measure = Callable[[Projection], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """To go from what is retained to `retain`, which is without `part`; the rest is as in `Entry` and `forget`."""

    action: str
    id: str | None
    subjects: list[str]
    retain: GroupedMoments
    part: GroupedMoments
    model: nn.Module | None
    measure: Measure | None
    options: dict[str, Any]

    def contents(self, old: Contents, about: dict[str, str]) -> Contents:
        """What takes the place of `old` in a store that says this of itself."""
        least, site, keep = int(about["min_rows"]), about["site"] or None, about["keep_forgotten"] == "True"
        retain = self.retain.select([key for key in self.retain if self.retain[key].count])
        check_sizes(retain, least)
        options, head = self.options, None
        if self.model is not None:
            wanted, got = about["fingerprint"], fingerprint(self.model, site, keep)
            if wanted and got != wanted:
                wanted, got = wanted[:16], got[:16]
                raise InputError(f"model: its fingerprint is {got}..., expected {wanted}..., that of the store's")
            head = predicting_head(self.model, find_site(self.model, site), retain, self.part)
        if options.get("head") is None and options.get("rank") is None:
            options = {**options, "head": head}
        forgotten = old.forgotten + self.part if keep else None
        if forgotten is not None:
            check_sizes(forgotten, least, "forgotten rows")
        projection = solve_next(old.projection, retain, self.part, forgotten, **options)
        projection.site = site
        return Contents(retain, old.forgotten if forgotten is None else forgotten, projection)

    def entry(self, old: Contents, new: Contents, last: Entry, key: bytes) -> Entry:
        """That `new` took the place of `old`, to follow on the `last` one of the ledger."""
        assert new.projection is not None
        assert new.projection.certificate is not None
        options = {name: value for name, value in self.options.items() if isinstance(value, int | float | str)}
        entry = Entry(
            number=last.number + 1,
            id=self.id or secrets.token_hex(16),
            time=now(),
            action=self.action,
            subjects=self.subjects,
            count=self.part.count,
            before=last.after,
            after=new.retain.digest(),
            projection=new.projection.digest(),
            certificate=asdict(new.projection.certificate),
            details={
                "options": options,
                "measured": {} if self.measure is None else self.measure(copy.deepcopy(new.projection)),
                "emptied": [pseudonym(key, name) for name in old.retain if name not in new.retain],
            },
        )
        try:
            return entry.sealed(last.hash)
        except (TypeError, ValueError) as error:
            raise InputError(f"measure: it returned what JSON cannot write: {error}") from error
