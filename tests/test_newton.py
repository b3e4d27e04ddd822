"""Newton's steps on the frontier: they may fail without harm, but where the theory holds they have to be close."""

import math

import pytest
import torch

from loft_fast import newton
from loft_fast.frontier import Frontier
from loft_fast.goals import Distance
from loft_fast.newton import _Models, search
from loft_fast.objective import Objective


def power_law(dim, power, seed):
    """A covariance of trace one with eigenvalues i^-power in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    matrix = basis * torch.arange(1, dim + 1).double() ** -power @ basis.T
    return (matrix + matrix.T) / (2 * matrix.trace())


def model_of(retain, forget, rank, angle):
    return _Models(retain.unsqueeze(0), forget.unsqueeze(0), rank, [angle])


def basis_of(model, t):
    """The basis that the model of a single problem predicts."""
    bases, _ = model.bases([0], [t])
    return bases[0]


def offers(objectives, rank, enough=lambda point: False):
    """What `search` offers for each problem: (angle, point) pairs."""
    found = [[] for _ in objectives]

    def offer(i, angle, point):
        found[i].append((angle, point))
        return enough(point)

    search(objectives, Distance(), rank, offer)
    return found


def test_model_is_the_taylor_series_of_the_frontier():
    # A wide gap at the cut, so that finite differences see the series and not an avoided crossing.
    retain, forget = power_law(24, 1, 0), power_law(24, 1, 1)
    objective, angle, rank = Objective(retain, forget, torch.zeros(24).double()), 0.6, 9
    model = model_of(retain, forget, rank, angle)
    frontier = Frontier(objective)

    def error(t):
        point = frontier.at(angle + t, rank)
        a, b = model.shares(0, t)
        return max(abs(a - point.retain_kept), abs(b - point.forget_kept))

    assert error(0) < 1e-9
    # The derivative of a second-order series is of first order: halving t divides its error by four.
    assert error(2e-3) < error(4e-3) / 3.5
    assert error(4e-3) < 1e-4


def test_the_predicted_space_is_right_to_second_order():
    retain, forget = power_law(24, 1, 0), power_law(24, 1, 1)
    angle, rank = 0.6, 9
    model = model_of(retain, forget, rank, angle)
    frontier = Frontier(Objective(retain, forget, torch.zeros(24).double()))

    def distance(t):
        found, true = torch.linalg.qr(basis_of(model, t)).Q, frontier.at(angle + t, rank).basis
        return float((found @ found.T - true @ true.T).norm())

    assert distance(0) < 1e-9
    assert distance(2e-3) < distance(4e-3) / 3.5  # to first order only, up to there
    assert distance(4e-3) < 0.1 * float((basis_of(model, 4e-3) - basis_of(model, 0)).norm())
    assert distance(0.0125) < distance(0.025) / 6


@pytest.mark.parametrize("root", [0.0, 1e-9, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("shape", [lambda x: -x, lambda x: -(x**3), lambda x: -math.atan(1e6 * x), math.expm1])
def test_root(shape, root):
    falling = shape if shape(1.0) < 0 else lambda x: -shape(x)
    assert newton._root(lambda x: falling(x - root), 0.0, 1.0) == pytest.approx(root, abs=1e-4)


@pytest.mark.parametrize("offset", [-0.5, 1.5])
def test_root_outside_is_the_nearer_end(offset):
    assert newton._root(lambda x: offset - x, 0.0, 1.0) == min(max(offset, 0.0), 1.0)


@pytest.mark.parametrize(("dim", "rank", "powers"), [(192, 60, (1, 1)), (256, 20, (0.5, 0.5)), (256, 100, (2, 1.5))])
def test_two_solves_prove_an_optimum(dim, rank, powers):
    objective = Objective(*(power_law(dim, p, seed) for seed, p in enumerate(powers)), torch.zeros(dim).double())
    (found,) = offers([objective], rank)
    points = [point for _, point in found[:2] if point is not None]
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
    (steps,) = offers([objective], 40)
    assert 1 <= len(steps) <= 3
    for angle, point in steps:
        assert 0 <= angle <= math.pi / 2
        assert point is None or point.support >= frontier.at(angle, 40).support - 1e-13


@pytest.mark.parametrize("live", [slice(None), slice(0, 1), slice(0, 40)])
def test_where_the_matrix_is_zero_the_angles_are_numbers(live):
    # All features white and alike, or of the thinned problems' features only the first alive: M(pi / 4) is zero.
    seen = torch.ones(160).double()
    seen[::2] = 0
    seen[live] = 1
    alike = torch.diag(seen / seen.sum())
    objective = Objective(alike, alike.clone(), torch.zeros(160).double())
    (steps,) = offers([objective], 40)
    for angle, point in steps:
        assert 0 <= angle <= math.pi / 2
        assert point is None or point.basis.isfinite().all()


def test_a_small_problem_is_left_to_float64():
    objective = Objective(power_law(24, 1, 0), power_law(24, 1, 1), torch.zeros(24).double())
    assert offers([objective], 9) == [[]]


def test_many_are_offered_what_each_alone_is():
    zero = torch.zeros(160).double()
    objectives = [Objective(power_law(160, 1, 2 * i), power_law(160, 0.7, 2 * i + 1), zero) for i in range(5)]
    objectives[2].retain[::8] = objectives[2].retain[:, ::8] = 0  # nothing to see for the thinned problems
    enough = lambda point: point is not None  # noqa: E731
    together = offers(objectives, 40, enough)
    for objective, many in zip(objectives, together, strict=True):
        (alone,) = offers([objective], 40, enough)
        assert len(alone) == len(many)
        assert [angle for angle, _ in alone] == pytest.approx([angle for angle, _ in many], abs=1e-3)


def test_a_satisfied_problem_is_left_alone():
    zero = torch.zeros(160).double()
    objectives = [Objective(power_law(160, 1, 2 * i), power_law(160, 1, 2 * i + 1), zero) for i in range(3)]
    calls = []
    search(objectives, Distance(), 40, lambda i, angle, point: calls.append(i) or i == 1)
    assert calls.count(1) == 1
    assert calls.count(0) > 1
