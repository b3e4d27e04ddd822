"""What a data set is to the benchmark."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality.problem import Rows

VALIDATION = 0.2  # of the test rows


@dataclass(frozen=True)
class Data:
    """Training and test rows.

    Attributes:
        name: as in the results.
        train, validation, test: the rows; those for validation are a fifth of what was there for testing.
        names: of the classes; labels are indices into it.
        group, group_test: (n,) whose row it is: a number per sub-group that goes across or lies inside classes.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    names: tuple[str, ...]
    group: Tensor
    group_test: Tensor

    @property
    def classes(self) -> int:
        """Outputs of a network for it."""
        return len(self.names)

    @property
    def version(self) -> str:
        """The same for the same labels and groups: inputs that are computed come out a little different elsewhere."""
        digest = hashlib.sha256(" ".join(self.names).encode())
        for part in (self.train.y, self.validation.y, self.test.y, self.group, self.group_test):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def held_out(self, share: float = 0.1) -> Data:
        """For tuning: a part of the training rows takes the place of the test rows, which stay unseen."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        held, fit = order.split([round(share * len(order)), len(order) - round(share * len(order))])
        fit_rows, held_rows = self.train[fit], self.train[held]
        return Data(self.name, fit_rows, self.validation, held_rows, self.names, self.group[fit], self.group[held])


def split(name: str, train: Rows, test: Rows, names: tuple[str, ...], group: Tensor, group_test: Tensor) -> Data:
    """A data set of which a fifth of the test rows is for validation."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(3))
    count = round(VALIDATION * len(test))
    held, rest = order[:count], order[count:].sort().values
    return Data(name, train, test[held], test[rest], names, group, group_test[rest])
