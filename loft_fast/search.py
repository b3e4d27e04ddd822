"""The search for the angle at which a goal has its optimum, at one rank, over all ranks, or for the smallest that does.

Each solve proves a lower bound and yields a candidate; they close in on each other until the gap is within tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loft_fast import newton, purified
from loft_fast.errors import InputError
from loft_fast.frontier import Frontier, Point
from loft_fast.goals import Goal
from loft_fast.projection import Certificate

_TINY_LOSS = 1e-9  # a millionth of it is what rounding does to a loss of order one
_MAX_SOLVES = 64


@dataclass(frozen=True)
class Optimum:
    """The best subspace found, its loss, and the largest lower bound seen."""

    point: Point
    loss: float
    bound: float

    @property
    def relative_gap(self) -> float:
        """(loss - bound) / loss. Of a loss that is no number neither is the gap."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(self.loss, _TINY_LOSS)

    def certificate(
        self, goal: str, why: str, eigen_solves: int, seconds: float, predicted: dict[str, float] | None = None
    ) -> Certificate:
        """What is known about it, with what it cost."""
        point = self.point
        return Certificate(
            goal=goal,
            why=why,
            loss=self.loss,
            lower_bound=self.bound,
            relative_gap=self.relative_gap,
            retain_kept=point.retain_kept,
            forget_kept=point.forget_kept,
            rank=point.rank,
            angle=point.angle,
            eigen_solves=eigen_solves,
            seconds=seconds,
            predicted=predicted or {},
        )


def optimum(frontier: Frontier, goal: Goal, rank: int, tolerance: float, start: float | None = None) -> Optimum:
    """The optimum of `goal` at one rank."""
    return searched([frontier], goal, rank, tolerance, start)[0].result()


def searched(
    frontiers: list[Frontier], goal: Goal, rank: int | None, tolerance: float, start: float | None = None
) -> list[_Search]:
    """The searches of problems of one size: all together in float32, then each for itself where that fell short.

    rank=None relaxes the rank and stops between two neighbouring ones. `start`: an angle to begin at.
    """
    searches = [_Search(goal, tolerance) for _ in frontiers]
    angles = [math.pi / 4 if start is None else start] * len(frontiers)

    def offer(i: int, angle: float, point: Point | None) -> bool:
        angles[i] = angle
        frontiers[i].eigen_solves += 1
        if point is not None:
            searches[i].take(point)
        return point is not None and searches[i].done

    if rank is not None and goal.reach:
        objectives = [frontier.objective for frontier in frontiers]
        method = purified if purified.pays(objectives[0]) else newton
        method.search(objectives, goal, rank, offer, start)
    for search, frontier, angle in zip(searches, frontiers, angles, strict=True):
        if search.best is None or not search.done:
            _bracket(search, frontier, rank, angle)
    return searches


def _bracket(search: _Search, frontier: Frontier, rank: int | None, angle: float) -> None:
    """Safeguarded secant on the goal's residual inside a bracket of angles, from an angle that may be near the optimum.

    Where the residual jumps across zero the frontier has a flat side: the normal of the chord between both ends is its
    angle, and the geodesic between their subspaces reaches every point of it.
    """
    for count in range(_MAX_SOLVES):
        search.add(frontier.at(angle, rank))
        following = search.next_angle(count)
        low, high = search.low, search.high
        if search.done or (rank is None and low is not None and high is not None and low.rank - high.rank <= 1):
            break
        stuck = following == angle
        if rank is not None and low is not None and high is not None and (stuck or (count >= 5 and count % 2)):
            search.consider(frontier.between(low, high, search.goal.loss))
        if search.done or stuck:
            break
        angle = following


