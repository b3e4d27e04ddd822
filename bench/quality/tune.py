"""Search the settings of every method: the same number of trials each, on held-out training rows of another original.

python -m bench.quality.tune --data mnist-5000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.quality import store
from bench.quality.data import DATA, load
from bench.quality.execute import Case, applies, execute, prepare
from bench.quality.measures import Seen, gap
from bench.quality.methods import METHODS
from bench.quality.methods.method import Method
from bench.quality.originals import hardness
from bench.quality.setups import RECIPES
from bench.quality.tasks import TUNED_AS, make

TRIALS, SEED = 6, 100

Tuned = dict[str, dict[str, Any]]
"""By "data/model/task/method": the knobs that came nearest to the retrained network, and all that were tried."""


def place(data: str, network: str, task: str, method: str) -> str:
    """The key in the file of tuned settings."""
    return "/".join((data, network, TUNED_AS[task], method))


def read(path: Path = store.TUNED) -> Tuned:
    """What was found so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def knobs(tuned: Tuned, data: str, network: str, task: str, name: str, method: Method) -> dict[str, Any]:
    """The tuned settings, or the first of each knob where nothing was tuned."""
    found = tuned.get(place(data, network, task, name))
    return found["knobs"] if found else {knob: values[0] for knob, values in method.search.items()}


def candidates(method: Method) -> Iterator[dict[str, Any]]:
    """The setting to start from, then others drawn from the grid without repetition, TRIALS in all at most."""
    grid = [dict(zip(method.search, values, strict=True)) for values in itertools.product(*method.search.values())]
    rest = grid[1:]
    random.Random(0).shuffle(rest)
    return iter([grid[0], *rest[: TRIALS - 1]])


def search(method: Method, case: Case, retrained: Seen) -> dict[str, Any]:
    """The candidate whose network is nearest to the retrained one."""
    tried = []
    for setting in candidates(method):
        result = execute(method, case, SEED, setting)
        distance = gap(Seen.of(result.model, case.sets), retrained)
        tried.append({"knobs": setting, "gap": round(distance, 3)})
    best = min(tried, key=lambda one: one["gap"])
    return {"knobs": best["knobs"], "gap": best["gap"], "tried": tried}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--models", nargs="+", help="only these networks")
    parser.add_argument("--tasks", nargs="+", choices=set(TUNED_AS.values()), default=sorted(set(TUNED_AS.values())))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--again", action="store_true", help="search also what was searched before")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, default=store.TUNED)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.data:
        data = load(name, options.cache).held_out()
        for network, recipe in RECIPES[name].items():
            if options.models and network not in options.models:
                continue
            for task_name in options.tasks:
                task = make(task_name, data, lambda: hardness(recipe, data, options.cache / "models"))  # noqa: B023
                left = [
                    method
                    for method in options.methods
                    if METHODS[method].search
                    and (options.again or place(name, network, task_name, method) not in read(options.file))
                ]
                if not left:
                    continue
                case = prepare(recipe, data, task, SEED, options.cache / "models")
                retrained = Seen.of(case.retrained.model, case.sets)
                for method in tqdm(left, desc=f"{name} {network}: {task_name}", leave=False):
                    if applies(METHODS[method], case):
                        found = search(METHODS[method], case, retrained)
                        key = place(name, network, task_name, method)
                        store.write_json(read(options.file) | {key: found}, options.file)
                        tqdm.write(f"{key}: gap {found['gap']} with {found['knobs']}")


if __name__ == "__main__":
    main()
