"""Proven points: the support is an upper bound whatever the basis, and a tight one near the eigenspace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_fast import proof
from loft_fast.frontier import Frontier
from loft_fast.objective import Objective


def edges_of(objective, angle, rank, count=1):
    """The eigenvectors on either side of the cut, `count` each."""
    _, vectors = Frontier(objective).spectrum(angle)
    cut = len(vectors) - rank
    return vectors[:, cut - count : cut + count]


def prove(objective, angle, basis, edges=None):
    edges = edges_of(objective, angle, basis.shape[1]) if edges is None else edges
    (point,) = proof.prove([objective], [angle], basis.unsqueeze(0), edges.unsqueeze(0))
    return point


def random_objective(dim, seed, forget_rank=None):
    """Two random covariances of trace one."""
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for rows in (2 * dim, forget_rank or 2 * dim):
        rows = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * torch.arange(1, dim + 1) ** -0.5
        pair.append(rows.T @ rows / rows.square().sum())
    return Objective(*pair, torch.zeros(dim, dtype=torch.float64))


def perturbed(basis, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return basis + size * torch.randn(basis.shape, generator=generator, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(
    dim=st.integers(2, 24),
    share=st.floats(0, 1),
    angle=st.floats(0, math.pi / 2),
    exponent=st.floats(-12, 0),
    seed=st.integers(0, 2**31),
)
def test_support_is_never_below_the_true_one(dim, share, angle, exponent, seed):
    objective = random_objective(dim, seed, forget_rank=max(1, dim // 2))
    rank = 1 + int(share * (dim - 2))
    true = Frontier(objective).at(angle, rank)
    point = prove(objective, angle, perturbed(true.basis, 10**exponent, seed))
    if point is None:
        return
    assert point.support >= true.support - 1e-13
    value = math.cos(angle) * point.retain_kept - math.sin(angle) * point.forget_kept
    assert value <= true.support + 1e-13
    assert torch.allclose(point.basis.T @ point.basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-6, 1e-5])
def test_the_bound_closes_with_the_square_of_the_error(size):
    objective = random_objective(32, 0)
    true = Frontier(objective).at(0.5, 10)
    point = prove(objective, 0.5, perturbed(true.basis, size, 1))
    assert point is not None
    assert point.support - true.support <= 1e-14 + 1000 * size**2  # of 320 terms
    assert abs(point.retain_kept - true.retain_kept) <= 1e-13 + 10 * size


def test_float32_basis_will_do():
    objective = random_objective(32, 3)
    true = Frontier(objective).at(0.5, 10)
    point = prove(objective, 0.5, true.basis.float())
    assert point is not None
    assert point.basis.dtype == torch.float64
    assert abs(point.support - true.support) < 1e-11


def test_another_eigenspace_is_refused():
    objective = random_objective(32, 0)
    _, vectors = Frontier(objective).spectrum(0.5)
    assert prove(objective, 0.5, vectors[:, :10]) is None  # the lowest
    assert prove(objective, 0.5, torch.cat([vectors[:, 20:21], vectors[:, -9:]], dim=1)) is None  # one too low


@settings(max_examples=100, deadline=None)
@given(size=st.floats(0, 3), seed=st.integers(0, 2**31))
def test_wrong_edges_can_only_spoil_a_proof(size, seed):
    objective = random_objective(32, 0)
    true = Frontier(objective).at(0.5, 10)
    edges = perturbed(edges_of(objective, 0.5, 10, 3), size, seed)
    point = prove(objective, 0.5, true.basis, edges)
    assert point is None or point.support >= true.support - 1e-13


@pytest.mark.parametrize("edges", [torch.zeros(32, 4), torch.ones(32, 2), torch.full((32, 2), math.nan)])
def test_edges_without_full_rank_are_refused(edges):
    objective = random_objective(32, 0)
    assert prove(objective, 0.5, Frontier(objective).at(0.5, 10).basis, edges) is None


@pytest.mark.parametrize("basis", [torch.zeros(32, 4), torch.ones(32, 2), torch.full((32, 3), math.nan)])
def test_a_basis_without_full_rank_is_refused(basis):
    assert prove(random_objective(32, 0), 0.5, basis) is None


def test_a_tie_at_the_cut_is_refused_or_bounded():
    # All eigenvalues equal: every subspace is optimal, and none is proven by a gap.
    flat = torch.eye(16, dtype=torch.float64) / 16
    objective = Objective(flat, flat, torch.zeros(16, dtype=torch.float64))
    point = prove(objective, 0.3, torch.eye(16, dtype=torch.float64)[:, :4])
    assert point is None or point.support >= (math.cos(0.3) - math.sin(0.3)) * 4 / 16 - 1e-14


def test_each_of_many_is_proven_as_if_alone():
    objectives = [random_objective(32, seed) for seed in range(6)]
    angles = [0.2 * i for i in range(6)]
    bases = [Frontier(one).at(angle, 10).basis for one, angle in zip(objectives, angles, strict=True)]
    bases[1] = torch.zeros_like(bases[1])
    bases[3] = torch.full_like(bases[3], math.nan)
    bases[4] = bases[4].flip(0)  # orthonormal, but of another space
    edges = [edges_of(one, angle, 10) for one, angle in zip(objectives, angles, strict=True)]
    points = proof.prove(objectives, angles, torch.stack(bases), torch.stack(edges))
    assert [point is not None for point in points] == [True, False, True, False, False, True]
    for point, objective, angle, basis in zip(points, objectives, angles, bases, strict=True):
        alone = prove(objective, angle, basis)
        assert (alone is None) == (point is None)
        if point is not None:
            assert point.support == pytest.approx(alone.support, rel=1e-12)
            assert point.retain_kept == pytest.approx(alone.retain_kept, rel=1e-12)
