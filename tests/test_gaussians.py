import math

import pytest
import torch

from loft_fast import GroupedMoments, gaussians, ops
from loft_fast.gaussians import Gaussians, features_are_cheaper


@pytest.fixture(params=["logits", "features"])
def drawn(request, monkeypatch):
    """What is drawn, whatever would cost less."""
    monkeypatch.setattr(gaussians, "features_are_cheaper", lambda *sizes: request.param == "features")
    return request.param


def problem(classes=5, dim=12, mean=0.0, per_class=400, seed=0):
    """Rows around as many means, each group with a covariance of its own; labels; a head that is right often."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.7 * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    mixing = torch.randn(classes, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    mixing *= torch.linspace(0.1, 2, dim, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 1, dim, generator=generator, dtype=torch.float64)
    rows = means[labels] + (noise @ mixing[labels]).squeeze(1) + mean
    bias = -(means * (means / 2 + mean)).sum(1)
    return rows, labels, means, bias


def percent(rows, labels, weight, bias):
    """Of the rows that a head gets right."""
    return 100 * float(((rows @ weight.T + bias).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_accuracies_are_those_of_rows_drawn_from_the_groups(drawn, mean):
    rows, labels, weight, bias = problem(mean=mean)
    tilted = bias + torch.tensor([3.0, 0.0, -2.0, 0.0, 1.0])
    groups = GroupedMoments(rows.shape[1]).update(rows, labels)
    found = Gaussians(groups, 5).accuracies(weight, [bias + 1e7, tilted])  # what all logits have in common is nothing
    fresh, labels, _, _ = problem(mean=mean, per_class=20000)
    right = [percent(fresh, labels, weight, one) for one in (bias, tilted)]
    assert 60 < right[1] < right[0] < 99
    assert found == pytest.approx(right, abs=1.5)


@pytest.mark.parametrize("scale", [2.0**-200, 2.0**70, 2.0**200])
def test_the_size_of_the_features_does_not_matter(drawn, scale):
    rows, labels, weight, bias = problem()
    plain, scaled = (GroupedMoments(rows.shape[1]).update(size * rows, labels) for size in (1.0, scale))
    found = Gaussians(scaled, 5).accuracies(weight, [scale * bias])
    assert found == pytest.approx(Gaussians(plain, 5).accuracies(weight, [bias]), abs=0.1)


def test_only_the_outputs_that_are_open_are_chosen(drawn):
    rows, labels, weight, bias = problem()
    groups = GroupedMoments(rows.shape[1]).update(rows, labels)
    closed = bias.clone()
    closed[[1, 3]] = -torch.inf
    before, after = Gaussians(groups, 5).accuracies(weight, [bias, closed])
    alone = [Gaussians(groups.select([key]), 5).accuracies(weight, [closed])[0] for key in range(5)]
    assert alone[1] == alone[3] == 0
    assert after == pytest.approx(sum(alone) / 5, abs=1.5)
    assert after < before


def test_groups_count_by_their_rows(drawn):
    groups = GroupedMoments(1)
    groups.update(torch.full((30, 1), 5.0), torch.zeros(30, dtype=torch.int64))
    groups.update(torch.full((10, 1), 5.0), torch.ones(10, dtype=torch.int64))
    weight, bias = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert Gaussians(groups, 2).accuracies(weight, [bias]) == [75]  # all rows are taken for group 0


@pytest.mark.parametrize("scale", [1.0, 2.0**-200, 2.0**200])
def test_a_group_of_one_row_is_where_it_is(drawn, scale):
    _, _, weight, bias = problem()
    one = GroupedMoments(12).update(scale * weight[2:3].double(), torch.tensor([2]))
    assert Gaussians(one, 5).accuracies(weight, [scale * bias]) == [100]


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_a_root_of_a_covariance_of_any_rank(rank):
    rows = torch.randn(rank, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = rows.T @ rows
    root = gaussians._root(covariance)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.double() @ root.double().T, covariance, rtol=1e-4, atol=1e-4)


def test_a_root_where_one_direction_has_all_the_variance():
    """There float32 takes rounding for negative variance."""
    direction = torch.randn(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = direction @ direction.T
    root = gaussians._root(covariance).double()
    assert (root @ root.T - covariance).norm() < 1e-4 * covariance.norm()


def test_a_root_of_what_rounding_made_indefinite():
    """Of the variances alone, none of them below zero."""
    covariance = torch.tensor([[4.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, -1e-3]], dtype=torch.float64)
    wanted = torch.tensor([2.0, 1.0, 0.0]).diag()
    torch.testing.assert_close(gaussians._root(covariance), wanted, rtol=1e-4, atol=1e-4)


def test_the_way_that_costs_less_is_taken():
    """Many outputs make covariances of logits dear, many dimensions those of features."""
    assert features_are_cheaper(48, 170, 768, 200)
    assert features_are_cheaper(48, 170, 2048, 1000)
    assert features_are_cheaper(48, 170, 64, 62)
    assert not features_are_cheaper(10, 819, 2048, 10)
    assert not features_are_cheaper(9, 910, 64, 10)


def test_many_groups_are_represented_by_some():
    classes = 150
    rows, labels, weight, bias = problem(classes=classes, dim=20, per_class=40)
    some = Gaussians(GroupedMoments(20).update(rows, labels), classes)
    assert len(some.labels) == math.ceil(classes / math.ceil(classes / gaussians._GROUPS))
    wanted = percent(rows, labels, weight, bias)
    assert wanted > 20
    assert some.accuracies(weight, [bias]) == pytest.approx([wanted], abs=5)


def test_logits_do_not_hang_on_the_signs_of_eigenvectors(monkeypatch):
    """They differ from head to head at random; other draws for the next head would pass for another accuracy."""
    rows, labels, weight, bias = problem()
    some = Gaussians(GroupedMoments(rows.shape[1]).update(rows, labels), 5)
    assert some.features is None
    wanted = some.accuracies(weight, [bias])
    eigh, seen = ops.eigh, []

    def others(matrix):
        values, vectors = eigh(matrix)
        signs = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(len(seen))) * 2 - 1
        seen.append(signs)
        return values, vectors * signs.unsqueeze(1)

    monkeypatch.setattr(ops, "eigh", others)
    for _ in range(5):
        assert some.accuracies(weight, [bias]) == pytest.approx(wanted, abs=0.02)
    assert len(seen) == 5


def test_defaults_of_the_caller_change_nothing(drawn):
    rows, labels, means, bias = problem()
    groups = GroupedMoments(12).update(rows, labels)
    want = Gaussians(groups, 5).accuracies(means, [bias])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        got = Gaussians(groups, 5).accuracies(means, [bias])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert got == want
