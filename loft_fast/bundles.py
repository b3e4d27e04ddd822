"""Sums over many groups that are made again only where groups have changed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from loft_fast.moments import Moments, pool

Key = int | str

_FEW = 32  # groups up to which adding all of them up costs no more than bundling them


class Bundles:
    """Moments of bundles of groups, about as many bundles as a bundle has groups: k groups make about sqrt(k).

    Where one group goes, its bundle is added up again, and the bundles: 2 sqrt(k) matrices instead of k. Which bundle a
    group is in follows from its key and the number of groups, so sums have the same bits whatever was there before.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[Key], Moments]] = {}  # by number: the groups in a bundle, and their sum

    def among(self, keys: Iterable[Key]) -> Bundles:
        """The sums of these groups alone, to be changed by themselves; none that holds a group which is left out."""
        result, there = Bundles(), set(keys)
        result._known = {i: one for i, one in self._known.items() if there.issuperset(one[0])}
        return result

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget the sums that these groups, which change, are in."""
        changed = set(keys)
        self._known = {i: one for i, one in self._known.items() if changed.isdisjoint(one[0])}

    def total(self, empty: Moments, parts: Mapping[Key, Moments], keys: list[Key]) -> Moments:
        """Moments of all rows of `parts`, which `keys` lists in order; `empty`: of the same kind."""
        if len(keys) <= _FEW:
            self._known = {}
            return pool([empty, *(parts[key] for key in keys)], "total")
        many = 1 << (len(keys).bit_length() // 2)
        bundles: dict[int, list[Key]] = {i: [] for i in range(many)}
        for key in keys:
            bundles[_number(key) % many].append(key)
        sums = {}
        for i, inside in bundles.items():
            before, total = self._known.get(i, ([], empty))
            sums[i] = inside, total if inside == before else pool([empty, *(parts[key] for key in inside)], "total")
        self._known = sums
        return pool([empty, *(total for _, total in sums.values())], "total")


def _number(key: Key) -> int:
    return key if isinstance(key, int) else zlib.crc32(key.encode())
