"""What is asked of a model that was made to forget."""

from dataclasses import astuple, dataclass

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import Tensor, nn

ATTACK_ROWS = 1000


@dataclass(frozen=True)
class Rows:
    """One split of the data at the site: features z (n, d), labels y (n,), which of them are to be forgotten (n,)."""

    z: Tensor
    y: Tensor
    forget: Tensor


@dataclass(frozen=True)
class Accuracies:
    """The four accuracies in percent."""

    retain_train: float
    forget_train: float
    retain_test: float
    forget_test: float


@dataclass(frozen=True)
class Score:
    """`mia`: percent of the forget train rows taken for training rows. `probe_auc`: 0.5 when no trace is left."""

    accuracies: Accuracies
    mia: float
    probe_auc: float

    def gap(self, retrained: "Score", mia: bool) -> float:
        """Mean absolute difference to the retrained model over the four accuracies, and the attack if asked."""
        mine, theirs = ([*astuple(score.accuracies)] + [score.mia] * mia for score in (self, retrained))
        return sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / len(mine)


@torch.inference_mode()
def measure(train: Rows, test: Rows, head: nn.Linear) -> Score:
    """The score of `head` on these features."""
    confidence = [head(rows.z).softmax(1) for rows in (train, test)]
    right = [p.argmax(1) == rows.y for p, rows in zip(confidence, (train, test), strict=True)]
    accuracies = Accuracies(
        *(
            100 * hit[rows.forget == gone].float().mean().item()
            for hit, rows in zip(right, (train, test), strict=True)
            for gone in (False, True)
        )
    )
    of_truth, of_truth_test = (p.gather(1, rows.y[:, None]) for p, rows in zip(confidence, (train, test), strict=True))
    mia = _membership(of_truth[~train.forget], of_truth_test[~test.forget], of_truth[train.forget])
    return Score(accuracies, mia, probe_auc(train, test))


def probe_auc(train: Rows, test: Rows) -> float:
    """A linear probe learns on train rows to tell forget from retain; its area under the ROC curve on test rows."""
    mean, scale = train.z.mean(0), train.z.std()  # one scale for all features: rounding noise must stay small
    x, x_test = (((rows.z - mean) / scale).numpy() for rows in (train, test))
    probe = LogisticRegression(class_weight="balanced", max_iter=500).fit(x, train.forget.numpy())
    return float(roc_auc_score(test.forget.numpy(), probe.decision_function(x_test)))


def _membership(members: Tensor, others: Tensor, forgotten: Tensor) -> float:
    """The paper's attack: an RBF SVC on the confidence in the true class, members against equally many others."""
    n = min(len(members), len(others), ATTACK_ROWS)
    draw = torch.Generator().manual_seed(0)
    known = torch.cat([part[torch.randperm(len(part), generator=draw)[:n]] for part in (members, others)])
    attack = SVC(C=3).fit(known.numpy(), [1] * n + [0] * n)
    return float(100 * attack.predict(forgotten.numpy()).mean())
