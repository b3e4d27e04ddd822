"""One pass over the data: features caught at a site stream into moments; no feature is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loft_fast import batches
from loft_fast.errors import InputError, SiteError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.sites import Site, evaluating, find_site, unwrap


def fetch_moments(
    model: nn.Module,
    loader: Iterable[Any],
    site: str | None = None,
    group: batches.Group | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Moments | GroupedMoments:
    """Moments of the features at `site` over all batches.

    The model runs in eval mode under inference_mode and whatever autocast the caller is in; modes, device and hooks
    are restored at the end, also after an exception or Ctrl-C.

    Args:
        model: any torch model; compiled and (distributed) data-parallel wrappers are looked through.
        loader: yields x, (x, y, ...) or dictionaries of model arguments (an `attention_mask` (n, t) then selects the
            tokens that count). A batch may also be a dictionary with labels under "labels" or "label".
        site: "name" or "name:input" for what a module reads, "name:output" for what it returns. None: the input of
            the last nn.Linear. Features (n, d) count as rows; (n, t, d) and (n, c, h, w) as one row per position.
        group: None for `Moments`. "label" for `GroupedMoments` by label; "prediction" by argmax of the model's output;
            another key or index into the batch; or a callable batch -> keys.
        device: where to run, default: where the model is. The moments stay there.
        progress: show a progress bar.

    Raises:
        SiteError: no such site, never reached, or not a float tensor.
        InputError: no batches; NaN or Inf (the message says in which batch and how many rows); keys that do not match.
    """
    place = find_site(model, site)
    target = unwrap(model)
    caught: list[Tensor] = []
    home = _device(target)
    run_on = torch.device(device) if device is not None else home
    result: Moments | GroupedMoments | None = None
    hook = None
    try:
        if run_on != home:
            target.to(run_on)
        hook = place.hook(lambda features: caught.append(features))
        with evaluating(target):
            bar = tqdm(loader, desc=f"moments at {place}", unit="batch", disable=not progress, leave=False)
            for index, raw in enumerate(bar):
                caught.clear()
                batch = batches.to_device(raw, run_on)
                output = batches.call(target, batch)
                if not caught:
                    raise SiteError(f"site: {str(place)!r} is not reached in the forward pass")
                keys = None if group is None else batches.keys(batch, output, group)
                for features in caught:
                    if result is None:
                        kind = Moments if group is None else GroupedMoments
                        result = kind(features.shape[place.channel_dim(features)], features.device)
                    try:
                        _add(result, place, features, keys, batches.attention_mask(batch))
                    except InputError as error:
                        raise InputError(f"batch {index}: {error}") from error
    finally:
        if hook is not None:
            hook.remove()
        if run_on != home:
            target.to(home)
    if result is None:
        raise InputError("loader: it yielded no batches, expected at least one")
    result.site = str(place)
    return result


def _add(result: Moments | GroupedMoments, place: Site, features: Tensor, keys: Any, mask: Tensor | None) -> None:
    positions = place.channels_last(features)
    shape = positions.shape[:-1]
    real = None
    if mask is not None and len(shape) == 2:
        if mask.shape != shape:
            raise InputError(f"attention_mask: got shape {tuple(mask.shape)} for features of {tuple(shape)} positions")
        real = mask.bool()
        positions = positions[real]
    if isinstance(result, Moments):
        result.update(positions.reshape(-1, result.dim))
        return
    index = keys if isinstance(keys, Tensor) else _tensor_or_list(keys)
    if isinstance(index, list):
        index, names = _enumerate(index)
    else:
        names = None
    if index.shape[:1] != shape[:1]:
        raise InputError(f"group: got {len(index)} keys for a batch of {shape[0]}")
    if index.shape != shape:  # one key per sample: each of its positions gets it
        index = index.reshape(len(index), *[1] * (len(shape) - 1)).expand(shape)
    flat = (index[real] if real is not None else index).reshape(-1)
    rows = positions.reshape(-1, result.dim)
    result.update(rows, flat if names is None else [names[i] for i in flat.tolist()])


def _tensor_or_list(keys: Any) -> Any:
    return torch.as_tensor(keys) if hasattr(keys, "__array__") and keys.dtype.kind in "iu" else list(keys)


def _enumerate(keys: list[Any]) -> tuple[Tensor, list[Any]]:
    names = list(dict.fromkeys(keys))
    position = {key: i for i, key in enumerate(names)}
    return torch.tensor([position[key] for key in keys], dtype=torch.int64), names


def _device(model: nn.Module) -> torch.device:
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return first.device if first is not None else torch.device("cpu")
