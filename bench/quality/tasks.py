"""What is to be forgotten: whole sections (classes), or the rows of a few maintainers (a sub-group across classes)."""

from collections import Counter, defaultdict
from typing import NamedTuple

import torch

TASKS = ("one", "four", "most", "subgroup")
FOUR, KEPT = ("games", "graphics", "sound", "x11"), 8
PEOPLE, LARGEST_SHARE = 3, 0.8  # a maintainer with all rows in one section would be a class again


class Task(NamedTuple):
    """Which rows go: `train` and `test` are boolean masks, True for a row to forget."""

    name: str
    forgets: list[str]
    train: torch.Tensor
    test: torch.Tensor


def tasks(
    y_train: torch.Tensor,
    y_test: torch.Tensor,
    names: list[str],
    maintainers_train: list[str],
    maintainers_test: list[str],
) -> dict[str, Task]:
    """one: games; four: four sections; most: all but the smallest eight; subgroup: rows of three large maintainers."""
    size = Counter(names[label] for label in y_train.tolist())
    largest = sorted(names, key=lambda name: (-size[name], name))
    sections = {"one": ["games"], "four": list(FOUR), "most": sorted(largest[:-KEPT])}
    found = {}
    for task, gone in sections.items():
        labels = torch.tensor([names.index(name) for name in gone])
        found[task] = Task(task, gone, torch.isin(y_train, labels), torch.isin(y_test, labels))
    people = _spread_maintainers(y_train, maintainers_train)
    masks = [torch.tensor([one in people for one in rows]) for rows in (maintainers_train, maintainers_test)]
    return found | {"subgroup": Task("subgroup", people, *masks)}


def _spread_maintainers(y: torch.Tensor, maintainers: list[str]) -> list[str]:
    """The maintainers with the most rows among those whose largest section holds at most `LARGEST_SHARE` of them."""
    rows: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for one, label in zip(maintainers, y.tolist(), strict=True):
        rows[one][label] += 1
    spread = [one for one, count in rows.items() if max(count.values()) <= LARGEST_SHARE * count.total()]
    return sorted(spread, key=lambda one: (-rows[one].total(), one))[:PEOPLE]
