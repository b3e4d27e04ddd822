"""A site: the place in a model where features are read or projected, named by a module and one of its two sides."""

from __future__ import annotations

import difflib
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loft_fast.errors import InputError, SiteError

log = logging.getLogger("loft_fast")

_FSDP = "_fsdp_wrapped_module"  # as FullyShardedDataParallel calls what it wraps
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_FIRST = (
    *_CONV,
    nn.modules.conv._ConvTransposeNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)
_CHANNELS_LAST = (nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class Site:
    """A module and the side of it that carries the features."""

    name: str
    side: Literal["input", "output"]
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name}:{self.side}"

    @property
    def plain(self) -> nn.Module:
        """The module without a wrapper of torch.compile or FSDP."""
        return _plain(self.module)

    def channel_dim(self, features: Tensor) -> int:
        """Which dimension of the features is d: what the module takes it to be, else 1 for (n, c, h, w), or last."""
        layer = self.plain
        if isinstance(layer, _CHANNELS_FIRST):
            return 1
        last = isinstance(layer, _CHANNELS_LAST) or features.ndim <= 3
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm):  # subclasses of them normalise feature maps
            last = last or features.shape[-1:] == torch.Size(layer.normalized_shape)
        return features.ndim - 1 if last else 1

    def channels_last(self, features: Tensor) -> Tensor:
        """The features with d as the last dimension: (n, d), (n, t, d), (n, h, w, c)."""
        return features.movedim(self.channel_dim(features), -1)

    def pooled(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, d): means over the positions of a row; of tokens, over those that a mask (n, t) marks as real.

        In float32 at least, under autocast, too: 16 bits cannot count the positions.
        """
        positions = self.channels_last(features).unsqueeze(1).flatten(1, -2)
        positions = positions.float() if positions.element_size() == 2 else positions
        weight = positions.new_ones(positions.shape[:2])
        if mask is not None and mask.shape == weight.shape:
            real = mask.to(weight.device).bool()
            weight = real.to(weight.dtype)
            positions = positions.masked_fill(~real.unsqueeze(2), 0)  # attention leaves NaN where it sees no token
        with torch.autocast(positions.device.type, enabled=False):
            sums = (weight.unsqueeze(1) @ positions).squeeze(1)
        return sums / weight.sum(1, keepdim=True).clamp_min(1)

    def hook(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `see` with the features in every forward pass; a tensor that it returns replaces them."""
        hook = _Hook(self, see)
        if self.side == "input":
            hook.handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            hook.handle = self.module.register_forward_hook(hook)
        return hook.handle

    def check(self, features: object) -> Tensor:
        """The features if they are a float tensor with a batch dimension; otherwise a SiteError."""
        if isinstance(features, Tensor) and features.is_nested:
            raise SiteError(
                f"site: {str(self)!r} carries a nested tensor; make the nn.TransformerEncoder with "
                "enable_nested_tensor=False, or project before or behind it"
            )
        if isinstance(features, Tensor) and features.is_floating_point() and features.ndim >= 2:
            return features
        got = f"a {features.dtype} tensor of shape {tuple(features.shape)}" if isinstance(features, Tensor) else None
        raise SiteError(
            f"site: {str(self)!r} carries {got or 'a ' + type(features).__name__}, expected a float tensor (n, ..., d)"
        )


