"""The search by matrix products: it may fail without harm, and where it does not, it ends at the same optimum."""

import math

import pytest
import torch
from problems import KINDS, make_problem
from test_newton import power_law

import loft_fast as loft
from loft_fast import purified
from loft_fast.goals import Distance
from loft_fast.objective import Objective
from loft_fast.purified import _Path


@pytest.fixture
def products(monkeypatch):
    """Solve by products, whatever the table says; returns how many problems each call of the projector had."""
    calls = []
    project = purified.topk_projector

    def spy(matrix, rank, window=None):
        calls.append((len(matrix), window.widenings if window else 0))
        return project(matrix, rank, window)

    monkeypatch.setattr(purified, "pays", lambda objective: True)
    monkeypatch.setattr(purified, "topk_projector", spy)
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(4))
def test_the_optimum_is_the_same(monkeypatch, products, kind, index):
    problem = make_problem(kind, 24, index)
    retain, forget = problem.moments
    ours = loft.solve(retain, forget, problem.rank)
    assert products
    monkeypatch.setattr(purified, "pays", lambda objective: False)
    theirs = loft.solve(retain, forget, problem.rank)
    assert ours.certificate.relative_gap <= 1e-6
    assert abs(ours.certificate.loss - theirs.certificate.loss) <= 2e-6 * max(theirs.certificate.loss, 1e-9)


def test_a_proof_takes_few_evaluations_and_the_later_ones_start_warm(products):
    objective = Objective(power_law(96, 1, 0), power_law(96, 1, 1), torch.zeros(96).double())
    found = []
    purified.search([objective], Distance(), 30, lambda i, angle, point: bool(found.append((angle, point))))
    assert [point for _, point in found[:-1]] == [None] * (len(found) - 1)
    angle, point = found[-1]
    assert point is not None
    assert len(found) == len(products)
    assert abs(math.atan2(point.forget_kept, 1 - point.retain_kept) - angle) < 1e-3
    assert len(products) <= 6
    assert products[0] == products[1] == (1, 0)
    assert all(widenings > 0 for _, widenings in products[2:])


def test_a_basis_is_as_orthonormal_as_any(products):
    # Spanned by the projections of random vectors, of which some are nearly alike: a condition of some hundreds.
    objective = Objective(power_law(256, 1, 0), power_law(256, 1, 1), torch.zeros(256).double())
    points = []
    purified.search([objective], Distance(), 100, lambda i, angle, point: bool(points.append(point)))
    basis = points[-1].basis
    assert float((basis.T @ basis - torch.eye(100).double()).abs().max()) < 1e-13


def test_problems_of_a_batch_are_searched_together(products):
    retain, forget = [], []
    for seed in range(3):
        for sets, power in ((retain, 1.0), (forget, 0.7)):
            matrix = power_law(20, power, 2 * seed + (power < 1))
            rows = torch.linalg.cholesky(matrix).T * 20**0.5
            sets.append(loft.Moments(20).update(torch.cat([rows, -rows])))
    together = loft.solve_batch(retain, forget, 6)
    assert max(many for many, _ in products) == 3
    for projection, keep, drop in zip(together, retain, forget, strict=True):
        alone = loft.solve(keep, drop, 6)
        assert abs(projection.certificate.loss - alone.certificate.loss) <= 2e-6 * alone.certificate.loss


def test_a_search_that_finds_nothing_is_made_up_for(monkeypatch, products):
    monkeypatch.setattr(purified, "_MAX_STEPS", 1)
    retain, forget = make_problem("power law", 24).moments
    assert loft.solve(retain, forget, 5).certificate.relative_gap <= 1e-6


def test_products_do_not_pay_unless_measured():
    objective = Objective(power_law(4, 1, 0), power_law(4, 1, 1), torch.zeros(4).double())
    assert not purified.pays(objective)


def test_no_window_before_the_level_has_moved():
    path = _Path(0.5)
    assert path.reach is None
    path.add(0.1, 1e-3, 0.4)
    path.step()
    assert path.reach is None
    path.add(0.01, 2e-3, 0.4)
    path.step()
    low, high = path.reach
    assert low < 2e-3 < high
