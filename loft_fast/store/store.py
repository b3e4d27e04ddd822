"""The store: what is kept so that requests can be answered without data, and shown to have been."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from loft_fast import files
from loft_fast.continual import solve_next
from loft_fast.errors import InputError, StoreError
from loft_fast.fingerprint import fingerprint
from loft_fast.grouped_moments import GroupedMoments, Key, index_groups, plain_keys
from loft_fast.moments import as_rows
from loft_fast.ops.arguments import largest_magnitude
from loft_fast.ops.reference import LARGEST, quantize
from loft_fast.projection import Projection
from loft_fast.sites import find_site
from loft_fast.store.contents import MOMENTS, PROJECTION, Contents, check_folders, collect, read_contents
from loft_fast.store.keys import new_secret, pseudonym, public_key, read_secret
from loft_fast.store.ledger import SCHEMA, Entry, Ledger, append, forget_subjects, set_groups
from loft_fast.store.lock import locked
from loft_fast.store.receipts import make_receipt, verify_receipt
from loft_fast.store.sums import Sums
from loft_fast.unlearn import predicting_head

_LEDGER, _LOCK, _SUBJECTS, _SIGNING = "ledger.sqlite", "lock", "subjects.key", "signing.key"
_PATIENCE = 60.0  # seconds to wait for another process

Measure = Callable[[Projection], dict[str, Any]]


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
        self._ledger = Ledger(Path(path) / _LEDGER)
        self.path = Path(path).absolute()  # the ledger, which is open, stays where it is; so do the other files
        self._number = -1  # of the entry whose state is in memory
        try:
            self._about = self._ledger.about()
            if self._about.get("schema") != str(SCHEMA):
                found = self._about.get("schema")
                raise StoreError(f"path: {str(path)!r} has schema {found!r}, this version reads '{SCHEMA}'")
            self._key = read_secret(self.path / _SUBJECTS)
            if self._about.get("key") != pseudonym(self._key, ""):
                raise StoreError(f"{_SUBJECTS}: it is not the key of this store")
            self._sums = Sums(self.path / _LEDGER, self._key)
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
        if not isinstance(moments, GroupedMoments):
            raise InputError(f"moments: got {type(moments).__name__}, expected GroupedMoments")
        if not isinstance(moments.exact, float) or not moments.count:
            raise InputError(f"moments: got {moments!r}, expected exact ones, of at least one row")
        if isinstance(min_rows, bool) or not isinstance(min_rows, int) or min_rows < 1:
            raise InputError(f"min_rows: got {min_rows!r}, expected an integer >= 1")
        moments = moments.select([key for key in moments if moments[key].count])
        _check_sizes(moments, min_rows)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"path: {str(target)!r} is there already")
        about = {
            "schema": str(SCHEMA),
            "identity": secrets.token_hex(16),
            "dim": str(moments.dim),
            "exact": repr(moments.exact),
            "site": moments.site or "",
            "fingerprint": "" if model is None else fingerprint(model, moments.site, keep_forgotten),
            "min_rows": str(min_rows),
            "keep_forgotten": str(keep_forgotten),
        }
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=_draft_prefix(target)))
        except OSError as error:
            raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
        try:
            with locked(draft / _LOCK, _PATIENCE):
                cls._fill(draft, moments, about)
                os.replace(draft, target)
            files.sync_folder(target.parent)
        except OSError as error:
            raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(target)

    @staticmethod
    def _fill(draft: Path, moments: GroupedMoments, about: dict[str, str]) -> None:
        """Write all files of a new store."""
        for folder in (MOMENTS, PROJECTION):
            (draft / folder).mkdir()
        key = new_secret(draft / _SUBJECTS)
        # Secrets are told by what they make of nothing, which needs no cryptography and gives nothing away.
        about = {**about, "key": pseudonym(key, ""), "signing": pseudonym(new_secret(draft / _SIGNING), "")}
        contents = Contents(moments, moments.select([]), None)
        contents.write(draft, key, {}, about["fingerprint"])
        ledger = Ledger(draft / _LEDGER, create=True)
        digest = moments.digest()
        entry = Entry(0, "create", _now(), "create", [], moments.count, "", digest, details=about).sealed("")
        with Sums(draft / _LEDGER, key).changing(ledger.checkpoint), ledger.transaction() as change:
            change.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            set_groups(change, {}, contents.digests(key))
            append(change, entry)
        ledger.close()

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
        entry = self._ledger.find(request) if _is_text(request) else None
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
            plain = plain_keys(keys)
            subjects = {key: pseudonym(self._key, key) for key in plain}
            answer = self._answered(id, "groups", sorted(subjects.values()))
            if answer is not None:
                return answer
            gone = {key: self._ledger.gone(subject) for key, subject in subjects.items()}
            left = [key for key in subjects if gone[key] is None]
            retain, part = self._retain.without(left), self._retain.select(left)
            numbers = [number for number in gone.values() if number is not None]
            if not left and numbers:
                return self._ledger.number(max(numbers))
            return self._commit("groups", id, list(subjects.values()), retain, part, model, measure, options)

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
            subjects = [subject for subject, _ in self._row_subjects(x, group)]
            answer = self._answered(id, "rows", sorted(subjects))
            if answer is not None:
                return answer
            if self._ledger.indexed() == self._retain.count:
                wanted = Counter[str]()
                for i, subject in enumerate(subjects):
                    wanted[subject] += 1
                    if self._ledger.rows(subject) < wanted[subject]:
                        raise InputError(f"x: row {i} is not in the data, or was forgotten before")
            return self._commit("rows", id, subjects, self._retain - part, part, model, measure, options)

    def index_rows(self, x: Tensor, group: Tensor | Sequence[Key]) -> int:
        """Add rows, (n, d), with their groups to the index of pseudonyms; returns how many it holds.

        Once that is all rows of the moments, `forget_rows` refuses rows that it does not hold. Every row is to be added
        once; where that went wrong, `clear_index` and begin again.

        Raises:
            InputError: bad input, or more rows than a group has: some were added twice, or never to the moments.
        """
        with self._turn():
            rows = self._row_subjects(x, group)
            self._check_room(group, len(rows))
            with self._changing() as change:
                change.executemany(
                    "INSERT INTO rows VALUES (?, ?, 1) ON CONFLICT (subject) DO UPDATE SET count = count + 1", rows
                )
            return self._ledger.indexed()

    def clear_index(self) -> None:
        """Take all rows out of the index."""
        with self._turn(), self._changing() as change:
            change.execute("DELETE FROM rows")

    def _check_room(self, group: Tensor | Sequence[Key], n: int) -> None:
        """Refuse to index n rows of these groups if that would be more of one than are retained."""
        keys, index = index_groups(group, n)
        held = self._ledger.owned()
        for key, count in zip(keys, index.bincount(minlength=len(keys)).tolist(), strict=True):
            total = held.get(pseudonym(self._key, key), 0) + count
            most = self._retain[key].count if key in self._retain else 0
            if total > most:
                raise InputError(
                    f"x: that would be {total} rows of group {key!r} in the index, expected at most {most}, as there "
                    "are; where some were added twice, clear_index() and begin again"
                )

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
            self._ledger.check()
            if self._ledger.about() != self._about:
                raise StoreError("ledger: what the store says of itself has changed")
            gone: dict[str, int] = {}
            entry, last = None, self._ledger.last().number + 1
            for entry in tqdm(self._ledger.entries(), "ledger", last, unit="entry", disable=not progress, leave=False):
                if entry.action == "create" and entry.details != self._about:
                    raise StoreError("ledger: what the store says of itself is not what it was created with")
                gone |= {subject: entry.number for subject in _emptied(entry) if subject not in gone}
            if gone != self._ledger.all_gone():
                raise StoreError("ledger: its list of forgotten groups is not what its entries say")
            assert entry is not None
            self._load()
            indexed = self._ledger.indexed()
            self._signing_key()
            if receipt is not None:
                shown = verify_receipt(receipt, self.public_key)
                if receipt.get("store") != self._about["identity"] or self._ledger.find(shown.id) != shown:
                    raise StoreError("receipt: the ledger has no such entry")
            return {
                "entries": entry.number + 1,
                "groups": len(self._retain),
                "rows": self._retain.count,
                "indexed": indexed,
                "digest": entry.after,
                "projection": entry.projection,
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
        secret = read_secret(self.path / _SIGNING)
        if pseudonym(secret, "") != self._about["signing"]:
            raise StoreError(f"{_SIGNING}: it is not the key of this store")
        return secret

    # ---- one at a time ----

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """No other process or thread is at work on the store, and what is in memory is what it holds."""
        with locked(self.path / _LOCK, _PATIENCE):
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

    # ---- requests ----

    def _answered(self, id: str | None, action: str, subjects: list[str]) -> Entry | None:
        """The entry of an earlier request of this id, if it was the same."""
        if id is None:
            return None
        if not _is_text(id) or not 1 <= len(id) <= 200:
            raise InputError(f"id: got {id!r}, expected a text of 1 to 200 letters")
        entry = self._ledger.find(id)
        if entry is not None and (entry.action, sorted(entry.subjects)) != (action, subjects):
            raise InputError(f"id: {id!r} was another request, number {entry.number} in the ledger")
        return entry

    def _row_subjects(self, x: Tensor, group: Tensor | Sequence[Key]) -> list[tuple[str, str]]:
        """For each row a pseudonym of it, as integers, with its group, and one of the group."""
        rows = as_rows(x, self._retain.dim, self._retain.device)
        if len(rows):
            largest_magnitude(rows)
        keys, index = index_groups(group, len(rows))
        owners = [pseudonym(self._key, key) for key in keys]
        integers = quantize(rows, float(self._about["exact"]) / LARGEST)[0].short().cpu().numpy()
        return [
            (pseudonym(self._key, [keys[i], integers[row].tobytes().hex()]), owners[i])
            for row, i in enumerate(index.tolist())
        ]

    def _head(self, model: nn.Module | None, retain: GroupedMoments, part: GroupedMoments) -> nn.Module | None:
        """The layer of the model that scores the groups, if it does; refuses another model than the store's."""
        if model is None:
            return None
        wanted, got = self._about["fingerprint"], fingerprint(model, self.site, self.keep_forgotten)
        if wanted and got != wanted:
            raise InputError(f"model: its fingerprint is {got[:16]}..., expected {wanted[:16]}..., that of the store's")
        return predicting_head(model, find_site(model, self.site), retain, part)

    def _commit(
        self,
        action: str,
        id: str | None,
        subjects: list[str],
        retain: GroupedMoments,
        part: GroupedMoments,
        model: nn.Module | None,
        measure: Measure | None,
        options: dict[str, Any],
    ) -> Entry:
        """Go from what is retained now to `retain`, which is without `part`."""
        empty = [key for key in self._retain if key not in retain or not retain[key].count]
        retain = retain.select([key for key in retain if key not in empty])
        _check_sizes(retain, int(self._about["min_rows"]))
        head = self._head(model, retain, part)
        if options.get("head") is None and options.get("rank") is None:
            options = {**options, "head": head}
        contents = self._contents
        forgotten = contents.forgotten + part if self.keep_forgotten else None
        if forgotten is not None:
            _check_sizes(forgotten, int(self._about["min_rows"]), "forgotten rows")
        projection = solve_next(contents.projection, retain, part, forgotten, **options)
        projection.site = self.site
        assert projection.certificate is not None
        emptied = [pseudonym(self._key, key) for key in empty]
        kept = contents.forgotten if forgotten is None else forgotten
        new, last = Contents(retain, kept, projection), self._ledger.last()
        entry = Entry(
            number=last.number + 1,
            id=id or secrets.token_hex(16),
            time=_now(),
            action=action,
            subjects=subjects,
            count=part.count,
            before=last.after,
            after=retain.digest(),
            projection=projection.digest(),
            certificate=asdict(projection.certificate),
            details={
                "options": {name: value for name, value in options.items() if isinstance(value, int | float | str)},
                "measured": {} if measure is None else measure(copy.deepcopy(projection)),
                "emptied": emptied,
            },
        )
        try:
            entry = entry.sealed(last.hash)
        except (TypeError, ValueError) as error:
            raise InputError(f"measure: it returned what JSON cannot write: {error}") from error
        before, after = self._ledger.groups(), new.digests(self._key)
        new.write(self.path, self._key, before, self._about["fingerprint"])
        with self._changing() as change:
            set_groups(change, before, after)
            forget_subjects(change, entry, emptied)
            append(change, entry)
        self._contents, self._number = new, entry.number
        collect(self.path, self._ledger)
        return entry

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what is executed inside has happened, all of it, once the block has ended."""
        with self._sums.changing(self._ledger.checkpoint), self._ledger.transaction() as change:
            yield change


def _is_text(id: object) -> bool:
    """Whether it is a text without halves of letters, which no database takes."""
    return isinstance(id, str) and not any("\ud800" <= letter <= "\udfff" for letter in id)


def _emptied(entry: Entry) -> list[str]:
    """The groups that a request left without rows."""
    return list(entry.details.get("emptied", []))


def _check_sizes(moments: GroupedMoments, least: int, what: str = "rows") -> None:
    small = next((key for key in moments if moments[key].count < least), None)
    if small is not None:
        count = moments[small].count
        raise InputError(f"moments: group {small!r} would hold {count} {what}, expected at least min_rows={least}")


def _draft_prefix(target: Path) -> str:
    return f".{target.name}.unfinished."


def _sweep(target: Path) -> None:
    """Delete the copies of moments and keys that were left where a store was to be made and the process was killed."""
    for draft in target.parent.iterdir():
        lock = draft / _LOCK
        if not draft.name.startswith(_draft_prefix(target)) or draft.is_symlink() or not lock.is_file():
            continue  # one without a lock is empty, and may have been made this moment
        with suppress(OSError, StoreError), locked(lock, 0):  # who is still at work on it holds the lock
            if any(path != lock for path in draft.iterdir()):
                shutil.rmtree(draft, ignore_errors=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
