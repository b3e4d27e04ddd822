"""The certified optimum of the retain/forget trade-off over all subspaces: a handful of eigen-solves, no descent.

The paper (arXiv 2601.22456) descends on the Stiefel manifold. Only the two numbers (a, b) of a subspace matter, their
reachable set has a convex hull with known support function (`frontier`), and the nearest point of a planar convex set
is a one-dimensional root: so the global optimum is found and proven.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import Tensor, nn

from loft_fast import newton, purified
from loft_fast.angle import DEFAULT_ANGLE, choose_angle
from loft_fast.errors import InputError
from loft_fast.frontier import Frontier, Point
from loft_fast.goals import Distance, Goal, KeepRetain, linear_text
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.objective import About, build_objective, pooled
from loft_fast.projection import Certificate, Projection
from loft_fast.state import lasting

_TINY_LOSS = 1e-9  # a millionth of it is what rounding does to a loss of order one
_MAX_SOLVES = 64
ERASING = "share of the retain variance by which retain rows move, so that no linear probe finds the forget rows"
AT_RANK = "the optimum at the rank asked for"


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


@lasting
def solve(
    retain: Moments | GroupedMoments,
    forget: Moments | GroupedMoments,
    rank: int | None = None,
    about: About = "retain",
    head: nn.Module | None = None,
    tolerance: float = 1e-6,
    *,
    erase: bool = False,
    close: bool = False,
    angle: float | None = None,
    forget_weight: float | None = None,
    min_retain_kept: float | None = None,
    max_loss: float | None = None,
    start: Projection | None = None,
) -> Projection:
    """The best subspace to project features onto, with a certificate.

    With a = share of retain variance kept and b = share of forget variance kept, which are tr(PA) and tr(PB) of two
    matrices of trace one (`objective`), and M(angle) = cos(angle) A - sin(angle) B, at most one of these is chosen:

    - nothing: with `rank`, the optimum of the paper's (1 - a)^2 + b^2 at that rank. Without, the positive part of
      M(angle) at the angle that `head` and grouped moments predict to be enough, or else at 0.3.
    - `angle`, in radians, 0 to pi/2: the optimum of cos(angle) (1 - a) + sin(angle) b, at `rank` or at the best rank.
    - `forget_weight`: the optimum of (1 - a)^2 + forget_weight b^2, at `rank` or at the best rank.
    - `min_retain_kept`: the least b with a >= min_retain_kept, at `rank` or at the best rank.
    - `max_loss`: the smallest rank whose optimum of (1 - a)^2 + b^2 is at most max_loss.

    Args:
        retain: moments of the rows to keep. Grouped moments are pooled.
        forget: moments of the rows to forget.
        rank: dimension s of the subspace, 1 <= s < d.
        about: "retain" sees the forget rows from the retain mean and projects affinely about it; "own" is the paper's
            centred, linear version.
        head: the linear classifier that reads the features; group keys are then its output indices.
        tolerance: relative gap to stop at.
        erase: with `head`, ask for features in which no linear probe finds the forget rows, instead: the mean of both
            sets is made the same by the oblique projection that moves the retain rows least (`eraser`). Of what that
            leaves, only the part that the head's open outputs read is kept, as by `Projection.trim`. Where the head
            does not forget by that, an angle is found first, as without `erase`. Of rows within classes, no linear
            probe tells them from the rest of their class.
        close: with `head`, say that `close_outputs` will follow, for the classes of which nothing is retained. What is
            predicted is then of such a head, and as it forgets by itself, the angle may not cost the retain groups more
            than a tenth of a point.
        start: the solution of a like problem, such as the last one of several requests. A search for the optimum of a
            loss begins at its angle: it ends at the same optimum, within tolerance, and usually sooner.

    Returns:
        A `Projection` whose certificate reports loss, lower bound, gap, kept shares, cost, and why this angle and rank.

    Raises:
        InputError: bad arguments, an empty set, features without variance, or a `max_loss` or `min_retain_kept` out of
            reach.
    """
    began = time.perf_counter()
    chosen = [
        name
        for name, value in (
            ("angle", angle),
            ("forget_weight", forget_weight),
            ("min_retain_kept", min_retain_kept),
            ("max_loss", max_loss),
        )
        if value is not None
    ]
    if len(chosen) > 1:
        raise InputError(f"{chosen[1]}: got it together with {chosen[0]}, expected at most one trade-off")
    objective = build_objective(pooled("retain", retain), pooled("forget", forget), about)
    check_number("rank", rank, 1, objective.dim - 1, whole=True)
    check_number("angle", angle, 0.0, math.pi / 2)
    check_number("forget_weight", forget_weight, 1e-9, 1e9)
    check_number("min_retain_kept", min_retain_kept, 0.0, 1.0)
    check_number("max_loss", max_loss, 0.0, 2.0)
    check_number("tolerance", tolerance, 1e-12, 1.0)
    for name, wish in (("erase", erase), ("close", close)):
        if wish and (head is None or rank is not None or chosen):
            got = "without a head" if head is None else f"together with {'rank' if rank is not None else chosen[0]}"
            raise InputError(f"{name}: got True {got}, expected a head, which finds the angle by itself")
    if max_loss is not None and rank is not None:
        raise InputError("max_loss: got it together with rank, expected one of them: max_loss finds the rank")
    if start is not None and not isinstance(start, Projection):
        raise InputError(f"start: got {type(start).__name__}, expected a Projection")
    first = start.certificate.angle if start is not None and start.certificate is not None else None
    frontier = Frontier(objective)
    goal: Goal = Distance(forget_weight or 1.0) if min_retain_kept is None else KeepRetain(min_retain_kept)
    text, predicted, center = str(goal), dict[str, float](), objective.center
    basis, lift = None, None

    if max_loss is not None:
        best = _smallest_rank(frontier, goal, max_loss, tolerance)
        why = f"the smallest rank with a loss of at most {max_loss:g}"
    elif angle is None and rank is not None:
        best, why = optimum(frontier, goal, rank, tolerance, first), AT_RANK
    elif angle is None and chosen:
        best = _best_rank(frontier, goal, tolerance, first)
        why = "the optimum over all ranks"
    else:
        choice = None
        if angle is not None:
            point, why = frontier.at(angle, rank), "the angle asked for"
        elif head is not None:
            choice = choose_angle(frontier, retain, forget, head, erase, close)
            point, center, why, predicted = choice.point, choice.center, choice.why, choice.predicted
            basis, lift = choice.basis, choice.lift
        else:
            point = frontier.at(DEFAULT_ANGLE)
            why = "the fixed default, since no head was given to predict accuracies with"
        if choice is not None and choice.eraser is not None:
            best, text = Optimum(point, choice.eraser.change, choice.eraser.least), ERASING
        else:
            best, text = _extreme(point), linear_text(point.angle)

    if best.loss == math.inf:
        rank = rank or objective.dim - 1
        most = frontier.at(0.0, rank).retain_kept
        raise InputError(f"min_retain_kept: got {min_retain_kept}, but rank {rank} keeps at most {most:.8g}")
    certificate = certify(best, text, why, frontier.eigen_solves, time.perf_counter() - began, predicted)
    basis = best.point.basis if basis is None else basis
    return Projection(basis.contiguous(), center, certificate, retain.site, lift=lift, check=False)


def certify(
    best: Optimum, goal: str, why: str, eigen_solves: int, seconds: float, predicted: dict[str, float] | None = None
) -> Certificate:
    """What is known about an optimum."""
    point = best.point
    return Certificate(
        goal=goal,
        why=why,
        loss=best.loss,
        lower_bound=best.bound,
        relative_gap=best.relative_gap,
        retain_kept=point.retain_kept,
        forget_kept=point.forget_kept,
        rank=point.rank,
        angle=point.angle,
        eigen_solves=eigen_solves,
        seconds=seconds,
        predicted=predicted or {},
    )


def _extreme(point: Point) -> Optimum:
    """A frontier point as the optimum of the linear loss at its own angle."""
    cos, sin = math.cos(point.angle), math.sin(point.angle)
    loss = cos * (1 - point.retain_kept) + sin * point.forget_kept
    return Optimum(point, loss, min(loss, max(0.0, cos - point.support)))


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
        descend = purified.descend if purified.pays(objectives[0]) else newton.descend
        descend(objectives, goal, rank, offer, start)
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


def _best_rank(frontier: Frontier, goal: Goal, tolerance: float, start: float | None = None) -> Optimum:
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


def _smallest_rank(frontier: Frontier, goal: Goal, max_loss: float, tolerance: float) -> Optimum:
    """The smallest rank whose optimum is at most max_loss; the optimum falls with the rank up to the best rank."""
    best = _best_rank(frontier, goal, tolerance)
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


def check_number(name: str, value: float | None, low: float, high: float, whole: bool = False) -> None:
    """Refuse an argument that is neither None nor a (whole) number in [low, high]."""
    if value is None:
        return
    kind = int if whole else (int, float)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, kind) or not low <= value <= high:
        wanted = "an integer" if whole else "a number"
        raise InputError(f"{name}: got {value!r}, expected {wanted} in [{low:g}, {high:g}]")
