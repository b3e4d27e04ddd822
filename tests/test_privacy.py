"""Released moments: no less noise than privacy needs, no more than the formula asks for, and moments nonetheless."""

import math
import secrets

import mpmath
import pytest
import torch
from conftest import normal, state
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import loft_fast as loft
from loft_fast import InputError, Moments, privacy
from loft_fast.privacy import _noisy_products, _normal, noise_scale, release

F64 = torch.float64
SENSITIVITY = 3**0.5
EPSILONS = [0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 50.0]
DELTAS = [1e-12, 1e-9, 1e-6, 1e-3, 0.1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bounded(n, d, norm=1.0, seed=0):
    """Rows of that norm at most, some of which have it."""
    x = normal(n, d, std=0.5, seed=seed)
    return norm * x / x.norm(dim=1, keepdim=True).clamp_min(1)


# ---- how much noise ----


def exact_delta(sigma, epsilon):
    """Theorem 8 of Balle and Wang for a sensitivity of one, in 150 digits."""
    with mpmath.workdps(150):
        sigma, epsilon = mpmath.mpf(sigma), mpmath.mpf(epsilon)
        near, far = 1 / (2 * sigma) - epsilon * sigma, 1 / (2 * sigma) + epsilon * sigma
        return mpmath.ncdf(near) - mpmath.exp(epsilon) * mpmath.ncdf(-far)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_the_least_noise_that_meets_the_formula(epsilon, delta):
    sigma = noise_scale(1.0, epsilon, delta)
    assert exact_delta(sigma, epsilon) <= delta
    assert exact_delta(0.999 * sigma, epsilon) > delta
    assert exact_delta((1 - 1e-8) * sigma, epsilon) > delta
    assert noise_scale(7.0, epsilon, delta) == pytest.approx(7 * sigma, rel=1e-15)


@pytest.mark.parametrize("epsilon", [1e-40, 1e-12, 1e-6, 1e4, 1e12, 1e40])
@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e-6, 0.5, 1 - 1e-9])
def test_never_too_little_noise_at_the_extremes(epsilon, delta):
    # Where doubles do not hold enough digits to find the least noise: rather more.
    assert exact_delta(noise_scale(1.0, epsilon, delta), epsilon) <= delta


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("delta", DELTAS)
def test_not_more_than_the_classical_bound(epsilon, delta):
    assert noise_scale(1.0, epsilon, delta) <= math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@given(st.floats(0.01, 50.0), st.floats(1e-12, 0.1))
def test_more_privacy_takes_more_noise(epsilon, delta):
    sigma = noise_scale(1.0, epsilon, delta)
    assert noise_scale(1.0, 1.1 * epsilon, delta) < sigma
    assert noise_scale(1.0, epsilon, 1.1 * delta) < sigma


# ---- what one row can do ----


def change(row, norm=1.0):
    """By how much one row changes the numbers that get noise, from the code itself."""
    one = Moments(len(row)).update(row[None])
    rows, columns = torch.triu_indices(len(row) + 1, len(row) + 1)
    return float(_noisy_products(one, norm, 0.0, seeded())[rows, columns].norm())


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.floats(0.01, 100.0), st.floats(0, 1))
def test_no_row_changes_more_than_the_sensitivity(row, norm, length):
    row = torch.tensor(row, dtype=F64)
    row *= length * norm / max(float(row.norm()), 1e-9)
    assert change(row, norm) <= SENSITIVITY * (1 + 1e-9)


def test_the_longest_change_found_by_search_is_the_sensitivity():
    # Climbing from random rows, over all rows of norm <= 1: ends at a single +-1, where the bound is reached.
    upper = torch.ones(5, 5, dtype=F64).triu()
    best = 0.0
    for seed in range(10):
        z = torch.randn(4, generator=seeded(seed), dtype=F64).requires_grad_()
        for _ in range(100):
            a = torch.cat([z / z.norm().clamp_min(1), torch.ones(1, dtype=F64)])
            size = (upper * torch.outer(a, a)).square().sum()
            (slope,) = torch.autograd.grad(size, z)
            z = (z + slope).detach().requires_grad_()
        best = max(best, float(size.detach()) ** 0.5)
    assert SENSITIVITY - 1e-3 < best <= SENSITIVITY * (1 + 1e-12)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_some_row_attains_the_sensitivity(d):
    assert change(-2.0 * torch.eye(d, dtype=F64)[0], 2.0) == pytest.approx(SENSITIVITY, rel=1e-12)


