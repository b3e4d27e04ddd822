"""ops.topk_projector against eigendecompositions."""

import math

import pytest
import torch
from conftest import normal
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from loft_fast import InputError
from loft_fast.ops import topk_projector
from loft_fast.ops.topk_projector import Window, purify

F64, F32 = torch.float64, torch.float32


def rotated(values, seed=0):
    """(1, d, d) with these eigenvalues."""
    values = torch.as_tensor(values, dtype=F64)
    vectors = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (vectors * values) @ vectors.T
    return ((matrix + matrix.T) / 2).unsqueeze(0)


def trade_off(d, angle=0.7, seed=0):
    """M(angle) of features whose variances fall off, as those of networks do: (1, d, d)."""
    matrices = []
    for k in range(2):
        scale = torch.arange(1, d + 1, dtype=F64).roll(3 * k) ** -0.6
        x = normal(3 * d, d, seed=seed + k) * scale
        matrices.append(x.T @ x / x.square().sum())
    return (math.cos(angle) * matrices[0] - math.sin(angle) * matrices[1]).unsqueeze(0)


def check(found, matrix, rank, tolerance=1e-5):
    """The projectors are those of `matrix`, and what is said of them is true."""
    wide = matrix.double()
    values = torch.linalg.eigvalsh(wide)
    for i, spectrum in enumerate(values):
        best = float(spectrum[-rank:].sum())
        size = max(abs(best), float(spectrum.abs().max()))
        projector = found.projector[i].double()
        assert torch.equal(projector, projector.T)
        assert abs(float(projector.trace()) - rank) < 1e-2
        assert float((projector - projector @ projector).trace().abs()) < 1e-2
        assert abs(float((projector * wide[i]).sum()) - best) <= tolerance * size
        assert abs(found.value[i] - best) <= tolerance * size
        rounding = 64 * len(spectrum) * torch.finfo(matrix.dtype).eps * size
        assert best - rounding <= found.bound[i] <= best + 2 * tolerance * size
        gap = float(spectrum[-rank] - spectrum[-rank - 1])
        if gap > 1e-4 * size:
            assert float(spectrum[-rank - 1]) <= found.level[i] <= float(spectrum[-rank])
        assert found.radius[i] >= (1 - 1e-6) * float(spectrum.abs().max())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("d", "rank"), [(2, 1), (3, 2), (17, 1), (17, 16), (64, 20), (130, 65)])
def test_is_that_of_an_eigendecomposition(dtype, d, rank):
    matrix = trade_off(d).to(dtype)
    found = topk_projector(matrix, rank)
    check(found, matrix, rank)
    assert found.products[0] > 0


@given(
    st.lists(st.floats(-1.0, 1.0, width=32), min_size=2, max_size=24),
    st.floats(1e-6, 1e6),
    st.randoms(use_true_random=False),
)
def test_any_spectrum(values, scale, random):
    rank = random.randint(1, len(values) - 1)
    matrix = rotated([scale * value for value in values])
    check(topk_projector(matrix, rank), matrix, rank)


def test_a_batch_is_its_problems():
    matrix = torch.cat([trade_off(40, angle, seed) for seed, angle in enumerate((0.1, 0.7, 1.4))]).float()
    together = topk_projector(matrix, 12)
    check(together, matrix, 12)
    for i in range(3):
        alone = topk_projector(matrix[i : i + 1], 12)
        assert alone.products[0] == together.products[i]
        torch.testing.assert_close(alone.projector[0], together.projector[i], rtol=0, atol=1e-5)


def test_no_problems():
    found = topk_projector(torch.empty(0, 4, 4), 2)
    assert (found.projector.shape, found.value) == ((0, 4, 4), [])


@pytest.mark.parametrize("values", [[0.0] * 6, [1.0] * 6, [2.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
def test_where_eigenvalues_cannot_be_told_apart_it_falls_back_and_says_so(values, caplog):
    matrix = torch.cat([rotated(values), rotated([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])])
    with caplog.at_level("INFO", logger="loft_fast"):
        found = topk_projector(matrix, 3)
    check(found, matrix, 3)
    assert found.products[0] == 0
    assert found.products[1] > 0
    assert "1 of 2 problems solved by torch.linalg.eigh instead" in caplog.text


@pytest.mark.parametrize("width", [1e-2, 1e-4, 1e-6])
def test_a_warm_start_costs_less_and_ends_at_the_same(width):
    first = topk_projector(trade_off(96, 0.7), 30)
    matrix = trade_off(96, 0.7 + width / 10)
    cold, warm = topk_projector(matrix, 30), topk_projector(matrix, 30, first.window(width))
    check(warm, matrix, 30)
    assert 0 < warm.products[0] <= cold.products[0]
    assert warm.products[0] < cold.products[0] or width == 1e-2
    torch.testing.assert_close(warm.projector, cold.projector, rtol=0, atol=1e-4)


@pytest.mark.parametrize("off", [-0.02, -1e-3, 1e-3, 0.02])
def test_a_window_without_the_level_does_no_harm(off):
    matrix = trade_off(64)
    level = topk_projector(matrix, 20).level[0]
    window = Window([level + off - 1e-5], [level + off + 1e-5], [1.0])
    assert window.widenings > 0
    check(topk_projector(matrix, 20, window), matrix, 20)


def test_purification_waits_for_nothing():
    # A fake tensor has no values: whatever looked at one would fail.
    with FakeTensorMode():
        matrix = torch.empty(2, 8, 8)
        for center, widenings in ((None, 0), (torch.empty(2), 3)):
            x, radius, steps = purify(matrix, 3, center, widenings)
            assert (x.shape, radius.shape, steps.shape[1]) == ((2, 8, 8), (2,), 2)


def test_purification_that_waits_for_nothing_is_the_same():
    matrix = trade_off(24).float()
    patient, hasty = purify(matrix, 8, wait=True), purify(matrix, 8)
    assert torch.equal(patient[0], hasty[0])
    taken = len(patient[2])
    assert torch.equal(hasty[2][:taken], patient[2])
    assert not hasty[2][taken:].any()


WRONG = {
    "matrix: got list": {"matrix": [[1.0]]},
    "matrix: got shape (3, 3)": {"matrix": torch.zeros(3, 3)},
    "matrix: got shape (1, 3, 4)": {"matrix": torch.zeros(1, 3, 4)},
    "matrix: got torch.float16": {"matrix": torch.zeros(1, 3, 3, dtype=torch.float16)},
    "rank: got 0": {"rank": 0},
    "rank: got 3, expected an integer between 1 and 2": {"rank": 3},
    "rank: got True": {"rank": True},
    "rank: got 1.0": {"rank": 1.0},
    "window: got 2 problems, expected 1": {"window": Window([0.0, 0.0], [1.0, 1.0], [1.0, 1.0])},
    "tolerance: got 0.0": {"tolerance": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_is_named(message):
    with pytest.raises(InputError) as caught:
        topk_projector(**{"matrix": torch.eye(3).unsqueeze(0), "rank": 2, **WRONG[message]})
    assert str(caught.value).startswith(message)


def test_what_is_not_finite_is_refused():
    matrix = torch.eye(4).unsqueeze(0)
    matrix[0, 1, 2] = matrix[0, 2, 1] = float("nan")
    with pytest.raises(InputError, match="matrix: 1 of 1 problems contain NaN or Inf"):
        topk_projector(matrix, 2)
