"""The projector onto the s largest eigenvectors from products of symmetric matrices alone: no eigendecomposition.

Trace-correcting purification (Niklasson, Phys. Rev. B 66, 155115, 2002, called SP2): with the spectrum scaled into
[0, 1], X becomes X^2 or 2 X - X^2, whichever brings the trace nearer to s. Both keep the order of eigenvalues, and in
the end s of them are one and the others zero. It needs no level between eigenvalues s and s + 1, and yields one: what
the maps, read backwards, make of one half.

Where a window with the level in it is known, from a like problem, it is first widened by odd polynomials of degree five
that keep the sign (as in Amsel, Persson, Musco and Gower, "The Polar Express", 2025): a factor of 4 for three products,
where purification needs seven. What lies outside the window loses its order there, but not its side.

Tried and not kept: such polynomials from the start, with a shift at each step that sets the trace right. It took 30 to
43 products instead of 62, and lost the order of eigenvalues that had not been told apart, on most spectra (errors of
1e-1 to 1e-5 in the objective).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_fast.errors import InputError
from loft_fast.ops.arguments import check_positive, check_square
from loft_fast.ops.eigh import eigh
from loft_fast.ops.symmetric_matmul import symmetric_matmul

_log = logging.getLogger("loft_fast")
_STEPS = 96  # of purification at most; spectra with a relative gap of 1e-6 take 60 to 80
# a x + b x^3 + c x^5 of largest value 1 on [0, 1], and at least 0.2 from where it first reaches that, 0.0496.
_WIDEN = (4.05782, -11.0356, 7.97778)
_WIDENED, _PEAK = 0.0496, 0.38664
_IDEMPOTENT = 1e-6  # tr (X - X^2) at which X is left as it is, where rounding lets it come so far
_PROJECTOR = 1e-2  # and at which it is taken for a projector
_STILL, _SQUARE, _RAISE = 0, 1, 2  # what became of X in a step


@dataclass(frozen=True)
class Window:
    """Where the levels of B problems are to be looked for.

    Attributes:
        low, high: their limits. radius: of the largest eigenvalues in magnitude, about. B numbers each.
    """

    low: list[float]
    high: list[float]
    radius: list[float]

    @property
    def center(self) -> list[float]:
        """Halfway between the limits."""
        return [(low + high) / 2 for low, high in zip(self.low, self.high, strict=True)]

    def over(self, scale: list[float]) -> Window:
        """The same for matrices divided by `scale`, each by its own."""
        low, high, radius = (
            [one / factor for one, factor in zip(numbers, scale, strict=True)]
            for numbers in (self.low, self.high, self.radius)
        )
        return Window(low, high, radius)

    @property
    def widenings(self) -> int:
        """How often all windows can be widened before one is as wide as the spectrum."""
        shares = [
            (high - low) / 2 / (radius + abs(center))
            for low, high, radius, center in zip(self.low, self.high, self.radius, self.center, strict=True)
        ]
        widest = max(max(shares, default=1.0), 1e-12)
        return max(0, 1 + math.floor(math.log(_WIDENED / widest, _WIDEN[0]))) if widest <= _WIDENED else 0


@dataclass
class TopK:
    """Projectors of a batch of B matrices M.

    Attributes:
        projector: (B, d, d), symmetric, of M's dtype; its trace is the rank, but for rounding.
        value: of tr(P M): the sum of the s largest eigenvalues, if not a little less.
        bound: that sum is at most this, but for rounding.
        level: between eigenvalues s and s + 1, as far as they were told apart.
        radius: no eigenvalue is larger in magnitude.
        products: matrix products that were needed; 0 where it was an eigendecomposition.
    """

    projector: Tensor
    value: list[float]
    bound: list[float]
    level: list[float]
    radius: list[float]
    products: list[int]

    def window(self, width: float) -> Window:
        """For a like problem, whose levels are nearer than `width`."""
        return Window([one - width for one in self.level], [one + width for one in self.level], self.radius)


def topk_projector(matrix: Tensor, rank: int, window: Window | None = None, tolerance: float = 1e-5) -> TopK:
    """Projectors onto the eigenvectors of the `rank` largest eigenvalues.

    The products are issued without waiting for the device; only what came of them is looked at. A problem that is not
    solved to `tolerance`, for instance because its eigenvalues s and s + 1 are one, is solved by `torch.linalg.eigh`,
    and the log says so.

    Args:
        matrix: (B, d, d) float32 or float64, symmetric and finite.
        rank: s, 1 <= s < d.
        window: a warm start. One that does not hold the level costs time, and does no harm.
        tolerance: of (bound - value) over the larger of |value| and radius.

    Raises:
        InputError: an argument has a wrong type, shape, dtype or value.
    """
    many, d = check_square("matrix", matrix, (torch.float32, torch.float64))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < d:
        raise InputError(f"rank: got {rank!r}, expected an integer between 1 and {d - 1}")
    if window is not None and not len(window.low) == len(window.high) == len(window.radius) == many:
        raise InputError(f"window: got {len(window.low)} problems, expected {many}")
    check_positive("tolerance", tolerance)
    if many == 0:
        return TopK(matrix, [], [], [], [], [])
    size = matrix.abs().amax((1, 2))
    size = torch.where(size > 0, size, 1.0)
    normal = matrix / size.view(-1, 1, 1)
    length = torch.linalg.matrix_norm(normal).clamp_min(1.0)
    normal /= length.view(-1, 1, 1)
    scale = (size.double() * length.double()).tolist()
    bad = sum(not math.isfinite(one) for one in scale)
    if bad:
        raise InputError(f"matrix: {bad} of {many} problems contain NaN or Inf, expected finite matrices")
    found = _solved(normal, rank, window.over(scale) if window is not None else None)
    if window is not None:
        _retry(found, lambda left: _solved(normal[left], rank, None), tolerance)
    left = _retry(found, lambda left: _decomposed(normal[left], rank), tolerance)
    if left:
        _log.info("topk_projector: %d of %d problems solved by torch.linalg.eigh instead", len(left), many)
    for name in ("value", "bound", "level", "radius"):
        setattr(found, name, [factor * one for factor, one in zip(scale, getattr(found, name), strict=True)])
    return found


def _retry(found: TopK, solve: Callable[[list[int]], TopK], tolerance: float) -> list[int]:
    """Solve anew what is not solved to the tolerance; returns which these are."""
    left = [
        i
        for i, (value, bound, radius) in enumerate(zip(found.value, found.bound, found.radius, strict=True))
        if not bound - value <= tolerance * max(abs(value), radius)
    ]
    if left:
        part = solve(left)
        found.projector[left] = part.projector
        for name in ("value", "bound", "level", "radius", "products"):
            for i, one in zip(left, getattr(part, name), strict=True):
                getattr(found, name)[i] = one
    return left


def purify(
    matrix: Tensor, rank: int, center: Tensor | None = None, widenings: int = 0, wait: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The products alone, of which nothing is looked at: they can be captured in a CUDA graph.

    Args:
        matrix: (B, d, d), of Frobenius norm one or zero. rank: s.
        center, widenings: (B,) of matrix's dtype, where to widen the spectrum, and how often.
        wait: look after every step whether all problems are done. Otherwise what is done is copied from then on.

    Returns:
        X, (B, d, d), nearly the projectors; a bound of each spectrum, (B,) float64; what became of X in each step,
        (steps, B) int8.
    """
    many, d = matrix.shape[:2]
    dtype = matrix.dtype
    # The eighth root of tr M^8: at most d^(1/8) too large, and hardly at all for spectra that fall off.
    square, _, _ = symmetric_matmul(matrix)
    _, _, eighth = symmetric_matmul(square)
    radius = eighth ** (1 / 8) * (1 + 16 * d * torch.finfo(dtype).eps)
    radius = torch.where(radius > 0, radius, 1.0)
    if center is None or not widenings:
        half = (0.5 / radius).to(dtype)
        x, trace, squares = symmetric_matmul(matrix, alpha=0.0, beta=half, gamma=0.5)
    else:
        reach = (1 / (radius + center.abs())).to(dtype)
        y, _, _ = symmetric_matmul(matrix, alpha=0.0, beta=reach, gamma=-center * reach)
        for _ in range(widenings):
            square, _, _ = symmetric_matmul(y)
            factor, _, _ = symmetric_matmul(square, alpha=_WIDEN[2], beta=_WIDEN[1], gamma=_WIDEN[0])
            y, _, _ = symmetric_matmul(y, factor)
        x, trace, squares = symmetric_matmul(y, alpha=0.0, beta=0.5, gamma=0.5)
    still = max(_IDEMPOTENT, d * torch.finfo(dtype).eps)
    one, zero = torch.ones(many, dtype=dtype, device=x.device), torch.zeros(many, dtype=dtype, device=x.device)
    steps = []
    for _ in range(_STEPS):
        done = (trace - squares).abs() < still
        if wait and bool(done.all()):
            break
        squared = (squares - rank).abs() < (2 * trace - squares - rank).abs()
        steps.append(torch.where(done, _STILL, torch.where(squared, _SQUARE, _RAISE)).to(torch.int8))
        alpha = torch.where(done, zero, torch.where(squared, one, -one))
        beta = torch.where(done, one, torch.where(squared, zero, 2 * one))
        x, trace, squares = symmetric_matmul(x, alpha=alpha, beta=beta)
    return x, radius, torch.stack(steps) if steps else torch.empty(0, many, dtype=torch.int8, device=x.device)


