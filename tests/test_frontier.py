import itertools
import math

import numpy as np
import pytest
import torch
from problems import KINDS, kept, make_problem, support

from loft_fast.frontier import Frontier, minimise
from loft_fast.goals import Distance, KeepRetain
from loft_fast.objective import Objective, build_objective

ANGLES = [0.0, 1e-9, 0.3, math.pi / 4, 1.5, math.pi / 2]


def frontier_of(kind, dim=16):
    problem = make_problem(kind, dim)
    return Frontier(build_objective(*problem.moments)), *problem.matrices()


def diagonal(retain, forget):
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (retain, forget))
    return Frontier(Objective(torch.diag(a / a.sum()), torch.diag(b / b.sum()), torch.zeros_like(a)))


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("kind", KINDS)
def test_point_is_extreme_and_has_the_shares_it_claims(kind, angle):
    frontier, A, B = frontier_of(kind)
    for rank in (1, 7, 15):
        point = frontier.at(angle, rank)
        basis = point.basis.numpy()
        assert point.rank == rank
        assert point.support == pytest.approx(support(A, B, rank, angle), abs=1e-13)
        assert point.retain_kept == pytest.approx(kept(A, basis), abs=1e-13)
        assert point.forget_kept == pytest.approx(kept(B, basis), abs=1e-13)
        reached = math.cos(angle) * point.retain_kept - math.sin(angle) * point.forget_kept
        assert reached == pytest.approx(point.support, abs=1e-13)
    assert frontier.eigen_solves == 3


def test_both_shares_fall_along_the_frontier():
    frontier, _, _ = frontier_of("power law")
    points = [frontier.at(angle, 5) for angle in np.linspace(0, math.pi / 2, 30)]
    for left, right in itertools.pairwise(points):
        assert right.retain_kept <= left.retain_kept + 1e-13
        assert right.forget_kept <= left.forget_kept + 1e-13


def test_positive_part_leaves_out_what_is_only_rounding():
    # Three directions of eight have variance, in a random basis: the other eigenvalues are rounding of either sign.
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    A = torch.from_numpy((rotation * [0.5, 0.3, 0.2, 0, 0, 0, 0, 0]) @ rotation.T)
    B = torch.from_numpy((rotation * [0.0, 0.0, 1.0, 0, 0, 0, 0, 0]) @ rotation.T)
    frontier = Frontier(Objective(A, B, torch.zeros(8, dtype=torch.float64)))
    assert frontier.at(0.0).rank == 3
    assert frontier.at(0.7).rank == 2
    assert frontier.at(math.pi / 2).rank == 1  # never none


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_geodesic_reaches_every_point_of_a_flat_side(share):
    # M(45 degrees) is zero on the first two coordinates: from one to the other, (a, b) goes along a line.
    frontier = diagonal([3, 1, 4], [3, 1, 4])
    low, high = frontier.at(0.1, 1), frontier.at(1.4, 1)
    target = high.retain_kept + share * (low.retain_kept - high.retain_kept)
    point = frontier.between(low, high, lambda a, b: (a - target) ** 2)
    assert point.retain_kept == pytest.approx(target, abs=1e-7)
    assert point.forget_kept == pytest.approx(point.retain_kept, abs=1e-13)
    assert point.basis.norm() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_geodesic_is_no_worse_than_its_ends(kind, rank):
    frontier, A, B = frontier_of(kind)
    low, high, goal = frontier.at(0.2, rank), frontier.at(1.2, rank), Distance()
    point = frontier.between(low, high, goal.loss)
    basis = point.basis.numpy()
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e-13
    assert point.retain_kept == pytest.approx(kept(A, basis), abs=1e-13)
    assert point.forget_kept == pytest.approx(kept(B, basis), abs=1e-13)
    ends = [goal.loss(end.retain_kept, end.forget_kept) for end in (low, high)]
    assert goal.loss(point.retain_kept, point.forget_kept) <= min(ends) + 1e-12


def test_geodesic_between_equal_subspaces_stays_there():
    frontier, _, _ = frontier_of("power law")
    low, high = frontier.at(0.5, 4), frontier.at(0.5 + 1e-12, 4)
    point = frontier.between(low, high, Distance().loss)
    overlap = torch.linalg.svdvals(low.basis.T @ point.basis)
    assert overlap.min() > 1 - 1e-12


