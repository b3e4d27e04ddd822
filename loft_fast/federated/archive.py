"""What a server keeps between rounds and restarts: contributions or their sum, by round, and the log, in SQLite."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loft_fast.errors import InputError, StoreError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.projection import Projection

SCHEMA = 2
# What is deleted is overwritten, in a file that exists as long as a change takes at most; what is committed is on disk.
_PRAGMAS = ("journal_mode=DELETE", "secure_delete=ON", "synchronous=EXTRA", "locking_mode=EXCLUSIVE", "foreign_keys=ON")
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE answers (id INTEGER PRIMARY KEY, client TEXT NOT NULL, node TEXT NOT NULL, digest TEXT NOT NULL,
    count INTEGER NOT NULL, site TEXT);
CREATE TABLE members (round INTEGER, client TEXT, answer INTEGER NOT NULL REFERENCES answers,
    PRIMARY KEY (round, client)) WITHOUT ROWID;
CREATE TABLE parts (answer INTEGER REFERENCES answers ON DELETE CASCADE, key TEXT, moments BLOB NOT NULL,
    PRIMARY KEY (answer, key));
CREATE TABLE totals (round INTEGER, key TEXT, moments BLOB NOT NULL, PRIMARY KEY (round, key));
CREATE TABLE gone (kind TEXT, name TEXT, PRIMARY KEY (kind, name)) WITHOUT ROWID;
CREATE TABLE log (number INTEGER PRIMARY KEY, id TEXT UNIQUE, time TEXT NOT NULL, round INTEGER NOT NULL,
    client TEXT, node TEXT, verdict TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX forgotten ON log (client) WHERE verdict = 'forgotten';
"""


@dataclass(frozen=True)
class Event:
    """A line of the log.

    Attributes:
        number: 1, 2, ...
        time: UTC, ISO 8601.
        round: that it belongs to.
        client, node: whom it is about, if anyone.
        verdict: "accepted", "refused", "missing", "opened", "closed", "incomplete",
            "abandoned" or "forgotten".
        reason: in words.
        id: of a forget request.
    """

    number: int
    time: str
    round: int
    client: str | None
    node: str | None
    verdict: str
    reason: str
    id: str | None = None


