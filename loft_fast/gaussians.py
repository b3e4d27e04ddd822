"""What a linear head would make of rows of which only the moments are known: they are drawn, classified and counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loft_fast import ops
from loft_fast.grouped_moments import GroupedMoments

_DRAWS = 8192  # Gaussian rows in all: a point of accuracy is then known to about a tenth
_GROUPS = 48  # at most so many groups of a set are drawn from, evenly spread over the keys
_HEADS = 6  # so many heads are usually asked about
_JITTER = 1e-5  # of the mean variance, added to every direction: a covariance of few rows has directions without any


class Gaussians:
    """The groups of a set as Gaussians, and what share of each a linear head would give to its own group.

    Where the outputs are few, each head's logits are drawn, from their own covariance. Where they are many, features
    are drawn once, for all heads. Draws are in float32: what is read off them is known to a tenth of a point.

    Args:
        groups: by output of the head, none of them empty.
        outputs: of the head.
    """

    def __init__(self, groups: GroupedMoments, outputs: int) -> None:
        keys = groups.keys()
        keys = keys[:: -(-len(keys) // _GROUPS)]
        parts = [groups[key] for key in keys]
        self.means = torch.stack([part.mean for part in parts])
        self.labels = torch.tensor([int(key) for key in keys], device=self.means.device)
        self.shares = self.means.new_tensor([part.count for part in parts])
        self.shares /= self.shares.sum()
        draws = max(128, _DRAWS // len(keys))
        many = features_are_cheaper(len(parts), draws, groups.dim, outputs)
        # The same for every group and head: differences between heads are then differences, not noise.
        generator = torch.Generator().manual_seed(0)
        shape = draws, groups.dim if many else outputs
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.means.device)
        units, made = [], []
        for part in parts:
            covariance = part.covariance(0)
            units.append(_unit(covariance, part.mean))
            covariance.div_(units[-1] ** 2)
            made.append(noise @ _root(covariance).T if many else covariance.float())
        self.units = self.means.new_tensor(units).unsqueeze(1)
        self.features = torch.stack(made) if many else None
        if not many:
            self.noise, self.covariances = noise, torch.stack(made)

    def accuracies(self, weight: Tensor, biases: list[Tensor]) -> list[float]:
        """For each bias, percent of rows expected to be classified as their group by argmax(weight z + bias)."""
        draws, means = self._logits(weight.float()), self.means @ weight.T
        found = []
        for bias in biases:
            offsets = means + bias
            # In float64 up to here: means may be large.
            offsets = ((offsets - offsets.amax(1, keepdim=True)) / self.units).float()
            right = (draws + offsets.unsqueeze(1)).argmax(2) == self.labels.unsqueeze(1)
            found.append(100 * float(right.double().mean(1) @ self.shares))
        return found

    def _logits(self, weight: Tensor) -> Tensor:
        """How far draws are from the mean of their group, in its unit, (groups, draws, outputs)."""
        if self.features is not None:
            return self.features @ weight.T
        weight = weight.T.expand(len(self.covariances), -1, -1)
        values, vectors = ops.eigh(ops.gram(weight, ops.gram(self.covariances, weight)))
        # The symmetric root: the only one that does not depend on the signs and the order of eigenvectors, which would
        # make other draws of the same noise for the next head.
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)) @ vectors.mT
        return self.noise @ root


def features_are_cheaper(groups: int, draws: int, dim: int, outputs: int) -> bool:
    """Whether drawing features once costs less than drawing the logits of every head. In multiply-adds."""
    once = groups * (dim**3 + draws * dim**2)  # Cholesky takes a third of it, at a third of the speed
    a_head = groups * draws * dim * outputs
    of_logits = groups * (dim**2 * outputs + dim * outputs**2 + 10 * outputs**3 + draws * outputs**2)
    return once + _HEADS * a_head < _HEADS * of_logits


def _unit(covariance: Tensor, mean: Tensor) -> float:
    """A power of two, which rounds nothing: features of any size, in units of it, have variances for float32."""
    size = float(covariance.diagonal().max()) or float(mean.square().max())
    return 2.0 ** round(math.log2(size) / 2) if size > 0 else 1.0


def _root(covariance: Tensor) -> Tensor:
    """A lower triangular square root, in float32, of a covariance that is not needed any more.

    Of the variances alone where no precision finds a positive matrix.
    """
    jitter = (_JITTER * covariance.trace() / len(covariance)).clamp_min(1e-30)
    covariance.diagonal().add_(jitter)
    for precision in (torch.float32, torch.float64):
        root, failed = torch.linalg.cholesky_ex(covariance.to(precision))
        if not failed:
            return root.float()
    return covariance.diagonal().clamp_min(0).sqrt().diag().float()
