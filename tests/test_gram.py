"""Every backend of ops.gram and ops.inverse_form against the definitions in float64."""

import pytest
import torch
from conftest import normal

from loft_fast import InputError
from loft_fast.ops import gram, inverse_form

F64, F32 = torch.float64, torch.float32
# About the tiles of 12, 24 and 48 columns, and the 256 products added up in one register.
SHAPES = [(1, 1, 1), (3, 0, 5), (0, 4, 3), (2, 7, 12), (1, 30, 13), (5, 257, 25), (1, 300, 49), (2, 40, 100)]
SHAPES += [(1, 4, 250), (1, 1100, 60), (1, 30, 700)]
each_backend = pytest.mark.parametrize("backend", ["native", "torch"])
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
    "stacked": lambda x: torch.stack([x, x], 1)[:, 1],
}


def close(found, want, dtype, terms):
    rounding = (terms + 1) ** 0.5 * (1e-6 if dtype == F32 else 1e-14)
    torch.testing.assert_close(found.double(), want, rtol=rounding, atol=rounding * float(want.abs().max() + 1))


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram(use, threads, backend, dtype, shape, layout):
    use("gram", backend, dtype)
    x = LAYOUTS[layout](normal(*shape).to(dtype))
    before = x.clone()
    found = gram(x)
    assert found.dtype == dtype
    if x.shape[0]:
        close(found, x.double().mT @ x.double(), dtype, shape[1])
    if backend == "native":
        assert torch.equal(found, found.mT)
    assert torch.equal(x, before)


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("columns", [1, 11, 48, 60])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_of_two(use, threads, backend, dtype, columns, layout):
    use("gram", backend, dtype)
    for many, n, d in ((1, 300, 50), (4, 9, 1), (2, 33, 97), (1, 1100, 400), (2, 0, 30)):
        x, y = LAYOUTS[layout](normal(many, n, d).to(dtype)), normal(many, n, columns, seed=1).to(dtype)
        close(gram(x, y), x.double().mT @ y.double(), dtype, n)
        close(gram(y, x), y.double().mT @ x.double(), dtype, n)


@each_backend
def test_gram_with_a_matrix_without_columns(use, backend):
    use("gram", backend, F64)
    x, none = normal(2, 9, 30), normal(2, 9, 30)[..., :0]
    assert gram(x, none).shape == (2, 30, 0)
    assert gram(none, x).shape == (2, 0, 30)


def positive(many, d, least=0.1):
    root = normal(many, d, d)
    return root.mT @ root / d + least * torch.eye(d, dtype=F64)


@each_backend
@pytest.mark.parametrize(("many", "d", "s"), [(1, 1, 1), (0, 3, 2), (1, 24, 5), (2, 25, 24), (5, 40, 60), (1, 150, 49)])
def test_inverse_form(use, threads, backend, many, d, s):
    use("inverse_form", backend, F64)
    matrix, border = positive(many, d), normal(many, d, s, seed=2)
    for one, other in ((matrix, border), (matrix.mT.contiguous().mT, border.mT.contiguous().mT)):
        found, fine = inverse_form(one, other)
        assert fine.tolist() == [True] * many
        assert torch.equal(found, found.mT) or backend == "torch"
        torch.testing.assert_close(found, border.mT @ torch.linalg.solve(matrix, border), rtol=1e-10, atol=1e-10)


# Where it stops being positive: in the first block of rows, within one, in the last row of all.
@each_backend
@pytest.mark.parametrize("place", [0, 30, 71])
@pytest.mark.parametrize("pivot", [-1.0, float("nan"), float("inf"), 0.0])
def test_what_is_not_positive_definite_is_told(use, threads, backend, place, pivot):
    use("inverse_form", backend, F64)
    matrix = torch.eye(72, dtype=F64).repeat(3, 1, 1)
    matrix[1, place, place] = pivot
    found, fine = inverse_form(matrix, normal(3, 72, 4))
    if pivot == float("inf"):  # a root of infinity, to some
        assert fine[[0, 2]].all()
    else:
        assert fine.tolist() == [True, False, True]
    torch.testing.assert_close(found[0], gram(normal(3, 72, 4)[:1])[0])


def test_threads_do_not_change_a_bit(use):
    use("gram", "native", F64)
    before, x = torch.get_num_threads(), normal(1, 300, 130)
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((gram(x), gram(x, x[..., :70]), inverse_form(positive(1, 130), x[:, :130, :60])[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_opcheck():
    torch.library.opcheck(torch.ops.loft_fast.gram.default, (normal(2, 5, 3), None))
    torch.library.opcheck(torch.ops.loft_fast.gram.default, (normal(2, 5, 3), normal(2, 5, 4)))
    torch.library.opcheck(torch.ops.loft_fast.inverse_form.default, (positive(2, 5), normal(2, 5, 3)))


def ones(*shape, dtype=F64):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram(ones(2, 3)), r"x: got shape \(2, 3\)"),
        (lambda: gram(ones(1, 2, 3, dtype=torch.int64)), "x: got torch.int64"),
        (lambda: gram(ones(1, 2, 3), ones(1, 3, 3)), r"y: got shape \(1, 3, 3\)"),
        (lambda: gram(ones(1, 2, 3), ones(1, 2, 3, dtype=F32)), "y: got torch.float32"),
        (lambda: inverse_form(ones(1, 2, 3), ones(1, 2, 3)), r"matrix: got shape \(1, 2, 3\)"),
        (lambda: inverse_form(ones(1, 2, 2, dtype=F32), ones(1, 2, 3)), "matrix: got torch.float32"),
        (lambda: inverse_form(ones(1, 2, 2), ones(1, 3, 3)), r"border: got shape \(1, 3, 3\)"),
        (lambda: inverse_form(ones(1, 2, 2), ones(1, 2, 0)), r"border: got shape \(1, 2, 0\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()
