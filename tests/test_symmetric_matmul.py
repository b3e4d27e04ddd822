"""Every backend of ops.symmetric_matmul against the definition in float64."""

import pytest
import torch
from conftest import normal

from loft_fast import InputError
from loft_fast.ops import symmetric_matmul

F64, F32 = torch.float64, torch.float32
CASES = [("triton", F32), ("torch", F32), ("torch", F64)]
each_backend = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)


def commuting(many, d, dtype=F64, seed=0):
    """Two stacks of symmetric matrices with the same eigenvectors."""
    vectors = torch.linalg.qr(normal(many, d, d, seed=seed)).Q
    pair = []
    for values in normal(2, many, 1, d, seed=seed + 1):
        matrix = (vectors * values) @ vectors.mT
        pair.append(((matrix + matrix.mT) / 2).to(dtype))
    return pair


def check(use, backend, dtype, x, y=None, **factors):
    device = use("symmetric_matmul", backend, dtype)
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in factors.items()}
    out, trace, squares = symmetric_matmul(x.to(device), None if y is None else y.to(device), **given)
    alpha, beta, gamma = (
        torch.as_tensor(factors.get(name, default), dtype=F64).expand(len(x)).view(-1, 1, 1)
        for name, default in (("alpha", 1.0), ("beta", 0.0), ("gamma", 0.0))
    )
    wide = x.double()
    eye = torch.eye(x.shape[1], dtype=F64)
    want = alpha * (wide @ (wide if y is None else y.double())) + beta * wide + gamma * eye
    size = 1 + float(want.abs().max()) if want.numel() else 1.0
    rounding = x.shape[1] * (1e-7 if dtype == F32 else 1e-15)
    assert out.dtype == dtype
    assert torch.equal(out, out.mT)
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=rounding * size)
    d = x.shape[1]
    torch.testing.assert_close(trace.cpu(), want.diagonal(dim1=1, dim2=2).sum(1), rtol=0, atol=d * rounding * size)
    torch.testing.assert_close(squares.cpu(), want.square().sum((1, 2)), rtol=d * rounding, atol=d * rounding)


@each_backend
@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 64, 65, 130])
def test_shapes(use, backend, dtype, d):
    x, y = commuting(2, d, dtype, seed=d)
    check(use, backend, dtype, x)
    check(use, backend, dtype, x, y, alpha=-0.5, beta=2.0, gamma=0.25)


@each_backend
def test_factors_of_each_problem(use, backend, dtype):
    x, y = commuting(3, 20, dtype)
    factors = {name: normal(3, seed=k).to(dtype) for k, name in enumerate(("alpha", "beta", "gamma"))}
    factors["alpha"][1] = 0.0
    check(use, backend, dtype, x, y, **factors)


@each_backend
def test_layouts(use, backend, dtype):
    x, _ = commuting(4, 33, dtype)
    check(use, backend, dtype, x[::2])
    check(use, backend, dtype, x[:1].expand(3, 33, 33))
    check(use, backend, dtype, x.mT)
    check(use, backend, dtype, torch.cat([x, x], 2)[:, :, :33])


@each_backend
def test_no_problems(use, backend, dtype):
    device = use("symmetric_matmul", backend, dtype)
    out, trace, squares = symmetric_matmul(torch.empty(0, 5, 5, dtype=dtype, device=device))
    assert (out.shape, trace.shape, squares.shape) == ((0, 5, 5), (0,), (0,))


def test_without_a_product_nothing_is_read_for_it(use):
    device = use("symmetric_matmul", "triton", F32)
    x, _ = commuting(1, 40, F32)
    out, _, _ = symmetric_matmul(x.to(device), torch.full_like(x, float("nan")).to(device), alpha=0.0, beta=2.0)
    assert torch.equal(out.cpu(), 2 * x)


def test_more_problems_than_a_grid_is_wide(use, monkeypatch):
    kernel = pytest.importorskip("loft_fast.kernels.symmetric_matmul")
    monkeypatch.setattr(kernel, "MOST", 2)
    x, y = commuting(5, 6, F32)
    check(use, "triton", F32, x, y, alpha=torch.arange(5.0), beta=1.0)


def test_precisions(use):
    kernel = pytest.importorskip("loft_fast.kernels.symmetric_matmul")
    device = use("symmetric_matmul", "triton", F32)
    x, y = (one.to(device) for one in commuting(1, 70, F32))
    scale = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    want = x.double() @ y.double()
    for precision, rounding in (("ieee", 1e-6), ("tf32x3", 3e-6), ("bf16", 2e-2)):
        out, _ = kernel.launch(x, y, scale, precision)
        assert float((out - want).norm() / want.norm()) < rounding


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck(dtype):
    x, y = commuting(2, 6, dtype)
    torch.library.opcheck(torch.ops.loft_fast.symmetric_matmul.default, (x, y, normal(2, 3).to(dtype)))


def test_compiles_into_one_graph():
    def step(x, alpha):
        out, trace, _ = symmetric_matmul(x, alpha=alpha, beta=1.0)
        return out * 2, trace

    x, alpha = commuting(2, 6, F32)[0], torch.tensor([0.5, 2.0])
    want = step(x, alpha)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, alpha)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


WRONG = {
    "x: got list": {"x": [[1.0]]},
    "x: got shape (3, 3)": {"x": torch.zeros(3, 3)},
    "x: got shape (1, 3, 4)": {"x": torch.zeros(1, 3, 4)},
    "x: got shape (1, 0, 0)": {"x": torch.zeros(1, 0, 0)},
    "x: got torch.int64": {"x": torch.zeros(1, 3, 3, dtype=torch.int64)},
    "y: got shape (1, 4, 4)": {"y": torch.zeros(1, 4, 4)},
    "y: got torch.float64": {"y": torch.zeros(1, 3, 3, dtype=F64)},
    "alpha: got shape (2,)": {"alpha": torch.zeros(2)},
    "beta: got torch.float64": {"beta": torch.zeros(1, dtype=F64)},
    "gamma: got a tensor on meta": {"gamma": torch.zeros(1, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_is_named(message):
    with pytest.raises(InputError) as caught:
        symmetric_matmul(**{"x": torch.zeros(1, 3, 3), **WRONG[message]})
    assert str(caught.value).startswith(message)
