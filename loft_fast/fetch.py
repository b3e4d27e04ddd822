"""One pass over the data: features caught at a site stream into moments; no feature is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from loft_fast import batches
from loft_fast.all_reduce import agree
from loft_fast.collective import TIMEOUT, Peers
from loft_fast.errors import DistributedError, InputError, SiteError
from loft_fast.grouped_moments import GroupedMoments, index_groups
from loft_fast.moments import Moments
from loft_fast.sharding import in_step, share_of
from loft_fast.sites import Site, device_of, evaluating, find_site, spread, unwrap

log = logging.getLogger("loft_fast")


def fetch_moments(
    model: nn.Module,
    loader: Iterable[Any],
    site: str | None = None,
    group: batches.Group | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    exact: float | bool | None = None,
    shard: bool | ProcessGroup = False,
    timeout: float = TIMEOUT,
    *,
    pool: bool = False,
) -> Moments | GroupedMoments:
    """Moments of the features at `site` over all batches.

    The model runs in eval mode without gradients and whatever autocast the caller is in; modes, device and hooks
    are restored at the end, also after an exception or Ctrl-C.

    Args:
        model: any torch model; compiled and (distributed) data-parallel wrappers are looked through.
        loader: yields x, (x, y, ...) or dictionaries of model arguments (an `attention_mask` (n, t) then selects the
            tokens that count), which may also hold labels, under "labels" or "label", and other entries.
        site: "name" or "name:input" for what a module reads, "name:output" for what it returns. None: the input of
            the last nn.Linear. Features (n, d) count as rows; (n, t, d) and (n, c, h, w) as one row per position.
        group: None for `Moments`. "label" for `GroupedMoments` by label; "prediction" by argmax of the model's output;
            another key or index into the batch; or a callable batch -> keys. One key per sample or per position.
            "auto": by label or prediction if there is one per sample, else `Moments`.
        device: where to run, default: where the model is. The moments stay there.
        progress: show a progress bar.
        exact: as for `Moments`; a warning in the log says so if features were clipped.
        shard: True (all processes) or a group of torch.distributed shares the data out: all call this with the same
            loader, each runs the model on its part, and all get the moments of the whole, as from `all_reduce`. Of a
            DataLoader over a data set with indices a process loads its part only, whatever the order; one that chooses
            rows at random, by `num_samples` or `drop_last` with `shuffle`, is refused; other loaders
            have to yield the same batches everywhere, and every process takes some. `exact` has to be None or a number.
        timeout: seconds to wait for the slowest process at the end; models under FSDP wait at every batch.
        pool: average over the positions of a row first, and count it once. Of maps and tokens, that is what tells one
            row from another: most of the variance of single positions lies within the rows.

    Raises:
        SiteError: no such site, never reached, or not a float tensor.
        InputError: no batches; NaN or Inf (the message says in which batch and how many rows); keys that do not match.
        DistributedError: with `shard`, another process has failed or is late.
    """
    place = find_site(model, site)
    batches.check_loader("loader", loader)
    if shard is False:
        result = _fetch(model, place, loader, group, device, progress, exact, pool, None)
    else:
        if exact is True:
            raise InputError("exact: got True with shard, expected None or a number, the same in all processes")
        peers = Peers(None if shard is True else shard, timeout)
        try:
            share = share_of(loader, peers)
            result = _fetch(model, place, share, group, device, progress and peers.rank == 0, exact, pool, peers)
        except BaseException as error:
            if not isinstance(error, DistributedError):  # who knows that another has failed need not tell
                agree(peers, None, error)
            raise
        said = agree(peers, None if result is None else result._introduction())
        result = _reduce(peers, result, said)
    if result is None:
        raise InputError("loader: it yielded no batches, expected at least one")
    result.site = str(place)
    if result.clipped:
        log.warning("%d feature values above exact=%g were clipped", result.clipped, result.exact)
    return result


def _reduce(
    peers: Peers, result: Moments | GroupedMoments | None, said: list[dict[str, Any]]
) -> Moments | GroupedMoments | None:
    known = next((one for one in said if "kind" in one), None)
    if result is None and known is not None:  # there were too few batches for this process
        kind = GroupedMoments if known["kind"] == "GroupedMoments" else Moments
        result = kind(known["dim"], None, known["exact"])
    return None if result is None else result._reduce(peers, said)


def _fetch(
    model: nn.Module,
    place: Site,
    loader: Iterable[Any],
    group: batches.Group | None,
    device: torch.device | str | None,
    progress: bool,
    exact: float | bool | None,
    pool: bool,
    peers: Peers | None,
) -> Moments | GroupedMoments | None:
    """Moments of what the loader yields, None if that is nothing; `peers` are those who do the rest."""
    target = unwrap(model)
    caught: list[Tensor] = []
    home = device_of(target, alone=device is not None)
    run_on = home if device is None else _device(device)
    result: Moments | GroupedMoments | None = None
    hook = None
    try:
        if run_on != home:
            target.to(run_on)
        hook = place.hook(lambda features: caught.append(features.clone()))  # what follows may change them in place
        bar = tqdm(loader, desc=f"moments at {place}", unit="batch", disable=not progress, leave=False)
        steps = ((batch, True) for batch in bar) if peers is None or not spread(target) else in_step(bar, peers)
        with evaluating(target), bar:
            for index, (raw, counts) in enumerate(steps):
                caught.clear()
                batch = batches.to_device(raw, run_on)
                output = batches.call(target, batch, group)
                if not counts:
                    continue
                if not caught:
                    raise SiteError(f"site: {str(place)!r} is not reached in the forward pass")
                keys = None if group is None else batches.keys(batch, output, group)
                for features in caught:
                    if result is None:
                        kind = Moments if keys is None else GroupedMoments
                        result = kind(features.shape[place.channel_dim(features)], features.device, exact)
                    try:
                        _add(result, place, features, keys, batches.attention_mask(batch), pool)
                    except InputError as error:
                        raise InputError(f"batch {index}: {error}") from error
    finally:
        if hook is not None:
            hook.remove()
        if run_on != home:
            target.to(home)
    return result


def _add(
    result: Moments | GroupedMoments,
    place: Site,
    features: Tensor,
    keys: Tensor | list[Any] | None,
    mask: Tensor | None,
    pool: bool,
) -> None:
    positions = place.channels_last(features)
    shape = positions.shape[:-1]
    real = None
    if mask is not None and len(shape) == 2:
        if mask.shape != shape:
            raise InputError(f"attention_mask: got shape {tuple(mask.shape)} for features of {tuple(shape)} positions")
        real = mask.to(positions.device).bool()
    if pool:
        positions = place.pooled(features, real)
        shape, real = positions.shape[:-1], None if real is None else real.any(1)
    if real is not None:
        positions = positions[real]
    if isinstance(result, Moments):
        result.update(positions)
        return
    if keys is None:
        raise InputError("group: the batch has neither one label nor one prediction per row, as those before had")
    names, index = (None, keys) if isinstance(keys, Tensor) else index_groups(keys, len(keys))
    if index.shape != shape:  # one key per sample: each of its positions gets it
        if index.shape[:1] != shape[:1] or index.numel() != shape[0]:
            got = f"keys of shape {tuple(index.shape)} for features of {tuple(shape)} positions"
            raise InputError(f"group: got {got}, expected one key per sample or per position")
        index = index.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    index = index.to(positions.device)
    flat = (index[real] if real is not None else index).reshape(-1)
    result.update(positions, flat if names is None else [names[i] for i in flat.tolist()])


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: got {device!r}, expected a torch.device or its name, such as 'cpu'") from error
