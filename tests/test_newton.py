"""The first angle: it may be wrong without harm, but where the theory holds it has to be close."""

import math

import pytest
import torch

from loft_fast.frontier import Frontier
from loft_fast.goals import Distance
from loft_fast.newton import _model, first_angle
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
    # The derivative of a third-order series is of second order: halving t divides its error by eight.
    assert error(2e-3) < error(4e-3) / 6
    assert error(4e-3) < 1e-5


@pytest.mark.parametrize(("dim", "rank", "powers"), [(192, 60, (1, 1)), (256, 20, (0.5, 0.5)), (256, 100, (2, 1.5))])
def test_first_angle_is_so_close_that_one_solve_proves_it(dim, rank, powers):
    objective = Objective(*(power_law(dim, p, seed) for seed, p in enumerate(powers)), torch.zeros(dim).double())
    angle, solves = first_angle(objective, Distance(), rank)
    point = Frontier(objective).at(angle, rank)
    loss = Distance().loss(point.retain_kept, point.forget_kept)
    assert loss - Distance().bound(angle, point.support) <= 1e-5 * loss
    assert solves <= 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999999])
def test_any_pair_gives_an_angle_in_range(share):
    # Equal, nearly equal and half-dead features: no theory holds, and no error may come of it.
    retain = power_law(160, 1, 0)
    forget = share * power_law(160, 1, 1) + (1 - share) * retain
    retain[::2], retain[:, ::2] = 0, 0
    objective = Objective(retain / retain.trace(), forget / forget.trace(), torch.zeros(160).double())
    angle, solves = first_angle(objective, Distance(), 40)
    assert 0 <= angle <= math.pi / 2
    assert 1 <= solves <= 3
