"""How GPU benchmarks are timed, held against rivals and ceilings, and saved."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

import loft_fast as loft
from bench.report import Row, commit
from loft_fast import cost

Run = Callable[[int], Any]
"""Does the work on input set number k."""


@dataclass(frozen=True)
class Rival:
    """Another way to the same end, to take `target` times as long, and the package whose version to note."""

    run: Run
    target: float | None = None
    package: str = "torch"


Rivals = dict[str, Rival]

SETS = 3  # of inputs: the same ones again and again would lie in a cache


class Machine:
    """Where to time, how often, and how large things are."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.repeats = 1 if rehearse else 15
        self.ceilings: dict[str, float] = {}

    def size(self, real: int, tiny: int) -> int:
        """`real`, or at a rehearsal `tiny`."""
        return tiny if self.rehearse else real

    def rows(self, n: int, d: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows with a mean and columns that hang together, made in pieces: no copy in float32 of the whole."""
        generator = torch.Generator(self.device).manual_seed(seed)
        mix = torch.randn(d, d, device=self.device, generator=generator) / d**0.5
        mix += torch.eye(d, device=self.device)
        out = torch.empty(n, d, dtype=dtype, device=self.device)
        for part in out.split(1 << 16):
            part.copy_(torch.randn(len(part), d, device=self.device, generator=generator) @ mix + 0.5)
        return out

    def seconds(self, run: Run) -> float:
        """Median over repeats, after a warm-up on every set."""
        for k in range(SETS if not self.rehearse else 1):
            run(k)
        if self.rehearse:
            began = time.perf_counter()
            run(0)
            return time.perf_counter() - began
        torch.cuda.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for k, (start, end) in enumerate(events):
            start.record()
            run(k % SETS)
            end.record()
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in events) / 1e3

    def sets(self, make: Callable[[int], Any]) -> list[Any]:
        """The input sets."""
        return [make(seed) for seed in range(1 if self.rehearse else SETS)]


Case = Callable[[Machine], Iterator[Row]]
"""The rows of what is measured in one go."""


def compete(
    machine: Machine,
    suite: str,
    case: str,
    ours: Run,
    rivals: Rivals,
    error: float,
    least: cost.Cost | None = None,
) -> Iterator[Row]:
    """A row for each rival; `error` is what was checked before, `least` what the job costs at least."""
    own = machine.seconds(ours)
    floor = None
    if least is not None and not machine.rehearse:
        floor = 1e3 * least.seconds(cost.Ceilings(machine.ceilings["copy"], machine.ceilings["bf16"]))
    for name, rival in rivals.items():
        theirs = machine.seconds(rival.run)
        yield {
            "suite": suite,
            "case": case,
            "peer": name,
            "peer_version": _version(rival.package),
            "ratio": theirs / own,
            "target": rival.target,
            "ours_ms": 1e3 * own,
            "peer_ms": 1e3 * theirs,
            "floor_ms": floor,
            "error": error,
        }


def _version(package: str) -> str:
    """Of an installed package; of this one, which may run from where it was built, its own word."""
    return loft.__version__ if package == "loft_fast" else version(package)


def ceilings(machine: Machine) -> Iterator[Row]:
    """The two numbers that all else is held against: no rows, but machine.ceilings."""
    machine.ceilings["copy"] = _copied(machine)
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        machine.ceilings[name] = _multiplied(machine, dtype)
    yield from ()


def _copied(machine: Machine) -> float:
    n = machine.size(1 << 30, 1 << 10)
    source = machine.sets(lambda seed: torch.empty(n, dtype=torch.bfloat16, device=machine.device).normal_())
    copied = torch.empty_like(source[0])
    return 4 * n / machine.seconds(lambda k: copied.copy_(source[k]))


def _multiplied(machine: Machine, dtype: torch.dtype) -> float:
    d = machine.size(8192, 64)
    a = machine.sets(lambda seed: machine.rows(d, d, seed, dtype))
    return 2 * d**3 / machine.seconds(lambda k: a[k] @ a[k])


def measure(
    machine: Machine, cases: Sequence[Case], budget: float, save: Callable[[list[Row], list[str]], None]
) -> tuple[list[Row], list[str]]:
    """All cases, and what went wrong or was left out; saved after each, as whoever lends a GPU may take it back."""
    began, rows, trouble = time.perf_counter(), list[Row](), list[str]()
    for case in cases:
        if time.perf_counter() - began > budget:
            trouble.append(f"{case.__name__}: left out, the time was up")
            continue
        try:
            rows += case(machine)
        except Exception as error:  # the other cases are worth having
            trouble.append(f"{case.__name__}: {type(error).__name__}: {error}")
            if machine.rehearse:
                raise
        if not machine.rehearse:
            torch.cuda.empty_cache()
        save(rows, trouble)
    return rows, trouble


def command(description: str | None, cases: Sequence[Case], arguments: list[str] | None) -> int:
    """The command line of a benchmark: all cases, a file and a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--tests", default="not run", help="what became of the tests, for the file")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no case is begun")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    machine = Machine(options.rehearse)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)

    def save(rows: list[Row], trouble: list[str]) -> None:
        found = {
            "device": name,
            "date": date.today().isoformat(),
            "commit": commit(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "loft_fast": loft.__version__},
            "tests": options.tests,
            "ceilings": machine.ceilings,
            "trouble": trouble,
            "rows": rows,
        }
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")

    rows, trouble = measure(machine, cases, options.budget, save)
    for row in rows:
        target = f"{row['target']:7.2f}" if row["target"] else " " * 7
        print(f"{row['suite']:10}{row['case']:52}{row['peer'][:44]:45}{row['ratio']:9.2f}{target}")
    print("\n".join(trouble))
    print({name: f"{rate / 1e12:.2f} T/s" for name, rate in machine.ceilings.items()}, "tests", options.tests)
    return 1 if trouble else 0
