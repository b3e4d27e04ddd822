"""Rivals timed in turn: a ratio of two medians is worth something only if both saw the same machine."""

from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep
from typing import Any

# Seconds before every call, ours and theirs: thread pools go on spinning after their work, to the cost of the next one.
_PAUSE = 0.1


def compete(benchmark: Any, case: str, ours: Callable[[], Any], rivals: dict[str, Callable[[], Any]], rounds: int = 7):
    """Time `ours` as the benchmark, and before each of its rounds every rival once.

    The benchmark's extra info gets the case and, by rival, how many times as long it takes as ours: `bench.report`
    makes tables, files and plots of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def run_rivals() -> None:
        for name, rival in rivals.items():
            sleep(_PAUSE)
            start = perf_counter()
            rival()
            seconds[name].append(perf_counter() - start)
        sleep(_PAUSE)

    benchmark.pedantic(ours, setup=run_rivals, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["case"] = case
    if benchmark.stats:  # not with --benchmark-disable
        own = benchmark.stats.stats.median
        # The first of each was the warm-up.
        benchmark.extra_info["ratios"] = {name: median(times[1:]) / own for name, times in seconds.items()}
