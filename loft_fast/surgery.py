"""Putting a projection into a model: `attach` for trying it, `fold` for good."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from loft_fast.backends import FLOATS
from loft_fast.errors import FoldError, InputError, SiteError
from loft_fast.projection import Projection
from loft_fast.sites import _CONV, Site, anything_compiled, find_site, spread, unwrap
from loft_fast.state import lasting

_FORWARDS = [kind.forward for kind in (nn.Linear, *_CONV)]


class Attached:
    """A projection at work in a model until `remove` is called or the `with` block ends."""

    def __init__(self, site: Site, projection: nn.Module) -> None:
        self.site = site
        self._handle = site.hook(_Project(site, projection))
        self._recompile()

    def remove(self) -> None:
        """Take the projection out of the model again; more than once does no harm."""
        self._handle.remove()
        self._recompile()

    def _recompile(self) -> None:
        # Compiled code has its hooks built in and no guard on them; and a function compiled around the model, which
        # cannot be seen from here, has them too.
        if anything_compiled():
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
        dim = self.site.channel_dim(features)
        projection = self.projection
        if isinstance(projection, Projection):
            _check_dim(self.site, projection, features.shape[dim])
            if projection.basis.device != features.device:
                # Never moved in place: it is the caller's, and the replicas of a data-parallel model share this object.
                self.projection = projection = _copy(projection, features.device)
        return projection(features.movedim(dim, -1)).movedim(-1, dim)


@lasting
def _copy(projection: Projection, device: torch.device) -> Projection:
    return copy.deepcopy(projection).to(device)


def attach(model: nn.Module, projection: nn.Module, site: str | None = None) -> Attached:
    """Project the features at `site` in every forward pass, reversibly.

    Args:
        model: any torch model. Compiled code compiles again at its next call.
        projection: a `Projection`, or any module that maps features (..., d) to (..., d).
        site: as for `fetch_moments`; default: the projection's own site, else the input of the last nn.Linear.

    Returns:
        A handle with `.remove()`, which is also a context manager.

    Raises:
        SiteError, InputError: no such site, or a projection of another dimension.
    """
    if not isinstance(projection, nn.Module):
        raise InputError(f"projection: got {type(projection).__name__}, expected a Projection or another nn.Module")
    place = find_site(model, site if site is not None else getattr(projection, "site", None))
    if isinstance(projection, Projection):
        _check_dim(place, projection, known_width(place))
    if isinstance(place.plain, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise SiteError(f"site: {str(place)!r} is read by nn.MultiheadAttention without being called; use fold instead")
    return Attached(place, projection)


@lasting
def fold(model: nn.Module, projection: Projection, site: str | None = None) -> None:
    """Rewrite the layer at `site` so that it projects by itself; inference then costs nothing extra.

    At the input of a Linear or 1x1 convolution with weight W and bias b: W' = W P, b' = b + W (I - P) center.
    At the output of a Linear or any convolution: W' = P W, b' = P b + (I - P) center.
    Computed in float64 and rounded once. A layer without bias gets one if the centre asks for it, and the model's
    state dict then has one entry more.

    Raises:
        FoldError: the layer is of another kind, grouped, padded, parametrised, quantised or shares its weight.
        SiteError, InputError: no such site, or a projection of another dimension.
    """
    if not isinstance(projection, Projection):
        raise InputError(f"projection: got {type(projection).__name__}, expected a Projection")
    place = find_site(model, site if site is not None else projection.site)
    layer = place.plain
    weight = foldable(model, place)
    _check_dim(place, projection, known_width(place))
    parts = (projection.basis, projection.back, projection.center)
    basis, back, center = (part.to(weight.device, torch.float64) for part in parts)
    flat = weight.detach().double().reshape(len(weight), -1)
    old_bias = layer.bias
    bias = flat.new_zeros(len(weight)) if not isinstance(old_bias, Tensor) else old_bias.detach().double()
    if place.side == "input":
        folded = flat @ back @ basis.T
        bias = bias + (flat - folded) @ center
    else:
        folded = back @ (basis.T @ flat)
        bias = back @ (basis.T @ (bias - center)) + center
    rewrite(layer, folded, bias)


def rewrite(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Put these numbers into the layer, rounded once. Without a bias it gets one if it needs one."""
    old_weight, old_bias = layer.weight, layer.bias
    assert isinstance(old_weight, nn.Parameter)
    old_weight.copy_(weight.reshape(old_weight.shape))
    if isinstance(old_bias, Tensor):
        old_bias.copy_(bias)
    elif bool(bias.any()):
        layer.bias = nn.Parameter(bias.to(old_weight.dtype), old_weight.requires_grad)


