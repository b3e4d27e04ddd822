"""Sums of states over the processes of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from loft_fast.collective import Peers
from loft_fast.errors import DistributedError, InputError
from loft_fast.state import State

_BUCKET = 2**26  # bytes that are sent at once
_ALIKE = ("kind", "dim", "exact")  # what has to be the same everywhere

_State = TypeVar("_State", bound=State)


def agree(peers: Peers, mine: dict[str, Any] | None, error: BaseException | None = None) -> list[dict[str, Any]]:
    """What the processes bring along: their moments' `kind`, `dim`, `exact`, `site`, `keys`, `counts`. None: nothing.

    Raises:
        DistributedError: another process reports that it has failed.
        InputError: two processes bring what cannot be summed; all of them raise it.
    """
    said = peers.exchange({"error": f"{type(error).__name__}: {error}"} if error is not None else mine)
    if error is not None:
        raise error
    raise_failures(said)
    for name in (*_ALIKE, "site"):
        # Moments that wait for their first row have neither a scale yet nor, perhaps, a site.
        found = {rank: one[name] for rank, one in enumerate(said) if one is not None}
        found = {rank: value for rank, value in found.items() if value is not True and (name != "site" or value)}
        first = next(iter(found), 0)
        other = next((rank for rank, value in found.items() if value != found[first]), None)
        if other is not None:
            raise InputError(
                f"group: process {other} has moments of {name}={found[other]!r}, process {first} of {found[first]!r}"
            )
    return [one or {"keys": [], "counts": []} for one in said]


def raise_failures(said: list[Any]) -> None:
    """DistributedError if a process said that it has failed."""
    failed = {rank: one["error"] for rank, one in enumerate(said) if one is not None and "error" in one}
    if failed:
        raise DistributedError("; ".join(f"group: process {rank} has failed: {why}" for rank, why in failed.items()))


def sum_states(
    peers: Peers, blank: _State, states: Mapping[Any, _State], said: list[dict[str, Any]]
) -> dict[Any, _State]:
    """States by key, of the rows of all processes.

    Args:
        blank: of no rows, calibrated if they are.
        states: of this process.
        said: what `agree` returned.

    Raises:
        InputError: more rows than such a state can hold.
    """
    counts = [dict(zip(one["keys"], one["counts"], strict=True)) for one in said]
    keys = list(dict.fromkeys(key for one in counts for key in one))
    keys.sort(key=lambda key: (isinstance(key, str), key or 0))
    for key in keys:
        count = sum(one.get(key, 0) for one in counts)
        if count > blank.most_rows:
            raise InputError(f"group: together that would be {count} rows, expected at most {blank.most_rows}")
    at_once = max(1, _BUCKET // (4 * blank.dim * (blank.dim + 1)))
    result: dict[Any, _State] = {}
    for start in range(0, len(keys), at_once):
        some = keys[start : start + at_once]
        numbers = torch.tensor([[one.get(key, 0) for key in some] for one in counts], dtype=torch.int64)
        summed = blank.summed([states.get(key, blank) for key in some], numbers, peers)
        result.update(zip(some, summed, strict=True))
    return result
