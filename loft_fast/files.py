"""One way to write and read the package's files: safetensors, a header, a digest, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from loft_fast.errors import FileFormatError, InputError

SCHEMA = "2"
_DIGEST = "sha256"
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)


def write_bytes(path: str | os.PathLike[str], data: bytes, mode: int | None = None) -> None:
    """Write `data` to the file at `path`, or at the end of the links there, whole or not at all.

    Args:
        mode: permissions; None for those of any new file.

    Raises:
        InputError: the folder does not exist or cannot be written, or there is something else than a file; whatever was
            at `path` is still there.
    """
    replace_bytes(_end_of_links("path", Path(path)), data, mode)


def replace_bytes(path: str | os.PathLike[str], data: bytes, mode: int | None = None) -> None:
    """Write `data` to a temporary neighbour, flush it to disk and rename it over `path`, which is then on disk, too.

    As for `write_bytes`, but a link at `path` is replaced, not followed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        # The kernel takes the umask off; to read it here, other threads would have to do without it for a moment.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    except OSError as error:
        raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise InputError(f"path: cannot write {str(target)!r}: {error.strerror or error}") from error
        raise


def unfinished(name: str) -> str | None:
    """The name of the file that `replace_bytes` was writing when it was killed, if `name` is of what that leaves."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def _end_of_links(name: str, path: Path) -> Path:
    """Where a file for `path` belongs, if there is a file or nothing; the message begins with the argument's `name`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{name}: cannot write {str(path)!r}: it is not a regular file")
    except (FileNotFoundError, NotADirectoryError):
        pass  # a new file, or a folder that the write finds missing
    except OSError as error:
        raise InputError(f"{name}: cannot write {str(path)!r}: {error.strerror or error}") from error
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def sync_folder(folder: Path) -> None:
    """Flush to disk which files there are in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Save `tensors` as one safetensors file that says it is a `kind` (such as "moments") of this schema."""
    write_bytes(path, to_bytes(kind, tensors, header))


def to_bytes(kind: str, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> bytes:
    """What `write_tensors` writes."""
    tensors, metadata = _content(kind, tensors, header)
    return serialize(tensors, {**metadata, _DIGEST: _digest(tensors, metadata)})


def content_digest(kind: str, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> str:
    """SHA-256 of all that such a file says, in hexadecimal; the order in which it says it is safetensors' own."""
    return _digest(*_content(kind, tensors, header))


def read_tensors(
    source: str | os.PathLike[str] | bytes,
    kind: str,
    names: tuple[str, ...] | Callable[[dict[str, str]], tuple[str, ...]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file that `write_tensors` made for the same `kind`.

    Nothing is allocated that is larger than the file: its layout is checked first.

    Args:
        source: path of the file, or its content.
        names: of the tensors that must be there, or a function that tells from the header.

    Raises:
        FileFormatError: no such file, truncated, damaged, not safetensors, or of another kind or schema.
    """
    wanted, name = f"loft_fast.{kind}", name_of(source)
    try:
        with _opened(source) as file:
            header: dict[str, str] = file.metadata() or {}
            found = header.get("format", "a foreign file")
            if found != wanted:
                raise FileFormatError(f"{name} holds {found}, expected {wanted}")
            if header.get("schema") != SCHEMA:
                raise FileFormatError(f"{name} has schema {header.get('schema')!r}, this version reads {SCHEMA!r}")
            names = names if isinstance(names, tuple) else names(header)
            missing = sorted(set(names) - set(file.keys()))
            if missing:
                raise FileFormatError(f"{name} lacks {', '.join(missing)}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError) as error:
        what = "data: cannot read it" if isinstance(source, bytes) else f"path: cannot read {str(source)!r}"
        raise FileFormatError(f"{what} as {wanted}: {error}") from error
    if header.pop(_DIGEST, "") != _digest(tensors, header):
        raise FileFormatError(f"{name} is damaged: its content is not what was written")
    return {key: tensors[key] for key in names}, header


def read_header(data: bytes) -> dict[str, str]:
    """The header of such a file's content, unchecked, without reading a tensor; empty if there is none."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])["__metadata__"] if 8 + length <= len(data) else {}
    except (KeyError, RecursionError, TypeError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def name_of(source: str | os.PathLike[str] | bytes) -> str:
    """What messages call the argument of this content."""
    return "data: it" if isinstance(source, bytes) else f"path: {str(source)!r}"


def bytes_of(data: bytes) -> bytes:
    """The argument `data`, if that is bytes."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"data: got {type(data).__name__}, expected bytes")
    return bytes(data)


def _opened(source: str | os.PathLike[str] | bytes) -> Any:
    if isinstance(source, bytes):
        return _Content(source)
    try:
        os.fspath(source).encode()
    except UnicodeEncodeError:  # `safe_open` takes no such path
        return _Content(Path(source).read_bytes())
    return safe_open(os.fspath(source), framework="pt")


class _Content:
    """The content of a safetensors file, in the way of `safe_open`."""

    def __init__(self, data: bytes) -> None:
        self._tensors = deserialize(data)  # which checks the header
        self._metadata = read_header(data)

    def __enter__(self) -> _Content:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _content(
    kind: str, tensors: dict[str, Tensor], header: dict[str, str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return kept, {"format": f"loft_fast.{kind}", "schema": SCHEMA, **(header or {})}


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    # safetensors itself does not notice a flipped bit.
    names = sorted(tensors)
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    found = hashlib.sha256(json.dumps([sorted(header.items()), layout]).encode())
    for name in names:
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def writable_folder(name: str, folder: Path) -> Path:
    """Make sure that `folder` exists and can be written, before any work whose result would go there.

    Raises:
        InputError: it cannot; the message begins with the argument's `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"{name}: cannot write to {str(folder)!r}: {error.strerror or error}") from error


def writable_file(name: str, path: Path) -> Path:
    """Make sure that `write_bytes` can write to `path`, before any work whose result would go there.

    Raises:
        InputError: it cannot; the message begins with the argument's `name`.
    """
    writable_folder(name, _end_of_links(name, path).parent)
    return path
