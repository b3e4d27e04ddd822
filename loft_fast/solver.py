"""The certified optimum of the retain/forget trade-off over all subspaces: a handful of eigen-solves, no descent.

The paper (arXiv 2601.22456) descends on the Stiefel manifold. Only the two numbers (a, b) of a subspace matter, their
reachable set has a convex hull with known support function (`frontier`), and the nearest point of a planar convex set
is a one-dimensional root: so the global optimum is found and proven.
"""

from __future__ import annotations

import math
import time

from torch import nn

from loft_fast.angle import DEFAULT_ANGLE, choose_angle
from loft_fast.errors import InputError
from loft_fast.frontier import Frontier, Point
from loft_fast.goals import Distance, Goal, KeepRetain, linear_text
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.objective import About, build_objective, pooled
from loft_fast.ops.arguments import check_number
from loft_fast.projection import Projection
from loft_fast.search import Optimum, best_rank, optimum, smallest_rank
from loft_fast.state import lasting

ERASING = "share of the retain variance by which retain rows move, so that no linear probe finds the forget rows"
AT_RANK = "the optimum at the rank asked for"


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
        best = smallest_rank(frontier, goal, max_loss, tolerance)
        why = f"the smallest rank with a loss of at most {max_loss:g}"
    elif angle is None and rank is not None:
        best, why = optimum(frontier, goal, rank, tolerance, first), AT_RANK
    elif angle is None and chosen:
        best = best_rank(frontier, goal, tolerance, first)
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
    certificate = best.certificate(text, why, frontier.eigen_solves, time.perf_counter() - began, predicted)
    basis = best.point.basis if basis is None else basis
    return Projection(basis.contiguous(), center, certificate, retain.site, lift=lift, check=False)


def _extreme(point: Point) -> Optimum:
    """A frontier point as the optimum of the linear loss at its own angle."""
    cos, sin = math.cos(point.angle), math.sin(point.angle)
    loss = cos * (1 - point.retain_kept) + sin * point.forget_kept
    return Optimum(point, loss, min(loss, max(0.0, cos - point.support)))
