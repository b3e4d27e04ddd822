"""How hard to push, from moments and head alone, with no data: predict accuracies, take the mildest that will do.

Rows of each group are taken to be Gaussian with the group's mean and covariance (`gaussians`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loft_fast.discriminant import linear_discriminant
from loft_fast.eraser import Eraser, least_change
from loft_fast.errors import InputError
from loft_fast.frontier import Frontier, Point
from loft_fast.gaussians import Gaussians
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.heads import linear_head, read_directions, with_closed
from loft_fast.moments import Moments

DEFAULT_ANGLE = 0.3
"""Radians; for where nothing can be predicted. It forgets single classes fully, at next to no cost to the others."""

_LADDER = [0.05 * 1.5**i for i in range(9)]  # 0.05 to 1.28 radians
_TOLERANCE = 0.25  # points of predicted accuracy within which two angles count as equal
_CLOSED_COST = 0.1  # points that a projection may cost which is not what makes the head forget


@dataclass(frozen=True)
class Choice:
    """A subspace, where its dropped coordinates are pinned, the reason, and the accuracies predicted (percent).

    basis, lift: what is kept of the subspace, and where it is put back; all of it, and where it was, unless erasing,
    which keeps only what the open outputs tell apart.
    """

    point: Point
    basis: Tensor
    center: Tensor
    why: str
    predicted: dict[str, float]
    lift: Tensor | None = None
    eraser: Eraser | None = None


def choose_angle(
    frontier: Frontier,
    retain: Moments | GroupedMoments,
    forget: Moments | GroupedMoments,
    head: nn.Module,
    erase: bool,
    close: bool,
) -> Choice:
    """The mildest angle on a ladder at which the head is predicted to have forgotten, plus a margin.

    A group that retain does not have is forgotten at accuracy 0. A group of which retain has other rows is forgotten
    when its accuracy falls to what a linear discriminant refitted on the retain moments alone would reach.
    With `close`, the outputs of the former will be closed: they are forgotten at any angle, and the angle ends where it
    costs the retain groups more than a tenth of a point. With `erase`, no angle but an eraser, which blinds every
    linear probe, of rows within classes every one that knows the class; inside the mildest subspace at which the head
    forgets, where it would not by the eraser alone.

    Raises:
        InputError: moments are not grouped, keys are not outputs of the head, or the head does not fit the features.
    """
    forecast = _Forecast(frontier, retain, forget, head, close)
    return forecast.erased() if erase else forecast.mildest()


@dataclass(frozen=True)
class _Rung:
    """What is predicted at one angle, of the head as it is. cost: retain errors plus distance to the forget target."""

    cost: float
    basis: Tensor
    center: Tensor
    retain: float
    forget: float


class _Forecast:
    """Predicted accuracies along a ladder of angles; every rung is solved once, the chosen one again in float64."""

    def __init__(
        self,
        frontier: Frontier,
        retain: Moments | GroupedMoments,
        forget: Moments | GroupedMoments,
        head: nn.Module,
        close: bool = False,
    ) -> None:
        self.frontier = frontier
        center = frontier.objective.center
        self.head = self.final_head = linear_head(head, frontier.objective.dim, center.device)
        outputs = len(self.head[0])
        kept, gone = _grouped("retain", retain, outputs), _grouped("forget", forget, outputs)
        closed = [int(key) for key in gone if key not in kept] if close else []
        if closed:
            self.final_head = with_closed(*self.head, closed)
        self.forgets_anyway = len(closed) == len(gone)
        self.retain_total, self.forget_total = kept.total(), gone.total()
        self.retain_rows, self.forget_rows = Gaussians(kept, outputs), Gaussians(gone, outputs)
        self.offsets = _offsets(kept, gone)
        self.target = 0.0
        if any(key in kept for key in gone):
            weight, bias = _discriminant(kept, self.head[0])
            (self.target,) = self.forget_rows.accuracies(weight, [bias])
        # Dropped coordinates are the same for every row, whatever value they are pinned at. The head was fitted around
        # the mean of all rows; pinned as far beyond the retain mean as that lies before it, they offset what the head
        # expects of forget rows. It matters when most of the data goes.
        share = gone.count / (gone.count + kept.count)
        self.centers = [center, center + share * (self.retain_total.mean - self.forget_total.mean)]
        self.rungs: dict[int, _Rung] = {}

    def at(self, index: int) -> _Rung:
        """The prediction at one rung, at whichever centre is better (the plain one unless it is clearly worse)."""
        if index not in self.rungs:
            basis = self.frontier.rough_basis(_LADDER[index])
            plain, pinned = (
                _Rung(100 - retain + abs(forget - self.target), basis, center, retain, forget)
                for center, (retain, forget) in zip(
                    self.centers, self.accuracies(self.head, basis, self.centers), strict=True
                )
            )
            self.rungs[index] = pinned if pinned.cost < plain.cost - _TOLERANCE else plain
        return self.rungs[index]

    def final(self, index: int) -> tuple[float, float]:
        """Retain and forget accuracy at one rung, with the outputs closed that will be."""
        rung = self.at(index)
        if self.final_head is self.head:
            return rung.retain, rung.forget
        return self.accuracies(self.final_head, rung.basis, [rung.center])[0]

    def accuracies(
        self, head: tuple[Tensor, Tensor], basis: Tensor, centers: list[Tensor], lift: Tensor | None = None
    ) -> list[tuple[float, float]]:
        """What a head makes of retain and forget rows projected onto this basis about each of these centres."""
        weight = (head[0] @ (basis if lift is None else lift)) @ basis.T
        biases = [head[1] + (head[0] - weight) @ center for center in centers]
        retain, forget = (rows.accuracies(weight, biases) for rows in (self.retain_rows, self.forget_rows))
        return list(zip(retain, forget, strict=True))

    def mildest(self) -> Choice:
        """The mildest angle that will do.

        A head with closed outputs forgets by itself. The projection then takes out of the features what the retain
        rows can spare, which is little where the classes crowd the dimensions.
        """
        first = index = self.first()
        if self.forgets_anyway:
            weight, bias = self.final_head
            (untouched,) = self.retain_rows.accuracies(weight, [bias])
            while index and self.final(index)[0] < untouched - _CLOSED_COST:
                index -= 1
        if index < first:
            why = "the strongest angle predicted to cost the retain set at most a tenth of a point; outputs are closed"
            return self.choice(index, why)
        return self.choice(index, "the mildest angle predicted to forget, from moments and head, with a margin")

    def first(self) -> int:
        """The first rung on the plateau of least cost, or one further as a margin if that is as good."""
        top = len(_LADDER) - 1
        low, high = 0, top - 2
        floor = min(self.at(high).cost, self.at(high - 1).cost)
        if self.at(high - 1).cost > floor + _TOLERANCE:  # still falling: down to where it no longer does
            while high < top and self.at(high + 1).cost < self.at(high).cost - _TOLERANCE:
                high += 1
            low = high
        while low < high:
            middle = (low + high) // 2
            cost = self.at(middle).cost
            floor = min(floor, cost)
            low, high = (low, middle) if cost <= floor + _TOLERANCE else (middle + 1, high)
        if high < top and self.at(high + 1).cost <= self.at(high).cost + _TOLERANCE:
            high += 1
        return high

    def erased(self) -> Choice:
        """The eraser of all features; of those that the mildest angle leaves, if the head forgets by that alone."""
        choice = self.blinded(None, "no linear probe finds the forget rows any more")
        if self.forgets_anyway:
            return choice
        basis = self.frontier.at(_LADDER[self.first()]).basis
        if basis.shape[1] <= self.offsets.shape[1]:
            return choice
        inside = self.blinded(
            basis, "within the mildest angle predicted to forget, no linear probe finds them any more"
        )
        return inside if self.cost(inside) < self.cost(choice) - _TOLERANCE else choice

    def cost(self, choice: Choice) -> float:
        """Retain errors plus distance to the forget target, as predicted."""
        return 100 - choice.predicted["retain accuracy"] + abs(choice.predicted["forget accuracy"] - self.target)

    def blinded(self, within: Tensor | None, why: str) -> Choice:
        """The eraser of these features, and what the open outputs read of what it leaves."""
        objective, weight = self.frontier.objective, self.final_head[0]
        eraser = least_change(objective.retain, self.offsets, within)
        ((retain, forget),) = self.accuracies(self.final_head, eraser.basis, [objective.center], eraser.lift)
        read = read_directions(weight @ eraser.lift)
        why = f"{why}; what no output reads is dropped"
        point = self.frontier.measured(eraser.basis)
        predicted = self.summary(retain, forget, eraser.basis)
        return Choice(point, eraser.basis @ read, objective.center, why, predicted, eraser.lift @ read, eraser)

    def choice(self, index: int, why: str) -> Choice:
        """A rung, solved once more in float64."""
        rung, point = self.at(index), self.frontier.at(_LADDER[index])
        return Choice(point, point.basis, rung.center, why, self.summary(*self.final(index), rung.basis))

    def summary(self, retain: float, forget: float, basis: Tensor) -> dict[str, float]:
        """What a certificate says of predictions."""
        return {
            "retain accuracy": retain,
            "forget accuracy": forget,
            "forget target": self.target,
            "probe AUC": self.probe_auc(basis),
        }

    def probe_auc(self, basis: Tensor) -> float:
        """AUC of the best linear probe between two Gaussians with the pooled retain and forget moments, projected."""
        within = self.retain_total.covariance(0) + self.forget_total.covariance(0)
        spread = basis.T @ within @ basis
        offset = basis.T @ (self.forget_total.mean - self.retain_total.mean)
        spread.diagonal().add_((1e-6 * spread.trace() / len(spread)).clamp_min(1e-300))  # a dead unit varies in neither
        direction = torch.linalg.solve(spread, offset)
        z = float(direction @ offset) / math.sqrt(max(float(direction @ spread @ direction), 1e-300))
        return (1 + math.erf(z / math.sqrt(2))) / 2


def _offsets(kept: GroupedMoments, gone: GroupedMoments) -> Tensor:
    """(d, 1 or 2): of the classes that go, from all that stays; of rows within classes, from the rest of these."""
    shared = [key for key in gone if key in kept]
    columns = []
    if len(shared) < len(gone):
        columns.append(gone.without(shared).total().mean - kept.total().mean)
    if shared:
        inside = sum(gone[key].count * (gone[key].mean - kept[key].mean) for key in shared)
        columns.append(torch.as_tensor(inside) / gone.select(shared).count)
    return torch.stack(columns, dim=1)


def _discriminant(groups: GroupedMoments, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear discriminant fitted to group moments; outputs without a group are never chosen."""
    keys = groups.keys()
    within = torch.stack([groups[key].scatter for key in keys]).sum(0) / groups.count
    means = torch.stack([groups[key].mean for key in keys])
    counts = torch.tensor([groups[key].count for key in keys]).to(like)
    index = torch.tensor([int(key) for key in keys], device=like.device)
    return linear_discriminant(within, means, counts, index, len(like))


def _grouped(name: str, moments: Moments | GroupedMoments, outputs: int) -> GroupedMoments:
    if not isinstance(moments, GroupedMoments):
        raise InputError(f"{name}: got ungrouped Moments, expected GroupedMoments by class to predict with the head")
    moments = moments.select([key for key in moments if moments[key].count])
    wrong = next((key for key in moments if not (isinstance(key, int) and 0 <= key < outputs)), None)
    if wrong is not None:
        raise InputError(f"{name}: got the group {wrong!r}, expected output indices of the head, 0 to {outputs - 1}")
    return moments
