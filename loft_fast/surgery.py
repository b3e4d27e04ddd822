"""Putting a projection into a model: `attach` for trying it, `fold` for good."""

from __future__ import annotations

import copy
from types import TracebackType

import torch
from torch import Tensor, nn

from loft_fast.errors import FoldError, InputError
from loft_fast.projection import Projection
from loft_fast.sites import _CONV, Site, find_site, is_compiled, unwrap


class Attached:
    """A projection at work in a model until `remove` is called or the `with` block ends."""

    def __init__(self, site: Site, projection: nn.Module, compiled: bool) -> None:
        self.site = site
        self._compiled = compiled
        self._handle = site.hook(_Project(site, projection))
        self._recompile()

    def remove(self) -> None:
        """Take the projection out of the model again; more than once does no harm."""
        self._handle.remove()
        self._recompile()

    def _recompile(self) -> None:
        # Compiled code has its hooks built in and no guard on them.
        if self._compiled:
            torch.compiler.reset()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class _Project:
    """features -> projected features, along the site's channel dimension."""

    def __init__(self, site: Site, projection: nn.Module) -> None:
        self.site, self.projection = site, projection

    def __call__(self, features: Tensor) -> Tensor:
        if isinstance(self.projection, Projection) and self.projection.basis.device != features.device:
            self.projection = self.projection.to(features.device)
        dim = self.site.channel_dim(features)
        return self.projection(features.movedim(dim, -1)).movedim(-1, dim)


def attach(model: nn.Module, projection: nn.Module, site: str | None = None) -> Attached:
    """Project the features at `site` in every forward pass, reversibly.

    Args:
        model: any torch model. A compiled one compiles again at its next call.
        projection: a `Projection`, or any module that maps features (..., d) to (..., d).
        site: as for `fetch_moments`; default: the projection's own site, else the input of the last nn.Linear.

    Returns:
        A handle with `.remove()`, which is also a context manager.

    Raises:
        SiteError, InputError: no such site, or a projection of another dimension.
    """
    place = find_site(model, site if site is not None else getattr(projection, "site", None))
    if isinstance(projection, Projection):
        _check_dim(place, projection)
        projection = copy.deepcopy(projection)  # moved to the features' device without moving the caller's
    return Attached(place, projection, is_compiled(model))


def fold(model: nn.Module, projection: Projection, site: str | None = None) -> None:
    """Rewrite the layer at `site` so that it projects by itself; inference then costs nothing extra.

    At the input of a Linear or 1x1 convolution with weight W and bias b: W' = W P, b' = b + W (I - P) center.
    At the output of a Linear or any convolution: W' = P W, b' = P b + (I - P) center.
    Computed in float64 and rounded once. A layer without bias gets one if the centre asks for it.

    Raises:
        FoldError: the layer is of another kind, grouped, padded, parametrised or shares its weight with another.
        SiteError, InputError: no such site, or a projection of another dimension.
    """
    place = find_site(model, site if site is not None else projection.site)
    layer = place.plain
    weight = _foldable(model, place, layer)
    _check_dim(place, projection)
    matrix = projection.matrix().to(weight.device, torch.float64)
    center = projection.center.to(weight.device, torch.float64)
    flat = weight.detach().double().reshape(len(weight), -1)
    old_bias = layer.bias
    bias = flat.new_zeros(len(weight)) if not isinstance(old_bias, Tensor) else old_bias.detach().double()
    if place.side == "input":
        folded = flat @ matrix
        bias = bias + (flat - folded) @ center
    else:
        folded = matrix @ flat
        bias = matrix @ bias + center - matrix @ center
    with torch.no_grad():
        weight.copy_(folded.reshape(weight.shape))
        if isinstance(old_bias, Tensor):
            old_bias.copy_(bias)
        elif bool(bias.any()):
            layer.bias = nn.Parameter(bias.to(weight.dtype))


def _foldable(model: nn.Module, place: Site, layer: nn.Module) -> nn.Parameter:
    """The weight that will absorb the projection, or a FoldError that says why none can."""
    why = None
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        why = f"it is a {type(layer).__name__}, expected a Linear or a 1x1 convolution"
    elif nn.utils.parametrize.is_parametrized(layer):
        why = "its weight is parametrised; remove the parametrisation first"
    elif isinstance(layer, _CONV) and layer.groups != 1:
        why = f"it is a convolution with {layer.groups} groups, expected 1"
    elif isinstance(layer, _CONV) and place.side == "input":
        padded = layer.padding not in ("valid", (0,) * len(layer.kernel_size))
        if any(size != 1 for size in layer.kernel_size) or padded:
            why = f"it is a convolution of kernel {layer.kernel_size} and padding {layer.padding}, expected 1x1 without"
    if why is None:
        assert isinstance(layer.weight, nn.Parameter)
        owners = [
            name or type(module).__name__
            for name, module in unwrap(model).named_modules(remove_duplicate=True)
            if any(own is layer.weight for own in module._parameters.values()) and module is not layer
        ]
        if not owners:
            return layer.weight
        why = f"it shares its weight with {owners[0]!r}"
    raise FoldError(f"site: cannot fold into {str(place)!r}: {why}; use attach instead")


def _check_dim(place: Site, projection: Projection) -> None:
    layer = place.plain
    width = None
    if isinstance(layer, nn.Linear):
        width = layer.in_features if place.side == "input" else layer.out_features
    elif isinstance(layer, _CONV):
        width = layer.in_channels if place.side == "input" else layer.out_channels
    if width is not None and width != projection.dim:
        raise InputError(f"projection: got dim {projection.dim}, expected {width} at {str(place)!r}")
