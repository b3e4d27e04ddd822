"""What would a model say of rows that it had not been trained on? Foretold from moments, without training one.

A linear discriminant on features from early in the model, fitted to the moments of the retain rows alone, has never
seen the forget rows; the network in front of it has. How much that helps is known from rows of the retain set that the
discriminant was not fitted to either, and how sure of itself the model is about rows it never saw, from validation
rows. The order comes from the discriminant, sureness from the model: a row that is among the hardest tenth for the one
is given the confidence that the other has among the hardest tenth of what it has not seen, less a constant where fewer
are expected to be right.

Several layers are tried, with random ReLU features of what is there: what is hard for a linear function of the input is
not what is hard for a network. A place is good if unseen rows are told apart there and those that the model saw look no
different. All places about as good as the best vote: a few hundred validation rows cannot tell which of them is best.

Forget rows that look like any retain rows to the discriminants are taken for a random sample of such: as many are
expected right as of the validation rows, but for what a sample's ranks have by chance over even ones. Others are a
kind of rows that a retrained model will not have met. Two things then change. What the network learnt of them helps the
more the later one looks, and no retain row tells by how much: the earliest place counts where the discriminant does
about as well as the model, and as some hundred rows do not tell for certain which that is, each by the chance that it
is. And what the model is better than the discriminant by, it owes to rows of the same kind: as many of the forget rows
are wrong as the discriminant gets wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from loft_fast import batches
from loft_fast.confidence import TEMPERATURES, Held, flattened, joined
from loft_fast.errors import InputError
from loft_fast.sites import Site, device_of, evaluating, find_site, unwrap
from loft_fast.voters import WIDTH, Candidate, Voters, best, earliest, fit, percent

_SITES = 6  # places to look at, spread over the model
_LOOK_AFTER, _HOPELESS = 4096, 5.0  # rows, and points of cost: worse places are left out from there on
_OTHER = 1.63  # Kolmogorov's statistic above which two samples are of two kinds (1 in 100 of one kind are so far apart)
_CERTAIN = 0.01  # a temperature that leaves one class


@dataclass(frozen=True)
class Unseen:
    """What the forget rows are expected to look like to a model that never saw them.

    Attributes:
        log_probabilities: (n, classes) float32, in the order of the forget batches.
        accuracy: percent of forget rows expected to be right.
        validation: percent of validation rows that are right, by the model.
        sites: where discriminants read, the best first or in the order of the model: (site, percent of validation rows
            that are right, points by which retain rows left out of its fit do better: what the model's having seen them
            is worth there).
        rows, batches: how many retain rows and batches there were.
    """

    log_probabilities: Tensor
    accuracy: float
    validation: float
    sites: tuple[tuple[str, float, float], ...]
    rows: int
    batches: int


def unseen(
    model: nn.Module,
    retain: Iterable[Any],
    forget: Iterable[Any],
    validation: Iterable[Any],
    *,
    sites: Sequence[str] | None = None,
    progress: bool = True,
) -> Unseen:
    """Foretell what a model trained without the forget rows would say of them; the model is left as it is.

    Args:
        model: a classifier.
        retain: loader of (x, y) or dictionaries with labels over the rows to keep; passed over once.
        forget: the same over the rows to forget.
        validation: the same over some hundred rows that the model was not trained on.
        sites: where to look for a discriminant, as for `fetch_moments`; default: what some layers with weights read,
            spread from the first to the last. Maps and tokens are averaged down to `WIDTH` features.
        progress: show a progress bar.

    Raises:
        InputError: a set is empty or has no class labels, or too few classes are left to tell apart.
    """
    target = unwrap(model)
    places = _places(target) if sites is None else [find_site(model, name) for name in sites]
    candidates = [Candidate(place) for place in places]
    held = Held([_look(target, places, batch, "validation") for batch in validation])
    rows = steps = 0
    for batch in tqdm(retain, desc="retain rows", unit="batch", disable=not progress, leave=False):
        logits, labels, caught = _look(target, places, batch, "retain")
        rows, steps = rows + len(labels), steps + 1
        for candidate in candidates:
            candidate.add(caught.get(candidate.place), labels, logits.shape[1])
        # Most of the work is for places that are no good. A loader may be sorted by class, though.
        if rows >= _LOOK_AFTER > rows - len(labels) and all(one.knows(held.labels) for one in candidates if one.count):
            fitted = fit(candidates, held.features, held.labels)
            good = [*best(fitted, _HOPELESS), *earliest(fitted, held.right).parts]
            candidates = [one for one in candidates if any(one is other.source for other in good)]
    fitted = fit(candidates, held.features, held.labels)
    voters, early = Voters(best(fitted)), earliest(fitted, held.right)
    look_at = list({one.place: None for one in (*voters.parts, *early.parts)})
    seen = [_look(target, look_at, batch, "forget") for batch in forget]
    foretold, right, used = _foretell(voters, early, held, seen)
    read = tuple((str(one.place), one.accuracy, one.contamination) for one in used.parts)
    return Unseen(foretold, right, percent(held.right), read, rows, steps)


def _foretell(
    voters: Voters, early: Voters, held: Held, seen: list[tuple[Tensor, Tensor, dict[Site, Tensor]]]
) -> tuple[Tensor, float, Voters]:
    """Log-probabilities of the forget rows, what percent of them will be right, and whose judgement that is."""
    if not seen:
        raise InputError("forget: it yielded no batches, expected at least one")
    labels, features = torch.cat([part[1] for part in seen]), [part[2] for part in seen]
    ranks, others, _ = voters.judge(labels, features)
    if _like_any(ranks, len(voters.sorted)):
        right = held.expected(voters, ranks)
    else:
        voters = early
        ranks, others, right = voters.judge(labels, features)
    margin, temperature = held.margins_by(ranks, right), held.temperature(voters)
    wanted = round(right * len(labels))
    for flattest in [one for one in reversed(TEMPERATURES) if one <= temperature]:
        foretold = joined(margin, flattened(others, flattest), labels)
        found = foretold.argmax(1) == labels
        if int(found.sum()) <= wanted:  # a row that is to be wrong needs a class that is likelier
            break
    # The discriminants may spread too far even at their most certain: then the hardest rows get one other class.
    stubborn = margin.where(found & (margin < 0), torch.inf).argsort()[: max(0, int(found.sum()) - wanted)]
    stubborn = stubborn[margin[stubborn] < 0]
    foretold[stubborn] = joined(margin[stubborn], flattened(others[stubborn], _CERTAIN), labels[stubborn])
    found = foretold.argmax(1) == labels
    return foretold.float(), percent(found), voters


def _like_any(ranks: Tensor, known: int) -> bool:
    """Whether these are ranks of a random sample, next to `known` rows; the test of Kolmogorov and Smirnov."""
    even = (torch.arange(len(ranks), device=ranks.device) + 0.5) / len(ranks)
    apart = float((ranks.sort().values - even).abs().max())
    return apart / (1 / len(ranks) + 1 / known) ** 0.5 < _OTHER


def _look(model: nn.Module, places: Sequence[Site], raw: Any, name: str) -> tuple[Tensor, Tensor, dict[Site, Tensor]]:
    """Logits (n, classes), labels (n,), and the features (n, d) at every place that the forward pass reaches."""
    batch = batches.to_device(raw, device_of(model))
    caught: dict[Site, Tensor] = {}

    def catch(place: Site) -> Any:
        def see(features: Tensor) -> None:
            caught[place] = _vectors(place, features, batches.attention_mask(batch))

        return place.hook(see)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for place in places:
            stack.callback(catch(place).remove)
        logits = batches.logits(batches.call(model, batch))
    return logits, batches.classes(name, batch, logits), caught


def _vectors(place: Site, features: Tensor, mask: Tensor | None) -> Tensor:
    """(n, d) with d <= WIDTH where that is to be had by averaging over positions; never a view."""
    if features.ndim == 4 and place.channel_dim(features) == 1:
        side = max(1, int((WIDTH / features.shape[1]) ** 0.5))
        if features[0].numel() > WIDTH:
            features = functional.adaptive_avg_pool2d(features, side)
        return features.flatten(1).float().clone()
    return place.pooled(features.float(), mask)


def _places(model: nn.Module) -> list[Site]:
    """What layers with a weight matrix read, the first, the last, and some between."""
    layers = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and name
    ]
    if not layers:
        raise InputError("sites: got None for a model without linear layers and convolutions, expected names")
    steps = min(_SITES, len(layers))
    chosen = [layers[round(i * (len(layers) - 1) / max(1, steps - 1))] for i in range(steps)]
    return [find_site(model, name) for name in chosen]
