"""What is asked of a classifier whose features were changed: the package's own measures, on rows of features."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loft_fast.evaluate import SETS, Evaluation, Outcome, membership_inference, probe_auc


@dataclass(frozen=True)
class Rows:
    """One split of the data at the site: features z (n, d), labels y (n,), which of them are to be forgotten (n,)."""

    z: Tensor
    y: Tensor
    forget: Tensor


@torch.inference_mode()
def measure(train: Rows, test: Rows, head: nn.Linear) -> Evaluation:
    """The score of `head` on these features."""
    seen = {
        f"{kind}_{split}": _observe(rows, rows.forget == gone, head)
        for split, rows in (("train", train), ("test", test))
        for kind, gone in (("retain", False), ("forget", True))
    }
    return Evaluation(
        **{name: outcome.accuracy for name, outcome in seen.items()},
        mia=membership_inference(*(seen[name].confidence for name in ("retain_train", "retain_test", "forget_train"))),
        probe_auc=probe_auc(*(seen[name].features for name in SETS)),
    )


def _observe(rows: Rows, chosen: Tensor, head: nn.Linear) -> Outcome:
    z = rows.z[chosen]
    return Outcome(rows.y[chosen], head(z).double().log_softmax(1), torch.empty(0), z.double())
