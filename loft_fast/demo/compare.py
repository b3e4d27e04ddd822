"""The methods side by side on one problem: each makes a map of features, and all are measured in the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loft_fast.clock import Clock
from loft_fast.demo.cache import Trained
from loft_fast.demo.digits import SITE, Digits, SmallCNN, batches
from loft_fast.evaluate import Evaluation, evaluate
from loft_fast.fetch import fetch_moments
from loft_fast.moments import Moments
from loft_fast.objective import build_objective, pooled
from loft_fast.peers.leace import Leace
from loft_fast.peers.riemannian_adam import descend
from loft_fast.projection import Projection
from loft_fast.unlearn import unlearn

Batches = list[tuple[Tensor, Tensor]]
Stages = dict[str, float]
"""Wall seconds of each stage of a method."""


@dataclass(frozen=True)
class Problem:
    """Which digits go from which network, and at which rank the paper's method works."""

    model: SmallCNN
    digits: Digits
    forget: tuple[int, ...]
    rank: int
    seed: int
    progress: bool = True

    @cached_property
    def sets(self) -> dict[str, Batches]:
        """Loaders of retain/forget x train/test."""
        return {name: batches(x, y) for name, (x, y) in self.digits.split(self.forget).items()}

    def moments(self) -> tuple[Moments, Moments]:
        """Pooled moments of the retain and the forget rows, from a pass over the training data."""
        loaders = self.sets["retain_train"], self.sets["forget_train"]
        retain, forget = (fetch_moments(self.model, part, SITE, progress=self.progress) for part in loaders)
        return pooled("retain", retain), pooled("forget", forget)

    @cached_property
    def known_moments(self) -> tuple[Moments, Moments]:
        """The same, fetched once: for what is not timed."""
        return self.moments()


@dataclass(frozen=True)
class Outcome:
    """A network after a method.

    Attributes:
        method: "original", "retrain" or a name from METHODS.
        model: the network; change: what is done to its features before the head reads them.
        seconds: wall time of all that the method does, passes over the data included.
        stages: the same by stage.
    """

    method: str
    model: SmallCNN
    change: nn.Module
    seconds: float
    stages: Stages
    evaluation: Evaluation

    def predict(self, x: Tensor) -> Tensor:
        """Predicted digits (n,) of images (n, 1, 28, 28)."""
        with torch.inference_mode():
            return self.model.fc(self.change(self.model.features(x))).argmax(1)


Answer = tuple[SmallCNN, nn.Module, Stages]
"""A network, what is done to the features that its head reads, and what that took."""


def paper(problem: Problem) -> Answer:
    """As published: its objective, linear, by Riemannian Adam."""
    clock = Clock()
    retain, forget = problem.moments()
    clock.lap("moments")
    objective = build_objective(retain, forget, about="own")
    descent = descend(objective.retain, objective.forget, problem.rank, seed=problem.seed)
    clock.lap("solve")
    return problem.model, Projection(descent.basis, objective.center, site=SITE), clock.seconds


def leace(problem: Problem) -> Answer:
    """LEACE with one concept per forgotten digit; for a single digit that is "to be forgotten or not"."""
    clock = Clock()
    x, y = problem.digits.train_x, problem.digits.train_y
    with torch.inference_mode():
        features = torch.cat([problem.model.features(part) for part, _ in batches(x, y)])
    clock.lap("features")
    eraser = Leace(features, y.unsqueeze(1) == torch.tensor(problem.forget))
    clock.lap("solve")
    return problem.model, eraser, clock.seconds


def ours(problem: Problem, erase: bool = False) -> Answer:
    """This package's default, folded into a copy of the network."""
    model = copy.deepcopy(problem.model)
    result = unlearn(
        model,
        problem.sets["retain_train"],
        problem.sets["forget_train"],
        SITE,
        fold=True,
        erase=erase,
        progress=problem.progress,
    )
    return model, result.projection, result.seconds


def ours_erase(problem: Problem) -> Answer:
    """Like `ours`, but a linear probe on the features is not to find the forgotten rows either."""
    return ours(problem, erase=True)


METHODS: dict[str, Callable[[Problem], Answer]] = {
    "paper": paper,
    "leace": leace,
    "ours": ours,
    "ours erase": ours_erase,
}


def compare(problem: Problem, original: Trained, retrained: Trained) -> Iterator[Outcome]:
    """The original, the retrained network, and the original after every method; measured against the retrained one."""

    def measured(method: str, model: SmallCNN, change: nn.Module, stages: Stages) -> Outcome:
        evaluation = evaluate(model, problem.sets, site=SITE, projection=change, reference=retrained.model)
        return Outcome(method, model, change, sum(stages.values()), stages, evaluation)

    yield measured("original", original.model, nn.Identity(), {"training": original.seconds})
    yield measured("retrain", retrained.model, nn.Identity(), {"training": retrained.seconds})
    for name, method in METHODS.items():
        yield measured(name, *method(problem))
