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

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from loft_fast import batches
from loft_fast.discriminant import linear_discriminant
from loft_fast.errors import InputError
from loft_fast.evaluate import kl_divergence
from loft_fast.logistic import logistic
from loft_fast.moments import Moments
from loft_fast.sites import Site, device_of, evaluating, find_site, unwrap

WIDTH = 2048
"""How many random features of a place a discriminant reads; maps are averaged down to no more than that first."""

_SITES = 6  # places to look at, spread over the model
_LOOK_AFTER, _HOPELESS = 4096, 5.0  # rows, and points of cost: worse places are left out from there on
_AS_GOOD = 1.5  # points of cost: the standard error of an accuracy from some hundred rows
_OTHER = 1.63  # Kolmogorov's statistic above which two samples are of two kinds (1 in 100 of one kind are so far apart)
_FOLD, _FOLD_ROWS = 5, 10_000  # every fifth of so many retain rows is left out of the fit, and fewer later on
_TEMPERATURES = [10 ** (0.1 * i) for i in range(21)]
_NEGLIGIBLE = 0.05  # chance of being the earliest good place: others are not looked at
_CERTAIN = 0.01  # a temperature that leaves one class
_SUREST = 100.0  # margin of a row that is right, or wrong, beyond doubt
_EVEN = 1000  # ranks that stand for all
_SHIFT = 0.3  # of random features, in standard deviations


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
    candidates = [_Candidate(place) for place in places]
    held = _Held([_look(target, places, batch, "validation") for batch in validation])
    rows = steps = 0
    for batch in tqdm(retain, desc="retain rows", unit="batch", disable=not progress, leave=False):
        logits, labels, caught = _look(target, places, batch, "retain")
        rows, steps = rows + len(labels), steps + 1
        for candidate in candidates:
            candidate.add(caught.get(candidate.place), labels, logits.shape[1])
        # Most of the work is for places that are no good. A loader may be sorted by class, though.
        if rows >= _LOOK_AFTER > rows - len(labels) and all(one.knows(held.labels) for one in candidates if one.count):
            fitted = _fit(candidates, held)
            good = [*_best(fitted, _HOPELESS), *_early(fitted, held).parts]
            candidates = [one for one in candidates if any(one is other.source for other in good)]
    fitted = _fit(candidates, held)
    voters, early = _Voters(_best(fitted, _AS_GOOD)), _early(fitted, held)
    look_at = list({one.place: None for one in (*voters.parts, *early.parts)})
    seen = [_look(target, look_at, batch, "forget") for batch in forget]
    foretold, right, used = _foretell(voters, early, held, seen)
    read = tuple((str(one.place), one.accuracy, one.contamination) for one in used.parts)
    return Unseen(foretold, right, _percent(held.right), read, rows, steps)


def _fit(candidates: list[_Candidate], held: _Held) -> list[_Fitted]:
    """The discriminants, in the order of the model."""
    fitted = [candidate.fit(held) for candidate in candidates if candidate.count]
    if not fitted:
        raise InputError("retain: it yielded no rows at any of the sites, expected at least one batch")
    return fitted


def _best(fitted: list[_Fitted], within: float) -> list[_Fitted]:
    """The discriminants, the best first, whose cost is within so many points of its."""
    least = min(one.cost for one in fitted)
    return sorted((one for one in fitted if one.cost <= least + within), key=lambda one: one.cost)


def _early(fitted: list[_Fitted], held: _Held) -> _Voters:
    """The first that does about as well as the model, and on rows that the model saw no better; else the best.

    Which that is, some hundred rows cannot tell for certain: each counts by the probability that it is the one.
    """
    right, rows = _percent(held.right), len(held.labels)
    chances, left = list[float](), 1.0
    for one in fitted:
        chance = 0.0
        if one.contamination <= 3 * _standard_error(one.accuracy, rows):
            reached = one.accuracy + one.contamination
            error = math.hypot(_standard_error(reached, len(one.left_out)), _standard_error(right, rows))
            chance = left * (1 + math.erf((reached - right + _AS_GOOD) / max(error, 1e-9) / 2**0.5)) / 2
        chances.append(chance)
        left -= chance
    chances[fitted.index(_best(fitted, 0.0)[0])] += left
    likely = [i for i, chance in enumerate(chances) if chance > _NEGLIGIBLE]
    return _Voters([fitted[i] for i in likely], [chances[i] for i in likely])


