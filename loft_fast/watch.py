"""Seen while a model runs: does the layer behind a site make its outputs, and do the rows have class labels?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast import batches
from loft_fast.sites import Site, unwrap

_MOST = 0.95  # of the rows: ties are ranked either way
_ROWS = 256  # as many tell; sorting the outputs of all would cost as much as the rest where these are many
_DEPTH = 3  # of containers in what a model returns


class Watch:
    """A loader that notes whether its rows have class labels, and whether outputs rank as the layer's do.

    The layer at the site is a head if what it makes is what the model returns, but for what keeps the order of the
    classes, such as a softmax. The last linear layer to be registered may be another one: hidden, a gate, or auxiliary.
    """

    def __init__(self, model: nn.Module, place: Site) -> None:
        self.model, self.place = unwrap(model), place
        self.labelled = True
        self.rows = self.alike = 0
        self.scores: Tensor | None = None

        self.scored = isinstance(place.plain, nn.Linear) and place.side == "input"

    @property
    def is_head(self) -> bool:
        """Whether the layer made the outputs, as far as any were seen."""
        return self.alike >= _MOST * self.rows

    def over(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader, watched while it is passed over."""
        return _Watched(self, loader)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Its batches, each run through the model before the next one."""
        with ExitStack() as hooks:
            if self.scored:
                hooks.callback(self.place.module.register_forward_hook(self._made).remove)
                hooks.callback(self.model.register_forward_hook(self._returned).remove)
            for batch in loader:
                if self.rows >= _ROWS:
                    hooks.close()
                self.labelled = self.labelled and batches.class_labels(batch) is not None
                yield batch

    def _made(self, layer: nn.Module, args: Any, scores: Any) -> None:
        self.scores = scores.detach() if isinstance(scores, Tensor) else None

    def _returned(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.scores is None:
            return
        made = self.scores.reshape(-1, self.scores.shape[-1])
        wanted = made[:_ROWS]
        order = wanted.argsort(1, descending=True)
        found = [0]
        for tensor in _tensors(output, _DEPTH):
            if tensor.shape[-1:] == made.shape[1:] and tensor.numel() == made.numel():
                ranked = tensor.detach().reshape(made.shape)[:_ROWS].gather(1, order).float()
                slack = torch.finfo(tensor.dtype).eps * ranked.abs().amax(1, keepdim=True)
                found.append(int((ranked.diff(dim=1) <= slack).all(1).sum()))
        self.rows, self.alike = self.rows + len(wanted), self.alike + max(found)
        self.scores = None


class _Watched:
    """A loader by another name, so that a progress bar knows its length."""

    def __init__(self, watch: Watch, loader: Iterable[Any]) -> None:
        self.watch, self.loader = watch, loader

    def __iter__(self) -> Iterator[Any]:
        return self.watch.batches(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without one raises TypeError, as it did


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    """All float tensors in what a model returned, which may be an object that holds anything."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, list | tuple):
        parts = output
    elif hasattr(output, "__dict__"):
        parts = vars(output).values()
    for part in parts if depth else ():
        yield from _tensors(part, depth - 1)