def _solved(matrix: Tensor, rank: int, window: Window | None) -> TopK:
    """By products. A bound is infinite where the level lies outside its window."""
    widenings = window.widenings if window is not None else 0
    center = matrix.new_tensor(window.center) if window is not None else None
    x, radius, steps = purify(matrix, rank, center, widenings, wait=matrix.device.type == "cpu")
    taken: list[list[int]] = steps.T.tolist()
    middle = center.tolist() if center is not None else [0.0] * len(matrix)
    radii = radius.tolist()
    level, valid = [], []
    for choices, c, r in zip(taken, middle, radii, strict=True):
        y = 2 * _before(choices, 0.5) - 1
        valid.append(not widenings or abs(y) < 0.2)
        for _ in range(widenings):
            y = _unwidened(y)
        level.append(c + y * (r + abs(c)) if widenings else y * r)
    value, bound, unsettled = _certificate(matrix, x, rank, level)
    settled = [fine and one < _PROJECTOR for fine, one in zip(valid, unsettled, strict=True)]
    bound = [one if fine else math.inf for one, fine in zip(bound, settled, strict=True)]
    products = [3 + 3 * widenings + sum(choice != _STILL for choice in choices) for choices in taken]
    return TopK(x, value, bound, level, radii, products)


def _certificate(
    matrix: Tensor, x: Tensor, rank: int, level: list[float]
) -> tuple[list[float], list[float], list[float]]:
    """What X is worth, a bound of the sum of the `rank` largest eigenvalues of M, and tr (X - X^2): one more product.

    For every level t that sum is at most s t + tr (M - t)_+, and equal to it if t parts eigenvalues s and s + 1. X is a
    function f of M, above one half just where an eigenvalue is above t; there 1 - f <= 2 f (1 - f), and elsewhere
    f <= 2 f (1 - f). So tr (M - t)_+ exceeds tr (M - t) X by at most 2 tr |M - t| (X - X^2), and that is bounded by the
    inequality of Cauchy and Schwarz.
    """
    t = matrix.new_tensor(level)
    above, _, _ = symmetric_matmul(matrix, alpha=0.0, beta=1.0, gamma=-t)
    product, kept, squares = symmetric_matmul(above, x)  # (M - t) X
    spread = _inner(above, product) - squares  # tr (M - t)^2 (X - X^2)
    unsettled = x.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) - _inner(x, x)
    value = rank * t.double() + kept
    bound = value + 2 * (spread.clamp_min(0) * unsettled.clamp_min(0)).sqrt()
    return value.tolist(), bound.tolist(), unsettled.tolist()


