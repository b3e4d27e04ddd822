"""What clients have contributed: by round, how it adds up, and what is left of it once some is forgotten."""

from __future__ import annotations

from collections.abc import Iterable

from loft_fast.errors import InputError
from loft_fast.federated.answers import RefusedError
from loft_fast.federated.archive import Archive
from loft_fast.federated.keys import by_key, from_keys
from loft_fast.float_state import FloatState
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments


class Contributions:
    """Moments of many clients in an archive: of each, or only their sum.

    A change is a transaction of its own; but to drop something is part of one that also says why.

    Args:
        archive: where they are.
        blank: of no rows, of the kind that clients send; its site, if any, is where features have to come from.
        keep: "clients" or "sum".
    """

    def __init__(self, archive: Archive, blank: Moments | GroupedMoments, keep: str) -> None:
        self.archive, self.blank, self.keep = archive, blank, keep

    @property
    def clients(self) -> list[str]:
        """Clients that count, by name."""
        return list(self.archive.members(self.archive.round))

    def site(self, round: int) -> str | None:
        """Where features have to come from in a round, as far as anyone has said so."""
        return self.blank.site or self.archive.site(round)

    def pooled(self, clients: Iterable[str] | None = None) -> Moments | GroupedMoments:
        """Moments of the rows of all clients that count, or of some of these."""
        round = self.archive.round
        parts: dict[str, Moments] = {}
        if clients is None and self.blank.exact is not None:
            parts = self.archive.total(round)
        else:
            for _, key, moments in self.archive.parts(round, clients):
                parts[key] = parts[key] + moments if key in parts else moments
        pooled = from_keys(parts, self.blank)
        pooled.site = self.site(round)
        return pooled

    # ---- rounds ----

    def open_round(self, refresh: bool) -> int:
        """The number of the round that goes on, or of a new one."""
        archive = self.archive
        number = archive.round + 1
        if refresh and archive.get("open") is not None and archive.get("refresh") is None:
            self.abandon_round()
        if archive.get("open") is None:
            with archive.change():
                archive.put("open", "1")
                if refresh:
                    archive.put("refresh", "1")
                else:
                    archive.inherit(number, archive.round)
                archive.write(number, "opened", "all are asked anew" if refresh else "those who are not in are asked")
        return number

    def close_round(self, number: int) -> None:
        """From now on, those who are in this round are those who count."""
        archive = self.archive
        with archive.change():
            archive.put("round", str(number))
            archive.put("open", None)
            archive.put("refresh", None)
            archive.drop_rounds(number)
            archive.write(number, "closed", f"{len(archive.members(number))} clients")

    def abandon_round(self) -> None:
        """Delete what was accepted in a round that is not complete, if there is one."""
        archive = self.archive
        if archive.get("open") is None:
            return
        with archive.change():
            archive.drop_rounds(archive.round)
            archive.put("open", None)
            archive.put("refresh", None)
            archive.write(archive.round + 1, "abandoned", "what was accepted in it is deleted")

    def still(self, moments: Moments | GroupedMoments) -> dict[str, Moments]:
        """What there is of groups that were not forgotten."""
        gone = self.archive.gone("group")
        return {key: part for key, part in by_key(moments).items() if key not in gone}

    def accept(self, round: int, client: str, node: str, digest: str, moments: Moments | GroupedMoments) -> None:
        """Add what a client sent; refuses more than the sums can hold."""
        archive, parts = self.archive, self.still(moments)
        sums = self._sums(round, moments.count, parts)
        kept = {key: part.to_bytes() for key, part in parts.items()} if self.keep == "clients" else {}
        with archive.change():
            archive.add_member(round, client, node, digest, moments, kept)
            for key, total in sums.items():
                archive.set_total(round, key, total)
            archive.write(round, "accepted", f"{moments.count} rows, SHA-256 {digest}", client, node)

    def _sums(self, round: int, count: int, parts: dict[str, Moments]) -> dict[str, Moments]:
        """What the kept sums become with these of a client, of so many rows; refuses more than they can hold."""
        if self.blank.exact is None:
            rows = self.archive.count(round) + count
            if rows > FloatState.most_rows:
                raise RefusedError(f"with it there would be {rows} rows, expected at most {FloatState.most_rows}")
            return {}
        total = self.archive.total(round, parts)
        try:
            return {key: total[key] + part if key in total else part for key, part in parts.items()}
        except InputError as error:
            raise RefusedError(f"it cannot be added to the others: {error}") from error

    # ---- what is forgotten ----

    def rest(
        self, without: list[str], part: Moments | GroupedMoments, instead: Moments | GroupedMoments | None = None
    ) -> Moments | GroupedMoments:
        """What is left: by subtraction where that is exact, else summed again, as if the clients had never been."""
        if self.blank.exact is not None:
            return self.pooled() - part  # type: ignore[operator] # both are of one kind
        rest = self.pooled([client for client in self.clients if client not in without])
        return rest if instead is None else rest + instead  # type: ignore[operator]

    def drop_clients(self, clients: list[str], part: Moments | GroupedMoments) -> None:
        """Drop clients that contributed `part`."""
        self._subtract(part)
        self.archive.drop_members(self.archive.round, clients)
        self.archive.set_gone("client", clients)

    def drop_groups(self, part: GroupedMoments) -> None:
        """Drop the groups of `part` everywhere."""
        keys = list(by_key(part))
        for key in keys:
            self.archive.drop_key(key)
        self.archive.set_gone("group", keys)

    def drop_rows(
        self, client: str, part: Moments | GroupedMoments, own: Moments | GroupedMoments | None, count: int, digest: str
    ) -> None:
        """Drop `part` of a client, which sent so many rows: `own`, if that is kept, is left, and has this digest."""
        self._subtract(part)
        kept = {} if own is None else {key: own_part.to_bytes() for key, own_part in by_key(own).items()}
        self.archive.replace_parts(self.archive.round, client, kept, count, digest)

    def _subtract(self, forgotten: Moments | GroupedMoments) -> None:
        if self.blank.exact is not None:
            round, parts = self.archive.round, by_key(forgotten)
            total = self.archive.total(round, parts)
            for key, part in parts.items():
                self.archive.set_total(round, key, total[key] - part)
