"""A site: the place in a model where features are read or projected, named by a module and one of its two sides."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loft_fast.errors import InputError, SiteError

log = logging.getLogger("loft_fast")

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
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


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
        """The module without a torch.compile wrapper."""
        return unwrap(self.module)

    def channel_dim(self, features: Tensor) -> int:
        """Which dimension of the features is d: the last, or 1 for feature maps (n, c, h, w)."""
        if isinstance(self.plain, _CHANNELS_FIRST):
            return 1
        if isinstance(self.plain, _CHANNELS_LAST) or features.ndim <= 3:
            return features.ndim - 1
        return 1

    def channels_last(self, features: Tensor) -> Tensor:
        """The features with d as the last dimension: (n, d), (n, t, d), (n, h, w, c)."""
        return features.movedim(self.channel_dim(features), -1)

    def hook(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `see` with the features in every forward pass; a tensor that it returns replaces them."""
        register = self.module.register_forward_pre_hook if self.side == "input" else self.module.register_forward_hook
        return register(_Hook(self, see))

    def check(self, features: object) -> Tensor:
        """The features if they are a float tensor with a batch dimension; otherwise a SiteError."""
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        if self.site.side == "output":
            return self.see(self.site.check(output))
        if not args:
            raise SiteError(f"site: {str(self.site)!r} is called without positional arguments, nothing to project")
        replaced = self.see(self.site.check(args[0]))
        return None if replaced is None else (replaced, *args[1:])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def find_site(model: nn.Module, site: str | None = None) -> Site:
    """The site called "name", "name:input" or "name:output"; None: the input of the last nn.Linear.

    Raises:
        SiteError: no such module; the message lists the nearest names.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    modules: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        modules.setdefault(name.replace("._orig_mod", ""), module)
    if site is None:
        linear = [name for name, module in modules.items() if isinstance(unwrap(module), nn.Linear)]
        if not linear:
            raise SiteError("site: the model has no nn.Linear to default to; name the module whose input to project")
        log.info("site not given: using the input of the last linear layer, %r", linear[-1])
        return Site(linear[-1], "input", modules[linear[-1]])
    name, _, side = site.partition(":")
    if side not in ("", "input", "output"):
        raise SiteError(f"site: got {site!r}, expected 'name', 'name:input' or 'name:output'")
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or [key for key in modules if key][-3:]
        raise SiteError(f"site: no module {name!r} in the model; nearest: {', '.join(map(repr, near))}")
    return Site(name, "output" if side == "output" else "input", modules[name])


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been applied to the model or to a module in it."""
    return any("_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) for m in model.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval and inference mode inside, and no compiled code, which would not see new hooks.

    Afterwards every module is back in the mode it was in, whatever happened.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
