"""The ledger: who was forgotten when, as a chain of entries in SQLite, each of which vouches for all before it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from loft_fast.errors import InputError, StoreError
from loft_fast.store.lock import PATIENCE
from loft_fast.store.sums import PAGE

SCHEMA = 1
LEDGER = "ledger.sqlite"
# What is deleted is overwritten; what is committed is on the disk; the log is moved to the database by `checkpoint`.
_PRAGMAS = (
    f"page_size={PAGE}",
    "secure_delete=ON",
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=0",
    "cell_size_check=ON",
)
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (subject TEXT, kept INTEGER, digest TEXT NOT NULL, PRIMARY KEY (subject, kept)) WITHOUT ROWID;
CREATE TABLE gone (subject TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (subject TEXT PRIMARY KEY, owner TEXT NOT NULL, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX owners ON rows (owner);
CREATE TABLE entries (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, entry TEXT NOT NULL);
"""

Place = tuple[str, bool]
"""Where moments belong: the pseudonym of their group, and whether their rows are retained."""


@dataclass(frozen=True)
class Entry:
    """One request, as the ledger has it.

    Attributes:
        number: 0 for the creation of the store, then 1, 2, ...
        id: the request's, unique in the ledger.
        time: when it was done, UTC, ISO 8601.
        action: "create", "groups" or "rows".
        subjects: what was forgotten, each as a keyed HMAC-SHA-256: of a group's key, or of a row with its group.
        count: rows forgotten (of the creation: rows there are).
        before, after: `GroupedMoments.digest` of what was retained, before and after.
        projection: `Projection.digest`; empty for the creation.
        certificate: of the projection.
        details: what was asked for, and whatever the caller wanted to be remembered, such as accuracies.
        previous: hash of the entry before; empty for the first.
        hash: SHA-256 of all the above.
    """

    number: int
    id: str
    time: str
    action: str
    subjects: list[str]
    count: int
    before: str
    after: str
    projection: str = ""
    certificate: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    previous: str = ""
    hash: str = ""

    def sealed(self, previous: str) -> Entry:
        """The entry as the next one of a chain."""
        fields = {**vars(self), "previous": previous, "hash": ""}
        return Entry(**{**fields, "hash": hashlib.sha256(canonical(fields)).hexdigest()})


