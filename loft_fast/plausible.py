"""Whether there can be rows with given moments: what to ask of moments that somebody else has made."""

from __future__ import annotations

import torch

from loft_fast.moments import Moments
from loft_fast.state import lasting

_ROUNDING = 1e-6  # relative, of a norm
# Of correlations. Sums in float32 leave eigenvalues down to -2e-6 where there are fewer rows than features; integers
# -3e-14.
_FLOAT, _EXACT = 1e-4, 1e-9
_LARGEST = 1e300  # sum of squares: float64 has room for 1e8 of these, as many as there may be contributions


@lasting
def implausible(moments: Moments, norm: float | None = None) -> str | None:
    """Why no rows, or none with Euclidean norms up to `norm`, have these moments; None if some may.

    Rows so large that sums over many contributions could overflow count as none. That the state is finite and
    consistent is taken for granted: `from_bytes` refuses others.
    """
    if not moments.count:
        return None
    scatter, mean = moments.scatter, moments.mean
    residue = getattr(moments._settled(), "residue", 0.0)
    variances = scatter.diagonal()
    squares = float(variances.abs().sum() + moments.count * mean.square().sum()) + residue
    if not squares <= _LARGEST:
        return f"squares that sum to {squares:.3g}, expected at most {_LARGEST:g}"
    if bool((variances < -residue).any()):
        return "a negative variance"
    if norm is not None:
        needed = float(variances.sum() / moments.count + mean.square().sum()) ** 0.5
        if needed > norm * (1 + _ROUNDING):
            return f"rows of norm {needed:.6g} in the root mean square, expected at most {norm:g}"
    scale = (variances.clamp_min(0) + residue).sqrt()
    there = scale > 0
    correlations = scatter[there][:, there] / torch.outer(scale[there], scale[there])
    correlations.diagonal().add_(_FLOAT if moments.exact is None else _EXACT)
    if bool(scatter[~there].any()) or int(torch.linalg.cholesky_ex(correlations)[1]):
        return "a scatter that is not positive semidefinite"
    return None
