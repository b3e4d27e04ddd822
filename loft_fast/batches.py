"""What a loader may yield, and how a model is called on it: tensors, (x, y) pairs, and dictionaries."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast.errors import InputError

Group = str | int | Callable[[Any], Any]
_LABELS = ("labels", "label")


def check_loader(name: str, loader: object) -> None:
    """Refuse what cannot be passed over."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise InputError(f"{name}: got {type(loader).__name__}, expected an iterable of batches")


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor in nested dictionaries, lists and tuples moved to the device, and all else that has a `.to`."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if hasattr(batch, "to"):  # packed sequences are tuples too
        return batch.to(device)
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else moved
    return batch


def call(model: nn.Module, batch: Any, group: Group | None = None) -> Any:
    """model(x) for x, (x, ...) or model(**x) for a dictionary.

    Labels are left out, and so is what the model's forward does not take.
    """
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(inputs, Mapping):
        return model(inputs)
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = [key for key in inputs if key in parameters or (anything and key != group)]
    return model(**{key: inputs[key] for key in taken if key not in _LABELS})


def labels(batch: Any) -> Any:
    """The labels of a batch, or None: the second element of a pair, or "labels" / "label" of a dictionary."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABELS if name in batch), None)
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[1]
    return None


def class_labels(batch: Any) -> Tensor | None:
    """The labels as (n,) integers, from a tensor, an array or a list of them, (n,) or (n, 1); None if they are not."""
    found = labels(batch)
    if isinstance(found, list | tuple) and all(isinstance(label, int) for label in found):
        found = torch.tensor(found, dtype=torch.int64)
    elif hasattr(found, "__array__") and not isinstance(found, Tensor) and found.dtype.kind in "iu":
        found = torch.as_tensor(found)
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex():
        return None
    if found.ndim == 2 and found.shape[1] == 1:
        found = found.squeeze(1)
    return found.long() if found.ndim == 1 else None


def classes(name: str, batch: Any, scores: Tensor) -> Tensor:
    """The labels (n,) of a batch of the set `name`, if they are classes of these scores (n, classes)."""
    found = class_labels(batch)
    if found is None or scores.ndim != 2 or scores.shape[1] < 2 or len(found) != len(scores):
        given = labels(batch)
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"{name}: got labels {got} and outputs {tuple(scores.shape)}, expected (n,) class indices and (n, classes)"
        )
    if bool(((found < 0) | (found >= scores.shape[1])).any()):
        raise InputError(f"{name}: got labels outside of the model's {scores.shape[1]} outputs")
    if bool((scores.isnan() | scores.isposinf()).any()):
        raise InputError(f"{name}: the model's outputs hold NaN or Inf, expected finite ones")
    return found.to(scores.device)


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


def keys(batch: Any, output: Any, group: Group) -> Tensor | list[Any] | None:
    """The group keys of a batch, one per row or one per position.

    group: "label"; "prediction" (argmax of the logits); "auto" (the class label if each row has one; without labels
    the prediction if each row has one; else None); another string or an integer indexes the batch; a callable gets
    the batch.
    """
    if group == "auto":
        if isinstance(labels(batch), Tensor | list) or hasattr(labels(batch), "__array__"):
            return class_labels(batch)  # of another kind, they say that the outputs are no classes
        scores = getattr(output, "logits", output)
        return scores.argmax(1) if isinstance(scores, Tensor) and scores.ndim == 2 else None
    if group == "label":
        found = labels(batch)
        if found is None or (isinstance(found, Tensor) and found.is_floating_point()):
            raise InputError("group: got 'label', but the batches carry no class labels, expected (x, y) or a dict")
    elif group == "prediction":
        scores = logits(output)
        found = scores.argmax(-1 if scores.ndim == 3 else 1)  # (n, t, classes), but (n, classes, h, w)
    elif callable(group):
        found = group(batch)
    else:
        found = _entry(batch, group)
    return _listed(found)


def _entry(batch: Any, key: str | int) -> Any:
    try:
        if not isinstance(batch, Tensor):  # whose index is a row, not an entry
            return batch[key]
    except (KeyError, IndexError, TypeError):
        pass
    raise InputError(f"group: got {key!r}, which is not in the batches ({type(batch).__name__})")


def _listed(found: Any) -> Tensor | list[Any]:
    """Group keys as a tensor, or as a list of what can be a key of a dictionary."""
    if isinstance(found, Tensor):
        return found
    if hasattr(found, "__array__") and found.dtype.kind in "iu":
        return torch.as_tensor(found)
    listed = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else None
    if listed is None or not all(isinstance(key, Hashable) for key in listed):
        raise InputError(f"group: got {type(found).__name__}, expected a tensor or a list with one key per row")
    return listed
