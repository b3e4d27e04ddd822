"""What server and clients say to each other, as records of Flower's Message API."""

from __future__ import annotations

import hashlib
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from loft_fast.errors import FileFormatError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments

SCHEMA = 1
MOMENTS, ROWS, UPDATE = "query.moments", "query.rows", "query.update"
"""The questions: for all moments, for those of rows to be forgotten, and to take a projection or weights."""

TAG = 32  # hexadecimal digits

_RECORD, _SEAL = "loft_fast", "loft_fast.bytes"
_HEADER = 2**16  # bytes of a header besides its keys
_KEY = 64  # bytes that a key may take on average


def question(**fields: Any) -> RecordDict:
    """A question with these fields; None is left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    return RecordDict({_RECORD: ConfigRecord({"schema": SCHEMA, **known})})


def with_bytes(record: RecordDict, name: str, data: bytes) -> RecordDict:
    """The record with data under a name; an array, as Flower sends those in chunks."""
    array = Array(dtype="uint8", shape=(len(data),), stype=_SEAL, data=data)
    record[name] = ArrayRecord({name: array})
    return record


def fields_of(record: RecordDict) -> dict[str, Any]:
    """The fields of a question or an answer.

    Raises:
        FileFormatError: it has none, or they are of another schema.
    """
    fields = dict(record.config_records.get(_RECORD) or {})
    if fields.get("schema") != SCHEMA:
        raise FileFormatError(f"message: it has schema {fields.get('schema')!r}, this version reads {SCHEMA}")
    return fields


def bytes_in(record: RecordDict, name: str, limit: int | None = None) -> bytes | None:
    """The data under a name, None if there are none.

    Raises:
        FileFormatError: they are of another kind, or longer than `limit` bytes.
    """
    arrays = record.array_records.get(name)
    array = None if arrays is None else arrays.get(name)
    if array is None:
        return None
    if array.stype != _SEAL or array.dtype != "uint8":
        raise FileFormatError(f"message: {name} is {array.stype} of {array.dtype}, expected bytes of loft_fast")
    if limit is not None and len(array.data) > limit:
        raise FileFormatError(f"message: {name} has {len(array.data)} bytes, expected at most {limit}")
    return array.data


def tag_of(id: str) -> str:
    """What stands for a request where its id may not."""
    return hashlib.sha256(id.encode()).hexdigest()[:TAG]


def largest(dim: int, groups: int | None) -> int:
    """Bytes that moments of so many features and groups (None: not grouped) take at most."""
    return _HEADER + (groups or 1) * (8 * (dim * (dim + 3) // 2 + 2) + _KEY)


def moments_of(data: bytes, grouped: bool) -> Moments | GroupedMoments:
    """Moments from what they made `to_bytes`.

    Raises:
        FileFormatError: the data are damaged, foreign, of another kind or inconsistent.
    """
    return (GroupedMoments if grouped else Moments).from_bytes(data)
