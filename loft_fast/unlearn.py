"""The whole job in one call: fetch moments of both sets, solve, attach or fold."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loft_fast.clock import Clock
from loft_fast.errors import InputError
from loft_fast.fetch import fetch_moments
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.objective import About
from loft_fast.ops.arguments import check_number
from loft_fast.outputs import close_outputs
from loft_fast.projection import Projection
from loft_fast.sites import Site, find_site, last_linear
from loft_fast.solver import solve
from loft_fast.surgery import Attached, attach, fold, foldable, known_width
from loft_fast.watch import Watch

log = logging.getLogger("loft_fast")


@dataclass
class Unlearned:
    """What `unlearn` did.

    Attributes:
        projection: with its certificate.
        site: where it works.
        attached: the handle to take it out again; None if it was folded.
        retain, forget: the moments it was solved from: keep them and the next request needs no data.
        seconds: wall time of "moments", "solve" and "attach" or "fold".
        bytes: size of the "moments" and of the "projection" in memory.
    """

    projection: Projection
    site: str
    attached: Attached | None
    retain: GroupedMoments | Moments
    forget: GroupedMoments | Moments
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def unlearn(
    model: nn.Module,
    retain: Iterable[Any] | Moments | GroupedMoments,
    forget: Iterable[Any] | Moments | GroupedMoments,
    site: str | None = None,
    rank: int | None = None,
    fold: bool = False,
    *,
    about: About = "retain",
    erase: bool = False,
    progress: bool = True,
) -> Unlearned:
    """Make `model` forget the rows of `forget` while keeping what `retain` needs.

    Args:
        model: a trained torch model, changed in place.
        retain: loader over the rows to keep (as for `fetch_moments`), or their moments.
        forget: loader over the rows to forget, or their moments.
        site: where to project; None: where given moments come from, else the input of the last nn.Linear.
        rank: dimension of the kept subspace; None: found, as `solve` says, with the layer at the site as head if that
            is the last nn.Linear, makes the model's outputs, and the groups are among them.
        fold: False attaches a hook that can be removed; True rewrites the layer for good. Where that makes the model's
            outputs and the rows have class labels, the outputs of classes without a row to retain are closed as well,
            as `close_outputs` says: a model retrained without a class never says it.
        about: "retain" or the paper's "own", as for `solve`.
        erase: ask for features in which no linear probe finds the forget rows, as for `solve`. Not with `rank`, and
            only where there is a head to find the rank with.
        progress: show progress bars.

    Raises:
        LoftError: whatever `fetch_moments`, `solve`, `attach` and `fold` refuse; the model is unchanged then.
    """
    given = {name: part for name, part in (("retain", retain), ("forget", forget)) if isinstance(part, _KINDS)}
    sites = [site, *(part.site for part in given.values())]
    place = find_site(model, next((known for known in sites if known is not None), None))
    _check(model, place, given, rank, fold, erase)
    clock = Clock()
    watch = Watch(model, place)
    gone = _moments("forget", model, forget, watch, progress)  # the smaller set first: it fails sooner
    kept = _moments("retain", model, retain, watch, progress)
    clock.lap("moments")
    head = predicting_head(model, place, kept, gone)
    if head is not None and not watch.is_head:
        log.warning("%s does not make the model's outputs: no angle or output to close can follow from it", place.name)
        head = None
    # What is the largest output of a row without a label need not be a class.
    closed = outputs_gone(kept, gone) if head is not None and watch.labelled else []
    guide = head if rank is None else None
    close = fold and guide is not None and watch.labelled
    projection = solve(kept, gone, rank, about, guide, erase=erase, close=close)
    projection.site = str(place)
    clock.lap("solve")
    attached = None
    if fold:
        _fold(model, projection, str(place))
        close_outputs(model, closed, str(place))
    else:
        attached = attach(model, projection, str(place))
    clock.lap("fold" if fold else "attach")
    matrices = sum(len(part) if isinstance(part, GroupedMoments) else 1 for part in (kept, gone))
    sizes = {
        "moments": 8 * matrices * kept.dim * (kept.dim + 1),
        "projection": sum(part.nbytes for part in projection.buffers()),
    }
    return Unlearned(projection, str(place), attached, kept, gone, clock.seconds, sizes)


_fold = fold  # the argument of `unlearn` has the name of the function
_KINDS = (Moments, GroupedMoments)


def _check(
    model: nn.Module,
    place: Site,
    given: dict[str, Moments | GroupedMoments],
    rank: int | None,
    fold: bool,
    erase: bool,
) -> None:
    """Refuse before the pass over the data what would be refused after it."""
    if erase and rank is not None:
        raise InputError(f"erase: got True together with rank={rank}, expected one of them: erasing finds the rank")
    width = known_width(place)
    for name, part in given.items():
        if width is not None and part.dim != width:
            raise InputError(f"{name}: got moments of dim {part.dim}, expected {width} at {str(place)!r}")
    if width is not None:
        check_number("rank", rank, 1, width - 1, whole=True)
    if fold:
        foldable(model, place)


def _moments(
    name: str, model: nn.Module, data: Iterable[Any] | Moments | GroupedMoments, watch: Watch, progress: bool
) -> Moments | GroupedMoments:
    if isinstance(data, _KINDS):
        return data
    loader = watch.over(data) if hasattr(data, "__iter__") or hasattr(data, "__getitem__") else data
    try:
        return fetch_moments(model, loader, str(watch.place), group="auto", progress=progress)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def outputs_gone(retain: Moments | GroupedMoments, forget: Moments | GroupedMoments) -> list[int]:
    """Of groups that are outputs of the head, those to forget of which nothing is retained; warns of others."""
    assert isinstance(retain, GroupedMoments)
    assert isinstance(forget, GroupedMoments)
    gone = [int(key) for key in forget if key not in retain or not retain[key].count]
    if len(gone) < len(forget):
        shared = len(forget) - len(gone)
        log.warning("forget: %d of its classes have rows to retain, too: see match_retrained", shared)
    return gone


def predicting_head(model: nn.Module, place: Site, *moments: Moments | GroupedMoments) -> nn.Linear | None:
    """The layer at the site, if it is the model's last and the groups are its outputs: it predicts their accuracy."""
    layer = place.plain
    if (
        isinstance(layer, nn.Linear)
        and place.side == "input"
        and place.name == last_linear(model)  # the outputs of a hidden layer are no classes
        and layer.out_features > 1
        and all(
            isinstance(part, GroupedMoments)
            and all(isinstance(key, int) and 0 <= key < layer.out_features for key in part)
            for part in moments
        )
    ):
        return layer
    log.info("the layer at the site does not score the groups: no angle or output can follow from them")
    return None
