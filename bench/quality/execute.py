"""One method on one task of one original: the network it leaves, and what that cost."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality.data.data import Data
from bench.quality.measures import Sets
from bench.quality.methods.method import Method
from bench.quality.networks import Chain
from bench.quality.originals import Trained, trained
from bench.quality.problem import Problem, Rows
from bench.quality.tasks import Task
from bench.quality.training import Recipe


@dataclass(frozen=True)
class Case:
    """A task on an original network, with the network retrained for it."""

    recipe: Recipe
    data: Data
    task: Task
    original: Trained
    retrained: Trained

    @cached_property
    def train(self) -> Rows:
        """The training rows with the labels that the original saw."""
        return _labelled(self.data.train, self.task)

    @cached_property
    def sets(self) -> Sets:
        """Retain and forget, train and test; without kin of the forget rows among the test rows, all are to retain."""
        test = torch.zeros(len(self.data.test), dtype=torch.bool) if self.task.test is None else self.task.test
        gone = self.task.train
        return Sets(self.train[~gone], self.train[gone], self.data.test[~test], self.data.test[test])

    def problem(self, model: nn.Module, before: Tensor, now: Tensor, gone: tuple[int, ...], seed: int) -> Problem:
        """Forget the rows `now`, of a network that has forgotten those `before`."""
        kept = ~(before | now)
        recipe, rows = self.recipe, self.train
        return Problem(
            model,
            rows[kept],
            rows[now],
            self.data.validation,
            self.data.classes,
            gone,
            recipe.rate,
            recipe.batch,
            seed,
            recipe.build,
            self.retrained.model,
        )


def prepare(recipe: Recipe, data: Data, task: Task, seed: int, cache: Path) -> Case:
    """The original and the retrained network of this seed, trained now if they are not in the cache."""
    rows = _labelled(data.train, task)
    original = trained(recipe, rows, data.classes, seed, cache)
    retrained = trained(recipe, rows[~task.train], data.classes, seed, cache)
    return Case(recipe, data, task, original, retrained)


def applies(method: Method, case: Case) -> bool:
    """Whether the method is meant for this task."""
    rows, gone = case.task.rounds[0], case.task.gone[0]
    return method.applies(case.problem(case.original.model, torch.zeros_like(rows), rows, gone, 0))


def _labelled(rows: Rows, task: Task) -> Rows:
    return rows if task.labels is None else Rows(rows.x, task.labels)


@dataclass(frozen=True)
class Result:
    """What a method left and what it cost.

    Wall seconds; those of the request alone, where moments can be there before it; rows looked at; bytes that changed;
    peak memory in MiB.
    """

    model: Chain
    costs: dict[str, float]


def execute(method: Method, case: Case, seed: int, knobs: dict[str, Any]) -> Result:
    """Answer every request of the task, one after another."""
    model = case.original.model
    before = torch.zeros_like(case.task.train)
    gone: tuple[int, ...] = ()
    seconds, prepared, touched = 0.0, 0.0, 0
    _reset_peak()
    started = _resident("VmRSS")
    for rows, classes in zip(case.task.rounds, case.task.gone, strict=True):
        if method.cumulative:
            gone += classes
            problem = case.problem(case.original.model, torch.zeros_like(before), before | rows, gone, seed)
        else:
            problem = case.problem(model, before, rows, classes, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            begin = time.perf_counter()
            model = method.run(problem, **knobs)
            seconds += time.perf_counter() - begin
        before = before | rows
        touched += sum(problem.touched.values())
        prepared += problem.prepared
    peak = _resident("VmHWM") - started
    return Result(
        model,
        {
            "seconds": seconds,
            "request_seconds": seconds - prepared,
            "touched": touched,
            "bytes": changed(case.original.model, model),
            "peak_mib": peak,
        },
    )


def changed(original: Chain, model: Chain) -> int:
    """Bytes of the tensors that are not as they were: what has to be sent to whoever has the original."""
    old = list(original.state_dict().values())  # by value: a map in front of the head renames the block before it
    new = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in old)
    }
    maps = [name for name in new if not name.startswith("fc.")]
    alone = len(maps) <= 3 and len(model.state_dict()) > len(old)  # one map was put in: it folds into the head
    sent = _size(list(new.values()))
    return min(sent, _size(list(model.fc.state_dict().values()))) if alone else sent


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reset_peak() -> None:
    with suppress(OSError):  # the high-water mark then is that of the process
        Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
