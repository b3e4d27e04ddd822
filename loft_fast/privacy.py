"""Differentially private moments, for publishing: Gaussian noise on the sum of products of augmented rows.

Analyze Gauss (Dwork, Talwar, Thakurta, Zhang 2014), with noise from the analytic Gaussian mechanism (Balle, Wang 2018).
"""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.float_state import FloatState
from loft_fast.moments import Moments
from loft_fast.ops.reference import LARGEST
from loft_fast.state import lasting, unpack

_LIMITS = 1e-50, 1e50  # of arguments: far beyond use, and no square of a square overflows
_ROUNDING = 1e-6  # relative, of the norm of a row that was scaled to it in float32
_ULPS = 2e-15  # relative, of a few operations in float64
# In units of norm^2, what one row a = (z, 1), |z| <= 1, can change in the upper triangle of the sum of a a^T:
# sum_{i<=j} a_i^2 a_j^2 = (|a|^4 + sum_i a_i^4) / 2 <= (2^2 + 1 + 1) / 2 = 3, as |a|^2 <= 2 and sum_i z_i^4 <= |z|^4.
# It is reached where z has a single number, +-1. (The Frobenius norm of all of a a^T, which counts pairs twice, is 2.)
_SENSITIVITY = 3**0.5


@lasting
def release(
    moments: Moments, norm: float, epsilon: float, delta: float, generator: torch.Generator | None = None
) -> Moments:
    """Moments with noise, (epsilon, delta)-differentially private for adding or removing one row.

    What is not promised:

    - anything for rows longer than `norm`: clip them before they are added. Moments cannot show every violation.
    - the sum of several releases of the same rows: their epsilons and deltas add up. Those of disjoint rows do not.
    - to hide whether there are any rows at all, or what a refusal says: do not publish an error.
    - exact arithmetic. Normal numbers of a computer are not quite normal (Mironov 2012: the low-order bits), and sums
      in floating point round differently with one row more. Sums of exact moments do not, given `exact` as a number:
      exact=True takes the step from the rows.

    Args:
        moments: at least one row; not changed.
        norm: Euclidean norm that no row exceeds, in units of the features. Chosen without looking at the rows.
        epsilon, delta: the privacy parameters; delta in (0, 1), far below 1 / count.
        generator: for tests, with the same noise for the same seed. None draws it from the system's secure source, as
            32 bits are all that torch.Generator takes from a seed on a CPU: few enough to try them all.

    Returns:
        Float64 moments of the same site: count (at least 1), mean (d,), and scatter (d, d), positive semidefinite. The
        noise does not depend on the count, so that it drowns few rows and is negligible for many.

    Raises:
        InputError: no rows, an argument of the wrong type or out of range, or moments that such rows cannot have.
    """
    if not isinstance(moments, Moments):
        raise InputError(f"moments: got {type(moments).__name__}, expected Moments")
    if not moments.count:
        raise InputError("moments: got no rows, expected at least 1")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
    _check("norm", norm, *_LIMITS)
    sigma = noise_scale(_SENSITIVITY, epsilon, delta)
    step = float(moments.exact or 0.0) / LARGEST
    norm_bound = norm * (1 + _ROUNDING) + moments.dim**0.5 * step / 2  # exact moments round every feature
    mean_square = float(moments.mean.square().sum())
    needed = max(mean_square, mean_square + float(moments.scatter.trace()) / moments.count) ** 0.5
    if not needed <= norm_bound:
        raise InputError(f"norm: got {norm!r}, expected at least {needed:.9g}, the root mean square norm of the rows")
    return _read(moments, norm_bound, _noisy_products(moments, norm_bound, sigma, generator))


def noise_scale(sensitivity: float, epsilon: float, delta: float) -> float:
    """The smallest sigma, in units of `sensitivity`, with which N(0, sigma^2 I) is (epsilon, delta)-private.

    Args:
        sensitivity: Euclidean norm of the largest change that one row makes.

    Raises:
        InputError: a number out of range.
    """
    _check("sensitivity", sensitivity, *_LIMITS)
    _check("epsilon", epsilon, *_LIMITS)
    _check("delta", delta, 0.0, 1.0)
    # With sigma in units of the sensitivity and near = 1 / (2 sigma) - epsilon sigma, theorem 8 of Balle and Wang is
    # delta = Phi(near) - e^epsilon Phi(-far), where far^2 = near^2 + 2 epsilon. It grows with near, from 0 to 1.
    low, high = -39.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, epsilon) <= delta else (low, middle)
    far = math.hypot(low, math.sqrt(2 * epsilon))
    # Two forms of one number: neither cancels digits.
    sigma = (far - low) / (2 * epsilon) if low < 0 else 1 / (far + low)
    return sensitivity * sigma * (1 + 2 * _ULPS)


def _delta(near: float, epsilon: float) -> float:
    """Phi(near) - e^epsilon Phi(-far), never less than it is: rounding costs noise, not privacy."""
    far = math.hypot(near, math.sqrt(2 * epsilon))
    first, second = torch.special.log_ndtr(torch.tensor([near, -far], dtype=torch.float64)).tolist()
    error = _ULPS * (epsilon - first - second)
    return -math.exp(first + _ULPS * (1 - first)) * math.expm1(epsilon + second - first - error)


def _noisy_products(moments: Moments, norm: float, sigma: float, generator: torch.Generator | None) -> Tensor:
    """Products, sums and count in one: sum a a^T over a = (z / norm, 1), (d + 1, d + 1), plus symmetric noise."""
    d, n, mean = moments.dim, moments.count, moments.mean / norm
    products = mean.new_empty(d + 1, d + 1)
    products[:d, :d] = moments.scatter / norm**2 + n * torch.outer(mean, mean)
    products[:d, d] = products[d, :d] = n * mean
    products[d, d] = n
    return products + sigma * unpack(_normal((d + 1) * (d + 2) // 2, generator), d + 1).to(mean)


def _normal(n: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, (n,) float64."""
    if generator is not None:
        return torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)
    bits = torch.frombuffer(bytearray(secrets.token_bytes(8 * n)), dtype=torch.int64) & (2**52 - 1)
    return torch.special.ndtri((bits.double() + 0.5) * 2.0**-52)  # never of 0 or 1


def _read(moments: Moments, norm: float, noisy: Tensor) -> Moments:
    """Moments of the kind and site of `moments` from noisy products, which alone decide: so this costs no privacy."""
    state = FloatState(moments.dim, moments.device)
    state.count = min(max(1, round(float(noisy[-1, -1]))), FloatState.most_rows)
    mean = noisy[:-1, -1] / state.count
    values, vectors = torch.linalg.eigh(noisy[:-1, :-1] - state.count * torch.outer(mean, mean))
    scatter = (vectors * values.clamp_min(0)) @ vectors.T
    state.vector, state.matrix = norm * mean, norm**2 * (scatter + scatter.T) / 2
    return moments._with(state)


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:  # NaN is not, either
        raise InputError(f"{name}: got {value!r}, expected a number between {low:g} and {high:g}")
