"""How sure of itself a model is of rows that it has not seen: what validation rows tell, in the order of ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from loft_fast.errors import InputError
from loft_fast.evaluate import kl_divergence
from loft_fast.logistic import logistic
from loft_fast.sites import Site
from loft_fast.voters import Voters, without

TEMPERATURES = [10 ** (0.1 * i) for i in range(21)]
_SUREST = 100.0  # margin of a row that is right, or wrong, beyond doubt
_EVEN = 1000  # ranks that stand for all


class Held:
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
        self.others = without(logits.double(), self.labels)
        self.features = {place: torch.cat([part[2][place] for part in seen]) for place in seen[0][2]}

    def expected(self, voters: Voters, ranks: Tensor) -> float:
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

    def temperature(self, voters: Voters) -> float:
        """How much more evenly the model spreads over wrong classes than the discriminants do.

        Nearest in KL divergence, weighted by the probability that is spread, of those with which as many of these rows
        come out right as are, give or take one: the nearest of all would have more of them right.
        """
        _, others, _ = voters.judge(self.labels, [self.features])
        weight = (-self.margins).sigmoid()
        found = []
        for temperature in TEMPERATURES:
            spread = flattened(others, temperature)
            right = joined(self.margins, spread, self.labels).argmax(1) == self.labels
            off = abs(int(right.sum()) - int(self.right.sum()))
            found.append((max(1, off), float(weight @ kl_divergence(self.others, spread)), temperature))
        return min(found)[2]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the true class, (n,), in float64."""
    scores = logits.double()
    true = scores.gather(1, labels.unsqueeze(1))
    return true.squeeze(1) - scores.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1)


def joined(margins: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (n, classes) from margins (n,) of the labels and the log-probabilities of the other classes."""
    true, margins = labels.unsqueeze(1), margins.unsqueeze(1)
    return (functional.logsigmoid(-margins) + others).scatter(1, true, functional.logsigmoid(margins))


def flattened(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (n, classes), more even the higher the temperature."""
    return (log_probabilities / temperature).log_softmax(1)
