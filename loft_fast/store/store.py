"""The store: what is kept so that requests can be answered without data, and shown to have been."""

from __future__ import annotations

import copy
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loft_fast.errors import InputError, StoreError
from loft_fast.grouped_moments import GroupedMoments, Key, plain_keys
from loft_fast.projection import Projection
from loft_fast.store.contents import check_folders, collect, read_contents
from loft_fast.store.creation import make_store
from loft_fast.store.index import check_held, check_room, row_subjects
from loft_fast.store.keys import SIGNING, SUBJECTS, pseudonym, public_key, read_secret
from loft_fast.store.ledger import LEDGER, SCHEMA, Entry, Ledger, record
from loft_fast.store.lock import LOCK, PATIENCE, locked
from loft_fast.store.receipts import make_receipt, verify_receipt
from loft_fast.store.request import Measure, Request
from loft_fast.store.sums import Sums


class UnlearningStore:
    """Exact moments by group, the projection that the requests so far ask for, and a ledger of these requests.

    A request changes all three or nothing, whenever the process or the machine stops. Processes take turns.

    The moments of a group that goes are deleted from every file. With `keep_forgotten` they stay, and each projection
    is bit for bit the solution of one request for all that was forgotten so far, for the model as it was trained;
    without, it is the best one inside the last, for that model or for one that the last was folded into (`Continual`
    says more).

    The ledger holds no subjects, only keyed pseudonyms of them, with the key in the file `subjects.key`: whoever has it
    can find out whether a given group or row was forgotten, or is in the index of rows, and nothing else. The names of
    groups that are retained stand in the files of their moments. Deleted files are unlinked: what becomes of the blocks
    is up to the file system.

    Args:
        path: folder of a store that `create` made.

    Raises:
        StoreError: on any call, if there is no store, it is damaged, busy or of a newer schema.
        InputError: on any call with bad input; the store is as it was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._ledger = Ledger(Path(path) / LEDGER)
        self.path = Path(path).absolute()  # the ledger, which is open, stays where it is; so do the other files
        self._number = -1  # of the entry whose state is in memory
        try:
            self._about = self._ledger.about()
            if self._about.get("schema") != str(SCHEMA):
                found = self._about.get("schema")
                raise StoreError(f"path: {str(path)!r} has schema {found!r}, this version reads '{SCHEMA}'")
            self._key = read_secret(self.path / SUBJECTS, self._about.get("key"))
            self._sums = Sums(self.path / LEDGER, self._key)
            with self._turn():
                self._sums.sweep()
                self._sums.recover(self._ledger.checkpoint)
                collect(self.path, self._ledger)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        moments: GroupedMoments,
        model: nn.Module | None = None,
        *,
        min_rows: int = 1,
        keep_forgotten: bool = False,
    ) -> UnlearningStore:
        """Make a store in a new folder, whole or not at all.

        Args:
            path: where; nothing or an empty folder may be there.
            moments: of all rows; exact.
            model: which they came from, to be told from others later (without `keep_forgotten`, by all but the layer
                that projections are folded into). None: any model will do.
            min_rows: smallest group that may be kept, of rows that are retained and, with `keep_forgotten`, of those
                that are not: moments of few rows give these away.
            keep_forgotten: keep the moments of what was forgotten.
        """
        target = Path(path)
        make_store(target, moments, model, min_rows, keep_forgotten)
        return cls(target)

    # ---- what there is ----

    @property
    def site(self) -> str | None:
        """Where in the model the rows came from."""
        return self._about["site"] or None

    @property
    def keep_forgotten(self) -> bool:
        """Whether the moments of what was forgotten are kept."""
        return self._about["keep_forgotten"] == "True"

    @property
    def public_key(self) -> str:
        """What receipts are verified with; Ed25519, in hexadecimal.

        Raises:
            MissingExtraError: without cryptography.
        """
        return public_key(self._signing_key())

    @property
    def moments(self) -> GroupedMoments:
        """Of the rows that are retained."""
        with self._turn():
            return self._retain.select(self._retain.keys())

    @property
    def projection(self) -> Projection | None:
        """What the requests so far ask for; None before the first."""
        with self._turn():
            return copy.deepcopy(self._contents.projection)  # what becomes of the caller's is no matter to the store

    def forgot(self, key: Key) -> bool:
        """Whether this was a group that is gone."""
        return self._ledger.gone(pseudonym(self._key, *plain_keys([key]))) is not None

    def ledger(self) -> Iterator[Entry]:
        """All entries in order, from the creation on, each checked against the one before."""
        return self._ledger.entries()

    def find(self, request: str) -> Entry:
        """The entry of a request, by its id."""
        entry = self._ledger.find(request)
        if entry is None:
            raise InputError(f"id: no request {request!r} in the ledger")
        return entry

    def close(self) -> None:
        """Let go of the files."""
        self._ledger.close()

    def __enter__(self) -> UnlearningStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"UnlearningStore({str(self.path)!r}, entries={self._ledger.last().number + 1})"

    # ---- requests ----

    def forget(
        self,
        keys: Iterable[Key],
        id: str | None = None,
        *,
        model: nn.Module | None = None,
        measure: Measure | None = None,
        **options: Any,
    ) -> Entry:
        """Forget whole groups.

        Args:
            keys: the groups. Those that went before are no matter; if all did, the answer is the entry of the last.
            id: of the request. A second request of the same id changes nothing and gets the same answer.
            model: to be checked against the store's, and whose head, if it scores the groups, finds the angle.
            measure: called with the projection before anything is written; what it returns goes into the ledger.
            options: as for `solve`: rank, head, about, ...

        Raises:
            InputError: no such group (the message has the nearest names), an id that was used for something else,
                another model, groups left too small, or what `solve` refuses.
        """
        with self._turn():
            subjects = {key: pseudonym(self._key, key) for key in plain_keys(keys)}
            answer = self._ledger.answered(id, "groups", list(subjects.values()))
            if answer is not None:
                return answer
            gone = {key: self._ledger.gone(subject) for key, subject in subjects.items()}
            left = [key for key in subjects if gone[key] is None]
            retain, part = self._retain.without(left), self._retain.select(left)
            numbers = [number for number in gone.values() if number is not None]
            if not left and numbers:
                return self._ledger.number(max(numbers))
            return self._commit(Request("groups", id, list(subjects.values()), retain, part, model, measure, options))

    def forget_rows(
        self,
        x: Tensor,
        group: Tensor | Sequence[Key],
        id: str | None = None,
        *,
        model: nn.Module | None = None,
        measure: Measure | None = None,
        **options: Any,
    ) -> Entry:
        """Forget rows, (n, d), each from its group; everything else as for `forget`.

        Rows that were never added are refused if all rows are in the index (`index_rows`). Otherwise only those that
        leave moments no rows can have are: nothing else can be told from sums.
        """
        with self._turn():
            part = self._retain.select([]).update(x, group)
            subjects = [subject for subject, _ in row_subjects(x, group, self._retain, self._key)]
            answer = self._ledger.answered(id, "rows", subjects)
            if answer is not None:
                return answer
            if self._ledger.indexed() == self._retain.count:
                check_held(self._ledger, subjects)
            return self._commit(Request("rows", id, subjects, self._retain - part, part, model, measure, options))

    def index_rows(self, x: Tensor, group: Tensor | Sequence[Key]) -> int:
        """Add rows, (n, d), with their groups to the index of pseudonyms; returns how many it holds.

        Once that is all rows of the moments, `forget_rows` refuses rows that it does not hold. Every row is to be added
        once; where that went wrong, `clear_index` and begin again.

        Raises:
            InputError: bad input, or more rows than a group has: some were added twice, or never to the moments.
        """
        with self._turn():
            rows = row_subjects(x, group, self._retain, self._key)
            check_room(self._ledger, group, len(rows), self._retain, self._key)
            with self._changing() as change:
                change.executemany(
                    "INSERT INTO rows VALUES (?, ?, 1) ON CONFLICT (subject) DO UPDATE SET count = count + 1", rows
                )
            return self._ledger.indexed()

    def clear_index(self) -> None:
        """Take all rows out of the index."""
        with self._turn(), self._changing() as change:
            change.execute("DELETE FROM rows")

    # ---- checks ----

    def verify(self, receipt: dict[str, Any] | None = None, progress: bool = False) -> dict[str, Any]:
        """Check every file against every other, and a receipt against the ledger.

        Args:
            receipt: what `receipt` gave, read from JSON.
            progress: show a progress bar; 100,000 entries take a few seconds.

        Returns:
            What was found: entries, groups, rows, digest, projection.

        Raises:
            StoreError: whatever does not fit.
        """
        with self._turn():
            self._sums.recover(self._ledger.checkpoint)
            self._sums.check()
            last = self._ledger.check(self._about, progress)
            self._load()
            indexed = self._ledger.indexed()
            self._signing_key()
            if receipt is not None:
                shown = verify_receipt(receipt, self.public_key)
                if receipt.get("store") != self._about["identity"] or self._ledger.find(shown.id) != shown:
                    raise StoreError("receipt: the ledger has no such entry")
            return {
                "entries": last.number + 1,
                "groups": len(self._retain),
                "rows": self._retain.count,
                "indexed": indexed,
                "digest": last.after,
                "projection": last.projection,
            }

    def undo_check(self, id: str, part: GroupedMoments) -> bool:
        """Whether what is retained and `part` together are, bit for bit, what was retained before a request.

        True shows that this request and those after it took away the rows of `part` and nothing else.
        """
        entry = self.find(id)
        with self._turn():
            return (self._retain + part).digest() == entry.before

    def receipt(self, id: str) -> dict[str, Any]:
        """A signed receipt of a request, as something that JSON can write; `verify` and `verify_receipt` check it."""
        return make_receipt(self.find(id), self._about["identity"], self._signing_key())

    def _signing_key(self) -> bytes:
        return read_secret(self.path / SIGNING, self._about.get("signing"))

    # ---- one at a time ----

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """No other process or thread is at work on the store, and what is in memory is what it holds."""
        with locked(self.path / LOCK, PATIENCE):
            check_folders(self.path)
            if self._ledger.last().number != self._number:
                self._load()
            yield

    def _load(self) -> None:
        """Read everything, and check that it fits together."""
        self._contents = read_contents(self.path, self._ledger, self._key)
        if repr(self._retain.exact) != self._about["exact"]:
            raise StoreError("moments: their scale is not that of the store")
        self._number = self._ledger.last().number

    @property
    def _retain(self) -> GroupedMoments:
        return self._contents.retain

    def _commit(self, request: Request) -> Entry:
        """Write what is to be kept, then the entry that says so: what is cut off in between has not happened."""
        old, new = self._contents, request.contents(self._contents, self._about)
        entry = request.entry(old, new, self._ledger.last(), self._key)
        before, after = self._ledger.groups(), new.digests(self._key)
        new.write(self.path, self._key, before, self._about["fingerprint"])
        with self._changing() as change:
            record(change, entry, before, after)
        self._contents, self._number = new, entry.number
        collect(self.path, self._ledger)
        return entry

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what is executed inside has happened, all of it, once the block has ended."""
        with self._sums.changing(self._ledger.checkpoint), self._ledger.transaction() as change:
            yield change
