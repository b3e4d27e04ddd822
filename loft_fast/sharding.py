"""One pass over data that several processes share out between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from loft_fast.all_reduce import raise_failures
from loft_fast.collective import Peers
from loft_fast.errors import InputError


def share_of(loader: Iterable[Any], peers: Peers) -> Iterable[Any]:
    """What this process takes of `loader`: together the processes take every row once, none twice.

    Of a DataLoader over a data set with indices, every size-th row from the rank-th on, in batches of the same size; of
    anything else, every size-th batch.

    Raises:
        InputError: a DataLoader with a sampler of its own: DistributedSampler pads or drops rows, and others may choose
            differently in every process.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return itertools.islice(loader, peers.rank, None, peers.size)
    samplers = (BatchSampler, SequentialSampler, RandomSampler)
    wrong = next((one for one in (loader.batch_sampler, loader.sampler) if one and type(one) not in samplers), None)
    if wrong is not None or getattr(loader.sampler, "replacement", False):
        name = type(loader.sampler if wrong is None else wrong).__name__
        raise InputError(f"loader: got one with a {name}, expected a DataLoader that goes through all rows, unsharded")
    assert isinstance(loader.dataset, Sized)
    rows = range(peers.rank, len(loader.dataset), peers.size)
    return DataLoader(
        Subset(loader.dataset, rows),  # type: ignore[arg-type] # any sequence of indices will do
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def in_step(batches: Iterable[Any], peers: Peers) -> Iterator[tuple[Any, bool]]:
    """Batches and whether they count, as many in every process: who has run out repeats one until all have."""
    rest, last = iter(batches), None
    while True:
        batch = next(rest, None)
        said = peers.exchange({"more": batch is not None, "any": last is not None})
        raise_failures(said)
        if not any(one["more"] for one in said):
            return
        if not all(one["more"] or one["any"] for one in said):  # someone has nothing to repeat
            giver = next(rank for rank, one in enumerate(said) if one["more"])
            given = peers.broadcast(batch, giver)
            last = given if last is None else last
        last = last if batch is None else batch
        yield last, batch is not None
