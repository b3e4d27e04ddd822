"""What a loader may yield, and how a model is called on it: tensors, (x, y) pairs, and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast.errors import InputError

Group = str | int | Callable[[Any], Any]
_LABELS = ("labels", "label")


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor in nested dictionaries, lists and tuples moved to the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [to_device(value, device) for value in batch]
    return batch


def call(model: nn.Module, batch: Any) -> Any:
    """model(x) for x, (x, ...) or model(**x) for a dictionary, labels left out."""
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(inputs, Mapping):
        return model(**{key: value for key, value in inputs.items() if key not in _LABELS})
    return model(inputs)


def labels(batch: Any) -> Any:
    """The labels of a batch, or None: the second element of a pair, or "labels" / "label" of a dictionary."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABELS if name in batch), None)
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[1]
    return None


def attention_mask(batch: Any) -> Tensor | None:
    """(n, t), nonzero where a token is real, if the batch has one."""
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def logits(output: Any) -> Tensor:
    """The logits (n, classes, ...) in what a classifier returned."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise InputError(f"model: its output is {type(output).__name__}, expected logits (n, classes) or .logits")
    return found


def keys(batch: Any, output: Any, group: Group) -> Tensor | Sequence[Any]:
    """One group key per row of the batch.

    group: "label"; "prediction" (argmax of the output); "auto" (label if there is one, else prediction); another
    string or an integer indexes the batch; a callable gets the batch.
    """
    if callable(group):
        return group(batch)
    if group in ("label", "auto"):
        found = labels(batch)
        if isinstance(found, Tensor) and not found.is_floating_point():
            return found
        if group == "label":
            raise InputError("group: got 'label', but the batches carry no integer labels, expected (x, y) or a dict")
        group = "prediction"
    if group == "prediction":
        return logits(output).argmax(1)
    try:
        return batch[group]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"group: got {group!r}, which is not in the batches ({type(batch).__name__})") from error
