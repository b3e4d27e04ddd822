"""What users ask of an unlearned model: accuracies, membership inference, probes, distance to a retrained model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast import batches
from loft_fast.errors import InputError, MissingExtraError, SiteError
from loft_fast.sites import Site, device_of, evaluating, find_site, unwrap
from loft_fast.surgery import attach

SETS = ("retain_train", "forget_train", "retain_test", "forget_test")
_TESTS = SETS[2:]
_ATTACK_SETS = ("retain_train", "retain_test", "forget_train")
_ATTACK_ROWS = 2000  # rows a side that the attack is trained on: an RBF SVC is cubic in them


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent; None where a set or a reference was not given.

    Attributes:
        retain_train, forget_train, retain_test, forget_test: accuracy.
        mia: percent of the forget training rows that a membership attack takes for training rows (`membership`).
        probe_auc: how well a linear probe on the features finds the forget rows among test rows; 0.5 is chance.
        agreement: percent of test rows with the same prediction as the reference model.
        kl: mean KL(reference || model) over the test rows, in nats.
        seconds: wall time of the evaluation.
    """

    retain_train: float | None = None
    forget_train: float | None = None
    retain_test: float | None = None
    forget_test: float | None = None
    mia: float | None = None
    probe_auc: float | None = None
    agreement: float | None = None
    kl: float | None = None
    seconds: float = 0.0

    @property
    def accuracies(self) -> dict[str, float | None]:
        """The four accuracies by set."""
        return {name: getattr(self, name) for name in SETS}


@dataclass(frozen=True)
class Outcome:
    """One set seen through a model, in float64 on the CPU.

    Attributes:
        labels: (n,) the true classes.
        log_probabilities: (n, classes).
        reference: (n, classes) log-probabilities by the reference model; empty without one.
        features: (n, d) at the site, the mean over the positions of a row that has several; empty without a site.
    """

    labels: Tensor
    log_probabilities: Tensor
    reference: Tensor
    features: Tensor

    @property
    def accuracy(self) -> float:
        """Percent of rows whose most likely class is the label."""
        return 100 * float((self.log_probabilities.argmax(1) == self.labels).double().mean())

    @property
    def confidence(self) -> Tensor:
        """Probability of the true class, (n,)."""
        return self.log_probabilities.gather(1, self.labels.unsqueeze(1)).squeeze(1).exp()


