"""Deletion that can be shown: moments, projection and a ledger of requests in one folder that survives a crash."""

from loft_fast.store.ledger import Entry
from loft_fast.store.receipts import verify_receipt
from loft_fast.store.store import UnlearningStore

__all__ = ["Entry", "UnlearningStore", "verify_receipt"]
