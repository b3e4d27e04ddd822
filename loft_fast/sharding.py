"""One pass over data that several processes share out between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from loft_fast.all_reduce import raise_failures
from loft_fast.collective import Peers
from loft_fast.errors import InputError


def share_of(loader: Iterable[Any], peers: Peers) -> Iterable[Any]:
    """What this process takes of `loader`: together the processes take every row that it yields once, none twice.

    Of a DataLoader over a data set with indices, every size-th of the rows that it yields, from the rank-th on, in
    batches of the same size; of anything else, every size-th batch.

    Raises:
        InputError: a DataLoader whose rows may be others in every process, by a sampler of its own or where `drop_last`
            drops some of a random order; DistributedSampler pads or drops rows.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return itertools.islice(loader, peers.rank, None, peers.size)
    rows = range(_rows_of(loader))[peers.rank :: peers.size]
    return DataLoader(
        Subset(loader.dataset, rows),  # type: ignore[arg-type] # any sequence of indices will do
        batch_size=getattr(loader.batch_sampler, "batch_size", None),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _rows_of(loader: DataLoader[Any]) -> int:
    """How many rows a loader yields, which are the first so many, in whatever order."""
    batches = loader.batch_sampler
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if batches is not None and type(batches) is not BatchSampler:
        raise _refused(f"a {type(batches).__name__}")
    if type(sampler) not in (SequentialSampler, RandomSampler):
        raise _refused(f"a {type(sampler).__name__}")
    n = len(sampler.data_source)
    left_out = n % batches.batch_size if batches is not None and batches.drop_last else 0
    if type(sampler) is RandomSampler:
        if sampler.replacement or sampler.num_samples != n:
            raise _refused("a RandomSampler that draws some of the rows")
        if left_out:
            raise _refused("a random order of which it drops the last rows")
    return n - left_out


def _refused(what: str) -> InputError:
    return InputError(f"loader: got one with {what}, expected a DataLoader with the same rows in every process")


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
