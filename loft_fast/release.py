"""Moments that may be published: with noise that hides any single row (differential privacy).

The Gaussian mechanism on second moments, as in Analyze Gauss (Dwork, Talwar, Thakurta, Zhang 2014), with the noise that
Balle and Wang (2018, "Improving the Gaussian Mechanism for Differential Privacy", theorem 8) show to be just enough.
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
from loft_fast.state import lasting

_SLACK = 1e-6  # relative rounding of a norm, where rows were scaled to it in float32


@lasting
def release(
    moments: Moments, norm: float, epsilon: float, delta: float, generator: torch.Generator | None = None
) -> Moments:
    """Moments in float64 that are (epsilon, delta)-differentially private: for one row more or less.

    That holds for rows of Euclidean norm at most `norm`, which the caller has to see to before they are added: sums do
    not show whether one row was longer. Several releases add up. Normal numbers of a computer are not quite normal
    (Mironov 2012), so that a promise to the last bit cannot be made.

    Args:
        moments: of at least one row; left as they are.
        norm: the largest norm a row may have, in the units of the features (before exact moments round it).
        epsilon: greater than 0. delta: between 0 and 1, best far below 1 / count.
        generator: of the noise, for tests. None: seeded by the system's source of secrets.

    Raises:
        InputError: a bad argument, or moments that rows of such norms cannot have.
    """
    if not isinstance(moments, Moments):
        raise InputError(f"moments: got {type(moments).__name__}, expected Moments")
    if not moments.count:
        raise InputError("moments: got no rows, expected at least one")
    _check("norm", norm, 1e100)
    step = moments.exact / LARGEST if isinstance(moments.exact, float) else 0.0
    longest = norm * (1 + _SLACK) + moments.dim**0.5 * step / 2  # after rounding
    squares = float(moments.scatter.trace()) / moments.count + float(moments.mean.square().sum())
    if squares > longest**2:
        raise InputError(f"norm: got {norm:g}, but the rows have norms of {squares**0.5:g} in the mean square")
    if generator is None:
        generator = torch.Generator().manual_seed(secrets.randbits(63))
    noisy = _noisy_products(moments, longest, noise_scale(3**0.5 * longest**2, epsilon, delta), generator)

    # What follows needs no data, and so gives nothing more away.
    state = FloatState(moments.dim, moments.device)
    state.count = max(1, round(float(noisy[-1, -1]) / longest**2))
    state.vector = noisy[-1, :-1] / (longest * state.count)
    scatter = noisy[:-1, :-1] - state.count * torch.outer(state.vector, state.vector)
    values, vectors = torch.linalg.eigh(scatter)
    scatter = (vectors * values.clamp_min(0)) @ vectors.T
    state.matrix = (scatter + scatter.T) / 2
    return moments._with(state)


def noise_scale(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least standard deviation of Gaussian noise that makes a sum (epsilon, delta)-differentially private.

    Args:
        sensitivity: by how much one row can change the sum, in Euclidean norm.

    Raises:
        InputError: a number out of range.
    """
    _check("sensitivity", sensitivity, 1e200)
    _check("epsilon", epsilon, 1e4)
    _check("delta", delta, 1.0)
    low, high = -30.0, 60.0  # log2 of the noise for a sensitivity of one
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if _delta(2.0**middle, epsilon) <= delta else (middle, high)
    return sensitivity * 2.0**high


def _delta(sigma: float, epsilon: float) -> float:
    """The delta of noise `sigma` for a sensitivity of one: what is left of one density where it exceeds the other."""
    near, far = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
    first, second = torch.special.log_ndtr(torch.tensor([near, far], dtype=torch.float64)).tolist()
    return math.exp(first) - math.exp(epsilon + second)


def _noisy_products(moments: Moments, norm: float, sigma: float, generator: torch.Generator) -> Tensor:
    """The sum of a a^T over the rows a = (z, norm), (d + 1, d + 1), with symmetric noise.

    It holds products, sums and count. One row changes its upper triangle by at most sqrt(3) norm^2: by the square root
    of (|a|^4 + sum_i a_i^4) / 2, which is largest where z has a single number, +-norm.
    """
    d, n, mean = moments.dim, moments.count, moments.mean
    products = mean.new_empty(d + 1, d + 1)
    products[:d, :d] = moments.scatter + n * torch.outer(mean, mean)
    products[d, :d] = products[:d, d] = norm * n * mean
    products[d, d] = n * norm**2
    noise = torch.randn(d + 1, d + 1, generator=generator, dtype=torch.float64).triu().to(products)
    return products + sigma * (noise + noise.triu(1).T)


def _check(name: str, value: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
        raise InputError(f"{name}: got {value!r}, expected a number between 0 and {most:g}")
