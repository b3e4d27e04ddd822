"""Earlier layers: project all of them together, as far as the rows to keep can spare.

A head that has forgotten stands on layers that have not. Erasing at every layer is known as concept scrubbing (Belrose
et al., arXiv 2306.03819). What no linear head reads may go as far as the model itself, on some rows, shows no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from loft_fast.eraser import lifted
from loft_fast.errors import InputError
from loft_fast.evaluate import observe
from loft_fast.fetch import fetch_moments
from loft_fast.moments import Moments
from loft_fast.ops.arguments import check_number
from loft_fast.projection import Projection
from loft_fast.sites import Site, find_site
from loft_fast.solver import solve
from loft_fast.state import lasting
from loft_fast.surgery import Attached, attach, fold, foldable

log = logging.getLogger("loft_fast")

_LADDER = [0.05 * 1.25**i for i in range(16)]  # 0.05 to 1.42 radians
_ROUNDING = 1e-9  # points by which the difference of two accuracies may be wrong
_WHY = "the largest angle tried that leaves the accuracy; shares are without what is put back of what is dropped"
_fold = fold  # the argument of `erase_layers` has the name of the function


@dataclass(frozen=True)
class Erased:
    """What was done at one layer.

    Attributes:
        site: where.
        projection: what was put in, with its certificate.
        attached: the handle to take it out again; None if it was folded.
        cost: points of accuracy that all layers together have cost.
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

    `solve` on moments of both sets, a row counted by the mean over its positions: at one angle for all sites, the
    largest that leaves the accuracy; then at a larger one for each, the last site first, while that leaves it, too. In
    the place of what is dropped comes what the rest says of it, by linear regression over single positions: layers
    behind see the rows to keep change less. What the head reads is not for here: `unlearn` comes afterwards.

    Args:
        model: a classifier, changed in place.
        retain, forget: loaders as for `fetch_moments`, passed over twice and once for each site.
        sites: in the order of the forward pass, as for `fetch_moments`; each once.
        cost: points of accuracy that all sites together may cost.
        check: loader of (x, y) or dictionaries with labels over rows to keep, which tell the accuracy: passed over six
            times at most, and five for each of several sites. Only classes that occur in it count as an answer.
            Default: `retain`.
        fold: False attaches hooks that can be removed; True rewrites the layers for good.
        progress: show progress bars.

    Returns:
        What was done, site by site; a site at which no projection is cheap enough is left out.

    Raises:
        LoftError: bad arguments, and whatever `fetch_moments`, `solve` and `fold` refuse. The model is then as it was,
            as it is after an interruption before all is solved.
    """
    if isinstance(sites, str) or not isinstance(sites, Iterable) or not (names := list(sites)):
        raise InputError(f"sites: got {sites!r}, expected a list with at least one name")
    places = [find_site(model, site) for site in names]
    twice = [str(place) for i, place in enumerate(places) if place in places[:i]]
    if twice:
        raise InputError(f"sites: got {twice[0]!r} twice, expected each once")
    check_number("cost", cost, 0.0, 100.0)
    for place in places if fold else ():
        foldable(model, place)
    rows = retain if check is None else check
    before = _accuracy(model, rows, [])
    with tqdm(places, desc="layers", disable=not progress, leave=False) as bar:
        layers = [
            _Layer(
                place,
                retain=_moments(model, place, "retain", retain, progress, pool=True),
                forget=_moments(model, place, "forget", forget, progress, pool=True),
                positions=_moments(model, place, "retain", retain, progress, pool=False),
            )
            for place in bar
        ]
    found, accuracy = _strongest(model, layers, rows, before, before - cost - _ROUNDING, progress)
    for layer, projection in zip(layers, found, strict=True):
        if projection is None:
            log.info("%s is left as it is: what would go first costs too much", layer.place)
    chosen = [one for one in found if one is not None]
    attached: list[Attached | None] = [None] * len(chosen)
    for i, projection in enumerate(chosen):
        if fold:
            _fold(model, projection)
        else:
            attached[i] = attach(model, projection)
    lost = min(before - accuracy, cost)  # more can only be rounding
    return [Erased(str(one.site), one, handle, lost) for one, handle in zip(chosen, attached, strict=True)]


def _moments(model: nn.Module, place: Site, name: str, rows: Iterable[Any], progress: bool, pool: bool) -> Moments:
    try:
        found = fetch_moments(model, rows, str(place), progress=progress, pool=pool)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    assert isinstance(found, Moments)
    return found


@dataclass(frozen=True)
class _Layer:
    """A site, moments of the rows of both sets there, and of single positions of those to keep."""

    place: Site
    retain: Moments
    forget: Moments
    positions: Moments

    @cached_property
    def _covariance(self) -> Tensor:
        return self.positions.covariance(ddof=0)

    @lasting
    def projection(self, angle: float) -> Projection | None:
        """At this angle; None where that drops nothing."""
        try:
            found = solve(self.retain, self.forget, angle=angle)
        except InputError as error:
            raise InputError(f"sites: no projection at {str(self.place)!r}: {error}") from error
        assert found.certificate is not None
        if found.rank == found.dim:
            return None
        lift = lifted(found.basis, self._covariance)
        center = self.positions.mean
        known = replace(found.certificate, why=_WHY)
        return Projection(found.basis, center, known, str(self.place), lift=lift, check=False)


def _strongest(
    model: nn.Module, layers: list[_Layer], rows: Iterable[Any], before: float, least: float, progress: bool
) -> tuple[list[Projection | None], float]:
    """For each layer the projection at the largest angle, by bisection, that leaves this accuracy; and what is left."""
    found: list[Projection | None] = [None] * len(layers)
    accuracy, together = before, 0
    every = list(range(len(layers)))
    steps = [every, *([i] for i in reversed(every))] if len(every) > 1 else [every]
    for turned in tqdm(steps, desc="angles", disable=not progress, leave=False):
        low, high = together, len(_LADDER)
        while low < high:
            middle = (low + high) // 2
            tried, now = list(found), accuracy
            for i in turned:
                tried[i] = layers[i].projection(_LADDER[middle])
            if any(tried[i] is not None for i in turned):
                now = _accuracy(model, rows, tried)
            if now < least:
                high = middle
            else:
                found, accuracy, low = tried, now, middle + 1
        if turned is every:
            together = low
    return found, accuracy


def _accuracy(model: nn.Module, rows: Iterable[Any], projections: Sequence[Projection | None]) -> float:
    """Percent of the rows that are right behind these, where only classes that occur among them can be said."""
    with ExitStack() as attached:
        for projection in projections:
            if projection is not None:
                attached.enter_context(attach(model, projection))
        seen = observe(model, rows, name="check")
    present = seen.labels.unique()
    said = present[seen.log_probabilities[:, present].argmax(1)]
    return 100 * float((said == seen.labels).double().mean())