class _Hook:
    """A forward (pre-)hook as an object of this module, so that a model that carries it can still be pickled."""

    def __init__(self, site: Site, see: Callable[[Tensor], Tensor | None]) -> None:
        self.site, self.see = site, see
        # Pickled along: torch then keeps its number from being given to another hook of the model that is loaded.
        self.handle: RemovableHandle | None = None
        self.first = next(iter(inspect.signature(site.plain.forward).parameters), None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> Any:
        """other: the keyword arguments before the module runs, its output afterwards."""
        if self.site.side == "output":
            return self.see(self.site.check(other))
        if args:
            replaced = self.see(self.site.check(args[0]))
            return None if replaced is None else ((replaced, *args[1:]), other)
        if self.first not in other:
            raise SiteError(f"site: {str(self.site)!r} is called without its first argument, nothing to project")
        replaced = self.see(self.site.check(other[self.first]))
        return None if replaced is None else (args, {**other, self.first: replaced})


def unwrap(model: nn.Module, argument: str = "model") -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel wrappers."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        got = type(model).__name__
        raise InputError(f"{argument}: got {got}, expected a torch.nn.Module that was not scripted: hooks need Python")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _plain(module: nn.Module) -> nn.Module:
    """The module inside wrappers, that of FSDP too: what it is, but not what to call."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    module = unwrap(module)
    while (wrapped := module._modules.get(_FSDP)) is not None:
        module = unwrap(wrapped)
    return module


def device_of(model: nn.Module, alone: bool = False) -> torch.device:
    """Where the model starts; with `alone`, all of it has to be there."""
    devices = dict.fromkeys(tensor.device for tensor in itertools.chain(model.parameters(), model.buffers()))
    if alone and len(devices) > 1:
        raise InputError(f"device: the model is spread over {', '.join(map(str, devices))}, expected device=None")
    return next(iter(devices), torch.device("cpu"))


def find_site(model: nn.Module, site: str | None = None) -> Site:
    """The site called "name", "name:input" or "name:output"; None: the input of the last nn.Linear.

    Raises:
        InputError: the model is no nn.Module.
        SiteError: no such module; the message lists the nearest names.
    """
    modules = _modules(model)
    if site is None:
        last = last_linear(model)
        if last is None:
            raise SiteError("site: the model has no nn.Linear to default to; name the module whose input to project")
        log.info("site not given: using the input of the last linear layer, %r", last)
        return Site(last, "input", modules[last])
    if not isinstance(site, str):
        raise SiteError(f"site: got {type(site).__name__}, expected the name of a module")
    name, _, side = site.partition(":")
    if side not in ("", "input", "output"):
        raise SiteError(f"site: got {site!r}, expected 'name', 'name:input' or 'name:output'")
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or [key for key in modules if key][-3:]
        raise SiteError(f"site: no module {name!r} in the model; nearest: {', '.join(map(repr, near))}")
    found = modules[name]
    if isinstance(found, torch.jit.ScriptModule) or type(_plain(found)).forward is nn.Module.forward:
        raise SiteError(f"site: {name!r} is a {type(found).__name__} that no forward pass goes through as a module")
    return Site(name, "output" if side == "output" else "input", found)


def last_linear(model: nn.Module) -> str | None:
    """The name of the last nn.Linear, by the order in which modules were registered."""
    modules = reversed(_modules(model).items())
    return next((name for name, part in modules if isinstance(_plain(part), nn.Linear)), None)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, as if nothing had been compiled or wrapped."""
    modules: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        plain = ".".join(part for part in name.split(".") if part not in ("_orig_mod", _FSDP))
        modules.setdefault(plain, module)
    return modules


def spread(model: nn.Module) -> bool:
    """Whether FSDP has spread the parameters over processes: a forward pass then needs one in each of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(getattr(fsdp, kind) for kind in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, kind))
    return any(isinstance(module, kinds) for module in model.modules())


def anything_compiled() -> bool:
    """False if torch.compile cannot have been used yet: importing its machinery just to ask takes seconds."""
    return "torch._dynamo" in sys.modules


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, and no code that would not see new hooks: compiled, or fused by torch.

    Not inference mode: what a model keeps of its first forward pass, such as positions, could not be trained with.
    Afterwards every module is back in the mode it was in, whatever happened.
    """
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()  # it hands nested tensors from layer to layer
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if anything_compiled() else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        model.train(modes[0][1])  # for modules that do more in `train` than to set the flag
        for module, mode in modes:
            module.training = mode
