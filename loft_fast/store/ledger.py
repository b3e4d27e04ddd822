"""The ledger: who was forgotten when, as a chain of entries in SQLite, each of which vouches for all before it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loft_fast.errors import StoreError
from loft_fast.store.sums import PAGE

SCHEMA = 1
_BUSY = 60  # seconds to wait for another process
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


class Ledger:
    """Entries, and the tables of what there is that change along with them."""

    def __init__(self, path: Path, create: bool = False) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(f"path: {str(path.parent)!r} holds no store")
        with self._translated():
            self._connection = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
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

    def groups(self) -> dict[tuple[str, bool], str]:
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
        found = self._all("SELECT entry FROM entries WHERE id = ?", request)
        return _parse(found[0][0]) if found else None

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

    def check(self) -> None:
        """Raise StoreError if SQLite finds the file inconsistent."""
        found = self._all("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise StoreError(f"ledger: damaged: {found[0][0]}")

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


def set_groups(
    connection: sqlite3.Connection, before: dict[tuple[str, bool], str], after: dict[tuple[str, bool], str]
) -> None:
    """Change inside a transaction what `Ledger.groups` gives."""
    dropped = [(subject, int(kept)) for subject, kept in before.keys() - after.keys()]
    new = [(*place, digest) for place, digest in after.items() if before.get(place) != digest]
    connection.executemany("DELETE FROM groups WHERE subject = ? AND kept = ?", dropped)
    connection.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?)", new)


def forget_subjects(connection: sqlite3.Connection, entry: Entry, emptied: list[str]) -> None:
    """Note inside a transaction which groups went with an entry, and drop what went from the index of rows."""
    connection.executemany("INSERT INTO gone VALUES (?, ?)", [(subject, entry.number) for subject in emptied])
    if entry.action == "rows":
        rows = [(subject,) for subject in entry.subjects]
        connection.executemany("UPDATE rows SET count = count - 1 WHERE subject = ?", rows)
        connection.executemany("DELETE FROM rows WHERE subject = ? AND count <= 0", rows)
    connection.executemany("DELETE FROM rows WHERE owner = ?", [(subject,) for subject in emptied])


def _parse(text: str) -> Entry:
    try:
        entry = Entry(**json.loads(text))
        intact = entry == entry.sealed(entry.previous) and text == canonical(vars(entry)).decode()
    except (TypeError, ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise StoreError(f"ledger: an entry is damaged: {text[:100]!r}")
    return entry
