"""What is to be forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality.data.data import Data

TUNED_AS = {
    "one class": "several classes",
    "several classes": "several classes",
    "extreme": "extreme",
    "continual": "several classes",
    "sub-group": "sub-group",
    "random 1%": "random 10%",
    "random 10%": "random 10%",
    "hardest": "random 10%",
    "mislabelled": "random 10%",
}
"""The task on whose held-out rows the settings for a task are searched."""
TASKS = tuple(TUNED_AS)
KEPT = 0.2  # share of the classes that stay in the extreme task
ROUNDS = 10  # of the continual task, one class each; fewer where there are not so many
GROUP_SHARE = 0.03  # of the rows: sub-groups are taken, largest first, until they are that many
NOISE = 0.05  # share of the training rows that get a wrong label


@dataclass(frozen=True)
class Task:
    """Which rows go.

    Attributes:
        name: one of TASKS.
        rounds: (n,) bool for each request, over the training rows; all but "continual" have one.
        test: (n,) bool over the test rows; None where a row has no kin there.
        gone: classes of which nothing stays, by request.
        labels: (n,) labels to train the original with, where they are not the true ones.
    """

    name: str
    rounds: tuple[Tensor, ...]
    test: Tensor | None
    gone: tuple[tuple[int, ...], ...]
    labels: Tensor | None = None

    @property
    def train(self) -> Tensor:
        """(n,) bool: the rows that go in all requests together."""
        return torch.stack(self.rounds).any(0)

    @property
    def kind(self) -> str:
        """ "class" or "rows"."""
        return "class" if self.gone[0] else "rows"


def make(name: str, data: Data, hardness: Callable[[], Tensor]) -> Task:
    """The task on this data. `hardness()`: (n,) of the training rows, larger is harder."""
    generator = torch.Generator().manual_seed(len(name))  # any fixed number
    order = torch.randperm(data.classes, generator=generator).tolist()
    if name in ("one class", "several classes", "extreme"):
        count = {
            "one class": 1,
            "several classes": max(2, data.classes // 8),
            "extreme": round((1 - KEPT) * data.classes),
        }
        return _classes(name, data, [tuple(sorted(order[: count[name]]))])
    if name == "continual":
        return _classes(name, data, [(label,) for label in order[: min(ROUNDS, data.classes - 2)]])
    n = len(data.train)
    if name == "sub-group":
        chosen = sub_groups(data)
        return Task(name, (torch.isin(data.group, chosen),), torch.isin(data.group_test, chosen), ((),))
    chosen = torch.zeros(n, dtype=torch.bool)
    if name == "hardest":
        chosen[hardness().argsort(descending=True)[: n // 10]] = True
        return Task(name, (chosen,), None, ((),))
    share = {"random 1%": 0.01, "random 10%": 0.1, "mislabelled": NOISE}[name]
    chosen[torch.randperm(n, generator=generator)[: round(share * n)]] = True
    if name != "mislabelled":
        return Task(name, (chosen,), None, ((),))
    shift = torch.randint(1, data.classes, (n,), generator=generator)
    labels = torch.where(chosen, (data.train.y + shift) % data.classes, data.train.y)
    return Task(name, (chosen,), None, ((),), labels)


def _classes(name: str, data: Data, requests: list[tuple[int, ...]]) -> Task:
    everything = torch.tensor([label for labels in requests for label in labels])
    rounds = tuple(torch.isin(data.train.y, torch.tensor(labels)) for labels in requests)
    return Task(name, rounds, torch.isin(data.test.y, everything), tuple(requests))


def sub_groups(data: Data, which: int = 0) -> Tensor:
    """Sub-groups that are no classes of their own, largest first, until they make up GROUP_SHARE of the rows.

    which: 1 for those that come after, 2 for those after them, and so on.
    """
    count = torch.bincount(data.group)
    of_class = torch.zeros(len(count), data.classes)
    of_class.index_put_((data.group, data.train.y), torch.ones(len(data.group)), accumulate=True)
    whole = torch.bincount(data.train.y, minlength=data.classes)
    usable = (of_class <= 0.8 * whole).all(1) & (count > 0)
    left = torch.where(usable)[0][count[usable].argsort(descending=True, stable=True)]
    for _ in range(which + 1):
        needed = int((count[left].cumsum(0) < GROUP_SHARE * len(data.group)).sum()) + 1
        chosen, left = left[:needed], left[needed:]
    return chosen
