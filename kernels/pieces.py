"""Rows cut into pieces of one group each: what programs that share out rows work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Rows order[start:end] of one group each; without an order, x[start:end]."""

    order: Tensor | None
    start: Tensor  # (pieces,) int64
    end: Tensor
    group: Tensor
    first: Tensor  # (G,) int64: the pieces of group g are first[g] to last[g]
    last: Tensor
    begin: Tensor  # (G,) int64: its rows in `order` are begin[g] to stop[g]
    stop: Tensor

    def __len__(self) -> int:
        return self.start.numel()

    def sizes(self, low: int, high: int) -> Tensor:
        """(G,) int64: how many rows of each group the pieces low to high have."""
        rows = self.end[low:high] - self.start[low:high]
        return torch.zeros_like(self.first).index_add_(0, self.group[low:high], rows)


def cut(n: int, length: int, group: Tensor | None, groups: int, device: torch.device) -> Pieces:
    """n rows in pieces of at most `length`, group by group.

    Some at the end may be empty: how many there are is not waited for.
    """
    if group is None:
        begin, stop = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), n, device=device)
        order, most = None, -(-n // length)
    else:
        keys, order = torch.sort(group, stable=True)
        names = torch.arange(groups, device=device)
        begin, stop = torch.searchsorted(keys, names), torch.searchsorted(keys, names, right=True)
        most = -(-n // length) + groups
    last = ((stop - begin + length - 1) // length).cumsum(0)
    first = torch.cat([last.new_zeros(1), last[:-1]])
    numbers = torch.arange(most, device=device)
    owner = torch.searchsorted(last, numbers, right=True).clamp_max_(groups - 1)
    start = begin[owner] + (numbers - first[owner]) * length
    end = torch.minimum(start + length, stop[owner])
    return Pieces(order, start, torch.maximum(start, end), owner, first, last, begin, stop)


def addresses_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Where they lie, (len(tensors),) int64 on the device, which is not waited for: only pinned memory is copied so."""
    pinned = device.type == "cuda"
    at = torch.tensor([one.data_ptr() for one in tensors], dtype=torch.int64, pin_memory=pinned)
    return at.to(device, non_blocking=True)