def _before(choices: list[int], x: float) -> float:
    """What the steps have made x of."""
    for choice in reversed(choices):
        if choice == _SQUARE:
            x = math.sqrt(x)
        elif choice == _RAISE:
            x = x / (1 + math.sqrt(1 - x))
    return x


def _unwidened(y: float) -> float:
    """What widening has made y of, near zero, where it rises."""
    a, b, c = _WIDEN
    low, high = 0.0, _PEAK
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if x * (a + x * x * (b + c * x * x)) < abs(y) else (low, x)
    return math.copysign(low, y)


def _decomposed(matrix: Tensor, rank: int) -> TopK:
    values, vectors = eigh(matrix)
    kept = vectors[..., -rank:]
    value = values[:, -rank:].sum(1, dtype=torch.float64).tolist()
    level = values[:, -rank - 1 : values.shape[1] - rank + 1].mean(1).tolist()
    radius = values.abs().amax(1).tolist()
    projector = kept @ kept.mT
    # Not every BLAS gives X X^T the same bits in both triangles.
    return TopK((projector + projector.mT) / 2, value, value, level, radius, [0] * len(matrix))


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """tr(X^T Y) of each pair, (B,) float64; float32 numbers are multiplied, and summed a row at a time."""
    return (x * y).sum(2).sum(1, dtype=torch.float64)
