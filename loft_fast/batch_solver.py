"""Many small problems at once: stacked, so that they share every call, and the threads share every call out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loft_fast.errors import InputError
from loft_fast.frontier import Frontier
from loft_fast.goals import Distance
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.objective import About, build_objective, pooled
from loft_fast.ops.arguments import check_number
from loft_fast.projection import Projection
from loft_fast.search import searched
from loft_fast.solver import AT_RANK
from loft_fast.state import lasting

_STACK = 1 << 23  # bytes of one matrix of a stack: all threads have enough to do, and it stays in the last cache

Sets = Sequence[Moments | GroupedMoments]


def solve_batch(
    retain: Sets,
    forget: Sets,
    rank: int,
    about: About = "retain",
    tolerance: float = 1e-6,
) -> list[Projection]:
    """`solve(retain[i], forget[i], rank, about, tolerance=tolerance)` for every i, sooner than one after another.

    For many small problems of one size: clients, layers, requests to choose from.

    Args:
        retain: moments of the rows to keep, all of one dimension d and on one device. Grouped moments are pooled.
        forget: moments of the rows to forget, as many.
        rank: dimension s of the subspaces, 1 <= s < d.
        about: as for `solve`.
        tolerance: relative gap to stop at.

    Returns:
        One `Projection` per problem. The `seconds` in a certificate are a problem's share of the time of its stack.

    Raises:
        InputError: bad arguments, sets of different size, or what `solve` refuses, with the number of the problem.
    """
    _check(retain, forget)
    if not retain:
        return []
    dim, device = retain[0].dim, retain[0].device
    if rank is None:  # which `solve` allows
        raise InputError(f"rank: got None, expected an integer in [1, {dim - 1}]")
    check_number("rank", rank, 1, dim - 1, whole=True)
    check_number("tolerance", tolerance, 1e-12, 1.0)
    size = max(1, _STACK // (8 * dim * dim)) if device.type == "cpu" else len(retain)
    found: list[Projection] = []
    for start in range(0, len(retain), size):
        stack = slice(start, start + size)
        found += _solve_stack(retain[stack], forget[stack], start, rank, about, tolerance)
    return found


@lasting
def _solve_stack(retain: Sets, forget: Sets, first: int, rank: int, about: About, tolerance: float) -> list[Projection]:
    """The problems first, first + 1, ..., stacked."""
    start = time.perf_counter()
    frontiers = []
    for i, (keep, drop) in enumerate(zip(retain, forget, strict=True)):
        try:
            frontiers.append(Frontier(build_objective(pooled("retain", keep), pooled("forget", drop), about)))
        except InputError as error:
            raise InputError(f"problem {first + i}: {error}") from error
    goal = Distance()
    results = [search.result() for search in searched(frontiers, goal, rank, tolerance)]
    seconds = (time.perf_counter() - start) / len(results)
    return [
        Projection(
            best.point.basis.contiguous(),
            frontier.objective.center,
            best.certificate(str(goal), AT_RANK, frontier.eigen_solves, seconds),
            keep.site,
            check=False,
        )
        for best, frontier, keep in zip(results, frontiers, retain, strict=True)
    ]


def _check(retain: Sets, forget: Sets) -> None:
    for name, sets in (("retain", retain), ("forget", forget)):
        if not isinstance(sets, Sequence):
            raise InputError(f"{name}: got {type(sets).__name__}, expected a list of moments, one per problem")
        for i, one in enumerate(sets):
            if not isinstance(one, Moments | GroupedMoments):
                got = type(one).__name__
                raise InputError(f"{name}: got {got} for problem {i}, expected Moments or GroupedMoments")
            if (one.dim, one.device) != (retain[0].dim, retain[0].device):
                raise InputError(
                    f"{name}: got dim {one.dim} on {one.device} for problem {i}, "
                    f"expected {retain[0].dim} on {retain[0].device}, as in retain[0]"
                )
    if len(retain) != len(forget):
        raise InputError(f"forget: got {len(forget)} sets, expected {len(retain)}, as many as in retain")