def foldable(model: nn.Module, place: Site) -> nn.Parameter:
    """The weight that will absorb a projection at this site, or a FoldError that says why none can."""
    layer = place.plain
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    why = None
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        why = f"it is a {type(layer).__name__}, expected a Linear or a 1x1 convolution"
    elif type(layer).forward not in _FORWARDS:
        why = f"its class {type(layer).__name__} has a forward of its own"
    elif spread(model):
        why = "its weight is spread over processes by FSDP"
    elif weight is None or bias is not layer.bias:
        why = "its weight or bias is computed from others (a parametrisation, pruning); make that permanent first"
    elif isinstance(weight, nn.parameter.UninitializedParameter):
        why = "its weight is not initialised yet; run the model once"
    elif weight.dtype not in FLOATS or weight.is_meta:
        why = f"its weight is {weight.dtype} on {weight.device}, expected floats of 16 bits or more in memory"
    elif isinstance(layer, _CONV) and layer.groups != 1:
        why = f"it is a convolution with {layer.groups} groups, expected 1"
    elif isinstance(layer, _CONV) and place.side == "input":
        padded = layer.padding not in ("valid", "same", (0,) * len(layer.kernel_size))
        if any(size != 1 for size in layer.kernel_size) or padded:
            why = f"it is a convolution of kernel {layer.kernel_size} and padding {layer.padding}, expected 1x1 without"
    elif place.side == "output" and place.module._forward_hooks:
        why = "a hook changes or sees what it returns, and would come after the projection instead of before; remove it"
    if why is None:
        assert weight is not None
        mine = [(part, _extent(part)) for part in (weight, bias) if part is not None]
        owners = [
            name or type(module).__name__
            for name, module in unwrap(model).named_modules()
            if module is not layer and any(_shared(mine, other) for other in module._parameters.values())
        ]
        if not owners:
            return weight
        why = f"it shares its weight or bias with {owners[0]!r}"
    raise FoldError(f"site: cannot fold into {str(place)!r}: {why}; use attach instead")


def _shared(mine: Sequence[tuple[Tensor, tuple[int, int]]], other: Tensor | None) -> bool:
    """Whether a tensor overlaps with one of mine, given with extents: tied by parameter or by the memory behind it."""
    if other is None or isinstance(other, nn.parameter.UninitializedParameter) or other.device != mine[0][0].device:
        return False
    first, last = _extent(other)
    return any(part is other or (start < last and first < end) for part, (start, end) in mine)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which its elements lie; none for what has no memory."""
    start, span = tensor.data_ptr(), tensor.numel()
    if not tensor.is_contiguous():
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return (start, start + span * tensor.element_size()) if start and tensor.numel() else (0, 0)


def known_width(place: Site) -> int | None:
    """The number of features at the site, where the module tells."""
    layer = place.plain
    if isinstance(layer, nn.Linear):
        width = layer.in_features if place.side == "input" else layer.out_features
    elif isinstance(layer, _CONV):
        width = layer.in_channels if place.side == "input" else layer.out_channels
    else:
        width = 0
    return width or None  # lazy layers say 0 until they have run


def _check_dim(place: Site, projection: Projection, width: int | None) -> None:
    if width is not None and width != projection.dim:
        raise InputError(f"projection: got dim {projection.dim}, expected {width} at {str(place)!r}")
