"""Released moments: just the noise that was promised, where it was promised."""

import math

import numpy as np
import pytest
import torch
from conftest import normal, state
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import loft_fast as loft
from loft_fast import InputError, Moments
from loft_fast.release import _noisy_products, noise_scale, release

F64 = torch.float64


def bounded(n, d, norm=1.0, seed=0):
    x = normal(n, d, seed=seed)
    return x * (norm / x.norm(dim=1, keepdim=True).clamp_min(norm))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- how much noise ----


def needed_delta(sigma, epsilon):
    """Theorem 8 of Balle and Wang, for a sensitivity of one."""
    near, far = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
    return stats.norm.cdf(near) - math.exp(epsilon) * stats.norm.cdf(far)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 1.0, 3.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1e-3, 0.1])
def test_just_enough(epsilon, delta):
    sigma = noise_scale(1.0, epsilon, delta)
    assert needed_delta(sigma, epsilon) <= delta * (1 + 1e-6)
    assert needed_delta(0.999 * sigma, epsilon) > delta
    assert noise_scale(7.0, epsilon, delta) == pytest.approx(7 * sigma)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 0.99])
@pytest.mark.parametrize("delta", [1e-9, 1e-6, 1e-3])
def test_less_than_the_classical_bound(epsilon, delta):
    assert noise_scale(1.0, epsilon, delta) < math.sqrt(2 * math.log(1.25 / delta)) / epsilon


# ---- what one row can do ----


def change(row, norm):
    """By how much one row changes what gets noise: the upper triangle of the sum of a a^T."""
    a = np.append(row, norm)
    return np.linalg.norm(np.outer(a, a)[np.triu_indices(len(a))])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.floats(0.1, 9.0), st.floats(0, 1))
def test_no_row_changes_more_than_the_sensitivity(row, norm, length):
    row = np.array(row)
    row *= length * norm / max(np.linalg.norm(row), 1e-300)
    assert change(row, norm) <= 3**0.5 * norm**2 * (1 + 1e-9)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_some_row_changes_as_much(d):
    assert change(2.0 * np.eye(d)[0], 2.0) == pytest.approx(3**0.5 * 4)


def test_the_noise_has_the_size_that_was_asked_for():
    moments, sigma = Moments(3).update(bounded(50, 3)), 2.5
    clean = _noisy_products(moments, 1.0, 0.0, seeded())
    x = torch.cat([bounded(50, 3), torch.ones(50, 1, dtype=F64)], 1)
    assert torch.allclose(clean, x.T @ x)
    generator = seeded()
    noise = torch.stack([_noisy_products(moments, 1.0, sigma, generator) - clean for _ in range(3000)])
    assert torch.equal(noise, noise.mT)
    rows, columns = torch.triu_indices(4, 4)
    upper = noise[:, rows, columns]
    assert float((upper.std(0) / sigma - 1).abs().max()) < 0.06
    assert float(upper.mean(0).abs().max()) < 0.2
    correlation = torch.corrcoef(upper.T) - torch.eye(10)
    assert float(correlation.abs().max()) < 0.08


@pytest.mark.parametrize(("share", "private"), [(1.0, True), (0.4, False)])
def test_an_attack_on_one_row_succeeds_no_more_often_than_it_may(share, private):
    # The best test between with and without the worst row, of what is published; with too little noise it wins.
    epsilon, delta, tries = 1.0, 1e-2, 15000
    sigma = share * noise_scale(3**0.5, epsilon, delta)
    without = Moments(2).update(torch.zeros(5, 2))
    row = torch.tensor([[1.0, 0.0]])
    with_it = without.copy().update(row)
    a = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    direction = torch.outer(a, a).triu()
    generator = seeded(1)
    scores = [
        torch.stack([(_noisy_products(part, 1.0, sigma, generator) * direction).sum() for _ in range(tries)])
        for part in (without, with_it)
    ]
    excess = max(
        float((scores[1] > t).double().mean()) - math.exp(epsilon) * float((scores[0] > t).double().mean())
        for t in torch.linspace(float(scores[0].min()), float(scores[1].max()), 60)
    )
    assert (excess <= delta + 0.012) == private


