import numpy as np
import pytest
import torch
from problems import KINDS, make_problem

from loft_fast import GroupedMoments, InputError, Moments
from loft_fast.objective import build_objective, pooled


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x):
    return Moments(x.shape[-1]).update(x)


@pytest.mark.parametrize("about", ["retain", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_those_of_the_rows(kind, about):
    problem = make_problem(kind, 12)
    objective = build_objective(*problem.moments, about)
    A, B = problem.matrices(about)
    np.testing.assert_allclose(objective.retain.numpy(), A, atol=1e-14)
    np.testing.assert_allclose(objective.forget.numpy(), B, atol=1e-14)
    assert objective.retain.dtype == objective.forget.dtype == torch.float64
    assert torch.equal(objective.retain, objective.retain.T)
    assert torch.equal(objective.forget, objective.forget.T)
    assert objective.dim == 12


def test_forget_term_sees_where_the_rows_sit():
    retain, forget = rows(50, 4), 0.01 * rows(20, 4, seed=1) + torch.tensor([0, 0, 5.0, 0])
    affine, own = (build_objective(moments(retain), moments(forget), about).forget for about in ("retain", "own"))
    assert affine[2, 2] > 0.99
    assert own[2, 2] < 0.6


def test_center_stays_where_the_variant_says():
    retain, forget = moments(rows(50, 4) + 3), moments(rows(20, 4, seed=1))
    assert torch.equal(build_objective(retain, forget).center, retain.mean)
    assert not build_objective(retain, forget, "own").center.any()


@pytest.mark.parametrize("about", ["retain", "own"])
@pytest.mark.parametrize("shift", [10.0, 1e6])
def test_a_common_shift_or_scale_changes_nothing(about, shift):
    retain, forget = rows(50, 6), rows(20, 6, seed=1) + 1
    plain = build_objective(moments(retain), moments(forget), about)
    moved = build_objective(moments(1e-3 * retain + shift), moments(1e-3 * forget + shift), about)
    for name in ("retain", "forget"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=0, atol=1e-13 * shift * 1e3)


def test_one_forget_row_is_enough_when_seen_from_retain():
    retain, row = rows(50, 4), torch.tensor([[3.0, 0, 4, 0]], dtype=torch.float64)
    objective = build_objective(moments(retain), moments(row))
    direction = (row[0] - retain.mean(0)) / (row[0] - retain.mean(0)).norm()
    torch.testing.assert_close(objective.forget, torch.outer(direction, direction))


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 1e8 / 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_rows_have_no_variance_whatever_they_are(value, dtype):
    constant = moments(torch.full((1000, 4), value, dtype=dtype))
    with pytest.raises(InputError, match=r"retain: 1000 rows of zero variance, expected features that vary"):
        build_objective(constant, moments(rows(20, 4)))
    with pytest.raises(InputError, match=r"forget: 1000 rows of zero variance"):
        build_objective(moments(rows(20, 4)), constant, "own")


@pytest.mark.parametrize("value", [1.0, 1e8 / 3])
def test_rows_that_differ_by_rounding_only_have_no_variance(value):
    steps = torch.randint(-2, 3, (1000, 4), generator=torch.Generator().manual_seed(0)).double()
    constant = moments(value * (1 + 2.0**-52 * steps))
    assert constant.scatter.trace() > 0
    with pytest.raises(InputError, match="retain: 1000 rows of zero variance"):
        build_objective(constant, moments(rows(20, 4)))


@pytest.mark.parametrize("scale", [1e-100, 1e-3, 1e100])
def test_size_of_the_features_does_not_matter(scale):
    plain, scaled = (build_objective(moments(s * rows(50, 4)), moments(s * rows(20, 4, seed=1))) for s in (1, scale))
    torch.testing.assert_close(scaled.retain, plain.retain)
    torch.testing.assert_close(scaled.forget, plain.forget)


def test_pooled_groups_are_all_rows():
    x = rows(30, 4)
    grouped = GroupedMoments(4).update(x, torch.arange(30) % 3)
    whole = moments(x)
    together = pooled("retain", grouped)
    assert together.count == 30
    torch.testing.assert_close(together.scatter, whole.scatter)
    assert pooled("retain", whole) is whole
    with pytest.raises(InputError, match="forget: got list, expected Moments or GroupedMoments"):
        pooled("forget", [whole])


def left_of(scale, exact=None):
    """Moments of 400 rows, out of which 2000 rows so many times their size were removed; and the 400 rows."""
    large, small = (scale * rows(2000, 20)).float(), rows(400, 20, seed=1).float()
    order = torch.randperm(2400, generator=torch.Generator().manual_seed(0))
    return Moments(20, exact=exact).update(torch.cat([large, small])[order]).remove(large), small


@pytest.mark.parametrize("name", ["retain", "forget"])
@pytest.mark.parametrize("scale", [300, 1e4])
def test_moments_that_a_removal_left_in_the_rounding_are_refused(name, scale):
    parts = {"retain": moments(rows(50, 20)), "forget": moments(rows(50, 20)), name: left_of(scale)[0]}
    with pytest.raises(InputError, match=rf"{name}: what was removed varied so much more than the 400 rows left"):
        build_objective(**parts)


@pytest.mark.parametrize(("scale", "exact", "error"), [(1, None, 1e-6), (20, None, 1e-3), (300, True, 3e-2)])
def test_moments_that_outlive_a_removal_are_those_of_the_rows_left(scale, exact, error):
    left, small = left_of(scale, exact)
    found, want = (build_objective(one, moments(rows(50, 20))).retain for one in (left, moments(small)))
    assert float((found - want).norm()) < error * float(want.norm())
