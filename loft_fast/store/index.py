"""The index of rows: with it, rows that were never in the data, or went before, can be refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.grouped_moments import GroupedMoments, Key, index_groups
from loft_fast.moments import as_rows
from loft_fast.ops.arguments import largest_magnitude
from loft_fast.ops.reference import LARGEST, quantize
from loft_fast.store.keys import pseudonym
from loft_fast.store.ledger import Ledger


def row_subjects(x: Tensor, group: Tensor | Sequence[Key], retain: GroupedMoments, key: bytes) -> list[tuple[str, str]]:
    """For each row a pseudonym of it, as integers, with its group, and one of the group."""
    rows = as_rows(x, retain.dim, retain.device)
    if len(rows):
        largest_magnitude(rows)
    names, index = index_groups(group, len(rows))
    owners = [pseudonym(key, name) for name in names]
    assert retain.exact is not None
    integers = quantize(rows, retain.exact / LARGEST)[0].short().cpu().numpy()
    return [
        (pseudonym(key, [names[i], integers[row].tobytes().hex()]), owners[i]) for row, i in enumerate(index.tolist())
    ]


def check_held(ledger: Ledger, subjects: list[str]) -> None:
    """Refuse to forget rows of these pseudonyms that the index does not hold."""
    wanted = Counter[str]()
    for i, subject in enumerate(subjects):
        wanted[subject] += 1
        if ledger.rows(subject) < wanted[subject]:
            raise InputError(f"x: row {i} is not in the data, or was forgotten before")


def check_room(ledger: Ledger, group: Tensor | Sequence[Key], n: int, retain: GroupedMoments, key: bytes) -> None:
    """Refuse to index n rows of these groups if that would be more of one than are retained."""
    names, index = index_groups(group, n)
    held = ledger.owned()
    for name, count in zip(names, index.bincount(minlength=len(names)).tolist(), strict=True):
        total = held.get(pseudonym(key, name), 0) + count
        most = retain[name].count if name in retain else 0
        if total > most:
            raise InputError(
                f"x: that would be {total} rows of group {name!r} in the index, expected at most {most}, as there "
                "are; where some were added twice, clear_index() and begin again"
            )
