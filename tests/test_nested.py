"""A projection inside another one: nested subspaces, and the optimum among them."""

import pytest
import torch
from conftest import normal
from problems import make_problem

import loft_fast as loft
from loft_fast import Continual, GroupedMoments, InputError, Moments
from loft_fast.nested import seen_through, solve_within

F64 = torch.float64


def groups(d=16, exact=None):
    y = torch.arange(3000) % 6
    x = normal(3000, d, seed=6) + 4 * torch.eye(6, d, dtype=F64)[y]
    return GroupedMoments(d, exact=exact).update(x, y)


def head(d=16):
    layer = torch.nn.Linear(d, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6, d))
        layer.bias.fill_(-2.0)
    return layer


def outer(moments, rank=9, about="retain"):
    return loft.solve(moments.without([0]), moments.select([0]), rank, about)


def test_moments_are_those_of_the_projected_coordinates():
    x = normal(400, 16, mean=2.0)
    projection = outer(groups())
    seen = seen_through(projection, "x", Moments(16).update(x))
    expected = Moments(9).update((x - projection.center) @ projection.basis)
    assert seen.count == 400
    assert torch.allclose(seen.mean, expected.mean, atol=1e-12)
    assert torch.allclose(seen.scatter, expected.scatter, atol=1e-9)
    assert torch.equal(seen.scatter, seen.scatter.T)
    assert seen_through(projection, "x", Moments(16)).update(x[:, :9]).count == 400


@pytest.mark.parametrize("about", ["retain", "own"])
@pytest.mark.parametrize("options", [{"rank": 5}, {"angle": 0.5}, {"min_retain_kept": 0.8}])
def test_inside_and_then_projected_again_as_both_would(about, options):
    moments = groups()
    first = outer(moments, about=about)
    second = solve_within(first, moments.without([0, 1]), moments.select([1]), about=about, **options)
    assert second.rank < first.rank
    columns = second.basis.T @ second.basis
    assert torch.allclose(columns, torch.eye(second.rank, dtype=F64), atol=1e-12)
    assert torch.allclose(first.matrix() @ second.basis, second.basis, atol=1e-12)
    # One projection does what the two would: what comes out lies in the outer subspace and is left alone by it.
    z = normal(50, 16, seed=7)
    assert torch.allclose(first(second(z)), second(z), atol=1e-10)
    assert torch.allclose(second(first(z)), second(z), atol=1e-10)
    assert second.certificate.why.endswith("within the last projection")
    assert second.certificate.relative_gap <= 1e-6


def test_the_optimum_among_the_subspaces_of_the_outer_one():
    problem = make_problem("power law", 24)
    retain, forget = problem.moments
    first = loft.solve(retain, forget, 12)
    inside = solve_within(first, retain, forget, 6)
    loss = inside.certificate.loss
    a, b = (seen_through(first, "part", part) for part in (retain, forget))
    assert loss == loft.solve(a, b, 6).certificate.loss
    generator = torch.Generator().manual_seed(0)
    A = a.covariance(0) / a.covariance(0).trace()
    B = b.second_moment(a.mean) / b.second_moment(a.mean).trace()
    for _ in range(200):
        U = torch.linalg.qr(torch.randn(12, 6, generator=generator, dtype=F64)).Q
        assert (1 - torch.trace(U.T @ A @ U)) ** 2 + torch.trace(U.T @ B @ U) ** 2 >= loss - 1e-9


def accuracy(projection, wanted):
    y = torch.arange(3000) % 6
    x = normal(3000, 16, seed=6) + 4 * torch.eye(6, 16, dtype=F64)[y]
    rows = torch.isin(y, torch.tensor(wanted))
    with torch.no_grad():
        return float((head()(projection(x[rows]).float()).argmax(1) == y[rows]).double().mean())


@pytest.mark.parametrize("exact", [None, True])
def test_request_after_request_without_what_was_forgotten(exact):
    continual = Continual(groups(exact=exact), keep_forgotten=False, head=head())
    for keys in ([0], [1], [2]):
        projection = continual.forget(keys)
    assert continual.forgotten.count == 0
    assert len(continual.forgotten) == 0
    assert accuracy(projection, [0, 1, 2]) <= 0.02
    assert accuracy(projection, [3, 4, 5]) >= 0.95
    assert continual.forget([1]) is projection
    with pytest.raises(InputError, match="no group 9"):
        continual.forget([9])


def test_the_first_request_is_solved_as_ever():
    one, other = Continual(groups(), keep_forgotten=False, rank=7), Continual(groups(), rank=7)
    assert torch.equal(one.forget([2]).basis, other.forget([2]).basis)
    assert [one.forget([3]).rank, one.forget([4]).rank] == [6, 5]
    assert [other.forget([3]).rank, other.forget([4]).rank] == [7, 7]


@pytest.mark.parametrize("options", [{"rank": 2}, {"angle": 1.5}])
def test_no_request_fails_for_want_of_dimensions(options):
    continual = Continual(groups(), keep_forgotten=False, **options)
    ranks = [continual.forget([key]).rank for key in range(5)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 1
    assert continual.retain.keys() == [5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, groups(), groups()), r"^outer: got int"),
        ((outer(groups()), groups(8), groups()), r"^retain: got dim 8, expected 16 as in the projection"),
        ((outer(groups()), groups(), 3), r"^forget: got int, expected Moments or GroupedMoments"),
        ((outer(groups()), groups(), groups(), 9), r"^rank: got 9"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(InputError, match=message):
        solve_within(*arguments)


def test_a_head_of_another_width():
    moments = groups()
    with pytest.raises(InputError, match=r"^head: .* expected a linear head reading 16 features"):
        solve_within(outer(moments), moments.without([0, 1]), moments.select([1]), head=head(8))
