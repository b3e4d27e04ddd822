"""Every backend of ops.eigh on the CPU against float64: what it has to be, on matrices that are hard to take apart."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import normal

from loft_fast import InputError, backends
from loft_fast.ops import eigh

F64, F32 = torch.float64, torch.float32
# About the leaves of 32, the tiles of 12, 24 and 48 columns, the 32 reflectors taken together; several leaves.
SIZES = [1, 2, 3, 4, 5, 16, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 130, 257, 300]


def symmetric(d, many=1, seed=0):
    part = normal(many, d, d, seed=seed)
    return (part + part.mT) / 2


def spectrum(values, seed=0):
    """A matrix with these eigenvalues."""
    vectors = torch.linalg.qr(normal(1, len(values), len(values), seed=seed)).Q
    return (vectors * values) @ vectors.mT


def half_empty(d):
    matrix = symmetric(d)
    matrix[:, d // 2 :] = 0
    matrix[:, :, d // 2 :] = 0
    return matrix


def beside(d, diagonal, off):
    """A tridiagonal matrix."""
    return (torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)).unsqueeze(0)


HARD = {
    "zeros": lambda d: torch.zeros(1, d, d, dtype=F64),
    "identity": lambda d: torch.eye(d, dtype=F64).unsqueeze(0),
    "diagonal": lambda d: torch.diag(normal(d)).unsqueeze(0),
    "ones": lambda d: torch.ones(1, d, d, dtype=F64),
    "rank 5": lambda d: (lambda x: x @ x.mT)(normal(1, d, 5)),
    "a projector": lambda d: spectrum((torch.arange(d) < d // 3).double()),
    "three clusters": lambda d: spectrum((torch.arange(d) % 3).double()),
    "twelve orders of magnitude": lambda d: spectrum(torch.logspace(0, -12, d, dtype=F64)),
    "sixty, on the diagonal": lambda d: torch.diag(torch.logspace(-30, 30, d, dtype=F64)).unsqueeze(0),
    "a covariance": lambda d: (lambda x: x.mT @ x / len(x[0]))(normal(1, 3 * d, d) / torch.arange(1, d + 1)),
    "half empty": half_empty,
    "Wilkinson's": lambda d: beside(d, (torch.arange(d) - d // 2).abs().double(), torch.ones(d - 1, dtype=F64)),
    "a path": lambda d: beside(d, torch.zeros(d, dtype=F64), torch.ones(d - 1, dtype=F64)),
    "nearly diagonal": lambda d: torch.diag(normal(d)) + 1e-20 * symmetric(d),
    "huge": lambda d: 1e36 * symmetric(d),
    "tiny": lambda d: 1e-36 * symmetric(d),
    "subnormal": lambda d: 1e-42 * symmetric(d),
    "small whole numbers": lambda d: symmetric(d).mul(2).round(),
}


@pytest.fixture(params=["native", "torch"])
def backend(request, use):
    use("eigh", request.param, F32)
    return request.param


def check(matrix, rounding=4e-6):
    """Values in order, vectors orthonormal, and both of the matrix, to the rounding of its largest number."""
    before = matrix.clone()
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == matrix.dtype
    assert values.shape == matrix.shape[:2]
    assert vectors.shape == matrix.shape
    assert vectors.is_contiguous()
    assert torch.equal(matrix, before)
    size = matrix.double().abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    exact, values, vectors = matrix.double() / size, values.double() / size[:, 0], vectors.double()
    assert bool((values.diff(dim=1) >= 0).all())
    d = matrix.shape[1]
    near = {"rtol": 0, "atol": rounding}
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(d, dtype=F64).expand_as(exact), **near)
    largest = torch.linalg.eigvalsh(exact)
    near["atol"] *= max(1.0, float(largest.abs().max()))
    near["atol"] += 1.5e-45 / float(size.min())  # next to the least subnormal number there is no other
    torch.testing.assert_close(values, largest, **near)
    near["atol"] *= math.sqrt(d)
    torch.testing.assert_close(exact @ vectors, vectors * values.unsqueeze(1), **near)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("many", [1, 2, 5])
def test_any_matrix(backend, threads, d, many):
    check(symmetric(d, many, seed=d).float())


@pytest.mark.parametrize("d", [2, 3, 33, 64, 130])
@pytest.mark.parametrize("kind", HARD)
def test_hard_ones(backend, kind, d):
    check(HARD[kind](d).float())


def test_many_leaves_on_several_threads(backend, threads):
    check(symmetric(700).float())
    check(spectrum(torch.arange(600).div(7, rounding_mode="floor").double()).float())


def test_double_precision(backend):
    check(symmetric(70, 2), rounding=1e-13)


def test_any_strides_and_no_matrices(backend):
    matrix = symmetric(40, 3).float()
    wanted = eigh(matrix)
    spread = matrix.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2]
    for one, other in zip(eigh(spread), wanted, strict=True):
        assert torch.equal(one, other)
    values, vectors = eigh(matrix[:0])
    assert (values.shape, vectors.shape) == ((0, 40), (0, 40, 40))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_do_not_pass_for_others(backend, bad):
    matrix = symmetric(40, 2).float()
    matrix[1, 3, 5] = matrix[1, 5, 3] = bad
    try:
        values, _ = eigh(matrix)
    except torch.linalg.LinAlgError:
        return
    assert values[0].isfinite().all()
    assert not values[1].isfinite().all()


OUT_OF_MEMORY = """
import resource, torch
from loft_fast.ops import eigh
torch.set_num_threads(2)
matrix = torch.zeros(2, 2000, 2000)
eigh(torch.eye(64).repeat(2, 1, 1))  # the threads are there
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + matrix.nbytes + (8 << 20)  # for the result, and for no working memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    eigh(matrix)
except MemoryError:
    print("told")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_runs_out_in_all_threads_is_an_exception():
    if "native" not in backends.available():
        pytest.skip("native is not available here")
    environment = {**os.environ, backends.VARIABLE: "native"}
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_op(backend, dtype):
    native = backend == "native" and dtype == F32
    assert backends.choose("eigh", "cpu", dtype) == ("native" if native else "torch")
    torch.library.opcheck(torch.ops.loft_fast.eigh.default, (symmetric(5, 3).to(dtype),))


@pytest.mark.parametrize("broken", [F32, F64], ids=str)
def test_where_lapack_does_not_converge_in_float32(monkeypatch, broken):
    lapack = torch.linalg.eigh

    def fails(matrix):
        if matrix.dtype in (F32, broken):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return lapack(matrix)

    monkeypatch.setenv(backends.VARIABLE, "torch")
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    matrix = symmetric(20, 2).float()
    if broken == F64:
        with pytest.raises(torch.linalg.LinAlgError):
            eigh(matrix)
        return
    check(matrix)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3, 3), r"matrix: got shape \(3, 3\)"),
        (torch.ones(1, 2, 3), r"matrix: got shape \(1, 2, 3\)"),
        (torch.ones(1, 2, 2, dtype=torch.float16), "matrix: got torch.float16"),
        ([[1.0]], "matrix: got list"),
    ],
)
def test_bad_arguments(matrix, message):
    with pytest.raises(InputError, match=message):
        eigh(matrix)
