"""Moments by the texts of their group keys, as a database keeps them, and back."""

from __future__ import annotations

import json

from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments

ALL = "null"  # the key of rows that are not grouped


def by_key(moments: Moments | GroupedMoments) -> dict[str, Moments]:
    """Moments by the text of their keys; of rows that are not grouped, one."""
    if isinstance(moments, Moments):
        return {ALL: moments}
    return {json.dumps(key): moments[key] for key in moments if moments[key].count}


def from_keys(parts: dict[str, Moments], blank: GroupedMoments | Moments) -> GroupedMoments | Moments:
    """The inverse; `blank` tells of what kind they are."""
    if isinstance(blank, Moments):
        return parts.get(ALL, blank)
    return GroupedMoments.of({json.loads(text): part for text, part in parts.items() if part.count}, blank.select([]))
