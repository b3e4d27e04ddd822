"""Random retain/forget problems of every kind, and what is true of them, worked out with numpy alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from loft_fast import Moments

SIZES = (8, 9, 11, 13, 16, 20, 24, 33, 48, 64, 96, 128, 256)


@dataclass(frozen=True)
class Problem:
    """Rows to keep and rows to forget, (n, d) float64 each, and a rank to solve at."""

    retain: np.ndarray
    forget: np.ndarray
    rank: int

    @property
    def moments(self):
        """Moments of both sets."""
        return tuple(Moments(rows.shape[1]).update(torch.from_numpy(rows)) for rows in (self.retain, self.forget))

    def matrices(self, about="retain"):
        """A and B as MATH defines them, from the rows."""
        mean = self.retain.mean(0)
        seen_from = mean if about == "retain" else self.forget.mean(0)
        return tuple(unit_trace(rows.T @ rows) for rows in (self.retain - mean, self.forget - seen_from))


def make_problem(kind, dim, index=0):
    """The problem of this kind and size; `index` picks the rank among eight from 1 to d - 1."""
    rng = np.random.default_rng([list(KINDS).index(kind), dim, index])
    ranks = (1, dim - 1, dim // 2, dim // 4, 2 * dim // 3, dim - 2, dim // 8, 2)
    rank = min(max(ranks[index % len(ranks)], 1), dim - 1)
    retain, forget = KINDS[kind](dim, rng)
    return Problem(retain, forget, rank)


def unit_trace(matrix):
    return matrix / np.trace(matrix)


def rows_with(variances, directions):
    """Rows of mean zero whose covariance has exactly these eigenvalues and eigenvectors (columns)."""
    half = (directions * np.sqrt(variances)).T
    return np.concatenate([half, -half])


# ---- kinds ----


def rotation(dim, rng):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def spectra(retain: Callable, forget: Callable, shared=False, offset=0.0):
    """Two spectra, each a function of (dim, rng), in one shared or two random bases; forget rows sit `offset` away."""

    def build(dim, rng):
        base = rotation(dim, rng)
        other = base if shared else rotation(dim, rng)
        shift = offset * rng.normal(size=dim) / math.sqrt(dim)
        return rows_with(retain(dim, rng), base), rows_with(forget(dim, rng), other) + shift

    return build


def power(exponent):
    return lambda dim, rng: np.arange(1.0, dim + 1) ** -exponent


def steps(width, exponent=1.0):
    """Eigenvalues tied in runs of `width`."""
    return lambda dim, rng: np.ceil(np.arange(1.0, dim + 1) / width) ** -exponent


def uniform(dim, rng):
    return rng.uniform(size=dim)


def flat(dim, rng):
    return np.ones(dim)


def nearly_two_levels(dim, rng):
    return 1 + 1e-9 * rng.uniform(size=dim) + 2 * (np.arange(dim) < dim // 2)


def first(share):
    """Variance in the first directions only."""
    return lambda dim, rng: rng.uniform(0.1, 1, size=dim) * (np.arange(dim) < max(1, int(share * dim)))


def last_half(dim, rng):
    return rng.uniform(0.1, 1, size=dim) * (np.arange(dim) >= dim // 2)


def gaussian(retain_rows, forget_rows):
    def build(dim, rng):
        mixing = rng.normal(size=(dim, dim))
        retain = rng.normal(size=(retain_rows(dim), dim)) @ mixing
        return retain, rng.normal(size=(forget_rows(dim), dim)) + rng.normal(size=dim)

    return build


def equal(dim, rng):
    rows = rows_with(uniform(dim, rng), rotation(dim, rng))
    return rows, rows.copy()


def equal_on_a_block(dim, rng):
    """A = B on half of the coordinates, so that M is zero there at 45 degrees."""
    half = dim // 2
    same = np.zeros((2 * dim, dim))
    same[: 2 * half, :half] = rows_with(uniform(half, rng) / half, rotation(half, rng))
    parts = []
    for _ in range(2):
        own = same.copy()
        own[: 2 * (dim - half), half:] = rows_with(0.2 * uniform(dim - half, rng) / dim, rotation(dim - half, rng))
        parts.append(own)
    return tuple(parts)


def coordinates(dim, rng):
    """Diagonal matrices."""
    return tuple(rows_with(rng.exponential(size=dim), np.eye(dim)) for _ in range(2))


GENERIC = {
    "power law": spectra(power(1.0), power(1.5), offset=1.0),
    "steep": spectra(power(4.0), lambda dim, rng: 10 ** (-np.arange(dim) / 4), offset=0.1),
    "gaussian rows": gaussian(lambda dim: 2 * dim, lambda dim: dim + 3),
    "fewer rows than features": gaussian(lambda dim: max(2, dim // 3), lambda dim: max(2, dim // 4)),
    "two rows": gaussian(lambda dim: 2, lambda dim: 2),
    "low rank": spectra(first(0.25), first(0.25)),
}
KINDS = GENERIC | {
    "one direction": spectra(first(0.0), first(0.0)),
    "commuting": spectra(uniform, uniform, shared=True),
    "coordinates": coordinates,
    "equal": equal,
    "equal on a block": equal_on_a_block,
    "tied": spectra(steps(3), steps(4)),
    "tied and commuting": spectra(steps(3), lambda dim, rng: steps(4)(dim, rng)[::-1], shared=True),
    "nearly tied": spectra(nearly_two_levels, nearly_two_levels),
    "flat against power law": spectra(flat, power(1.0)),
    "disjoint": spectra(first(0.5), last_half, shared=True),
}


# ---- what is true of them ----


def kept(matrix, basis):
    """tr(U^T matrix U)."""
    return float(np.trace(basis.T @ matrix @ basis))


def support(A, B, rank, angle):
    """h(angle): what no projector of this rank exceeds in cos(angle) a - sin(angle) b."""
    values = np.linalg.eigvalsh(math.cos(angle) * A - math.sin(angle) * B)
    return float(values[len(values) - rank :].sum())


def distance_bound(A, B, rank, angle, weight=1.0):
    """D(angle): no projector of this rank has a smaller (1 - a)^2 + weight b^2."""
    cos, sin = math.cos(angle), math.sin(angle)
    return max(0.0, cos - support(A, B, rank, angle)) ** 2 / (cos**2 + sin**2 / weight)


def best_distance_bound(A, B, rank, weight=1.0):
    """The largest D over all angles, on a grid and then by golden section around its best cell."""
    # Angles that are even where the loss is a circle, however large the weight.
    return maximum(
        lambda turn: distance_bound(A, B, rank, math.atan(math.sqrt(weight) * math.tan(turn)), weight), math.pi / 2
    )


def maximum(value, end, cells=16, steps=42):
    """The largest value seen in [0, end] of a function with one hill."""
    grid = np.linspace(0, end, cells + 1)
    seen = [value(x) for x in grid]
    best = int(np.argmax(seen))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, cells)]
    ratio = (math.sqrt(5) - 1) / 2
    x, y = high - ratio * (high - low), low + ratio * (high - low)
    at_x, at_y = value(x), value(y)
    for _ in range(steps):
        seen += [at_x, at_y]
        if at_x >= at_y:
            high, y, at_y = y, x, at_x
            x = high - ratio * (high - low)
            at_x = value(x)
        else:
            low, x, at_x = x, y, at_y
            y = low + ratio * (high - low)
            at_y = value(y)
    return max(seen)