# ---- the noise ----


def test_noise_of_the_size_asked_for_on_every_entry():
    x, sigma, norm = bounded(40, 3, norm=2.0), 2.5, 2.0
    moments, generator = Moments(3).update(x), seeded()
    a = torch.cat([x / norm, torch.ones(40, 1, dtype=F64)], 1)
    noisy = torch.stack([_noisy_products(moments, norm, sigma, generator) for _ in range(4000)])
    assert torch.equal(noisy, noisy.mT)
    rows, columns = torch.triu_indices(4, 4)
    noise = (noisy - a.T @ a)[:, rows, columns] / sigma
    # Five standard errors.
    assert float((noise.std(0) - 1).abs().max()) < 5 / 8000**0.5
    assert float(noise.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((torch.corrcoef(noise.T) - torch.eye(10)).abs().max()) < 5 / 4000**0.5


def test_release_uses_that_noise(monkeypatch):
    used = []
    original = privacy._noisy_products
    monkeypatch.setattr(privacy, "_noisy_products", lambda *given: used.append(given[1:3]) or original(*given))
    release(Moments(3).update(bounded(40, 3)), 1.0, 0.7, 1e-5)
    ((norm, sigma),) = used
    assert 1.0 <= norm <= 1 + 2e-6
    assert sigma == noise_scale(SENSITIVITY, 0.7, 1e-5)


def test_secret_numbers_are_normal():
    numbers = _normal(200_000, None)
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-9
    assert float(numbers.mean().abs()) < 6.5 / 200_000**0.5
    assert float((numbers.std() - 1).abs()) < 6.5 / 400_000**0.5
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b"\x7f", b"\x80"])
def test_no_secret_is_infinite(monkeypatch, byte):
    monkeypatch.setattr(secrets, "token_bytes", lambda n: byte * n)
    numbers = _normal(10, None)
    assert numbers.shape == (10,)
    assert float(numbers.abs().max()) < 9


# ---- an audit ----


@pytest.mark.parametrize(("share", "private"), [(1.0, True), (0.5, False)])
def test_the_best_attack_on_the_worst_row(share, private):
    # Neyman and Pearson's test between without and with the row: P(yes | with) <= e^epsilon P(yes | without) + delta,
    # and the same with both exchanged, is what privacy says of it. With half the noise the attack does better.
    epsilon, delta, tries = 1.0, 0.1, 3000
    sigma = share * noise_scale(SENSITIVITY, epsilon, delta)
    without = Moments(1).update(torch.tensor([[0.3], [-0.8]]))
    with_it = without.copy().update(torch.ones(1, 1))
    upper = torch.ones(2, 2, dtype=F64).triu()  # the change that the row makes
    start = float((_noisy_products(without, 1.0, 0.0, seeded()) * upper).sum())
    generator = seeded(1)
    scores = [
        torch.stack([_noisy_products(part, 1.0, sigma, generator) for _ in range(tries)]).mul(upper).sum((1, 2))
        for part in (without, with_it)
    ]
    outside, inside = ((score - start) / SENSITIVITY for score in scores)
    threshold = SENSITIVITY / 2 + epsilon * sigma**2 / SENSITIVITY  # where the likelihoods differ by e^epsilon
    for caught, wrongly in (
        (inside > threshold, outside > threshold),
        (outside < SENSITIVITY - threshold, inside < SENSITIVITY - threshold),
    ):
        true_rate, false_rate = float(caught.double().mean()), float(wrongly.double().mean())
        excess = true_rate - math.exp(epsilon) * false_rate
        variance = true_rate * (1 - true_rate) + math.exp(2 * epsilon) * false_rate * (1 - false_rate)
        slack = 4 * (variance / tries) ** 0.5
        assert slack < delta
        assert (excess <= delta + slack) == private
        assert excess >= delta - slack  # not more noise than needed, either


