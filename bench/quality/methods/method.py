"""What the harness knows of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bench.quality.problem import Problem

Row = dict[str, float]
"""Means of one method on one task: retain_train, forget_train, retain_test, forget_test, mia (percent), seconds, ..."""


@dataclass(frozen=True)
class Method:
    """A way of forgetting.

    Attributes:
        run: (problem, **knobs) -> the network after it, in eval mode; the original is left as it was.
        source: the paper.
        needs: what it looks at.
        search: knob -> values to try, the first being the one to start from.
        random: whether two seeds give two results.
        cumulative: of several requests, every one is answered from the first original, for all rows so far.
        applies: which problems it is meant for.
        claim: what its paper says of it, as we read it, in a sentence that our measures can confirm. Where the paper
            gives a number for other data, or none, the threshold is ours.
        holds: whether it does: given, for one data set and task, the row of means of every method by name.
        claimed_for: the kinds of task of the claim: "class" or "rows".
    """

    run: Callable[..., nn.Module]
    source: str
    needs: str = "retain and forget rows"
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    random: bool = True
    cumulative: bool = False
    applies: Callable[[Problem], bool] = lambda problem: True
    claim: str = ""
    holds: Callable[[dict[str, Row]], bool] | None = None
    claimed_for: tuple[str, ...] = ("class",)


def classes_only(problem: Problem) -> bool:
    """For methods that forget whole classes."""
    return bool(problem.gone)
