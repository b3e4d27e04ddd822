"""Tasks x methods x originals x seeds; every run is kept as it ends, and a second start goes on from there.

python -m bench.quality.run --data mnist-5000 debian-sections --originals 0 1 2 --seeds 0 1
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.quality import store, tune
from bench.quality.data import DATA, load
from bench.quality.data.data import Data
from bench.quality.execute import Case, Result, applies, execute, prepare
from bench.quality.measures import Seen, accuracy, likeness, lira, probes, relearning
from bench.quality.methods import METHODS, RETRAIN, RETRAIN_AGAIN
from bench.quality.originals import hardness, shadows, trained
from bench.quality.setups import RECIPES
from bench.quality.tasks import TASKS, Task, make
from bench.quality.training import Recipe

AGAIN = 50  # added to the seed of a second retrained network: how far apart are two of them?
REGAINED = 0.9  # of the original's accuracy on the forget rows: what relearning goes for


class Bench:
    """All cases of one network on one data set."""

    def __init__(self, data: Data, network: str, cache: Path) -> None:
        self.data, self.network, self.cache = data, network, cache / "models"
        self.recipe: Recipe = RECIPES[data.name][network]
        self.tuned = tune.read()

    @cached_property
    def shadows(self) -> tuple[torch.Tensor, list[Any]]:
        """For the likelihood-ratio attack."""
        return shadows(self.recipe, self.data.train, self.data.classes, self.cache)

    def task(self, name: str) -> Task:
        """The task on this data."""
        return make(name, self.data, lambda: hardness(self.recipe, self.data, self.cache))

    def case(self, task: Task, original: int) -> Case:
        """Its networks."""
        return prepare(self.recipe, self.data, task, original, self.cache)

    def run(self, case: Case, name: str, original: int, seed: int, reference: Seen) -> dict[str, Any]:
        """One method, measured."""
        settings: dict[str, Any] = {}
        if name == RETRAIN:
            result = Result(case.retrained.model, _training_costs(case, case.retrained.seconds))
        elif name == RETRAIN_AGAIN:
            rows = case.train[~case.task.train]
            again = trained(self.recipe, rows, self.data.classes, original + AGAIN, self.cache)
            result = Result(again.model, _training_costs(case, again.seconds))
        else:
            method = METHODS[name]
            settings = tune.knobs(self.tuned, self.data.name, self.network, case.task.name, name, method)
            result = execute(method, case, seed, settings)
        measured: dict[str, Any] = likeness(Seen.of(result.model, case.sets), reference)
        if seed == 0:
            measured |= self.deeper(case, result.model)
        about = {"data": self.data.name, "version": self.data.version, "model": self.network, "task": case.task.name}
        about |= {"method": name, "original": original, "seed": seed}
        return {**about, "knobs": settings, **measured, **result.costs}

    def deeper(self, case: Case, model: Any) -> dict[str, Any]:
        """The measures that take longer: once for each original."""
        if case.task.kind == "class":
            level = REGAINED * accuracy(case.original.model, case.sets.forget_train)
            return {
                "probes": probes(model, case.sets),
                "relearn": relearning(model, case.sets, self.recipe.rate / 10, level),
            }
        if case.task.labels is None:
            inside, models = self.shadows
            return {"lira": lira(models, inside, self.data.train, case.task.train, model)}
        return {}


def _training_costs(case: Case, seconds: float) -> dict[str, float]:
    rows = int((~case.task.train).sum()) * case.recipe.epochs
    size = sum(tensor.numel() * tensor.element_size() for tensor in case.original.model.state_dict().values())
    return {"seconds": seconds, "touched": rows, "bytes": size}


def wanted(names: list[str], originals: list[int], seeds: list[int]) -> Iterator[tuple[int, str, int]]:
    """(original, method, seed) of all runs; what is not random runs once."""
    for original in originals:
        for name in names:
            once = name in (RETRAIN, RETRAIN_AGAIN) or not METHODS[name].random
            for seed in seeds[:1] if once else seeds:
                yield original, name, seed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [RETRAIN, RETRAIN_AGAIN, *METHODS]
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--models", nargs="+", help="only these networks")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything)
    parser.add_argument("--originals", nargs="+", type=int, default=[0, 1, 2], help="independently trained networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of unlearning, for each of them")
    parser.add_argument("--again", action="store_true", help="run also what was run before")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=1, help="of torch; the networks are small")
    parser.add_argument("--file", type=Path, default=store.RUNS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = [] if options.again else store.read_runs(options.file)
    for data_name in options.data:
        data = load(data_name, options.cache)
        done = {store.key(record) for record in known if record.get("version") == data.version}
        for network in RECIPES[data_name]:
            if options.models and network not in options.models:
                continue
            bench = Bench(data, network, options.cache)
            for task_name in options.tasks:
                task = bench.task(task_name)
                left = [
                    (original, name, seed)
                    for original, name, seed in wanted(options.methods, options.originals, options.seeds)
                    if (data_name, network, task_name, name, original, seed) not in done
                ]
                _run_all(bench, task, left, options.file)


def _run_all(bench: Bench, task: Task, left: list[tuple[int, str, int]], file: Path) -> None:
    case, reference, current = None, None, None
    for original, name, seed in tqdm(left, desc=f"{bench.data.name} {bench.network}: {task.name}"):
        if original != current:
            case, current = bench.case(task, original), original
            reference = Seen.of(case.retrained.model, case.sets)
        assert case is not None
        assert reference is not None
        if name in METHODS and not applies(METHODS[name], case):
            continue
        store.add_run(bench.run(case, name, original, seed, reference), file)


if __name__ == "__main__":
    main()
