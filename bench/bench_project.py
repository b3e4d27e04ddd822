"""Projecting rows, as `attach` does, against torch.

The peers: the formula as it is written, and without centring first, the least that torch can do (two products; the
center's part goes into their biases, at the cost of digits where it is large); for bfloat16 also in float32, which is
the faster way on processors that cannot multiply bfloat16. Checked before the clock starts: the relative error to the
formula in float64.
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
@torch.inference_mode()
def test_project(n, dim, rank, dtype, benchmark):
    x = features(n, dim, seed=0).to(dtype)
    basis = torch.linalg.qr(features(dim, rank, seed=1).double()).Q.contiguous()
    projection = Projection(basis, x.double().mean(0))

    def as_written(x, u, center):
        return center + (x - center) @ u @ u.T

    def two_products(x, u, center):
        return torch.addmm(center, torch.addmm(-(center @ u), x, u), u.T)

    few = slice(0, 1000)
    want = as_written(x[few].double(), basis, projection.center)
    error = float((projection(x)[few].double() - want).norm() / want.norm())
    assert error <= TOLERANCE[dtype]
    same, single = ((basis.to(kind), projection.center.to(kind)) for kind in (dtype, torch.float32))
    rivals = {
        "torch, as written": Rival(lambda: as_written(x, *same)),
        "torch, two products": Rival(lambda: two_products(x, *same)),
        **multiply_adds(2 * n * dim * rank),
    }
    if dtype == torch.bfloat16:
        rivals["torch, two products in float32"] = Rival(lambda: two_products(x.float(), *single).to(dtype))
    case = f"{dtype} {n} x {dim}, s = {rank}".removeprefix("torch.")
    compete(benchmark, case, lambda: projection(x), rivals, error, 5)
