"""Every backend of ops.symmetric_sum, bit for bit."""

import pytest
import torch
from conftest import normal

from loft_fast import InputError, backends
from loft_fast.ops import symmetric_sum


def symmetric(count, d, seed=0):
    values = normal(count, d, d, seed=seed)
    return list((values + values.mT).unbind())


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("d", [0, 1, 2, 7, 8, 9, 64, 100, 301])  # bands of the result hold 2048 numbers
def test_it_is_the_sum_in_the_order_given(backend, count, d, monkeypatch):
    if backend not in backends.available():
        pytest.skip(f"{backend} is not available here")
    monkeypatch.setenv(backends.VARIABLE, backend)
    matrices = symmetric(count, d)
    start = normal(1, d, d, seed=9)[0]  # its lower triangle does not count
    want = start.triu() + start.triu(1).T
    for matrix in matrices:
        want = want + matrix
    before = [matrix.clone() for matrix in matrices]
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            out = start.clone()
            symmetric_sum(out, matrices)
            assert torch.equal(out, want)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(matrix, old) for matrix, old in zip(matrices, before, strict=True))


def test_opcheck():
    torch.library.opcheck(torch.ops.loft_fast.symmetric_sum.default, (torch.zeros(5, 5).double(), symmetric(3, 5)))


@pytest.mark.parametrize(
    ("out", "matrix", "message"),
    [
        (torch.zeros(2, 3).double(), torch.zeros(2, 2).double(), r"out: got shape \(2, 3\), expected \(2, 2\)"),
        (torch.zeros(2, 2), torch.zeros(2, 2).double(), "out: got torch.float32, expected torch.float64"),
        (torch.zeros(2, 2).double(), torch.zeros(3, 3).double(), r"matrices\[1\]: got shape \(3, 3\)"),
        (torch.zeros(2, 2).double(), torch.zeros(2, 2), r"matrices\[1\]: got torch.float32"),
        (torch.zeros(2, 2).double(), torch.zeros(2, 4).double()[:, ::2], r"matrices\[1\]: got strides \(4, 2\)"),
        (torch.zeros(2, 4).double()[:, ::2], torch.zeros(2, 2).double(), r"out: got strides \(4, 2\)"),
        (torch.zeros(2, 2).double(), "no", r"matrices\[1\]: got str, expected a torch.Tensor"),
    ],
)
def test_bad_arguments_leave_the_sum_alone(out, matrix, message):
    with pytest.raises(InputError, match=message):
        symmetric_sum(out, [torch.ones(2, 2).double(), matrix])
    assert not out.any()