def test_geodesic_stays_on_the_inner_side_of_a_limit():
    frontier, _, _ = frontier_of("equal", 13)
    goal = KeepRetain(0.9)
    for rank in range(1, 13):
        low, high = frontier.at(0.1, rank), frontier.at(1.4, rank)
        if low.retain_kept > 0.9 > high.retain_kept:
            point = frontier.between(low, high, goal.loss)
            assert goal.loss(point.retain_kept, point.forget_kept) == pytest.approx(0.9, abs=1e-11)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda t: (t - 0.3) ** 2, 0.3),
        (lambda t: t, 0.0),
        (lambda t: -t, 1.0),
        (lambda t: abs(t - 0.70001), 0.70001),
        (lambda t: -t if t <= 0.4321 else math.inf, 0.4321),
        (lambda t: t if t >= 0.4321 else math.inf, 0.4321),
        (lambda t: min((t - 0.2) ** 2 + 0.1, 3 * (t - 0.9) ** 2), 0.9),
    ],
    ids=["inside", "left end", "right end", "kink", "cliff on the right", "cliff on the left", "two valleys"],
)
def test_minimum_of_a_function_of_one_number(value, expected):
    assert minimise(value) == pytest.approx(expected, abs=1e-7)


# ---- goals: bounds and residuals from one angle ----


@pytest.mark.parametrize("goal", [Distance(), Distance(0.01), Distance(100.0), KeepRetain(0.5)], ids=str)
@pytest.mark.parametrize("angle", [0.1, 0.3, math.pi / 4, 1.5, math.pi / 2])
@pytest.mark.parametrize("limit", [-0.3, 0.0, 0.2, 0.6, 1.0])
def test_bound_is_the_least_loss_in_the_half_plane(goal, angle, limit):
    cos, sin = math.cos(angle), math.sin(angle)
    # For every a the least b that the half-plane cos a - sin b <= limit leaves.
    losses = [goal.loss(a, max(0.0, (cos * a - limit) / sin)) for a in np.linspace(-2, 1, 6001)]
    bound = goal.bound(angle, limit)
    assert bound <= min(losses) + 1e-12
    assert bound == pytest.approx(min(losses), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("goal", [Distance(), Distance(0.01), Distance(100.0)], ids=str)
def test_bound_from_the_retain_end_is_what_retain_loses(goal):
    assert goal.bound(0.0, 0.8) == pytest.approx(0.04)


@pytest.mark.parametrize("goal", [Distance(), Distance(0.01), Distance(100.0), KeepRetain(0.6)], ids=str)
def test_residual_changes_sign_once_along_the_frontier(goal):
    frontier, _, _ = frontier_of("power law")
    points = [frontier.at(angle, 5) for angle in np.linspace(1e-3, math.pi / 2, 40)]
    signs = [goal.residual(point.angle, point.retain_kept, point.forget_kept) >= 0 for point in points]
    assert signs == sorted(signs, reverse=True)
    assert True in signs
    assert False in signs
    losses = [goal.loss(point.retain_kept, point.forget_kept) for point in points]
    best = int(np.argmin(losses))
    assert signs[max(best - 1, 0)]
    assert not signs[min(best + 1, 39)]


def test_no_limit_on_forget_follows_from_the_retain_end_unless_the_floor_is_out_of_reach():
    assert KeepRetain(0.5).bound(0.0, 0.7) == 0.0
    assert KeepRetain(0.5).bound(0.0, 0.4) == math.inf


@pytest.mark.parametrize("rank", [1, 5, 12, 19, None])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_features_that_never_vary_change_nothing(rank, precision):
    # Eight dead features of twenty, in between; ranks below, at and above what the others span.
    full, _, _ = frontier_of("power law")
    live = torch.tensor([0, 1, 3, 4, 7, 8, 9, 12, 13, 15, 18, 19])
    retain, forget = (torch.zeros(20, 20, dtype=torch.float64) for _ in range(2))
    for padded, matrix in ((retain, full.objective.retain), (forget, full.objective.forget)):
        block = matrix[:12, :12]
        padded[live.unsqueeze(1), live] = block / block.trace()
    frontier = Frontier(Objective(retain, forget, torch.zeros(20, dtype=torch.float64)))
    values, vectors = frontier.spectrum(0.7, precision)
    matrix = math.cos(0.7) * retain - math.sin(0.7) * forget
    tolerance = 1e-13 if precision == torch.float64 else 1e-5
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=0, atol=tolerance)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=0, atol=tolerance)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20).double(), rtol=0, atol=tolerance)
    point = frontier.at(0.7, rank)
    # What the eigenvalues of the whole matrix say, worked out without leaving anything out.
    expected = torch.linalg.eigvalsh(matrix)
    top = expected[20 - rank :].sum() if rank else expected.clamp(min=0).sum()
    assert point.support == pytest.approx(float(top), abs=1e-13)
    assert point.support == pytest.approx(
        math.cos(0.7) * point.retain_kept - math.sin(0.7) * point.forget_kept, abs=1e-13
    )
