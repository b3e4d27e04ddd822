"""Which block sizes a kernel runs with: the only place that decides, from a table, never by a search."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loft_fast.errors import InputError

PRECISIONS = ("ieee", "tf32x3", "bf16")
"""How 32-bit numbers are multiplied: in float32, in float32 in effect, or rounded to bfloat16."""
VARIABLE = "LOFT_FAST_PRECISION"
_TABLE = Path(__file__).with_name("blocks.json")


@dataclass(frozen=True)
class Blocks:
    """Sizes of one launch.

    Attributes:
        tile: rows or columns a side. rows: how many are multiplied at a time. warps, stages: as in Triton.
        flush: multiplications summed in float32 before they go to float64.
        piece: rows that are worth a program of their own.
    """

    tile: int
    rows: int
    warps: int = 4
    stages: int = 3
    flush: int = 4096
    piece: int = 4096


def blocks_for(op: str, dtype: torch.dtype, d: int, device: torch.device) -> Blocks:
    """The first line of the table that fits: of this op and dtype, for as many columns, and for such a device."""
    return lines_for(op, dtype, d, capability(device))[0]


def lines_for(op: str, dtype: torch.dtype, d: int, capability: int) -> list[Blocks]:
    """All lines that fit, best first."""
    name = str(dtype).removeprefix("torch.")
    return [
        Blocks(**line["sizes"])
        for line in table()["blocks"]
        if line["op"] == op
        and name in line["dtypes"]
        and d <= (line["most_columns"] or d)
        and capability >= line["capability"]
    ]


def precision_for(asked: str | None) -> str:
    """`asked`, or what LOFT_FAST_PRECISION says, or "tf32x3".

    Raises:
        InputError: it is none of PRECISIONS.
    """
    name = asked or os.environ.get(VARIABLE) or "tf32x3"
    if name not in PRECISIONS:
        source = "precision" if asked else VARIABLE
        raise InputError(f"{source}: got {name!r}, expected one of {', '.join(PRECISIONS)}")
    return name


@cache
def table() -> dict[str, Any]:
    """Device and date of the measurement (null: never measured), and lines by op."""
    return json.loads(_TABLE.read_text())


@cache
def capability(device: torch.device) -> int:
    """90 for a Hopper; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy; few where kernels are interpreted, so that rows are split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