def test_nothing_but_the_noisy_products_is_released(monkeypatch):
    noisy = _noisy_products(Moments(4).update(bounded(300, 4)), 1.0, 1.0, seeded())
    monkeypatch.setattr(privacy, "_noisy_products", lambda *given: noisy)
    one, other = Moments(4).update(bounded(300, 4, seed=1)), Moments(4).update(bounded(7, 4, norm=0.1, seed=2))
    assert state(release(one, 1.0, 1.0, 1e-6)) == state(release(other, 1.0, 1.0, 1e-6))


# ---- what comes out ----


@pytest.mark.parametrize("exact", [None, 8.0])
@pytest.mark.parametrize("n", [1, 30, 3000])
def test_released_moments_are_moments(tmp_path, exact, n):
    moments = Moments(6, exact=exact).update(bounded(n, 6, norm=3.0))
    moments.site = "fc:input"
    before, digest = state(moments), moments.digest()
    released = release(moments, 3.0, 1.0, 1e-6, seeded(n))
    assert (state(moments), moments.digest()) == (before, digest)
    assert (released.dim, released.site, released.exact, released.clipped) == (6, "fc:input", None, 0)
    assert released.mean.dtype == released.scatter.dtype == F64
    assert isinstance(released.count, int)
    assert 1 <= released.count < n + 60
    assert torch.equal(released.scatter, released.scatter.T)
    values = torch.linalg.eigvalsh(released.scatter)
    assert float(values[0]) >= -1e-12 * float(values[-1])
    released.save(tmp_path / "file")
    assert state(Moments.load(tmp_path / "file")) == state(released)
    assert (released + released).update(torch.zeros(2, 6)).count == 2 * released.count + 2


def test_without_noise_everything_is_read_back(monkeypatch):
    monkeypatch.setattr(privacy, "noise_scale", lambda *given: 0.0)
    moments = Moments(5).update(bounded(200, 5, norm=7.0) * 0.7 + 0.5)
    released = release(moments, 7.0, 1.0, 1e-6)
    assert released.count == moments.count
    assert torch.allclose(released.mean, moments.mean, rtol=1e-12)
    assert torch.allclose(released.scatter, moments.scatter, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [1e-40, 1e-6, 1e6, 1e40])
def test_units_do_not_matter(norm):
    x = bounded(500, 4)
    one, other = (release(Moments(4).update(c * x), c, 1.0, 1e-6, seeded()) for c in (1.0, norm))
    assert other.count == one.count
    assert torch.allclose(other.mean / norm, one.mean, rtol=1e-9)
    assert torch.allclose(other.scatter / norm**2, one.scatter, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1e-49, 1e-10, 1e10, 1e49])
def test_finite_whatever_the_noise(epsilon):
    for seed in range(5):
        released = release(Moments(3).update(bounded(50, 3)), 1.0, epsilon, 1e-6, seeded(seed))
        assert 1 <= released.count <= 2**62
        assert bool(torch.isfinite(released.mean).all() and torch.isfinite(released.scatter).all())


def test_reproducible_with_a_generator_only():
    moments = Moments(4).update(bounded(100, 4))
    arguments = (moments, 1.0, 1.0, 1e-6)
    assert state(release(*arguments, seeded(3))) == state(release(*arguments, generator=seeded(3)))
    assert state(release(*arguments, seeded(3))) != state(release(*arguments, seeded(4)))
    torch.manual_seed(0)
    first = state(release(*arguments))
    torch.manual_seed(0)  # has no influence on it
    assert state(release(*arguments)) != first