def _standard_error(percent: float, rows: int) -> float:
    """Of a percentage that was counted among so many rows."""
    return (percent * (100 - percent) / rows) ** 0.5


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the true class, (n,), in float64."""
    scores = logits.double()
    true = scores.gather(1, labels.unsqueeze(1))
    return true.squeeze(1) - scores.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1)


def _leads(scores: Tensor, labels: Tensor) -> Tensor:
    """Score of the true class less that of the best other one, (n,), in float64: positive where a row is right."""
    true = labels.unsqueeze(1)
    scores = scores.double()
    return (scores.gather(1, true) - scores.scatter(1, true, -torch.inf).amax(1, keepdim=True)).squeeze(1)


def _foretell(
    voters: _Voters, early: _Voters, held: _Held, seen: list[tuple[Tensor, Tensor, dict[Site, Tensor]]]
) -> tuple[Tensor, float, _Voters]:
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
    for flattest in [one for one in reversed(_TEMPERATURES) if one <= temperature]:
        foretold = _joined(margin, _flattened(others, flattest), labels)
        found = foretold.argmax(1) == labels
        if int(found.sum()) <= wanted:  # a row that is to be wrong needs a class that is likelier
            break
    # The discriminants may spread too far even at their most certain: then the hardest rows get one other class.
    stubborn = margin.where(found & (margin < 0), torch.inf).argsort()[: max(0, int(found.sum()) - wanted)]
    stubborn = stubborn[margin[stubborn] < 0]
    foretold[stubborn] = _joined(margin[stubborn], _flattened(others[stubborn], _CERTAIN), labels[stubborn])
    found = foretold.argmax(1) == labels
    return foretold.float(), _percent(found), voters


def _like_any(ranks: Tensor, known: int) -> bool:
    """Whether these are ranks of a random sample, next to `known` rows; the test of Kolmogorov and Smirnov."""
    even = (torch.arange(len(ranks), device=ranks.device) + 0.5) / len(ranks)
    apart = float((ranks.sort().values - even).abs().max())
    return apart / (1 / len(ranks) + 1 / known) ** 0.5 < _OTHER


def _joined(margins: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (n, classes) from margins (n,) of the labels and the log-probabilities of the other classes."""
    true, margins = labels.unsqueeze(1), margins.unsqueeze(1)
    return (functional.logsigmoid(-margins) + others).scatter(1, true, functional.logsigmoid(margins))


def _flattened(log_probabilities: Tensor, temperature: float) -> Tensor:
    return (log_probabilities / temperature).log_softmax(1)


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (n, classes) of the classes that are not a row's own, were it none of that."""
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).log_softmax(1)


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


@torch.inference_mode()
def _look(model: nn.Module, places: Sequence[Site], raw: Any, name: str) -> tuple[Tensor, Tensor, dict[Site, Tensor]]:
    """Logits (n, classes), labels (n,), and the features (n, d) at every place that the forward pass reaches."""
    batch = batches.to_device(raw, device_of(model))
    labels = batches.labels(batch)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise InputError(f"{name}: got batches without one class label per row, expected (x, y) or a dict")
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
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise InputError(f"{name}: got labels outside of the model's {logits.shape[1]} outputs")
    return logits, labels, caught


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


class _Held:
    """The validation rows: labels (n,), features by place, and what the model says of them.

    That is margins (n,), and log-probabilities (n, classes) of the classes that are not theirs.
    """

    def __init__(self, seen: list[tuple[Tensor, Tensor, dict[Site, Tensor]]]) -> None:
        if not seen:
            raise InputError("validation: it yielded no batches, expected at least one")
        self.labels = torch.cat([part[1] for part in seen])
        logits = torch.cat([part[0] for part in seen])
        self.right = logits.argmax(1) == self.labels
        # An output that is closed makes a margin infinite.
        self.margins = margins(logits, self.labels).clamp(-_SUREST, _SUREST)
        self.others = _without(logits.double(), self.labels)
        self.features = {place: torch.cat([part[2][place] for part in seen]) for place in seen[0][2]}

    def expected(self, voters: _Voters, ranks: Tensor) -> float:
        """Share of a random sample with these ranks (n,) that will be right.

        It is that of the rows here, and more where the ranks of the sample are by chance better than even ones: by as
        much as a logistic regression on ranks, fitted to the rows here, then expects.
        """
        known, _, _ = voters.judge(self.labels, [self.features])
        # Laplace's rule of succession, one more of each: that three of two hundred are wrong may be luck.
        known = torch.cat([known.to(self.margins), self.margins.new_full((2,), 0.5)])
        right = torch.cat([self.right.to(known), known.new_tensor([0.0, 1.0])])
        chance = logistic(known, right)
        even = (torch.arange(_EVEN).to(known) + 0.5) / _EVEN
        return float((right.mean() + chance(ranks.to(known)).mean() - chance(even).mean()).clamp(0, 1))

    def margins_by(self, ranks: Tensor, right: float) -> Tensor:
        """Margins (n,) of rows in this order of which this share is to be right: as of the rows here, less a constant.

        A kind of rows that a model has not met, it is less sure of: of the easy ones as much as of the hard ones.
        """
        order = (ranks.argsort(stable=True).argsort().to(self.margins) + 0.5) / len(ranks)
        # Where rows begin to be right: below 0 where what is left is spread over several classes, never above.
        shares = torch.stack([self.right.double().mean(), self.margins.new_tensor(right)])
        here, there = self._quantile(1 - shares)
        return self._quantile(order) + here.clamp_max(0) - there

    def _quantile(self, order: Tensor) -> Tensor:
        """Margins at these places in [0, 1] among all, each of n margins being at the middle of its n-th part."""
        n = len(self.margins)
        return self.margins.quantile(((order * n - 0.5) / max(1, n - 1)).clamp(0, 1))

    def temperature(self, voters: _Voters) -> float:
        """How much more evenly the model spreads over wrong classes than the discriminants do.

        Nearest in KL divergence, weighted by the probability that is spread, of those with which as many of these rows
        come out right as are, give or take one: the nearest of all would have more of them right.
        """
        _, others, _ = voters.judge(self.labels, [self.features])
        weight = (-self.margins).sigmoid()
        found = []
        for temperature in _TEMPERATURES:
            spread = _flattened(others, temperature)
            right = _joined(self.margins, spread, self.labels).argmax(1) == self.labels
            off = abs(int(right.sum()) - int(self.right.sum()))
            found.append((max(1, off), float(weight @ kl_divergence(self.others, spread)), temperature))
        return min(found)[2]


