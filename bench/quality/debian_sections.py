"""Forgetting on Debian's package descriptions: frozen MiniLM, trained classifier, 32 sections.

python -m bench.quality.debian_sections --tasks one four most subgroup --seeds 0 1 2 --json results.json
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from bench.quality.classifier import Classifier, train
from bench.quality.measures import Rows, measure
from bench.quality.methods import METHODS, Problem
from bench.quality.packages import sample
from bench.quality.results import Run, summarise, table, write
from bench.quality.sentences import embed
from bench.quality.tasks import TASKS, Task, tasks

Splits = tuple[Tensor, Tensor, Tensor, Tensor]  # X_train, y_train, X_test, y_test
DATA, MODEL = "debian-sections", "MiniLM + MLP 384-512-256-32"


def load(cache: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str], list[str], list[str]]:
    """X_train, y_train, X_test, y_test, section names, maintainers of the train rows, maintainers of the test rows."""
    packages = sample()
    names = sorted({package.section for package in packages})
    x = embed([package.text for package in packages], cache)
    y = torch.tensor([names.index(package.section) for package in packages])
    rows = np.arange(len(packages))
    fit, held = (np.sort(part) for part in train_test_split(rows, test_size=0.2, random_state=0, stratify=y))
    maintainers, maintainers_test = ([packages[i].maintainer for i in part] for part in (fit, held))
    return x[fit], y[fit], x[held], y[held], names, maintainers, maintainers_test


def compare(splits: Splits, task: Task, model: Classifier, seed: int, methods: list[str]) -> Iterator[Run]:
    """The retrained model, then every method, on one task of one original model."""
    x, y, _, _ = splits
    start = time.perf_counter()
    fresh = train(x[~task.train], y[~task.train], model.head.out_features, seed)
    retrain_seconds = time.perf_counter() - start
    retrained = measure(*_rows(fresh, splits, task), fresh.head)
    yield Run(task.name, "retrain", seed, retrained, retrained, retrain_seconds, retrain_seconds)

    fit, held = _rows(model, splits, task)
    for method in methods:
        start = time.perf_counter()
        change = METHODS[method](Problem(fit.z, fit.y, fit.forget, model.head, seed))
        seconds = time.perf_counter() - start
        score = measure(replace(fit, z=change(fit.z)), replace(held, z=change(held.z)), model.head)
        yield Run(task.name, method, seed, score, retrained, seconds, retrain_seconds)


@torch.no_grad()
def _rows(model: Classifier, splits: Splits, task: Task) -> tuple[Rows, Rows]:
    x, y, x_test, y_test = splits
    return Rows(model.body(x), y, task.train), Rows(model.body(x_test), y_test, task.test)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one original model each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=1, help="of torch; the layers are too small to gain from more")
    options = parser.parse_args()

    x, y, x_test, y_test, names, maintainers, maintainers_test = load(options.cache)
    torch.set_num_threads(options.threads)
    every = tasks(y, y_test, names, maintainers, maintainers_test)
    models = {seed: train(x, y, len(names), seed) for seed in tqdm(options.seeds, desc="originals")}
    for name in options.tasks:
        runs: list[Run] = []
        for seed in tqdm(options.seeds, desc=name, leave=False):
            runs += compare((x, y, x_test, y_test), every[name], models[seed], seed, options.methods)
        rows = summarise(runs, DATA, MODEL)
        print(table(rows), flush=True)
        if options.json:
            write(rows, options.json)


if __name__ == "__main__":
    main()
