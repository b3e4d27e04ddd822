"""What each of several processes takes of a loader, asked in one process."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from loft_fast import InputError
from loft_fast.sharding import share_of

DATA = TensorDataset(torch.arange(101))


def in_batches(sampler, drop_last=False):
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 8, drop_last))


def numbers(loader):
    return sorted(torch.cat([batch[0].reshape(-1) for batch in loader]).tolist())


LOADERS = {
    "in order": lambda: DataLoader(DATA, batch_size=8),
    "shuffled": lambda: DataLoader(DATA, batch_size=8, shuffle=True),
    "row by row": lambda: DataLoader(DATA, batch_size=None),
    "the last dropped": lambda: DataLoader(DATA, batch_size=8, drop_last=True),
    "nothing to drop": lambda: DataLoader(TensorDataset(torch.arange(96)), batch_size=8, shuffle=True, drop_last=True),
    "the first, in order": lambda: DataLoader(DATA, batch_size=8, sampler=SequentialSampler(range(50))),
    "the first, shuffled": lambda: DataLoader(DATA, batch_size=8, sampler=RandomSampler(range(50))),
    "batches in order": lambda: in_batches(SequentialSampler(DATA)),
    "batches without the last": lambda: in_batches(SequentialSampler(range(50)), drop_last=True),
    "shuffled batches": lambda: in_batches(RandomSampler(DATA)),
    "a list": lambda: list(DataLoader(DATA, batch_size=8)),
}


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", LOADERS)
def test_processes_share_out_the_rows_that_the_loader_yields(name, size):
    shares = [share_of(LOADERS[name](), SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
    batches = [batch for share in shares for batch in share]
    assert numbers(batches) == numbers(LOADERS[name]())
    assert max(batch[0].numel() for batch in batches) <= (1 if name == "row by row" else 8)


class Sized(BatchSampler):
    """Batches of anyone's choice."""


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=50)), "a RandomSampler that draws some"),
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "a RandomSampler that draws some"),
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=150)), "a RandomSampler that draws some"),
        (lambda: DataLoader(DATA, batch_size=8, shuffle=True, drop_last=True), "a random order of which it drops"),
        (lambda: in_batches(SubsetRandomSampler(range(50))), "a SubsetRandomSampler"),
        (lambda: in_batches(range(50)), "a range"),
        (lambda: DataLoader(DATA, batch_sampler=Sized(SequentialSampler(DATA), 8, False)), "a Sized"),
        (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "a list"),
    ],
)
def test_rows_that_may_be_others_in_every_process_are_refused(make, what):
    with pytest.raises(InputError, match=f"loader: got one with {what}.*, expected a DataLoader with the same rows"):
        share_of(make(), SimpleNamespace(rank=0, size=2))
