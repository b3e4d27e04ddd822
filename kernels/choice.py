"""Which block sizes a kernel runs with: the only place that decides, from a table that was measured, never by a search."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_TABLE = Path(__file__).with_name("blocks.json")


@dataclass(frozen=True)
class Blocks:
    """Sizes of one launch.

    Attributes:
        tile: columns a side. rows: how many are multiplied at a time. warps, stages: as in Triton.
        flush: multiplications summed in float32 before they go to float64.
        piece: rows that are worth a program of their own.
    """

    tile: int
    rows: int
    warps: int = 4
    stages: int = 3
    flush: int = 4096
    piece: int = 4096


def blocks_for(op: str, dtype: torch.dtype, d: int) -> Blocks:
    """The first line of the table that fits: of this op, this dtype, and at least this many columns."""
    name = str(dtype).removeprefix("torch.")
    for line in table()["blocks"]:
        if line["op"] == op and name in line["dtypes"] and d <= (line["most_columns"] or d):
            return Blocks(**line["sizes"])
    raise KeyError(f"{_TABLE.name} has no line for {op}, {name}, d = {d}")


@cache
def table() -> dict[str, Any]:
    """Device and date of the measurement (null: never measured), and lines by op."""
    return json.loads(_TABLE.read_text())


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy; few where kernels are interpreted, so that rows are split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
