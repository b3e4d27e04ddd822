"""Newton's steps on the frontier: they may fail without harm, but where the theory holds they have to be close."""

import math

import pytest
import torch

from loft_fast.frontier import Frontier
from loft_fast.goals import Distance
from loft_fast.newton import _model, descend
from loft_fast.objective import Objective


def power_law(dim, power, seed):
    """A covariance of trace one with eigenvalues i^-power in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    matrix = basis * torch.arange(1, dim + 1).double() ** -power @ basis.T
    return (matrix + matrix.T) / (2 * matrix.trace())


def test_model_is_the_taylor_series_of_the_frontier():
    # A wide gap at the cut, so that finite differences see the series and not an avoided crossing.
    retain, forget = power_law(24, 1, 0), power_law(24, 1, 1)
    objective, angle, rank = Objective(retain, forget, torch.zeros(24).double()), 0.6, 9
    model = _model(retain, forget, rank, angle)
    frontier = Frontier(objective)

    def error(t):
        point = frontier.at(angle + t, rank)
        a, b = model.kept(angle, t)
        return max(abs(a - point.retain_kept), abs(b - point.forget_kept))

    assert error(0) < 1e-9
    # The derivative of a second-order series is of first order: halving t divides its error by four.
    assert error(2e-3) < error(4e-3) / 3.5
    assert error(4e-3) < 1e-4


def test_the_predicted_space_is_right_to_first_order():
    retain, forget = power_law(24, 1, 0), power_law(24, 1, 1)
    angle, rank = 0.6, 9
    model = _model(retain, forget, rank, angle)
    frontier = Frontier(Objective(retain, forget, torch.zeros(24).double()))

    def distance(t):
        found, true = torch.linalg.qr(model.basis(t)).Q, frontier.at(angle + t, rank).basis
        return float((found @ found.T - true @ true.T).norm())

    assert distance(0) < 1e-9
    assert distance(2e-3) < distance(4e-3) / 3.5
    assert distance(4e-3) < 0.1 * float((model.basis(4e-3) - model.basis(0)).norm())


@pytest.mark.parametrize(("dim", "rank", "powers"), [(192, 60, (1, 1)), (256, 20, (0.5, 0.5)), (256, 100, (2, 1.5))])
def test_two_solves_prove_an_optimum(dim, rank, powers):
    objective = Objective(*(power_law(dim, p, seed) for seed, p in enumerate(powers)), torch.zeros(dim).double())
    found = [point for _, point in descend(objective, Distance(), rank)][:2]
    points = [point for point in found if point is not None]
    loss = min(Distance().loss(point.retain_kept, point.forget_kept) for point in points)
    bound = max(Distance().bound(point.angle, point.support) for point in points)
    assert 0 <= loss - bound <= 1e-6 * loss


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999999, 1.0])
def test_any_pair_gives_angles_in_range_and_no_false_proof(share):
    # Equal, nearly equal and half-dead features: no theory holds, and no error may come of it.
    retain = power_law(160, 1, 0)
    forget = (1 - share) * power_law(160, 1, 1) + share * retain
    retain[::2], retain[:, ::2] = 0, 0
    objective = Objective(retain / retain.trace(), forget / forget.trace(), torch.zeros(160).double())
    frontier = Frontier(objective)
    steps = list(descend(objective, Distance(), 40))
    assert 1 <= len(steps) <= 3
    for angle, point in steps:
        assert 0 <= angle <= math.pi / 2
        assert point is None or point.support >= frontier.at(angle, 40).support - 1e-13


def test_small_problems_are_left_to_float64():
    objective = Objective(power_law(24, 1, 0), power_law(24, 1, 1), torch.zeros(24).double())
    assert list(descend(objective, Distance(), 9)) == []
