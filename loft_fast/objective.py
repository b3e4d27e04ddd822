"""What is traded off: the retain and forget matrices of LOFT's objective (arXiv 2601.22456), each of trace one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.ops.reference import square

About = Literal["retain", "own"]

# Share of the variance that earlier removals may have left as rounding, by the bound of `FloatState.residue`. What they
# do leave is less: at this share, float32 rows of 8 to 200 features gave losses up to 1e-3 off, and ten times the share
# ten times that.
_MOST_RESIDUE = 0.25


@dataclass(frozen=True)
class Objective:
    """Retain variance lost against forget variance kept, for a projector P.

    Attributes:
        retain: A, (d, d) float64, trace 1. Retain variance kept is tr(P A).
        forget: B, (d, d) float64, trace 1. Forget variance kept is tr(P B).
        center: (d,) float64, the fixed point of the projection z -> center + P (z - center).
    """

    retain: Tensor
    forget: Tensor
    center: Tensor

    @property
    def dim(self) -> int:
        """Number of features d."""
        return len(self.center)


def build_objective(retain: Moments, forget: Moments, about: About = "retain") -> Objective:
    """The pair (A, B) and the centre.

    about="retain" (affine): B is the forget second moment about the RETAIN mean, so that it sees where the forget rows
    sit, and the projection leaves the retain mean where it is. about="own" (the paper): both are covariances about
    their own means and the projection is linear.

    Raises:
        InputError: different dimensions or only one, an empty set, features without variance, or with none but what
            the rounding of a removal may have left.
    """
    if about not in ("retain", "own"):
        raise InputError(f"about: got {about!r}, expected 'retain' or 'own'")
    for name, part in (("retain", retain), ("forget", forget)):
        if part.count == 0:
            raise InputError(f"{name}: the set is empty, expected at least one row")
    if retain.dim != forget.dim:
        raise InputError(f"forget: got dim {forget.dim}, expected {retain.dim} as in retain")
    if retain.dim < 2:
        raise InputError(f"retain: got dim {retain.dim}, expected at least 2 features to choose from")
    center = retain.mean if about == "retain" else torch.zeros_like(retain.mean)
    seen_from = center if about == "retain" else forget.mean
    return Objective(
        retain=_unit_trace("retain", retain, retain.mean),
        forget=_unit_trace("forget", forget, seen_from.to(forget.mean)).to(center),
        center=center,
    )


def _unit_trace(name: str, part: Moments, about: Tensor) -> Tensor:
    """The second moment about a point, divided by its trace."""
    offset = part.mean - about
    trace = float(part.scatter.trace() / part.count + offset.square().sum())
    residue = getattr(part._settled(), "residue", 0.0)
    if residue > _MOST_RESIDUE * part.count * trace:
        raise InputError(
            f"{name}: what was removed varied so much more than the {part.count} rows left that these are lost in its "
            "rounding, expected rows of like size, or exact moments (exact=True), which do not round"
        )
    # Rounding leaves about 1e-32 of the squared size of the features; less than that is no variance at all.
    scale = float(part.mean.square().sum()) + trace
    if not trace > 1e-28 * scale:
        raise InputError(f"{name}: {part.count} rows of zero variance, expected features that vary")
    matrix = part.scatter / (part.count * trace)
    return matrix.add_(square(offset / trace**0.5)) if bool(offset.any()) else matrix


def pooled(name: str, moments: Moments | GroupedMoments) -> Moments:
    """Moments of all rows behind either kind."""
    if isinstance(moments, GroupedMoments):
        return moments.total()
    if not isinstance(moments, Moments):
        raise InputError(f"{name}: got {type(moments).__name__}, expected Moments or GroupedMoments")
    return moments
