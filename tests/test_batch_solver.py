"""Many problems at once: the same optima, with the same certificates, as one after another."""

import pytest
import torch
from conftest import normal

from loft_fast import GroupedMoments, InputError, Moments, solve, solve_batch


def problems(count, dim, seed=0):
    """Retain and forget moments with a power law in their spectra."""
    scale = torch.arange(1, dim + 1).double() ** -0.5
    sets = [[], []]
    for i in range(count):
        for j, part in enumerate(sets):
            turn = torch.linalg.qr(normal(dim, dim, seed=seed + 97 * i + j)).Q
            part.append(Moments(dim).update(normal(3 * dim, dim, seed=seed + 2 * i + j) * scale @ turn + 0.1 * j))
    return sets


@pytest.mark.parametrize(("count", "dim", "rank"), [(1, 40, 10), (7, 6, 2), (20, 40, 39), (5, 130, 1), (9, 130, 32)])
@pytest.mark.parametrize("about", ["retain", "own"])
def test_same_optima_as_one_by_one(count, dim, rank, about, threads):
    retain, forget = problems(count, dim)
    together = solve_batch(retain, forget, rank, about)
    assert torch.get_num_threads() == threads
    assert len(together) == count
    for keep, drop, got in zip(retain, forget, together, strict=True):
        alone = solve(keep, drop, rank, about)
        assert got.basis.shape == (dim, rank)
        assert torch.equal(got.center, alone.center)
        assert got.certificate.relative_gap <= 1e-6
        assert got.certificate.loss == pytest.approx(alone.certificate.loss, rel=2e-6)
        assert got.certificate.lower_bound <= alone.certificate.loss * (1 + 1e-12)
        assert (got.certificate.goal, got.certificate.why) == (alone.certificate.goal, alone.certificate.why)


def test_groups_are_pooled_and_sites_kept():
    x = normal(200, 12)
    retain = GroupedMoments(12).update(x[:150], torch.arange(150) % 3)
    retain.site = "fc:input"
    (projection,) = solve_batch([retain], [Moments(12).update(3 * x[150:].flip(1))], 4)
    alone = solve(retain, Moments(12).update(3 * x[150:].flip(1)), 4)
    assert projection.site == "fc:input"
    assert projection.certificate.loss == pytest.approx(alone.certificate.loss, rel=1e-6)


def test_no_problems_have_no_solutions():
    assert solve_batch([], [], 3) == []


def test_made_in_inference_mode_used_outside():
    retain, forget = problems(2, 8)
    with torch.inference_mode():
        projection, _ = solve_batch(retain, forget, 3)
    assert projection(torch.ones(2, 8, requires_grad=True)).requires_grad


FULL, OTHER, EMPTY = (Moments(d).update(normal(n, d)) for d, n in ((5, 9), (6, 9), (5, 0)))


@pytest.mark.parametrize(
    ("retain", "forget", "rank", "message"),
    [
        (FULL, [FULL], 2, "retain: got Moments, expected a list of moments, one per problem"),
        ([FULL], [FULL, FULL], 2, "forget: got 2 sets, expected 1, as many as in retain"),
        ([FULL, "x"], [FULL, FULL], 2, "retain: got str for problem 1, expected Moments or GroupedMoments"),
        ([FULL], [OTHER], 2, r"forget: got dim 6 on cpu for problem 0, expected 5 on cpu, as in retain\[0\]"),
        ([FULL, FULL], [FULL, EMPTY], 2, "problem 1: forget: the set is empty"),
        ([FULL], [FULL], 5, "rank: got 5, expected an integer in"),
        ([FULL], [FULL], None, "rank: got None, expected an integer in"),
        ([FULL], [FULL], 2.0, "rank: got 2.0, expected an integer in"),
    ],
)
def test_wrong_arguments(retain, forget, rank, message, threads):
    with pytest.raises(InputError, match=f"^{message}"):
        solve_batch(retain, forget, rank)
    assert torch.get_num_threads() == threads


def test_wrong_about_and_tolerance():
    with pytest.raises(InputError, match=r"^problem 0: about: got 'mine'"):
        solve_batch([FULL], [FULL], 2, about="mine")
    with pytest.raises(InputError, match=r"^tolerance: got 0"):
        solve_batch([FULL], [FULL], 2, tolerance=0)
