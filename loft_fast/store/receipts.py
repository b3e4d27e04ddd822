"""Receipts: one entry of a ledger, signed by its store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loft_fast.errors import StoreError
from loft_fast.store.keys import public_key, sign, signed
from loft_fast.store.ledger import Entry, canonical

_FORMAT = {"format": "loft_fast.receipt", "schema": 1}


def make_receipt(entry: Entry, store: str, secret: bytes) -> dict[str, Any]:
    """A receipt of this entry from the store of that identity, as something that JSON can write."""
    receipt = {**_FORMAT, "store": store, "entry": asdict(entry), "public_key": public_key(secret)}
    return {**receipt, "signature": sign(secret, canonical(receipt))}


def verify_receipt(receipt: dict[str, Any], public: str) -> Entry:
    """The entry that a receipt is about, if the owner of this public key has signed it. Needs no store.

    Args:
        receipt: what `UnlearningStore.receipt` gave, read from JSON.
        public: `UnlearningStore.public_key`, from a source that is trusted: the receipt names one, too, but anybody can
            sign with a key of their own.

    Raises:
        StoreError: it is no receipt, was changed, or was signed with another key.
        MissingExtraError: without cryptography.
    """
    try:
        about = {name: receipt[name] for name in _FORMAT}
        entry = Entry(**receipt["entry"])
        rest = canonical({name: value for name, value in receipt.items() if name != "signature"})
        signature, key = str(receipt["signature"]), receipt["public_key"]
        sealed = entry.sealed(entry.previous).hash
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoreError("receipt: it is no receipt of this schema") from error
    if about != _FORMAT:
        raise StoreError(f"receipt: got {about}, expected {_FORMAT}")
    if key != public:
        raise StoreError(f"receipt: it was signed with another key, {str(key)[:16]!r}..., expected {public[:16]!r}...")
    if sealed != entry.hash or not signed(public, rest, signature):
        raise StoreError("receipt: it was changed after it was signed")
    return entry
