"""Sums of the ledger's pages: SQLite itself does not notice a flipped bit.

They are brought up to date where pages change, which is when the write-ahead log is moved to the database. A mark says
that this is under way: where it is found later, the process was stopped in between, and all sums are made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loft_fast import files
from loft_fast.errors import StoreError

PAGE = 4096  # bytes; what SQLite takes, too
_SUM = 8  # bytes: one in 2^64 pages that change by accident has the sum it had
_WAL_HEADER, _FRAME_HEADER = 32, 24  # bytes; https://www.sqlite.org/walformat.html


class Sums:
    """A keyed sum for every page of a database, in a file next to it.

    Args:
        database: in write-ahead mode, without automatic checkpoints.
        key: secret, so that who changes a page cannot change its sum.
    """

    def __init__(self, database: Path, key: bytes) -> None:
        self._database, self._key = database, key
        self._log = database.with_name(f"{database.name}-wal")
        self._path = database.with_suffix(".sums")
        self._mark = database.with_suffix(".changing")

    @contextmanager
    def changing(self, checkpoint: Callable[[], bool]) -> Iterator[None]:
        """Change the database inside; `checkpoint` moves the log to it, and tells whether it could."""
        cut_off = self._mark.exists()
        files.replace_bytes(self._mark, b"")
        try:
            yield
        finally:
            self._settle(checkpoint, None if cut_off else self._logged())

    def sweep(self) -> None:
        """Delete what was left when a process was killed while it wrote one of the two files."""
        for path in self._path.parent.iterdir():
            if files.unfinished(path.name) in (self._path.name, self._mark.name) and path.is_file():
                path.unlink(missing_ok=True)

    def recover(self, checkpoint: Callable[[], bool]) -> None:
        """Make all sums anew if a change was cut off."""
        if self._mark.exists():
            self._settle(checkpoint, None)

    def _settle(self, checkpoint: Callable[[], bool], changed: set[int] | None) -> None:
        """changed: pages in the log; None for all of the database."""
        if not checkpoint():
            return  # the mark stays
        sums = [] if changed is None or not self._path.exists() else self._read()
        with self._database.open("rb") as file:
            count = -(-file.seek(0, 2) // PAGE)
            for page in range(count):
                if page >= len(sums) or page in (changed or ()):
                    file.seek(page * PAGE)
                    sums[page : page + 1] = [self._sum(page, file.read(PAGE))]
        body = b"".join(sums[:count])
        files.replace_bytes(self._path, self._sum(len(body), body) + body)
        self._mark.unlink()
        files.sync_folder(self._mark.parent)

    def check(self) -> None:
        """Raise StoreError if a page is not what was written."""
        sums = self._read()
        with self._database.open("rb") as file:
            for page, wanted in enumerate(sums):
                if self._sum(page, file.read(PAGE)) != wanted:
                    raise StoreError(f"ledger: damaged: page {page} of {str(self._database)!r} is not what was written")
            if file.read(1):
                raise StoreError(f"ledger: damaged: {str(self._database)!r} is longer than what was written")

    def _sum(self, page: int, data: bytes) -> bytes:
        return hashlib.blake2b(page.to_bytes(8, "little") + data, digest_size=_SUM, key=self._key).digest()

    def _logged(self) -> set[int]:
        """Pages in the log; of a transaction that was cut off as well, which does no harm."""
        if not self._log.exists():
            return set()
        with self._log.open("rb") as file:
            size, place = file.seek(0, 2), _WAL_HEADER
            pages = set()
            while place + _FRAME_HEADER <= size:
                file.seek(place)
                pages.add(int.from_bytes(file.read(4), "big") - 1)  # SQLite counts from 1
                place += _FRAME_HEADER + PAGE
            return pages

    def _read(self) -> list[bytes]:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise StoreError(f"ledger: cannot read {str(self._path)!r}: {error.strerror or error}") from error
        own, body = data[:_SUM], data[_SUM:]
        if own != self._sum(len(body), body):
            raise StoreError(f"ledger: {str(self._path)!r} is damaged")
        return [body[place : place + _SUM] for place in range(0, len(body), _SUM)]
