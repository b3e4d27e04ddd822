"""A new store: all of its files, or none."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from torch import nn

from loft_fast import files
from loft_fast.errors import InputError, StoreError
from loft_fast.fingerprint import fingerprint
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.ops.arguments import check_integer
from loft_fast.store.contents import MOMENTS, PROJECTION, Contents, check_sizes
from loft_fast.store.keys import SIGNING, SUBJECTS, new_secret, pseudonym
from loft_fast.store.ledger import LEDGER, SCHEMA, Entry, Ledger, now, record
from loft_fast.store.lock import LOCK, PATIENCE, locked
from loft_fast.store.sums import Sums


def make_store(
    target: Path, moments: GroupedMoments, model: nn.Module | None, min_rows: int, keep_forgotten: bool
) -> None:
    """Make the folder of a store; `UnlearningStore.create` says of what."""
    if not isinstance(moments, GroupedMoments):
        raise InputError(f"moments: got {type(moments).__name__}, expected GroupedMoments")
    if not isinstance(moments.exact, float) or not moments.count:
        raise InputError(f"moments: got {moments!r}, expected exact ones, of at least one row")
    check_integer("min_rows", min_rows)
    moments = moments.select([key for key in moments if moments[key].count])
    check_sizes(moments, min_rows)
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
        prefix = f".{target.name}.unfinished."
        _sweep(target.parent, prefix)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    except OSError as error:
        raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
    try:
        with locked(draft / LOCK, PATIENCE):
            _fill(draft, moments, about)
            os.replace(draft, target)
        files.sync_folder(target.parent)
    except OSError as error:
        raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(draft: Path, moments: GroupedMoments, about: dict[str, str]) -> None:
    """Write all files of a new store."""
    for folder in (MOMENTS, PROJECTION):
        (draft / folder).mkdir()
    key = new_secret(draft / SUBJECTS)
    # Secrets are told by what they make of nothing, which needs no cryptography and gives nothing away.
    about = {**about, "key": pseudonym(key, ""), "signing": pseudonym(new_secret(draft / SIGNING), "")}
    contents = Contents(moments, moments.select([]), None)
    contents.write(draft, key, {}, about["fingerprint"])
    ledger = Ledger(draft / LEDGER, create=True)
    digest = moments.digest()
    entry = Entry(0, "create", now(), "create", [], moments.count, "", digest, details=about).sealed("")
    with Sums(draft / LEDGER, key).changing(ledger.checkpoint), ledger.transaction() as change:
        change.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        record(change, entry, {}, contents.digests(key))
    ledger.close()


def _sweep(folder: Path, prefix: str) -> None:
    """Delete the copies of moments and keys that were left where a store was to be made and the process was killed."""
    for draft in folder.iterdir():
        lock = draft / LOCK
        if not draft.name.startswith(prefix) or draft.is_symlink() or not lock.is_file():
            continue  # one without a lock is empty, and may have been made this moment
        with suppress(OSError, StoreError), locked(lock, 0):  # who is still at work on it holds the lock
            if any(path != lock for path in draft.iterdir()):
                shutil.rmtree(draft, ignore_errors=True)
