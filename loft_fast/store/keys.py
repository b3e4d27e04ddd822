"""The secrets of a store: one key that turns subjects into pseudonyms, one that signs receipts."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path
from typing import Any

from loft_fast import files
from loft_fast.errors import MissingExtraError, StoreError

SUBJECTS, SIGNING = "subjects.key", "signing.key"
_BYTES = 32


def pseudonym(key: bytes, subject: Any) -> str:
    """Keyed HMAC-SHA-256 of a subject (anything that JSON can write), in hexadecimal."""
    return hmac.new(key, json.dumps(subject).encode(), hashlib.sha256).hexdigest()


def new_secret(path: Path) -> bytes:
    """A random key in a new file that only its owner can read."""
    key = secrets.token_bytes(_BYTES)
    files.write_bytes(path, key, mode=0o600)
    return key


def read_secret(path: Path, mark: str | None) -> bytes:
    """The key in a file, if `mark` is its pseudonym of nothing."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path.name}: cannot read {str(path)!r}: {error.strerror or error}") from error
    if len(key) != _BYTES:
        raise StoreError(f"{path.name}: {str(path)!r} is damaged: {len(key)} bytes, expected {_BYTES}")
    if pseudonym(key, "") != mark:
        raise StoreError(f"{path.name}: it is not the key of this store")
    return key


def public_key(secret: bytes) -> str:
    """The public half of an Ed25519 key, in hexadecimal."""
    return str(_ed25519().Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw().hex())


def sign(secret: bytes, message: bytes) -> str:
    """Ed25519 signature, in hexadecimal."""
    return str(_ed25519().Ed25519PrivateKey.from_private_bytes(secret).sign(message).hex())


def signed(public: str, message: bytes, signature: str) -> bool:
    """Whether the signature is one of the message by the owner of this public key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("receipts need cryptography: pip install 'loft-fast[store]'") from error
    return ed25519
