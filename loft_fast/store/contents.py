"""The files of a store: moments by group and the projection, each under a name that says what is in it."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loft_fast import files
from loft_fast.errors import FileFormatError, InputError, StoreError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.projection import Projection
from loft_fast.store.keys import pseudonym
from loft_fast.store.ledger import Ledger, Place

MOMENTS, PROJECTION = "moments", "projection"
_NAMES = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{32})?\.safetensors")


@dataclass(frozen=True)
class Contents:
    """What is kept: moments of the rows that are retained, of those that are not if wanted, and the projection."""

    retain: GroupedMoments
    forgotten: GroupedMoments
    projection: Projection | None

    def digests(self, key: bytes) -> dict[Place, str]:
        """Which moments there are, each with its digest."""
        return {
            (pseudonym(key, name), kept): groups[name].digest()
            for kept, groups in ((True, self.retain), (False, self.forgotten))
            for name in groups
        }

    def write(self, store: Path, key: bytes, known: dict[Place, str], fingerprint: str) -> None:
        """Write moments whose digest is not known yet, and the projection."""
        for kept, groups in ((True, self.retain), (False, self.forgotten)):
            for name in groups:
                subject, digest = pseudonym(key, name), groups[name].digest()
                if known.get((subject, kept)) != digest:
                    data = groups.select([name]).to_bytes(fingerprint=fingerprint)
                    files.replace_bytes(store / MOMENTS / _file(subject, digest), data)
        if self.projection is not None:
            data = self.projection.to_bytes()
            files.replace_bytes(store / PROJECTION / f"{self.projection.digest()}.safetensors", data)


def read_contents(store: Path, ledger: Ledger, key: bytes) -> Contents:
    """What the ledger says there is.

    Raises:
        StoreError: a file is missing, damaged or holds something else.
    """
    found: dict[bool, list[GroupedMoments]] = {True: [], False: []}
    for (subject, kept), digest in ledger.groups().items():
        path = store / MOMENTS / _file(subject, digest)
        group: GroupedMoments = _load(GroupedMoments.load, path)
        names = group.keys()
        if len(names) != 1 or pseudonym(key, names[0]) != subject or group[names[0]].digest() != digest:
            raise StoreError(f"{MOMENTS}: {str(path)!r} holds another group than the ledger says")
        found[kept].append(group)
    last = ledger.last()
    if not found[True]:
        raise StoreError("ledger: there are no groups")
    none = found[True][0].select([])
    retain, forgotten = none.join(found[True]), none.join(found[False])
    if retain.digest() != last.after:
        raise StoreError(f"{MOMENTS}: they are not those of the last entry of the ledger")
    projection = None
    if last.projection:
        path = store / PROJECTION / f"{last.projection}.safetensors"
        projection = _load(Projection.load, path)
        if projection.digest() != last.projection:
            raise StoreError(f"{PROJECTION}: {str(path)!r} is not that of the last entry of the ledger")
    return Contents(retain, forgotten, projection)


def check_sizes(moments: GroupedMoments, least: int, what: str = "rows") -> None:
    """Refuse groups of fewer rows than may be kept: moments of few rows give these away."""
    small = next((key for key in moments if moments[key].count < least), None)
    if small is not None:
        count = moments[small].count
        raise InputError(f"moments: group {small!r} would hold {count} {what}, expected at least min_rows={least}")


def check_folders(store: Path) -> None:
    """Raise StoreError unless the folders are the store's own: files elsewhere are not for it to write and delete."""
    for folder in (store / MOMENTS, store / PROJECTION):
        if not _is_folder(folder):
            raise StoreError(f"{folder.name}: {str(folder)!r} is {_kind(folder)}, expected the store's own folder")


def collect(store: Path, ledger: Ledger) -> None:
    """Delete the files of the store that the ledger does not refer to: what went, and what a crash left."""
    wanted = {_file(subject, digest) for (subject, _), digest in ledger.groups().items()}
    wanted.add(f"{ledger.last().projection}.safetensors")
    for folder in (store / MOMENTS, store / PROJECTION):
        left = [path for path in folder.iterdir() if path.name not in wanted and _ours(path)]
        for path in left:
            path.unlink(missing_ok=True)
        if left:
            files.sync_folder(folder)


def _is_folder(path: Path) -> bool:
    """Whether there is a folder, not a link to one. Every call of the store asks: one look at the disk will do."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _kind(path: Path) -> str:
    return "a link" if path.is_symlink() else "no folder" if path.exists() else "missing"


def _ours(path: Path) -> bool:
    """Whether it is a file that a store writes, or part of one."""
    name = files.unfinished(path.name) or path.name
    return _NAMES.fullmatch(name) is not None and path.is_file() and not path.is_symlink()


def _file(subject: str, digest: str) -> str:
    return f"{subject}-{digest[:32]}.safetensors"


def _load(load: Callable[[Path], Any], path: Path) -> Any:
    try:
        return load(path)
    except FileFormatError as error:
        raise StoreError(f"{path.parent.name}: {error}") from error
