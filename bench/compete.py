"""Rivals timed in turn: a ratio of two medians is worth something only if both saw the same machine."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from loft_fast import backends

# Seconds before every call, ours and theirs: thread pools go on spinning after their work, to the cost of the next one.
_PAUSE = 0.1


@dataclass(frozen=True)
class Rival:
    """Another way to the same end.

    Attributes:
        run: does it once.
        package: whose version is worth noting.
        target: as many times as our time it is to take, at least.
    """

    run: Callable[[], Any]
    package: str = "torch"
    target: float | None = None


def compete(
    benchmark: Any, case: str, ours: Callable[[], Any], rivals: dict[str, Rival], error: float, rounds: int = 7
) -> None:
    """Time `ours` as the benchmark, and before each of its rounds every rival once.

    The benchmark's extra info gets a row per rival, the `error` that was checked before among it: `bench.report` makes
    tables, files and plots of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def run_rivals() -> None:
        for name, rival in rivals.items():
            sleep(_PAUSE)
            start = perf_counter()
            rival.run()
            seconds[name].append(perf_counter() - start)
        sleep(_PAUSE)

    benchmark.pedantic(ours, setup=run_rivals, rounds=rounds, warmup_rounds=1)
    if not benchmark.stats:  # with --benchmark-disable
        return
    own = benchmark.stats.stats.median
    benchmark.extra_info["rows"] = [
        {
            "case": case,
            "peer": name,
            "peer_version": version(rival.package),
            "ratio": median(seconds[name][1:]) / own,  # the first of each was the warm-up
            "target": rival.target,
            "ours_ms": 1e3 * own,
            "peer_ms": 1e3 * median(seconds[name][1:]),
            "error": error,
        }
        for name, rival in rivals.items()
    ]


def multiply_adds(count: int) -> dict[str, Rival]:
    """As a rival, the float32 multiply-adds that a job cannot do without, from registers: what the machine allows."""
    if "native" not in backends.available():
        return {}
    run = backends.native_module().multiply_adds
    return {"its multiply-adds, from registers": Rival(lambda: run(count, torch.get_num_threads()), "loft_fast")}