@pytest.mark.parametrize("exact", [None, 1.0])
def test_many_rows_drown_the_noise(exact):
    weights = torch.linspace(1, 0.1, 16, dtype=F64)
    retain, forget = bounded(200_000, 16) * weights, bounded(200_000, 16, seed=1) * weights.flip(0)
    true = [Moments(16, exact=exact).update(x) for x in (retain, forget)]
    released = [release(part, 1.0, 8.0, 1e-6, seeded(seed)) for seed, part in enumerate(true)]
    assert released[0].count == pytest.approx(200_000, abs=20)
    assert torch.allclose(released[0].mean, true[0].mean, atol=1e-4)
    expected, found = (loft.solve(*pair, rank=6).basis for pair in (true, released))
    assert float((expected.T @ found).square().sum()) / 6 > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("exact", [None, 1.0])
def test_rows_rounded_to_just_above_the_norm(dtype, exact):
    refused = 0
    for d in range(1, 40):
        x = torch.nn.functional.normalize(torch.ones(20, d, dtype=dtype))
        moments = Moments(d, exact=exact).update(x)
        refused += float(moments.mean.square().sum()) > 1 + 1e-9
        assert release(moments, 1.0, 1.0, 1e-6).dim == d
    assert refused or (dtype == F64 and exact is None)  # without an allowance


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": "x"}, r"^moments: got str, expected Moments$"),
        ({"moments": None}, r"^moments: got NoneType, expected Moments$"),
        ({"moments": Moments(3)}, r"^moments: got no rows, expected at least 1$"),
        ({"moments": Moments(3, exact=True)}, r"^moments: got no rows"),
        ({"norm": 0.0}, r"^norm: got 0.0, expected a number between 1e-50 and 1e\+50$"),
        ({"norm": -1}, r"^norm: got -1, expected"),
        ({"norm": math.nan}, r"^norm: got nan, expected"),
        ({"norm": math.inf}, r"^norm: got inf, expected"),
        ({"norm": True}, r"^norm: got True, expected"),
        ({"norm": torch.tensor(1.0)}, r"^norm: got tensor\(1.\), expected"),
        ({"epsilon": 0}, r"^epsilon: got 0, expected a number between 1e-50 and 1e\+50$"),
        ({"epsilon": -0.5}, r"^epsilon: got -0.5, expected"),
        ({"epsilon": math.nan}, r"^epsilon: got nan, expected"),
        ({"epsilon": math.inf}, r"^epsilon: got inf, expected"),
        ({"epsilon": "1"}, r"^epsilon: got '1', expected"),
        ({"delta": 0.0}, r"^delta: got 0.0, expected a number between 0 and 1$"),
        ({"delta": 1.0}, r"^delta: got 1.0, expected"),
        ({"delta": -1e-9}, r"^delta: got -1e-09, expected"),
        ({"delta": math.nan}, r"^delta: got nan, expected"),
        ({"delta": None}, r"^delta: got None, expected"),
        ({"generator": 7}, r"^generator: got int, expected a torch.Generator or None$"),
    ],
    ids=repr,
)
def test_refusals(change, message):
    moments = Moments(5).update(bounded(30, 5))
    before = state(moments)
    arguments = {"moments": moments, "norm": 1.0, "epsilon": 1.0, "delta": 1e-6} | change
    with pytest.raises(InputError, match=message):
        release(**arguments)
    assert state(moments) == before


@pytest.mark.parametrize("exact", [None, 8.0])
@pytest.mark.parametrize(
    "x", [torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])], ids=["mean", "spread"]
)
def test_a_norm_that_the_moments_contradict(exact, x):
    moments = Moments(2, exact=exact).update(x)
    before, generator = state(moments), seeded()
    drawn = generator.get_state()
    with pytest.raises(
        InputError, match=r"^norm: got 4.9, expected at least 5, the root mean square norm of the rows$"
    ):
        release(moments, 4.9, 1.0, 1e-6, generator)
    assert state(moments) == before
    assert torch.equal(generator.get_state(), drawn)
    assert release(moments, 5.0, 1.0, 1e-6).dim == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 0.1), r"^sensitivity: got 0.0, expected a number between"),
        ((math.nan, 1.0, 0.1), r"^sensitivity: got nan"),
        ((1.0, math.nan, 0.1), r"^epsilon: got nan"),
        ((1.0, 1.0, 1), r"^delta: got 1, expected a number between 0 and 1$"),
    ],
)
def test_noise_scale_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        noise_scale(*arguments)
