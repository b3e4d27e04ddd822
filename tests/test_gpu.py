"""What only a GPU can show: skipped without one. `bench/gpu.sh` runs it."""

import pytest
import torch
from conftest import normal

import loft_fast as loft
from loft_fast import backends, purified
from loft_fast.ops import reference
from loft_fast.ops.topk_projector import purify

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from loft_fast.kernels import cuda, moments_update

needs_library = pytest.mark.skipif(backends.cuda_library() is None, reason="the CUDA kernels were not built")


@needs_library
@pytest.mark.parametrize("d", [1, 2, 17, 64, 130, 238, 256])
def test_jacobi(d):
    matrix = normal(20, d, d, seed=d)
    matrix = ((matrix + matrix.mT) / 2).float().cuda()
    values, vectors = cuda.eigh(matrix)
    wide = matrix.double()
    size = float(torch.linalg.matrix_norm(wide).amax())
    assert float((values - torch.linalg.eigvalsh(wide)).abs().max()) <= 3e-6 * size
    residual = wide @ vectors.double() - vectors.double() * values.double().unsqueeze(1)
    assert float(residual.abs().max()) <= 5e-5 * size


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d", "groups"), [(1, 1, 1), (1000, 100, 1), (40000, 70, 3), (5000, 513, 40)])
def test_integers(dtype, n, d, groups):
    x = (1000 * normal(n, d)).to(dtype).cuda()
    group = (torch.arange(n) * 7 % groups).cuda() if groups > 1 else None

    def blank():
        total, product = (torch.zeros(groups, *size, dtype=torch.int64, device="cuda") for size in ((d,), (d, d)))
        count, clipped = (torch.zeros(groups, dtype=torch.int64, device="cuda") for _ in range(2))
        return count, total, clipped, list(product)

    ours, theirs = blank(), blank()
    cuda.quantized_update(x, 0.125, *ours, group)
    reference.quantized_update(x, 0.125, *theirs, group)
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], theirs[:3], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(ours[3], theirs[3], strict=True))


def test_purification_in_a_graph():
    matrix = normal(2, 96, 96)
    matrix = ((matrix + matrix.mT) / torch.linalg.matrix_norm(matrix + matrix.mT)).float().cuda()
    matrix /= torch.linalg.matrix_norm(matrix, keepdim=True)
    want = purify(matrix, 30)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = purify(matrix, 30)[0]
    got.zero_()
    graph.replay()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_products", [False, True])
def test_solve_and_fold(monkeypatch, by_products):
    monkeypatch.setattr(purified, "pays", lambda objective: by_products)
    scale = torch.arange(1, 301) ** -0.5
    moments = loft.GroupedMoments(300, device="cuda").update((normal(4000, 300) * scale).cuda(), torch.arange(4000) % 5)
    projection = loft.solve(moments.without([3]), moments.select([3]), 80)
    assert projection.certificate.relative_gap <= 1e-6
    model = torch.nn.Sequential(torch.nn.Linear(300, 5)).cuda()
    x = normal(10, 300).float().cuda()
    want = model(projection(x))
    loft.fold(model, projection)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_of_many_columns(dtype):
    x = torch.randn(200_000, 1000, device="cuda", dtype=torch.float32).add_(1).to(dtype)
    moments = loft.Moments(1000, device="cuda").update(x)
    wide = x.double()
    wide -= wide.mean(0)
    truth = wide.T @ wide
    assert float((moments.scatter - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_do_not_wait_for_the_device(groups):
    x, group = normal(5000, 100).float().cuda(), torch.arange(5000).cuda() % groups
    count = torch.zeros(groups, dtype=torch.int64, device="cuda")
    mean, scatter = (torch.zeros(groups, *size, dtype=torch.float64, device="cuda") for size in ((100,), (100, 100)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments_update.launch(x, count, mean, list(scatter), group if groups > 1 else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(count.sum()) == 5000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rows_on_another_device_than_the_current_one():
    x = normal(3000, 100).float()
    moments = loft.Moments(100, device="cuda:1").update(x)
    torch.testing.assert_close(moments.covariance().cpu(), x.double().T.cov(), rtol=1e-5, atol=1e-5)
