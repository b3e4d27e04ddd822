"""How good is `unseen`? Forecasts for rows that no task of the benchmark forgets, next to networks retrained for it.

python -m bench.quality.forecasts --data debian-sections --count 5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from bench.quality.data import DATA, load
from bench.quality.data.data import Data
from bench.quality.execute import Case, prepare
from bench.quality.measures import accuracy
from bench.quality.methods.match import Loader
from bench.quality.setups import RECIPES
from bench.quality.tasks import Task, sub_groups
from loft_fast import unseen

FIRST = 10  # seed of the first original: the benchmark's own are smaller


def tasks(data: Data, count: int, share: float) -> Iterator[tuple[int, Task]]:
    """(seed of the original, task): sub-groups smaller than the benchmark's, then random samples, `count` of each."""
    for i in range(count):
        chosen = torch.isin(data.group, sub_groups(data, 1 + i))
        if chosen.any():
            yield FIRST + i, Task(f"sub-group {1 + i}", (chosen,), None, ((),))
    for i in range(count):
        chosen = torch.zeros(len(data.train), dtype=torch.bool)
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1000 + i))
        chosen[order[: round(share * len(chosen))]] = True
        yield FIRST + i, Task(f"sample {1 + i}", (chosen,), None, ((),))


def forecast(case: Case, order: int) -> float:
    """Percent of the forget rows expected to be right, with retain rows in the order of this seed."""
    nothing = torch.zeros_like(case.task.train)
    problem = case.problem(case.original.model, nothing, case.task.train, (), order)
    parts = (Loader(problem, part) for part in ("retain", "forget", "validation"))
    return unseen(case.original.model, *parts, progress=False).accuracy


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="debian-sections")
    parser.add_argument("--count", type=int, default=5, help="of sub-groups, and of samples")
    parser.add_argument(
        "--orders", type=int, default=3, help="of the retain rows, which decide what is left out of fits"
    )
    parser.add_argument("--share", type=float, default=0.1, help="of the training rows in a sample")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data, options.cache)
    for network, recipe in RECIPES[options.data].items():
        print(f"{options.data}, {network}    rows  expected retrained     error")
        errors: dict[str, list[float]] = {}
        for seed, task in tasks(data, options.count, options.share):
            case = prepare(recipe, data, task, seed, options.cache / "models")
            truth = accuracy(case.retrained.model, case.sets.forget_train)
            found = [forecast(case, order) for order in range(options.orders)]
            error = mean(abs(one - truth) for one in found)
            errors.setdefault(task.name.split()[0], []).append(error)
            numbers = (mean(found), truth, error)
            print(f"{task.name:24}{int(task.train.sum()):8}" + "".join(f"{number:10.1f}" for number in numbers))
        print("mean error: " + ", ".join(f"{kind}s {mean(some):.1f}" for kind, some in errors.items()))


if __name__ == "__main__":
    main()