def canonical(value: Any) -> bytes:
    """The one way to write `value` as JSON that is hashed and signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def now() -> str:
    """The time, as entries have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Ledger:
    """Entries, and the tables of what there is that change along with them."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(f"path: {str(path.parent)!r} holds no store")
        with self._translated():
            self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            for pragma in _PRAGMAS:
                self._connection.execute(f"PRAGMA {pragma}")
            if create:
                self._connection.executescript(_TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    # ---- reading ----

    def about(self) -> dict[str, str]:
        """What the store says of itself."""
        return dict(self._all("SELECT name, value FROM about"))

    def groups(self) -> dict[Place, str]:
        """(Subject, whether these rows are retained) -> digest of their moments."""
        found = self._all("SELECT subject, kept, digest FROM groups")
        return {(subject, bool(kept)): digest for subject, kept, digest in found}

    def gone(self, subject: str) -> int | None:
        """The number of the request that forgot this group."""
        found = self._all("SELECT number FROM gone WHERE subject = ?", subject)
        return found[0][0] if found else None

    def all_gone(self) -> dict[str, int]:
        """The same for all groups that went."""
        return dict(self._all("SELECT subject, number FROM gone"))

    def indexed(self) -> int:
        """Rows in the index."""
        return int(self._all("SELECT coalesce(sum(count), 0) FROM rows")[0][0])

    def owned(self) -> dict[str, int]:
        """The same for each group that has any."""
        return dict(self._all("SELECT owner, sum(count) FROM rows GROUP BY owner"))

    def rows(self, subject: str) -> int:
        """How many rows of the index are this one."""
        found = self._all("SELECT count FROM rows WHERE subject = ?", subject)
        return found[0][0] if found else 0

    def last(self) -> Entry:
        """The latest entry."""
        return self._one("SELECT entry FROM entries ORDER BY number DESC LIMIT 1")

    def number(self, number: int) -> Entry:
        """The entry of this number."""
        return self._one("SELECT entry FROM entries WHERE number = ?", number)

    def find(self, request: str) -> Entry | None:
        """The entry of a request, by its id."""
        found = self._all("SELECT entry FROM entries WHERE id = ?", request) if _is_text(request) else []
        return _parse(found[0][0]) if found else None

    def answered(self, id: str | None, action: str, subjects: list[str]) -> Entry | None:
        """The entry of an earlier request of this id, if it was the same."""
        if id is None:
            return None
        if not _is_text(id) or not 1 <= len(id) <= 200:
            raise InputError(f"id: got {id!r}, expected a text of 1 to 200 letters")
        entry = self.find(id)
        if entry is not None and (entry.action, sorted(entry.subjects)) != (action, sorted(subjects)):
            raise InputError(f"id: {id!r} was another request, number {entry.number} in the ledger")
        return entry

    def entries(self) -> Iterator[Entry]:
        """All of them in order, each checked against the one before, a few at a time.

        Raises:
            StoreError: where the chain is broken.
        """
        previous, number = "", 0
        while True:
            found = self._all(
                "SELECT number, id, entry FROM entries WHERE number >= ? ORDER BY number LIMIT 500", number
            )
            if not found:
                return
            for place, request, text in found:
                entry = _parse(text)
                if (place, request) != (entry.number, entry.id) or place != number or entry.previous != previous:
                    raise StoreError(f"ledger: entry {place} does not follow on entry {number - 1}")
                previous, number = entry.hash, number + 1
                yield entry

    def check(self, about: dict[str, str], progress: bool) -> Entry:
        """The last entry; raises StoreError unless entries, tables and what the store said of itself fit together."""
        found = self._all("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise StoreError(f"ledger: damaged: {found[0][0]}")
        if self.about() != about:
            raise StoreError("ledger: what the store says of itself has changed")
        gone: dict[str, int] = {}
        entry, count = None, self.last().number + 1
        for entry in tqdm(self.entries(), "ledger", count, unit="entry", disable=not progress, leave=False):
            if entry.action == "create" and entry.details != about:
                raise StoreError("ledger: what the store says of itself is not what it was created with")
            gone |= {subject: entry.number for subject in _emptied(entry) if subject not in gone}
        if gone != self.all_gone():
            raise StoreError("ledger: its list of forgotten groups is not what its entries say")
        assert entry is not None
        return entry

    # ---- writing ----

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing of what is executed inside."""
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def checkpoint(self) -> bool:
        """Move everything from the write-ahead log to the database and empty it: nothing that was deleted is left.

        Returns False where a reader is in the way; the next call will do it.
        """
        return not self._all("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]

    def _one(self, query: str, *values: Any) -> Entry:
        found = self._all(query, *values)
        if not found:
            raise StoreError("ledger: it has no entries")
        return _parse(found[0][0])

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._translated():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreError(f"ledger: {str(self.path)!r}: {error}") from error


def append(connection: sqlite3.Connection, entry: Entry) -> None:
    """Add a sealed entry inside a transaction."""
    values = (entry.number, entry.id, canonical(vars(entry)).decode())
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", values)


def record(connection: sqlite3.Connection, entry: Entry, before: dict[Place, str], after: dict[Place, str]) -> None:
    """Inside a transaction, add a sealed entry, and change what `Ledger.groups` gives, what is gone, and the index."""
    emptied = [(subject,) for subject in _emptied(entry)]
    dropped = [(subject, int(kept)) for subject, kept in before.keys() - after.keys()]
    new = [(*place, digest) for place, digest in after.items() if before.get(place) != digest]
    connection.executemany("DELETE FROM groups WHERE subject = ? AND kept = ?", dropped)
    connection.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?)", new)
    connection.executemany("INSERT INTO gone VALUES (?, ?)", [(*subject, entry.number) for subject in emptied])
    if entry.action == "rows":
        rows = [(subject,) for subject in entry.subjects]
        connection.executemany("UPDATE rows SET count = count - 1 WHERE subject = ?", rows)
        connection.executemany("DELETE FROM rows WHERE subject = ? AND count <= 0", rows)
    connection.executemany("DELETE FROM rows WHERE owner = ?", emptied)
    append(connection, entry)


def _emptied(entry: Entry) -> list[str]:
    """The groups that a request left without rows."""
    return list(entry.details.get("emptied", []))


def _is_text(id: object) -> bool:
    """Whether it is a text without halves of letters, which no database takes."""
    return isinstance(id, str) and not any("\ud800" <= letter <= "\udfff" for letter in id)


def _parse(text: str) -> Entry:
    try:
        entry = Entry(**json.loads(text))
        intact = entry == entry.sealed(entry.previous) and text == canonical(vars(entry)).decode()
    except (TypeError, ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise StoreError(f"ledger: an entry is damaged: {text[:100]!r}")
    return entry