class _Candidate:
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
            mix = torch.randn(features.shape[1], WIDTH, generator=generator) / features.shape[1] ** 0.5
            self.mix = mix.to(features)
        return functional.relu(features / self.scale @ self.mix + _SHIFT)

    def knows(self, labels: Tensor) -> bool:
        """Whether there were rows of all these classes."""
        return bool((self.sizes[labels] > 0).all())

    def fit(self, held: _Held) -> _Fitted:
        """The discriminant, and how it fares on rows it has not seen."""
        present = self.sizes > 0
        if int(present.sum()) < 2:
            raise InputError(f"retain: got rows of {int(present.sum())} classes, expected at least two")
        means = self.sums[present] / self.sizes[present].unsqueeze(1)
        offsets = means - self.moments.mean
        within = (self.moments.scatter - offsets.T @ (offsets * self.sizes[present].unsqueeze(1))) / self.count
        labels = torch.where(present)[0]
        return _Fitted(self, *linear_discriminant(within, means, self.sizes[present], labels, len(present)), held)


def _left_out(index: Tensor) -> Tensor:
    """Which rows are kept out of the fit: every fifth of the first ten thousand, then 500 for each doubling."""
    octave = (index / _FOLD_ROWS).clamp_min(1).log2().floor()
    return index % torch.where(index < _FOLD_ROWS, _FOLD, 4 * _FOLD * 2**octave) == 0


class _Fitted:
    """A discriminant: where it reads, its leads on rows that the model saw and it did not, and what it is worth."""

    def __init__(self, source: _Candidate, weight: Tensor, bias: Tensor, held: _Held) -> None:
        self.place, self.source = source.place, source
        self.weight, self.bias = weight, bias
        fold, truth = (torch.cat(column) for column in zip(*source.fold, strict=True))
        self.left_out = _leads(fold.double() @ weight.T + bias, truth)
        fresh = _leads(self.scores(held.features[self.place]), held.labels)
        self.sorted = self.left_out.sort().values
        self.wrong = float((self.left_out < 0).double().mean())
        self.accuracy, self.contamination = _percent(fresh > 0), 100 * (1 - self.wrong) - _percent(fresh > 0)
        self.cost = max(0.0, self.contamination) - self.accuracy

    def scores(self, features: Tensor) -> Tensor:
        """(n, classes) in float64."""
        return self.source.read(features).double() @ self.weight.T + self.bias

    def ranks(self, found: Tensor) -> Tensor:
        """What share of the left-out rows has smaller leads than these, (n,)."""
        return torch.searchsorted(self.sorted, found) / len(self.sorted)


class _Voters:
    """Discriminants by weight, all alike if none is given: the mean of their ranks, ranked among the left-out rows."""

    def __init__(self, parts: list[_Fitted], weights: list[float] | None = None) -> None:
        self.parts = parts
        chances = torch.tensor(weights or [1.0] * len(parts), dtype=torch.float64)
        self.weights = (chances / chances.sum()).to(parts[0].sorted.device)
        self.sorted = self._mean([one.ranks(one.left_out) for one in parts]).sort().values

    def judge(self, labels: Tensor, features: list[dict[Site, Tensor]]) -> tuple[Tensor, Tensor, float]:
        """Ranks (n,) of the rows in [0, 1], log-probabilities (n, classes) of other classes, and the share right."""
        votes, others, right = [], [], []
        for one in self.parts:
            scores = torch.cat([one.scores(batch[one.place]) for batch in features])
            leads = _leads(scores, labels)
            votes.append(one.ranks(leads))
            others.append(_without(scores, labels))
            right.append((leads >= 0).double().mean())
        ranks = torch.searchsorted(self.sorted, self._mean(votes)) / len(self.sorted)
        mixed = (torch.stack(others) + self.weights.log().view(-1, 1, 1)).logsumexp(0)
        return ranks, mixed, float(self._mean(right))

    def _mean(self, values: list[Tensor]) -> Tensor:
        return self.weights @ torch.stack(values).to(self.weights)