class _Search:
    """A bracket of angles around the optimum, the best subspace and the best bound so far."""

    def __init__(self, goal: Goal, tolerance: float) -> None:
        self.goal, self.tolerance = goal, tolerance
        self.start, self.end = 0.0, math.pi / 2
        self.low: Point | None = None  # the last extreme point below the optimum, and its residual
        self.high: Point | None = None
        self.last: Point | None = None
        self.low_residual = self.high_residual = 0.0
        self.best: Point | None = None
        self.loss, self.bound = math.inf, 0.0

    def take(self, point: Point) -> None:
        """Take in a point whose support is proven: bound, candidate."""
        self.bound = max(self.bound, self.goal.bound(point.angle, point.support))
        self.consider(point)

    def add(self, point: Point) -> None:
        """Take in an extreme point: bound, candidate, bracket."""
        self.take(point)
        residual = self.goal.residual(point.angle, point.retain_kept, point.forget_kept)
        # Illinois: an end that stays while the other moves twice loses half its weight, or the secant creeps.
        if residual >= 0:
            self.high_residual /= 2 if self.last is self.low else 1
            self.low, self.low_residual, self.start = point, residual, max(self.start, point.angle)
            if self.goal.reach:
                self.end = min(self.end, point.angle + residual)
        else:
            self.low_residual /= 2 if self.last is self.high else 1
            self.high, self.high_residual, self.end = point, residual, min(self.end, point.angle)
            if self.goal.reach:
                self.start = max(self.start, point.angle + residual)
        self.last = point

    def consider(self, point: Point) -> None:
        """Take in a candidate."""
        loss = self.goal.loss(point.retain_kept, point.forget_kept)
        if self.best is None or loss < self.loss or math.isnan(self.loss):
            self.best, self.loss = point, loss

    @property
    def done(self) -> bool:
        return self.result().relative_gap <= self.tolerance

    def result(self) -> Optimum:
        assert self.best is not None
        # Bound and loss are rounded separately; a bound above the loss is rounding.
        return Optimum(self.best, self.loss, min(self.bound, self.loss))

    def next_angle(self, count: int) -> float:
        """The angle to solve next, inside the bracket."""
        low, high = self.low, self.high
        if low is None or high is None:
            # One side only: the middle first, then the end of the bracket itself.
            return (self.start + self.end) / 2 if count == 0 else (self.end if high is None else self.start)
        if count % 3 == 2:
            chord = math.atan2(low.retain_kept - high.retain_kept, low.forget_kept - high.forget_kept)
            if self.start < chord < self.end:
                return chord
        step = self.low_residual / (self.low_residual - self.high_residual or 1.0)
        secant = low.angle + (high.angle - low.angle) * step
        return secant if self.start < secant < self.end else (self.start + self.end) / 2


def best_rank(frontier: Frontier, goal: Goal, tolerance: float, start: float | None = None) -> Optimum:
    """The optimum over all ranks. The optimal loss is convex in the rank: where it is least, neighbours prove it."""
    search = searched([frontier], goal, None, tolerance, start)[0]
    best, most = search.result(), frontier.objective.dim - 1
    if search.done and best.point.rank <= most:
        return best
    high = min(search.low.rank if search.low else most, most)
    low = min(search.high.rank if search.high else 1, high)
    tried = [optimum(frontier, goal, low, tolerance)] if low == high else []
    while low < high:
        middle = (low + high) // 2
        left, right = (optimum(frontier, goal, rank, tolerance) for rank in (middle, middle + 1))
        low, high = (low, middle) if left.loss <= right.loss < math.inf else (middle + 1, high)
        tried += [left, right]
    best = min(tried, key=lambda one: one.loss)
    bound = max(search.bound, min(one.bound for one in tried))
    return Optimum(best.point, best.loss, min(best.loss, bound))


def smallest_rank(frontier: Frontier, goal: Goal, max_loss: float, tolerance: float) -> Optimum:
    """The smallest rank whose optimum is at most max_loss; the optimum falls with the rank up to the best rank."""
    best = best_rank(frontier, goal, tolerance)
    if best.loss > max_loss:
        raise InputError(f"max_loss: got {max_loss:g}, but no projector of any rank has a loss below {best.loss:g}")
    low, high = 0, best.point.rank
    while high - low > 1:
        middle = (low + high) // 2
        candidate = optimum(frontier, goal, middle, tolerance)
        if candidate.loss <= max_loss:
            high, best = middle, candidate
        else:
            low = middle
    return best
