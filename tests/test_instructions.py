"""The CPU kernels with each of the instructions that this machine has: the widest serve, and so hide the others."""

import numpy as np
import pytest
import test_eigh
import test_gram
import test_moments_update
import test_project
import test_quantized_update
import torch
from conftest import normal

from loft_fast import backends
from loft_fast.ops import gram, inverse_form, moments_update, project

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NATIVE = backends.native_module() if "native" in backends.available() else None
KNOWN = NATIVE.known_instructions() if NATIVE else []

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the extension was not built")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "native")
    yield
    if NATIVE:
        NATIVE.use_instructions(KNOWN[-1])


@pytest.fixture(params=KNOWN)
def instructions(request):
    NATIVE.use_instructions(request.param)
    return request.param


def test_the_widest_are_the_default():
    assert NATIVE.instructions() == KNOWN[-1]
    assert KNOWN[0] == "portable"


def test_unknown_ones_are_refused():
    with pytest.raises(ValueError, match="got 'sse9', expected one of portable"):
        NATIVE.use_instructions("sse9")
    assert NATIVE.instructions() == KNOWN[-1]


# Edges of panels and of vectors within them, for every width of a vector; one block and several.
@pytest.mark.parametrize("shape", [(1, 7), (65, 17), (300, 33), (33, 64), (1100, 50), (70, 100)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_moments(instructions, dtype, shape):
    test_moments_update.check(normal(*shape, mean=0.5, dtype=dtype))
    test_moments_update.check(normal(*shape, dtype=dtype), groups=3, group=torch.arange(shape[0]) ** 2 % 3)


@pytest.mark.parametrize("shape", [(1, 7), (65, 17), (513, 33), (70, 100)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_integers(instructions, dtype, shape):
    x = normal(*shape, std=3.0).to(dtype)
    got = test_quantized_update.add(test_quantized_update.empty(1, shape[1]), x)
    assert torch.equal(test_quantized_update.bits(got), test_quantized_update.bits(test_quantized_update.truth(x)))


def test_the_largest_integers(instructions):
    x = torch.full((1024, 9), 32767 * test_quantized_update.SCALE)
    got = test_quantized_update.add(test_quantized_update.empty(1, 9), x)
    assert torch.equal(got[3][0], torch.full((9, 9), 1024 * 32767**2))


@pytest.mark.parametrize("n", [3, 61, 1030])
def test_integers_of_all_sizes(instructions, n):
    x = torch.randint(-32767, 32768, (n, 50), generator=torch.Generator().manual_seed(n)).double()
    x *= test_quantized_update.SCALE
    got = test_quantized_update.add(test_quantized_update.empty(1, 50), x)
    assert torch.equal(test_quantized_update.bits(got), test_quantized_update.bits(test_quantized_update.truth(x)))


@pytest.mark.parametrize("shape", [(1, 7, 3), (65, 17, 5), (50, 100, 49)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_projection(instructions, dtype, shape):
    x, basis, center = test_project.operands(*shape, dtype)
    test_project.check(project(x, basis, center), x, basis, center)


@pytest.mark.parametrize("d", [7, 49, 100])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_products_and_forms(instructions, dtype, d):
    x = normal(2, 70, d, dtype=dtype)
    test_gram.close(gram(x), x.double().mT @ x.double(), dtype, 70)
    matrix, border = test_gram.positive(2, d), normal(2, d, 9)
    found, fine = inverse_form(matrix, border)
    assert fine.all()
    torch.testing.assert_close(found, border.mT @ torch.linalg.solve(matrix, border), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["rank 5", "three clusters", "small whole numbers"])
@pytest.mark.parametrize("d", [5, 49, 100])
def test_eigenvectors(instructions, d, kind):
    test_eigh.check(test_eigh.HARD[kind](d).float())


# ---- one state, many threads ----


# Two threads pack rows each for itself, more of them together; one group is most of the rows, or none is.
@pytest.mark.parametrize("sizes", [(2000,), (1500, 10, 0, 600), (40,) * 50], ids=["one", "few", "many"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_threads_do_not_matter(instructions, dtype, sizes):
    x = normal(sum(sizes), 150, dtype=dtype)
    group = torch.repeat_interleave(torch.tensor(sizes))[torch.randperm(len(x))]
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 9):
            torch.set_num_threads(number)
            count, mean, scatter = test_moments_update.old_state(len(sizes), 150)
            moments_update(x, count, mean, scatter, group)
            results.append(torch.cat([count, mean.flatten(), *(matrix.flatten() for matrix in scatter)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


# ---- bfloat16 pairs: what is subtracted, and when they do not serve ----


def error(x):
    """Relative Frobenius error of the scatter of these rows."""
    count, mean, scatter = test_moments_update.empty_state(1, x.shape[1])
    moments_update(x, count, mean, scatter)
    centered = x.double() - x.double().mean(0)
    truth = centered.T @ centered
    return float((scatter[0] - truth).norm() / truth.norm()), mean[0]


ROWS = 2000


def far_in_some_columns(mean):
    x = normal(ROWS, 200)
    x[:, ::7] = x[:, ::7] * 0.1 + mean
    return x


SETS = {
    "about zero": normal(ROWS, 200),
    "means of half a deviation": normal(ROWS, 200, mean=0.5),
    "means of three deviations": normal(ROWS, 200, mean=3.0),
    "far from zero, where differences are exact": far_in_some_columns(10.0),
    "far from zero, where differences are not": far_in_some_columns(0.5),
    "constant columns": far_in_some_columns(0.0) * (torch.arange(200) % 7 > 0) + 3 * (torch.arange(200) % 7 == 0),
    "as far as numbers go": normal(ROWS, 200, std=200) + 1e4,
    "rare and large": normal(ROWS, 200) + 1e4 * (normal(ROWS, 200, seed=1) > 4),
    "so small that squares are hardly numbers": normal(ROWS, 200, std=1e-18),
    "sorted": normal(ROWS, 200).sort(0).values,
}


@pytest.mark.parametrize("name", SETS)
def test_bfloat16_keeps_its_digits(instructions, name):
    x = SETS[name].bfloat16()
    off, mean = error(x)
    assert off < 2e-6
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bfloat16_that_is_no_number_stays_in_its_column(instructions, bad):
    x = normal(100, 60).bfloat16()
    x[50, 20] = bad
    count, mean, scatter = test_moments_update.empty_state(1, 60)
    moments_update(x, count, mean, scatter)
    touched = np.zeros((60, 60), dtype=bool)
    touched[20] = touched[:, 20] = True
    assert not scatter[0][torch.from_numpy(touched)].isfinite().any()
    assert scatter[0][torch.from_numpy(~touched)].isfinite().all()
