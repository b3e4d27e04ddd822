"""What users ask of an unlearned model: accuracies, membership inference, probes, distance to a retrained model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast import batches
from loft_fast.errors import InputError, MissingExtraError
from loft_fast.sites import evaluating, find_site, unwrap
from loft_fast.surgery import attach

SETS = ("retain_train", "forget_train", "retain_test", "forget_test")
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
    """One set seen through a model: features (n, d), log-probabilities (n, classes), labels (n,)."""

    features: Tensor
    log_probabilities: Tensor
    labels: Tensor

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
            "retain_test", "forget_test".
        site: where the features for the probe are read (features after the projection); default as `fetch_moments`.
        projection: any module on features, attached at the site for the evaluation only. Needed for an honest probe of
            a folded model, whose features are as before: its head no longer looks at the dropped ones.
        reference: the retrained model, for agreement and KL.
        probe, membership: leave these measures out to save time.

    Raises:
        InputError: an unknown or empty set, or batches without labels.
        MissingExtraError: scikit-learn is needed for `probe` and `membership`.
    """
    start = time.perf_counter()
    unknown = sorted(set(sets) - set(SETS))
    if unknown or not sets:
        raise InputError(f"sets: got {unknown or 'none'}, expected some of {', '.join(SETS)}")
    if projection is None:
        seen = {name: observe(model, loader, site, name) for name, loader in sets.items()}
    else:
        with attach(model, projection, site):
            seen = {name: observe(model, loader, site, name) for name, loader in sets.items()}
    values: dict[str, float] = {name: outcome.accuracy for name, outcome in seen.items()}
    attacked = ("retain_train", "retain_test", "forget_train")
    if membership and set(attacked) <= set(seen):
        values["mia"] = membership_inference(*(seen[name].confidence for name in attacked))
    if probe and set(SETS) <= set(seen):
        values["probe_auc"] = probe_auc(*(seen[name].features for name in SETS))
    tests = [name for name in ("retain_test", "forget_test") if name in seen]
    if reference is not None and tests:
        mine = torch.cat([seen[name].log_probabilities for name in tests])
        theirs = torch.cat([observe(reference, sets[name], site, name).log_probabilities for name in tests])
        values["agreement"] = 100 * float((mine.argmax(1) == theirs.argmax(1)).double().mean())
        values["kl"] = float((theirs.exp() * (theirs - mine)).sum(1).mean())
    return Evaluation(**values, seconds=time.perf_counter() - start)


def observe(model: nn.Module, loader: Iterable[Any], site: str | None = None, name: str = "loader") -> Outcome:
    """Features at the site, log-probabilities and labels of all rows, in float64 on the CPU."""
    place = find_site(model, site)
    target = unwrap(model)
    device = next((p.device for p in target.parameters()), torch.device("cpu"))
    features: list[Tensor] = []
    outputs: list[Tensor] = []
    truth: list[Tensor] = []
    hook = place.hook(lambda z: features.append(place.channels_last(z).flatten(1).double().cpu()))
    try:
        with evaluating(target):
            for raw in loader:
                batch = batches.to_device(raw, device)
                outputs.append(batches.logits(batches.call(target, batch)).double().log_softmax(1).cpu())
                truth.append(torch.as_tensor(batches.keys(batch, None, "label")).cpu())
    finally:
        hook.remove()
    rows = sum(len(part) for part in truth)
    if not rows:
        raise InputError(f"{name}: the set is empty, expected at least one row")
    return Outcome(torch.cat(features), torch.cat(outputs), torch.cat(truth))


def membership_inference(members: Tensor, others: Tensor, forgotten: Tensor) -> float:
    """Percent of `forgotten` that the paper's attack takes for training rows.

    The attack (arXiv 2601.22456): an RBF support vector classifier, C = 3, on the confidence in the true class, trained
    on equally many retain training rows (members) and test rows (others). All arguments are (n,) probabilities.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise MissingExtraError("evaluate needs scikit-learn: pip install 'loft-fast[demo]'") from error
    n = min(len(members), len(others), _ATTACK_ROWS)
    generator = torch.Generator().manual_seed(0)
    known = [part[torch.randperm(len(part), generator=generator)[:n]] for part in (members, others)]
    attack = SVC(C=3).fit(torch.cat(known).unsqueeze(1).numpy(), [1] * n + [0] * n)
    return float(100 * attack.predict(forgotten.unsqueeze(1).numpy()).mean())


def probe_auc(retain: Tensor, forget: Tensor, retain_test: Tensor, forget_test: Tensor) -> float:
    """Area under the ROC curve, on test rows, of a logistic regression telling forget from retain features (n, d)."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtraError("evaluate needs scikit-learn: pip install 'loft-fast[demo]'") from error
    train, test = torch.cat([retain, forget]), torch.cat([retain_test, forget_test])
    # One scale for all features: scaling each by itself would blow rounding noise in dropped directions up to size one.
    mean, scale = train.mean(0), train.std().clamp_min(1e-30)
    wanted = [[0] * len(part) + [1] * len(other) for part, other in ((retain, forget), (retain_test, forget_test))]
    probe = LogisticRegression(class_weight="balanced", max_iter=500)
    probe.fit(((train - mean) / scale).numpy(), wanted[0])
    return float(roc_auc_score(wanted[1], probe.decision_function(((test - mean) / scale).numpy())))
