"""One process at a time: a lock on a file, which the system lets go of however the process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loft_fast.errors import StoreError

LOCK = "lock"  # the file of a store that is locked
PATIENCE = 60.0  # seconds to wait for another process
_PAUSE = 0.01  # seconds between two tries


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock of the file at `path`.

    Raises:
        StoreError: it cannot be opened, or is held elsewhere for longer than `patience` seconds.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"lock: cannot open {str(path)!r}: {error.strerror or error}") from error
    try:
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise StoreError(f"lock: {str(path)!r} is held by another process") from None
                time.sleep(_PAUSE)
        yield
    finally:
        os.close(handle)
