"""Earlier layers: project every one of them as far as the rows to keep can spare, one after another.

A head that has forgotten stands on layers that have not. Erasing at every layer is known as concept scrubbing (Belrose
et al., arXiv 2306.03819). What no linear head reads may go as far as the model itself, on some rows, shows no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from loft_fast.errors import InputError
from loft_fast.evaluate import observe
from loft_fast.fetch import fetch_moments
from loft_fast.moments import Moments
from loft_fast.ops.arguments import check_number
from loft_fast.projection import Projection
from loft_fast.sites import Site, find_site
from loft_fast.solver import solve
from loft_fast.surgery import Attached, attach, fold, foldable

log = logging.getLogger("loft_fast")

_LADDER = [0.05 * 1.25**i for i in range(16)]  # 0.05 to 1.42 radians
_fold = fold  # the argument of `erase_layers` has the name of the function


@dataclass(frozen=True)
class Erased:
    """What was done at one layer.

    Attributes:
        site: where.
        projection: what was put in, with its certificate.
        attached: the handle to take it out again; None if it was folded.
        cost: points of accuracy that this layer and those before it have cost.
    """

    site: str
    projection: Projection
    attached: Attached | None
    cost: float


def erase_layers(
    model: nn.Module,
    retain: Iterable[Any],
    forget: Iterable[Any],
    sites: Sequence[str],
    *,
    cost: float = 0.25,
    check: Iterable[Any] | None = None,
    fold: bool = False,
    progress: bool = True,
) -> list[Erased]:
    """Project the features at these sites so that they tell as little of the forget rows as the others can spare.

    For each site in turn: moments of both sets, a row counted by the mean over its positions, behind the projections so
    far; then `solve` at the largest angle that leaves the accuracy. What a site does not use of its share of the cost
    is for those after it. What the head reads is not for here: `unlearn` comes afterwards.

    Args:
        model: a classifier, changed in place.
        retain, forget: loaders as for `fetch_moments`, passed over once for each site.
        sites: in the order of the forward pass, as for `fetch_moments`.
        cost: points of accuracy that all sites together may cost.
        check: loader of (x, y) or dictionaries with labels over rows to keep, which tell the accuracy: passed over five
            times at most for each site. Only classes that occur in it count as an answer. Default: `retain`.
        fold: False attaches hooks that can be removed; True rewrites the layers for good, once all are solved.
        progress: show progress bars.

    Returns:
        What was done, site by site; a site at which no projection is cheap enough is left out.

    Raises:
        LoftError: bad arguments, and whatever `fetch_moments`, `solve` and `fold` refuse. The model is then as it was,
            as it is after an interruption before the last site is solved.
    """
    if isinstance(sites, str) or not sites:
        raise InputError(f"sites: got {sites!r}, expected a list with at least one name")
    places = [find_site(model, site) for site in sites]
    check_number("cost", cost, 0.0, 100.0)
    for place in places if fold else ():
        foldable(model, place)
    sets = (("retain", retain), ("forget", forget))
    rows = retain if check is None else check
    before = _accuracy(model, rows)
    erased = list[Erased]()
    with ExitStack() as undo:
        for count, place in enumerate(tqdm(places, desc="layers", disable=not progress, leave=False), 1):
            kept, gone = (_moments(model, place, name, part, progress) for name, part in sets)
            found = _strongest(model, place, kept, gone, rows, before - cost * count / len(places))
            if found is None:
                log.info("%s is left as it is: what would go first costs too much", place)
                continue
            projection, accuracy = found
            attached = attach(model, projection, str(place))
            undo.callback(attached.remove)
            erased.append(Erased(str(place), projection, attached, before - accuracy))
        if not fold:
            undo.pop_all()
    if fold:
        for one in erased:
            _fold(model, one.projection, one.site)
        erased = [replace(one, attached=None) for one in erased]
    return erased


def _moments(model: nn.Module, place: Site, name: str, rows: Iterable[Any], progress: bool) -> Moments:
    try:
        found = fetch_moments(model, rows, str(place), progress=progress, pool=True)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    assert isinstance(found, Moments)
    return found


def _strongest(
    model: nn.Module, place: Site, retain: Moments, forget: Moments, rows: Iterable[Any], least: float
) -> tuple[Projection, float] | None:
    """The projection at the largest angle, by bisection, that leaves this accuracy, and what it leaves."""
    best = None
    low, high = 0, len(_LADDER)
    while low < high:
        middle = (low + high) // 2
        projection = solve(retain, forget, angle=_LADDER[middle])
        projection.site = str(place)
        if projection.rank == projection.dim:  # nothing is dropped, at this angle and below
            low = middle + 1
            continue
        with attach(model, projection):
            accuracy = _accuracy(model, rows)
        if accuracy >= least:
            best, low = (projection, accuracy), middle + 1
        else:
            high = middle
    return best


def _accuracy(model: nn.Module, rows: Iterable[Any]) -> float:
    """Percent of the rows that are right, where only classes that occur among them can be said."""
    seen = observe(model, rows, name="check")
    present = seen.labels.unique()
    said = present[seen.log_probabilities[:, present].argmax(1)]
    return 100 * float((said == seen.labels).double().mean())
