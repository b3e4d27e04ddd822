"""Rows within classes: make a model say of them what it would say had it never seen them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from loft_fast import batches
from loft_fast.errors import InputError
from loft_fast.ops.arguments import check_integer, check_positive
from loft_fast.sites import device_of, evaluating, unwrap
from loft_fast.unseen import Unseen, unseen

_SHARE = 4.0  # weight of the forget rows, as a multiple of their number over that of the retain rows; at most one
_LAST = 0.02  # of the step size, at the end


def match_retrained(
    model: nn.Module,
    retain: Iterable[Any],
    forget: Iterable[Any],
    validation: Iterable[Any],
    *,
    rate: float,
    epochs: int = 6,
    sites: Sequence[str] | None = None,
    progress: bool = True,
) -> Unseen:
    """Make `model`, in place, look as if it had not been trained on the forget rows.

    For rows within classes, where a projection helps little: the forget rows lie where the retain rows do. `unseen`
    foretells what a retrained model would say of the forget rows; some passes of distillation make the model say it,
    while it goes on saying of the retain rows what it says now. Statistics of batch norm stay as they are.

    Args:
        model: a classifier.
        retain: loader over the rows to keep, (x, y) or dictionaries with labels; passed over `epochs` + 1 times.
        forget: loader over the rows to forget; its batches are kept in memory meanwhile.
        validation: loader over some hundred rows that the model was not trained on.
        rate: step size of Adam at the start; it falls to nothing. Start with 0.8 of the largest of the training.
        epochs: passes over the retain rows.
        sites: as for `unseen`.
        progress: show progress bars.

    Returns:
        What was foretold.

    Raises:
        InputError: as `unseen`, or a bad number; the model is then, and after an interruption, as it was.
    """
    check_positive("rate", rate)
    check_integer("epochs", epochs)
    if iter(retain) is retain:
        raise InputError(f"retain: got a {type(retain).__name__}, expected a loader that can be passed over again")
    target = unwrap(model)
    if not any(one.requires_grad for one in target.parameters()):
        raise InputError("model: got one without a parameter that requires a gradient, expected something to train")
    kept = list(forget)
    expected = unseen(model, retain, kept, validation, sites=sites, progress=progress)
    before = copy.deepcopy(target.state_dict())
    try:
        with evaluating(target), torch.inference_mode(False), torch.enable_grad():
            _distil(target, retain, kept, expected, epochs, rate, progress)
    except BaseException:
        target.load_state_dict(before)
        target.zero_grad()
        raise
    return expected


def _distil(
    model: nn.Module,
    retain: Iterable[Any],
    forget: list[Any],
    expected: Unseen,
    epochs: int,
    rate: float,
    progress: bool,
) -> None:
    teacher = copy.deepcopy(model)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=all(one.is_floating_point() for one in parameters))
    sizes = [len(batches.labels(batch)) for batch in forget]
    targets = list(zip(forget, expected.log_probabilities.split(sizes), strict=True))
    weight = min(1.0, _SHARE * sum(sizes) / expected.rows)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST, epochs * expected.batches)
    order: list[int] = []
    device = device_of(model)
    with tqdm(total=epochs * expected.batches, desc="matching", unit="step", disable=not progress, leave=False) as bar:
        for _ in range(epochs):
            for raw in retain:
                order = order or torch.randperm(len(targets), device="cpu").tolist()
                gone, wanted = targets[order.pop()]
                batch = batches.to_device(raw, device)
                with torch.no_grad():
                    said = _scores(teacher, batch)
                loss = _divergence(_scores(model, batch), said)
                loss = loss + weight * _divergence(_scores(model, batches.to_device(gone, device)), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    optimizer.zero_grad()


def _scores(model: nn.Module, batch: Any) -> Tensor:
    return batches.logits(batches.call(model, batch)).log_softmax(1)


def _divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean KL(theirs || mine) of log-probabilities (n, classes); a class that theirs rules out counts nothing."""
    return functional.kl_div(mine, theirs.clamp_min(-100.0), log_target=True, reduction="batchmean")
