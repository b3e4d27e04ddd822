"""Linear discriminants at several places in a model, which know retain rows alone, and what they say together.

They read random ReLU features of what is there: what is hard for a linear function of the input is not what is hard for
a network. Every fifth row is left out of a fit, and tells what the model's having seen it is worth at that place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from loft_fast.discriminant import linear_discriminant
from loft_fast.errors import InputError
from loft_fast.moments import Moments
from loft_fast.sites import Site

WIDTH = 2048
"""How many random features of a place a discriminant reads; maps are averaged down to no more than that first."""

_AS_GOOD = 1.5  # points of cost: the standard error of an accuracy from some hundred rows
_FOLD, _FOLD_ROWS = 5, 10_000  # every fifth of so many retain rows is left out of the fit, and fewer later on
_NEGLIGIBLE = 0.05  # chance of being the earliest good place: others are not looked at
_SHIFT = 0.3  # of random features, in standard deviations


class Candidate:
    """A discriminant in the making: class sums and moments of random features at one place."""

    def __init__(self, place: Site) -> None:
        self.place = place
        self.count, self.seen = 0, 0
        self.fold: list[tuple[Tensor, Tensor]] = []
        self.scale: Tensor | None = None
        self.mix: Tensor | None = None

    def add(self, features: Tensor | None, labels: Tensor, classes: int) -> None:
        """One batch; a place that the forward pass does not reach is left out."""
        if features is None or not len(features):
            return
        z = self.read(features)
        if not self.count:
            self.moments = Moments(z.shape[1], z.device)
            self.sums = torch.zeros(classes, z.shape[1], dtype=torch.float64, device=z.device)
            self.sizes = torch.zeros(classes, dtype=torch.float64, device=z.device)
        out = _left_out(torch.arange(self.seen, self.seen + len(z), device=z.device))
        self.seen += len(z)
        self.fold.append((z[out], labels[out]))
        z, labels = z[~out], labels[~out]
        self.count += len(z)
        self.moments.update(z)
        self.sums.index_add_(0, labels, z.double())
        self.sizes += torch.bincount(labels, minlength=classes)

    def read(self, features: Tensor) -> Tensor:
        """Random features, (n, WIDTH): relu(x W + shift), x in units of the first batch."""
        if self.scale is None or self.mix is None:
            generator = torch.Generator().manual_seed(0)
            self.scale = features.square().mean().sqrt().clamp_min(1e-30)
            shape = features.shape[1], WIDTH
            mix = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") / shape[0] ** 0.5
            self.mix = mix.to(features)
        return functional.relu(features / self.scale @ self.mix + _SHIFT)

    def knows(self, labels: Tensor) -> bool:
        """Whether there were rows of all these classes."""
        return bool((self.sizes[labels] > 0).all())

    def fit(self, features: dict[Site, Tensor], truth: Tensor) -> Fitted:
        """The discriminant, and how it fares on validation rows: features by place, and labels (n,)."""
        present = self.sizes > 0
        if int(present.sum()) < 2:
            raise InputError(f"retain: got rows of {int(present.sum())} classes, expected at least two")
        means = self.sums[present] / self.sizes[present].unsqueeze(1)
        offsets = means - self.moments.mean
        within = (self.moments.scatter - offsets.T @ (offsets * self.sizes[present].unsqueeze(1))) / self.count
        labels = torch.where(present)[0]
        weight, bias = linear_discriminant(within, means, self.sizes[present], labels, len(present))
        return Fitted(self, weight, bias, features[self.place], truth)


def _left_out(index: Tensor) -> Tensor:
    """Which rows are kept out of the fit: every fifth of the first ten thousand, then 500 for each doubling."""
    octave = (index / _FOLD_ROWS).clamp_min(1).log2().floor()
    return index % torch.where(index < _FOLD_ROWS, _FOLD, 4 * _FOLD * 2**octave) == 0


class Fitted:
    """A discriminant: where it reads, its leads on rows that the model saw and it did not, and what it is worth."""

    def __init__(self, source: Candidate, weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> None:
        self.place, self.source = source.place, source
        self.weight, self.bias = weight, bias
        fold, truth = (torch.cat(column) for column in zip(*source.fold, strict=True))
        self.left_out = leads(fold.double() @ weight.T + bias, truth)
        fresh = leads(self.scores(features), labels)
        self.sorted = self.left_out.sort().values
        self.wrong = float((self.left_out < 0).double().mean())
        self.accuracy, self.contamination = percent(fresh > 0), 100 * (1 - self.wrong) - percent(fresh > 0)
        self.cost = max(0.0, self.contamination) - self.accuracy

    def scores(self, features: Tensor) -> Tensor:
        """(n, classes) in float64."""
        return self.source.read(features).double() @ self.weight.T + self.bias

    def ranks(self, found: Tensor) -> Tensor:
        """What share of the left-out rows has smaller leads than these, (n,)."""
        return torch.searchsorted(self.sorted, found) / len(self.sorted)


class Voters:
    """Discriminants by weight, all alike if none is given: the mean of their ranks, ranked among the left-out rows."""

    def __init__(self, parts: list[Fitted], weights: list[float] | None = None) -> None:
        self.parts = parts
        chances = torch.tensor(weights or [1.0] * len(parts), dtype=torch.float64)
        self.weights = (chances / chances.sum()).to(parts[0].sorted.device)
        self.sorted = self._mean([one.ranks(one.left_out) for one in parts]).sort().values

    def judge(self, labels: Tensor, features: list[dict[Site, Tensor]]) -> tuple[Tensor, Tensor, float]:
        """Ranks (n,) of the rows in [0, 1], log-probabilities (n, classes) of other classes, and the share right."""
        votes, others, right = [], [], []
        for one in self.parts:
            scores = torch.cat([one.scores(batch[one.place]) for batch in features])
            found = leads(scores, labels)
            votes.append(one.ranks(found))
            others.append(without(scores, labels))
            right.append((found >= 0).double().mean())
        ranks = torch.searchsorted(self.sorted, self._mean(votes)) / len(self.sorted)
        mixed = (torch.stack(others) + self.weights.log().view(-1, 1, 1)).logsumexp(0)
        return ranks, mixed, float(self._mean(right))

    def _mean(self, values: list[Tensor]) -> Tensor:
        return self.weights @ torch.stack(values).to(self.weights)


def fit(candidates: list[Candidate], features: dict[Site, Tensor], labels: Tensor) -> list[Fitted]:
    """The discriminants, in the order of the model, and how they fare on validation rows."""
    fitted = [candidate.fit(features, labels) for candidate in candidates if candidate.count]
    if not fitted:
        raise InputError("retain: it yielded no rows at any of the sites, expected at least one batch")
    return fitted


def best(fitted: list[Fitted], within: float = _AS_GOOD) -> list[Fitted]:
    """The discriminants, the best first, whose cost is within so many points of its."""
    least = min(one.cost for one in fitted)
    return sorted((one for one in fitted if one.cost <= least + within), key=lambda one: one.cost)


def earliest(fitted: list[Fitted], right: Tensor) -> Voters:
    """The first that does about as well as the model, and on rows that the model saw no better; else the best.

    Which that is, some hundred validation rows, right or not by the model (n,), cannot tell for certain: each counts by
    the probability that it is the one.
    """
    rows = len(right)
    chances, left = list[float](), 1.0
    for one in fitted:
        chance = 0.0
        if one.contamination <= 3 * _standard_error(one.accuracy, rows):
            reached = one.accuracy + one.contamination
            error = math.hypot(_standard_error(reached, len(one.left_out)), _standard_error(percent(right), rows))
            chance = left * (1 + math.erf((reached - percent(right) + _AS_GOOD) / max(error, 1e-9) / 2**0.5)) / 2
        chances.append(chance)
        left -= chance
    chances[fitted.index(best(fitted)[0])] += left
    likely = [i for i, chance in enumerate(chances) if chance > _NEGLIGIBLE]
    return Voters([fitted[i] for i in likely], [chances[i] for i in likely])


def leads(scores: Tensor, labels: Tensor) -> Tensor:
    """Score of the true class less that of the best other one, (n,), in float64: positive where a row is right."""
    true = labels.unsqueeze(1)
    scores = scores.double()
    return (scores.gather(1, true) - scores.scatter(1, true, -torch.inf).amax(1, keepdim=True)).squeeze(1)


def without(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (n, classes) of the classes that are not a row's own, were it none of that."""
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).log_softmax(1)


def _standard_error(share: float, rows: int) -> float:
    """Of a percentage that was counted among so many rows."""
    return (share * (100 - share) / rows) ** 0.5


def percent(right: Tensor) -> float:
    """Of rows (n,) that are right or not."""
    return 100 * float(right.double().mean())