def evaluate(
    model: nn.Module,
    sets: Mapping[str, Iterable[Any]],
    *,
    site: str | None = None,
    projection: nn.Module | None = None,
    reference: nn.Module | None = None,
    probe: bool = True,
    membership: bool = True,
) -> Evaluation:
    """Measure a classifier on retain/forget x train/test.

    Args:
        model: the model as it is, or the original one together with `projection`.
        sets: loaders of (x, y) or dictionaries with labels, under any of "retain_train", "forget_train",
            "retain_test", "forget_test". Each is passed over once.
        site: where the features for the probe are read (features after the projection); default as `fetch_moments`.
        projection: any module on features, attached at the site for the evaluation only. Needed for an honest probe of
            a folded model, whose features are as before: its head no longer looks at the dropped ones.
        reference: the retrained model, for agreement and KL.
        probe, membership: leave these measures out to save time.

    Raises:
        InputError: an unknown or empty set, or labels (n,) that are no classes of the outputs (n, classes).
        MissingExtraError: scikit-learn is needed for `probe` and `membership`.
    """
    start = time.perf_counter()
    unknown = sorted(set(sets) - set(SETS))
    if unknown or not sets:
        raise InputError(f"sets: got {unknown or 'none'}, expected some of {', '.join(SETS)}")
    probe = probe and set(SETS) <= set(sets)
    membership = membership and set(_ATTACK_SETS) <= set(sets)
    if probe or membership:
        _require_sklearn()
    place = find_site(model, site) if probe or site is not None else None
    if reference is not None and unwrap(reference, "reference") is unwrap(model) and projection is not None:
        reference = copy.deepcopy(reference)  # the model as it is, without the projection
    with ExitStack() as stack:
        if projection is not None:
            stack.enter_context(attach(model, projection, site))
        seen = {
            name: observe(model, loader, place if probe else None, reference if name in _TESTS else None, name)
            for name, loader in sets.items()
        }
    values: dict[str, float] = {name: outcome.accuracy for name, outcome in seen.items()}
    if membership:
        values["mia"] = membership_inference(*(seen[name].confidence for name in _ATTACK_SETS))
    if probe:
        values["probe_auc"] = probe_auc(*(seen[name].features for name in SETS))
    tests = [seen[name] for name in _TESTS if name in seen]
    if reference is not None and tests:
        mine = torch.cat([outcome.log_probabilities for outcome in tests])
        theirs = torch.cat([outcome.reference for outcome in tests])
        values["agreement"] = 100 * float((mine.argmax(1) == theirs.argmax(1)).double().mean())
        values["kl"] = float(kl_divergence(theirs, mine).mean())
    return Evaluation(**values, seconds=time.perf_counter() - start)


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) of log-probabilities (n, classes), (n,); a class ruled out by the reference counts 0."""
    return torch.where(reference.isneginf(), 0.0, reference.exp() * (reference - model)).sum(1)


def observe(
    model: nn.Module,
    loader: Iterable[Any],
    place: Site | None = None,
    reference: nn.Module | None = None,
    name: str = "loader",
) -> Outcome:
    """Labels and log-probabilities of all rows, also by a reference on the same batches, and features at the site."""
    batches.check_loader(name, loader)
    caught: list[Tensor] = []
    truth: list[Tensor] = []
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    features: list[Tensor] = []
    with ExitStack() as stack:
        for part in (model, reference):
            if part is not None:
                stack.enter_context(evaluating(unwrap(part)))
        if place is not None:
            stack.callback(place.hook(lambda z: caught.append(z.clone())).remove)
        for raw in loader:
            caught.clear()
            scores, batch = _scores(model, raw)
            mine.append(scores)
            truth.append(batches.classes(name, batch, scores).cpu())
            if place is not None:
                features.append(_one_per_row(place, caught, batches.attention_mask(batch)))
            if reference is not None:
                theirs.append(_scores(reference, raw)[0])
    if not sum(len(part) for part in truth):
        raise InputError(f"{name}: the set is empty, expected at least one row")
    return Outcome(*(torch.cat(parts) if parts else torch.empty(0) for parts in (truth, mine, theirs, features)))


def _scores(model: nn.Module, raw: Any) -> tuple[Tensor, Any]:
    """Log-probabilities (n, classes) of a batch, in float64 on the CPU, and the batch where the model is."""
    target = unwrap(model)
    batch = batches.to_device(raw, device_of(target))
    return batches.logits(batches.call(target, batch)).double().log_softmax(1).cpu(), batch


def _one_per_row(place: Site, caught: list[Tensor], mask: Tensor | None) -> Tensor:
    """Features (n, d) in float64 on the CPU: means over a row's (real) positions and over the module's calls."""
    if not caught:
        raise SiteError(f"site: {str(place)!r} is not reached in the forward pass")
    return torch.stack([place.pooled(features.double().cpu(), mask) for features in caught]).mean(0)


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("evaluate needs scikit-learn: pip install 'loft-fast[demo]'") from error


def membership_inference(members: Tensor, others: Tensor, forgotten: Tensor) -> float:
    """Percent of `forgotten` that the paper's attack takes for training rows.

    The attack (arXiv 2601.22456): an RBF support vector classifier, C = 3, on the confidence in the true class, trained
    on equally many retain training rows (members) and test rows (others). All arguments are (n,) probabilities.
    """
    _require_sklearn()
    from sklearn.svm import SVC

    n = min(len(members), len(others), _ATTACK_ROWS)
    generator = torch.Generator().manual_seed(0)
    known = [part[torch.randperm(len(part), generator=generator, device="cpu")[:n]] for part in (members, others)]
    attack = SVC(C=3).fit(torch.cat(known).unsqueeze(1).numpy(), [1] * n + [0] * n)
    return float(100 * attack.predict(forgotten.unsqueeze(1).numpy()).mean())


def probe_auc(retain: Tensor, forget: Tensor, retain_test: Tensor, forget_test: Tensor) -> float:
    """Area under the ROC curve, on test rows, of a logistic regression telling forget from retain features (n, d)."""
    _require_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    train, test = torch.cat([retain, forget]), torch.cat([retain_test, forget_test])
    # One scale for all features: scaling each by itself would blow rounding noise in dropped directions up to size one.
    mean, scale = train.mean(0), train.std().clamp_min(1e-30)
    wanted = [[0] * len(part) + [1] * len(other) for part, other in ((retain, forget), (retain_test, forget_test))]
    probe = LogisticRegression(class_weight="balanced", max_iter=500)
    probe.fit(((train - mean) / scale).numpy(), wanted[0])
    return float(roc_auc_score(wanted[1], probe.decision_function(((test - mean) / scale).numpy())))