class Archive:
    """A database. Every change is a transaction: it happens as a whole or not at all, also when the machine stops."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Open the database, or make one for a server of this kind.

        Raises:
            StoreError: damaged, foreign, of a newer schema, or open elsewhere.
            InputError: it was made for another kind of server.
        """
        about = {"schema": SCHEMA, **about}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)  # moments of every client: nobody else's business
            self._base = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"folder: cannot open {str(path)!r}: {error}") from error
        try:
            for pragma in _PRAGMAS:
                self._base.execute(f"PRAGMA {pragma}")
            with self.change():
                if not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _TABLES.split(";")[:-1]:
                        self._base.execute(statement)
                    self.put("about", json.dumps(about))
                    self.put("round", "0")
            found = json.loads(self.get("about") or "{}")
        except (sqlite3.Error, ValueError) as error:
            self.close()
            why = "another server has it open" if "locked" in str(error) else f"cannot read it: {error}"
            raise StoreError(f"folder: {str(path)!r}: {why}") from error
        except BaseException:
            self.close()
            raise
        if found.get("schema") != SCHEMA:
            self.close()
            raise StoreError(f"folder: {str(path)!r} has schema {found.get('schema')!r}, this version reads {SCHEMA}")
        other = next((name for name in about if found.get(name) != about[name]), None)
        if other is not None:
            self.close()
            raise InputError(f"{other}: got {about[other]!r}, but {str(path)!r} was made with {found.get(other)!r}")

    def close(self) -> None:
        """Let others open it."""
        self._base.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A transaction."""
        try:
            self._base.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise StoreError(f"folder: cannot write to it: {error}") from error
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException as error:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"folder: cannot write to it: {error}") from error
            raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._base.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"folder: cannot read it: {error}") from error

    # ---- single values ----

    def get(self, name: str) -> Any:
        """A value, or None."""
        found = self._rows("SELECT value FROM about WHERE name = ?", name)
        return found[0][0] if found else None

    def put(self, name: str, value: Any) -> None:
        """Keep a value; None deletes it."""
        if value is None:
            self._base.execute("DELETE FROM about WHERE name = ?", (name,))
        else:
            self._base.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    @property
    def round(self) -> int:
        """The last round that was closed; 0 if none was."""
        return int(self.get("round"))

    @property
    def projection(self) -> Projection | None:
        """The last projection."""
        data = self.get("projection")
        return None if data is None else Projection.from_bytes(data)

    # ---- contributions ----

    def members(self, round: int) -> dict[str, tuple[str, str, int]]:
        """Node, digest of the answer and rows, of every client that counts in a round, in order of their names."""
        found = self._rows(
            "SELECT client, node, digest, count FROM members JOIN answers USING (client) "
            "WHERE round = ? AND answers.id = answer ORDER BY client",
            round,
        )
        return {client: (node, digest, count) for client, node, digest, count in found}

    def count(self, round: int) -> int:
        """Rows of all clients that count in a round."""
        query = "SELECT coalesce(sum(count), 0) FROM members JOIN answers ON answers.id = answer WHERE round = ?"
        return int(self._rows(query, round)[0][0])

    def site(self, round: int) -> str | None:
        """Where the features of those who count in a round come from, if one of them says so."""
        query = "SELECT site FROM members JOIN answers ON answers.id = answer WHERE round = ? AND site NOT NULL LIMIT 1"
        found = self._rows(query, round)
        return found[0][0] if found else None

    def known(self, round: int, client: str) -> str | None:
        """The digest of a client's answer, if it is in a round."""
        found = self._rows(
            "SELECT digest FROM members JOIN answers ON answers.id = answer WHERE round = ? AND members.client = ?",
            round,
            client,
        )
        return found[0][0] if found else None

    def inherit(self, new: int, old: int) -> None:
        """Begin a round with all that another has."""
        self._base.execute("INSERT INTO members SELECT ?, client, answer FROM members WHERE round = ?", (new, old))
        self._base.execute("INSERT INTO totals SELECT ?, key, moments FROM totals WHERE round = ?", (new, old))

    def add_member(
        self,
        round: int,
        client: str,
        node: str,
        digest: str,
        moments: Moments | GroupedMoments,
        parts: dict[str, bytes],
    ) -> None:
        """A contribution, of which `parts` are kept by key."""
        row = self._base.execute(
            "INSERT INTO answers (client, node, digest, count, site) VALUES (?, ?, ?, ?, ?)",
            (client, node, digest, moments.count, moments.site),
        )
        self._base.execute("INSERT INTO members VALUES (?, ?, ?)", (round, client, row.lastrowid))
        self._base.executemany(
            "INSERT INTO parts VALUES (?, ?, ?)", [(row.lastrowid, key, data) for key, data in parts.items()]
        )

    def parts(self, round: int, clients: Iterable[str] | None = None) -> Iterator[tuple[str, str, Moments]]:
        """(client, key, moments) in a round, by client, then by key; one is in memory at a time."""
        names = self.members(round) if clients is None else sorted(clients)
        for client in names:
            for answer, key in self._rows(
                "SELECT answer, key FROM members JOIN parts USING (answer) WHERE round = ? AND client = ? ORDER BY key",
                round,
                client,
            ):
                data = self._rows("SELECT moments FROM parts WHERE answer = ? AND key = ?", answer, key)[0][0]
                yield client, key, Moments.from_bytes(data)

    def replace_parts(self, round: int, client: str, parts: dict[str, bytes], fewer: int, digest: str) -> None:
        """Keep these parts of a client in the place of those there were, so many rows less, and the digest of these."""
        answer = self._rows("SELECT answer FROM members WHERE round = ? AND client = ?", round, client)[0][0]
        self._base.execute("DELETE FROM parts WHERE answer = ?", (answer,))
        self._base.executemany(
            "INSERT INTO parts VALUES (?, ?, ?)", [(answer, key, data) for key, data in parts.items()]
        )
        self._base.execute("UPDATE answers SET count = count - ?, digest = ? WHERE id = ?", (fewer, digest, answer))

    def drop_members(self, round: int, clients: Iterable[str]) -> None:
        """Take clients out of a round, and out of the file if they are in no other."""
        self._base.executemany(
            "DELETE FROM members WHERE round = ? AND client = ?", [(round, client) for client in clients]
        )
        self._collect()

    def drop_key(self, key: str) -> None:
        """Take a group out of everything."""
        self._base.execute("DELETE FROM parts WHERE key = ?", (key,))
        self._base.execute("DELETE FROM totals WHERE key = ?", (key,))

    def drop_rounds(self, but: int) -> None:
        """Drop all rounds but one."""
        self._base.execute("DELETE FROM members WHERE round <> ?", (but,))
        self._base.execute("DELETE FROM totals WHERE round <> ?", (but,))
        self._collect()

    def _collect(self) -> None:
        self._base.execute("DELETE FROM answers WHERE id NOT IN (SELECT answer FROM members)")

    def total(self, round: int, keys: Iterable[str] | None = None) -> dict[str, Moments]:
        """What the kept sum of a round is, by key; of all keys, or of those there are among some."""
        if keys is None:
            keys = [key for (key,) in self._rows("SELECT key FROM totals WHERE round = ? ORDER BY key", round)]
        found = {}
        for key in keys:
            for (data,) in self._rows("SELECT moments FROM totals WHERE round = ? AND key = ?", round, key):
                found[key] = Moments.from_bytes(data)
        return found

    def set_total(self, round: int, key: str, moments: Moments) -> None:
        """Keep a sum."""
        self._base.execute("INSERT OR REPLACE INTO totals VALUES (?, ?, ?)", (round, key, moments.to_bytes()))

    # ---- what must not come back ----

    def gone(self, kind: str) -> set[str]:
        """Names of the "client"s, or keys of the "group"s, that were forgotten."""
        return {name for (name,) in self._rows("SELECT name FROM gone WHERE kind = ?", kind)}

    def is_gone(self, kind: str, name: str) -> bool:
        """Whether it was forgotten."""
        return bool(self._rows("SELECT 1 FROM gone WHERE kind = ? AND name = ?", kind, name))

    def set_gone(self, kind: str, names: Iterable[str]) -> None:
        """Remember that these were forgotten."""
        self._base.executemany("INSERT OR IGNORE INTO gone VALUES (?, ?)", [(kind, name) for name in names])

    # ---- the log ----

    def write(
        self,
        round: int,
        verdict: str,
        reason: str,
        client: str | None = None,
        node: str | None = None,
        id: str | None = None,
    ) -> None:
        """A line of the log."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._base.execute(
            "INSERT INTO log (id, time, round, client, node, verdict, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (id, now, round, client, node, verdict, reason),
        )

    def log(self) -> list[Event]:
        """All lines, in order."""
        return self._events("ORDER BY number")

    def _events(self, which: str, *values: Any) -> list[Event]:
        names = "number, time, round, client, node, verdict, reason, id"
        return [Event(*row) for row in self._rows(f"SELECT {names} FROM log {which}", *values)]

    def requests(self, client: str) -> list[str]:
        """Ids of the requests for rows that a client has answered."""
        return [id for (id,) in self._rows("SELECT id FROM log WHERE verdict = 'forgotten' AND client = ?", client)]

    def request(self, id: str) -> Event | None:
        """The line of a forget request, if there was one of this id."""
        return next(iter(self._events("WHERE id = ?", id)), None)
