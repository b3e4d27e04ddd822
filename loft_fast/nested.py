"""A projection inside another: what the outer one dropped stays dropped, and nothing needs to be known about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from loft_fast.errors import InputError
from loft_fast.float_state import FloatState
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.heads import linear_head
from loft_fast.moments import Moments
from loft_fast.projection import Projection
from loft_fast.solver import solve
from loft_fast.state import lasting

_Kind = TypeVar("_Kind", bound=Moments | GroupedMoments)


@lasting
def solve_within(
    outer: Projection,
    retain: Moments | GroupedMoments,
    forget: Moments | GroupedMoments,
    rank: int | None = None,
    *,
    head: nn.Module | None = None,
    **options: Any,
) -> Projection:
    """As `solve`, for the features that `outer` has projected: the best subspace inside its subspace.

    It takes the place of `outer`, for the same model. The moments are those of the original features.

    Args:
        outer: an earlier projection, of dimension s; `rank` is less than s.
        retain, forget, head, options: as for `solve`. The certificate is about subspaces of the outer one.

    Raises:
        InputError: as for `solve`, or moments of another dimension than the projection.
    """
    if not isinstance(outer, Projection):
        raise InputError(f"outer: got {type(outer).__name__}, expected a Projection")
    kept, gone = seen_through(outer, "retain", retain), seen_through(outer, "forget", forget)
    inner = solve(kept, gone, rank, head=None if head is None else _reading(outer, head), **options)
    certificate = inner.certificate
    assert certificate is not None
    basis, back, center = (part.double() for part in (outer.basis, outer.back, outer.center))
    inside = [part.to(basis) for part in (inner.basis, inner.back, inner.center)]
    oblique = outer.lift is not None or inner.lift is not None
    return Projection(
        basis @ inside[0],
        center + back @ inside[2],
        replace(certificate, why=f"{certificate.why}, within the last projection"),
        retain.site,
        lift=back @ inside[1] if oblique else None,
        check=False,
    )


def seen_through(outer: Projection, name: str, moments: _Kind) -> _Kind:
    """Moments of the coordinates U^T (z - center) of the rows z behind `moments`, the argument `name`."""
    if not isinstance(moments, Moments | GroupedMoments):
        raise InputError(f"{name}: got {type(moments).__name__}, expected Moments or GroupedMoments")
    if moments.dim != outer.dim:
        raise InputError(f"{name}: got dim {moments.dim}, expected {outer.dim} as in the projection")
    if isinstance(moments, GroupedMoments):
        return cast(_Kind, moments.map(lambda part: seen_through(outer, name, part)))
    basis, center = (one.to(moments.device, torch.float64) for one in (outer.basis, outer.center))
    state = FloatState(outer.rank, moments.device)
    if moments.count:
        state.count = moments.count
        state.vector = basis.T @ (moments.mean - center)
        scatter = basis.T @ moments.scatter @ basis
        state.matrix = (scatter + scatter.T) / 2  # products round (i, j) and (j, i) apart
    seen = Moments(outer.rank)._with(state)
    seen.site = moments.site
    return cast(_Kind, seen)


def _reading(outer: Projection, head: nn.Module) -> nn.Module:
    """The head as it reads the coordinates: W (center + R y) + b."""
    weight, bias = linear_head(head, outer.dim, outer.basis.device)
    back, center = outer.back.to(weight), outer.center.to(weight)
    layer = nn.Linear(outer.rank, len(weight), device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight @ back)
    layer.bias.copy_(bias + weight @ center)
    return layer
