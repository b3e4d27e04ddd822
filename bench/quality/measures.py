"""What is asked of a network that was made to forget, next to the one retrained without the rows."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from bench.quality.networks import Chain
from bench.quality.originals import logits
from bench.quality.problem import Rows, adam, cross_entropy, step
from loft_fast.confidence import margins
from loft_fast.evaluate import SETS, Outcome, kl_divergence, membership_inference, probe_auc

PROBE_ROWS = 1500  # a side and set: a probe on more finds the same
RELEARN_STEPS, RELEARN_BATCH = 60, 64


@dataclass(frozen=True)
class Sets:
    """The rows of one task: to be kept and to be forgotten, trained on and not. `forget_test` may have no rows."""

    retain_train: Rows
    forget_train: Rows
    retain_test: Rows
    forget_test: Rows

    @cached_property
    def present(self) -> dict[str, Rows]:
        """Those with rows."""
        return {name: getattr(self, name) for name in SETS if len(getattr(self, name))}


@dataclass(frozen=True)
class Seen:
    """What one network says of every set."""

    outcomes: dict[str, Outcome]

    @classmethod
    def of(cls, model: Chain, sets: Sets) -> Seen:
        """Look at all rows once."""
        nothing = torch.empty(0)
        found = {}
        for name, rows in sets.present.items():
            found[name] = Outcome(rows.y, logits(model, rows.x).double().log_softmax(1), nothing, nothing)
        return cls(found)

    def confidence(self, name: str) -> Tensor:
        """Probability of the true class, (n,)."""
        return self.outcomes[name].confidence

    def entropy(self, name: str) -> Tensor:
        """Of the predicted distribution, in nats, (n,)."""
        return torch.special.entr(self.outcomes[name].log_probabilities.exp()).sum(1)

    def membership(self, signal: str) -> float:
        """Percent of the forget rows that an attack on "confidence" or "entropy" takes for training rows."""
        look = getattr(self, signal)
        return membership_inference(look("retain_train"), look("retain_test"), look("forget_train"))

    @cached_property
    def values(self) -> dict[str, float]:
        """Accuracies, and the attack on the confidence: what the gap is taken over."""
        accuracies = {name: outcome.accuracy for name, outcome in self.outcomes.items()}
        return {**accuracies, "mia": self.membership("confidence")}


def gap(seen: Seen, retrained: Seen) -> float:
    """Mean absolute difference to the retrained network over the accuracies and membership inference, in points."""
    return fmean(abs(seen.values[name] - retrained.values[name]) for name in seen.values)


def likeness(seen: Seen, retrained: Seen) -> dict[str, float]:
    """How near to the retrained network: gaps in points, agreement in percent, KL in nats, Tug-of-War in [0, 1]."""
    tests = [name for name in ("retain_test", "forget_test") if name in seen.outcomes]
    ours, reference = (torch.cat([one.outcomes[name].log_probabilities for name in tests]) for one in (seen, retrained))
    return {
        **seen.values,
        "mia_entropy": seen.membership("entropy"),
        "gap": gap(seen, retrained),
        "agreement": 100 * float((ours.argmax(1) == reference.argmax(1)).double().mean()),
        "kl": float(kl_divergence(reference, ours).mean()),
        "tug_of_war": math.prod(1 - abs(seen.values[name] - retrained.values[name]) / 100 for name in seen.outcomes),
    }


def lira(models: list[Chain], inside: Tensor, rows: Rows, chosen: Tensor, network: Chain) -> float:
    """Percent of the chosen training rows that look trained on: likelihood ratio of the shadows' logit confidences.

    With one variance for all rows and both sides, as eight shadows a side allow, that is: nearer to the mean of those
    that saw the row than to the mean of those that did not.

    Args:
        models: shadows; inside: (shadows, n) bool, the rows of each.
        chosen: (n,) bool, the rows asked about.
    """
    part = rows[chosen]
    known = torch.stack([_sureness(model, part) for model in models])
    was_in = inside[:, chosen]
    own = _sureness(network, part)
    distance = []
    for side in (was_in, ~was_in):
        center = (known * side).sum(0) / side.sum(0)
        distance.append((own - center).abs())
    return 100 * float((distance[0] < distance[1]).double().mean())


def _sureness(model: Chain, rows: Rows) -> Tensor:
    """log(p / (1 - p)) of the true class, (n,)."""
    return margins(logits(model, rows.x), rows.y).clamp(-30, 30)


@torch.inference_mode()
def probes(model: Chain, sets: Sets) -> list[dict[str, float]]:
    """For every block, how well a linear and a nearest-neighbour probe tell forget from retain test rows (AUC)."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, rows in sets.present.items():
        chosen = torch.randperm(len(rows), generator=generator)[:PROBE_ROWS]
        parts[name] = model.block_features(rows.x[chosen])
    found = []
    for block in range(len(model.blocks)):
        features = {name: found_in[block].double() for name, found_in in parts.items()}
        found.append({"linear": probe_auc(*(features[name] for name in SETS)), "neighbours": _neighbours(features)})
    return found


def _neighbours(features: dict[str, Tensor]) -> float:
    """AUC, on test rows, of the share of forget rows among the nearest 20 training rows."""
    columns = {}
    for when in ("train", "test"):
        pair = features[f"retain_{when}"], features[f"forget_{when}"]
        columns[when] = torch.cat(pair).numpy(), [0] * len(pair[0]) + [1] * len(pair[1])
    near = KNeighborsClassifier(20).fit(*columns["train"])
    x, wanted = columns["test"]
    return float(roc_auc_score(wanted, near.predict_proba(x)[:, 1]))


def accuracy(model: Chain, rows: Rows) -> float:
    """Percent."""
    return 100 * float((logits(model, rows.x).argmax(1) == rows.y).double().mean())


def relearning(model: Chain, sets: Sets, rate: float, level: float) -> int:
    """Steps of fine-tuning on the forget rows until the accuracy on them is `level` percent; at most RELEARN_STEPS."""
    student = copy.deepcopy(model).eval()  # statistics of batch norm stay: the rows are of one kind
    optimizer = adam(student, rate)
    generator = torch.Generator().manual_seed(0)
    rows = sets.forget_train
    for taken in range(RELEARN_STEPS):
        if accuracy(student, rows) >= level:
            return taken
        step(optimizer, cross_entropy(student, rows[torch.randint(len(rows), (RELEARN_BATCH,), generator=generator)]))
    return RELEARN_STEPS
