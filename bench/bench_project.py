"""Projecting rows, as `attach` does, against torch.

The peers: the formula as it is written, and without centring first, the least that torch can do (two products; the
center's part goes into their biases, at the cost of digits where it is large). Checked before the clock starts: the
relative error to float64.
"""

import pytest
import torch

from bench.compete import Rival, compete, multiply_adds
from bench.problems import features
from loft_fast import Projection

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
CASES = [
    (32768, 768, 250, torch.float32),
    (8192, 2048, 500, torch.float32),
    (2048, 768, 250, torch.bfloat16),
    (128, 768, 250, torch.float32),
]


@pytest.mark.parametrize(("n", "dim", "rank", "dtype"), CASES, ids=str)
def test_project(n, dim, rank, dtype, benchmark):
    x = features(n, dim, seed=0).to(dtype)
    basis = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64)).Q.contiguous()
    projection = Projection(basis, x.double().mean(0))
    u, center = basis.to(dtype), projection.center.to(dtype)

    def ours():
        with torch.inference_mode():
            return projection(x)

    def as_written():
        return center + (x - center) @ u @ u.T

    def two_products():
        return torch.addmm(center, torch.addmm(-(center @ u), x, u), u.T)

    few = slice(0, 1000)
    want = projection(x[few].double())
    error = float((ours()[few].double() - want).norm() / want.norm())
    assert error <= TOLERANCE[dtype]
    rivals = {
        "torch, as written": Rival(as_written),
        "torch, two products": Rival(two_products),
        **multiply_adds(2 * n * dim * rank),
    }
    case = f"{dtype} {n} x {dim}, s = {rank}".removeprefix("torch.")
    compete(benchmark, case, ours, rivals, error, 5)