# ---- what comes out ----


def test_released_moments_are_moments():
    moments = Moments(6, exact=1.0).update(bounded(500, 6))
    moments.site = "fc:input"
    before = state(moments)
    released = release(moments, 1.0, 1.0, 1e-5, seeded())
    assert state(moments) == before
    assert released.exact is None
    assert released.site == "fc:input"
    assert torch.equal(released.scatter, released.scatter.T)
    assert float(torch.linalg.eigvalsh(released.scatter)[0]) >= -1e-9 * float(released.scatter.trace())
    assert released.count != 500
    assert abs(released.count - 500) < 60
    assert state(release(moments, 1.0, 1.0, 1e-5, seeded())) == state(released)
    assert state(release(moments, 1.0, 1.0, 1e-5)) != state(release(moments, 1.0, 1.0, 1e-5))
    assert (released + released).count == 2 * released.count


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("exact", [None, 1.0])
def test_rows_of_just_that_norm(dtype, exact):
    # Rounding makes some of them longer, by float32 and by the steps of exact moments: that is allowed for.
    x = torch.nn.functional.normalize(normal(400, 64)).to(dtype)
    moments = Moments(64, exact=exact).update(x)
    assert float(moments.second_moment(torch.zeros(64)).trace()) != 1
    assert release(moments, 1.0, 1.0, 1e-6).dim == 64


def test_many_rows_drown_the_noise():
    x = bounded(200_000, 16) * torch.linspace(1, 0.1, 16, dtype=F64)
    x = x * 0.5 + torch.tensor([0.1] * 16)
    released = release(Moments(16).update(x), 1.0, 8.0, 1e-6, seeded())
    assert released.count == pytest.approx(200_000, rel=1e-3)
    assert torch.allclose(released.mean, x.mean(0), atol=1e-3)
    true, found = (torch.linalg.eigh(matrix).eigenvectors[:, -4:] for matrix in (torch.cov(x.T), released.covariance()))
    assert float((true.T @ found).square().sum()) / 4 > 0.99


def test_few_rows_are_lost_in_it():
    released = release(Moments(16).update(bounded(20, 16)), 1.0, 0.1, 1e-6, seeded())
    assert released.count >= 1
    assert bool(torch.isfinite(released.mean).all() and torch.isfinite(released.scatter).all())
    retain = release(Moments(16).update(bounded(2000, 16)), 1.0, 1.0, 1e-6, seeded())
    assert loft.solve(retain, released, rank=4).rank == 4


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("moments", 1.0, 1.0, 1e-6), r"^moments: got str, expected Moments"),
        ((Moments(3), 1.0, 1.0, 1e-6), r"^moments: got no rows"),
        ((0.0, 1.0, 1e-6), r"^norm: got 0.0, expected a number between 0 and"),
        ((float("nan"), 1.0, 1e-6), r"^norm: got nan"),
        ((1.0, 0.0, 1e-6), r"^epsilon: got 0.0"),
        ((1.0, -1.0, 1e-6), r"^epsilon: got -1.0"),
        ((1.0, "1", 1e-6), r"^epsilon: got '1'"),
        ((1.0, 1.0, 0.0), r"^delta: got 0.0, expected a number between 0 and 1"),
        ((1.0, 1.0, 1.0), r"^delta: got 1.0"),
        ((1.0, 1.0, True), r"^delta: got True"),
        ((0.5, 1.0, 1e-6), r"^norm: got 0.5, but the rows have norms of 1 in the mean square"),
    ],
)
def test_refusals(arguments, message):
    if len(arguments) == 3:
        arguments = (Moments(5).update(bounded(30, 5)), *arguments)
    with pytest.raises(InputError, match=message):
        release(*arguments)
