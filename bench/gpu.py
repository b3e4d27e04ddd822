"""Time the kernels on a GPU against their peers: results checked first, medians of events, ceilings of the same run.

python -m bench.gpu --out gpu-out       # writes gpu-out/<device>.json, in the form of bench/results
TRITON_INTERPRET=1 LOFT_FAST_BACKEND=triton python -m bench.gpu --rehearse     # every case once, tiny, without a GPU
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton

import loft_fast as loft
from bench.gpu_harness import Machine, Rival, Rivals, Row, Run, ceilings, command, compete
from loft_fast import backends, cost, ops, purified
from loft_fast.kernels import choice, cuda, moments_update
from loft_fast.ops.topk_projector import purify, topk_projector


def moments(machine: Machine) -> Iterator[Row]:
    """Streams of rows, with mean, centred."""
    for d in (768, 2048, 4096):
        yield from _moments(machine, torch.bfloat16, machine.size(1 << 20, 100), machine.size(d, 40), 1.5)
        yield from _moments(machine, torch.float32, machine.size(1 << 18, 100), machine.size(d, 40), 3.0)


def _moments(machine: Machine, dtype: torch.dtype, n: int, d: int, target: float) -> Iterator[Row]:
    x = machine.sets(lambda seed: machine.rows(n, d, seed, dtype))
    made = state(d, 1, machine.device)

    def ours(k: int) -> None:
        ops.moments_update(x[k], *made)

    ours(0)
    error = covariance_error(x[0], made[0], made[1][0], made[2][0])
    assert error < 1e-5, error
    name = str(dtype).removeprefix("torch.")
    rivals: Rivals = {f"torch {name} X^T X, not centred": Rival(lambda k: x[k].T @ x[k], target)}
    cov_gemm = peer("flashlib.linalg.cov_gemm.triton.cov_gemm", "cov_gemm")
    if cov_gemm is not None and not machine.rehearse and _agrees(cov_gemm, x[0][: 1 << 14]):
        rivals["flashlib cov_gemm, not centred"] = Rival(lambda k: cov_gemm(x[k]), 1.5, "flashlib")
    least = cost.moments_update(n, d, dtype=dtype)
    yield from compete(machine, "moments", f"{name} {n} x {d}", ours, rivals, error, least)


def grouped(machine: Machine) -> Iterator[Row]:
    """A thousand groups in mixed order, all of one size, which is the best case for a batched product."""
    groups, each, d = machine.size(1000, 3), machine.size(1000, 20), machine.size(512, 20)
    x = machine.sets(lambda seed: machine.rows(groups * each, d, seed, torch.float32))
    group = torch.arange(groups, device=machine.device).repeat(each)
    made = state(d, groups, machine.device)

    def ours(k: int) -> None:
        ops.moments_update(x[k], *made, group)

    def batched(k: int) -> torch.Tensor:
        rows = x[k][torch.argsort(group, stable=True)].view(groups, each, d)
        rows = rows - rows.mean(1, keepdim=True)
        return rows.mT @ rows

    def one_by_one(k: int) -> list[torch.Tensor]:
        return [torch.cov(rows.T) for rows in x[k][torch.argsort(group, stable=True)].split(each)]

    ours(0)
    error = covariance_error(x[0][group == 1], made[0][1], made[1][1], made[2][1])
    assert error < 1e-5, error
    rivals = {
        "torch, sorted, batched product": Rival(batched, 10.0),
        "torch.cov of each group": Rival(one_by_one, 10.0),
    }
    least = cost.moments_update(groups * each, d, groups)
    yield from compete(
        machine, "moments", f"{groups} groups, float32 {groups * each} x {d}", ours, rivals, error, least
    )


def exact(machine: Machine) -> Iterator[Row]:
    """Integers by bytes, against our own moments of the same rows."""
    if backends.cuda_library() is None or machine.rehearse:
        return
    for d in (768, 2048):
        yield from _exact(machine, 1 << 20, d)


def _exact(machine: Machine, n: int, d: int) -> Iterator[Row]:
    x = machine.sets(lambda seed: machine.rows(n, d, seed, torch.bfloat16))
    scale = 2.0**-9
    total, clipped, count = (torch.zeros(1, *size, dtype=torch.int64, device="cuda") for size in ((d,), (), ()))
    product = [torch.zeros(d, d, dtype=torch.int64, device="cuda")]
    part = x[0][:4096]
    cuda.quantized_update(part, scale, count, total, clipped, product, None)
    q = (part.double() / scale).round().clamp(-32767, 32767)
    assert torch.equal(product[0], (q.T @ q).long())
    made = state(d, 1, machine.device)

    def ours(k: int) -> None:
        cuda.quantized_update(x[k], scale, count, total, clipped, product, None)

    rivals: Rivals = {"Moments that are not exact": Rival(lambda k: ops.moments_update(x[k], *made), 0.5, "loft_fast")}
    least = cost.quantized_update(n, d, dtype=torch.bfloat16)
    yield from compete(machine, "exact", f"bfloat16 {n} x {d}", ours, rivals, 0.0, least)


def projector(machine: Machine) -> Iterator[Row]:
    """The top eigenspace of one large matrix; with the products captured in a graph as well."""
    for d, rank in ((2048, 500), (4096, 1000)):
        yield from _projector(machine, machine.size(d, 32), machine.size(rank, 8))


def _projector(machine: Machine, d: int, rank: int) -> Iterator[Row]:
    matrices = machine.sets(lambda seed: trade_off(machine, d, seed))
    found = topk_projector(matrices[0], rank)
    best = float(torch.linalg.eigvalsh(matrices[0].double())[0, -rank:].sum())
    error = abs(best - found.value[0]) / best
    assert error <= 1e-5, error
    rivals: Rivals = {"torch.linalg.eigh": Rival(lambda k: torch.linalg.eigh(matrices[k]), 10.0)}
    if not machine.rehearse:
        graph, static = torch.cuda.CUDAGraph(), matrices[0] / torch.linalg.matrix_norm(matrices[0])
        purify(static, rank)
        with torch.cuda.graph(graph):
            purify(static, rank)
        rivals["the same products, captured in a graph"] = Rival(lambda k: graph.replay(), package="loft_fast")
    case = f"d = {d}, s = {rank}, {found.products[0]} products"
    least = cost.topk_projector(d, products=max(1, found.products[0]))
    yield from compete(machine, "projector", case, lambda k: topk_projector(matrices[k], rank), rivals, error, least)


def small(machine: Machine) -> Iterator[Row]:
    """Many small eigenproblems: Jacobi in shared memory, and products."""
    if backends.cuda_library() is None or machine.rehearse:
        return
    matrices = machine.sets(lambda seed: torch.cat([trade_off(machine, 64, 1024 * seed + i) for i in range(1024)]))
    values, vectors = cuda.eigh(matrices[0])
    truth = torch.linalg.eigvalsh(matrices[0].double())
    error = float((values - truth).abs().max() / truth.abs().max())
    assert error < 1e-5, error
    residual = matrices[0] @ vectors - vectors * values.unsqueeze(1)
    assert float(residual.abs().max()) < 1e-4
    rivals: Rivals = {
        "torch.linalg.eigh, batched": Rival(lambda k: torch.linalg.eigh(matrices[k]), 5.0),
        "topk_projector, s = 16": Rival(lambda k: topk_projector(matrices[k], 16), package="loft_fast"),
    }
    yield from compete(machine, "small", "1024 problems, d = 64", lambda k: cuda.eigh(matrices[k]), rivals, error)


def projection(machine: Machine) -> Iterator[Row]:
    """Rows through a projection."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from _projection(machine, dtype)


def _projection(machine: Machine, dtype: torch.dtype) -> Iterator[Row]:
    n, d, rank = machine.size(1 << 18, 60), machine.size(2048, 40), machine.size(500, 8)
    x = machine.sets(lambda seed: machine.rows(n, d, seed, dtype))
    basis = torch.linalg.qr(machine.rows(d, rank, 9, torch.float32)).Q
    center = machine.rows(1, d, 8, torch.float32)[0]
    wide = x[0][:1000].double()
    want = center + (wide - center) @ basis.double() @ basis.double().T
    got = torch.ops.loft_fast.project(x[0][:1000], basis, center).double()
    error = float((got - want).norm() / want.norm())
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), error
    u, c = basis.to(dtype), center.to(dtype)
    rivals: Rivals = {"torch, three steps": Rival(lambda k: torch.addmm(c, (x[k] - c) @ u, u.T))}
    case = f"{str(dtype).removeprefix('torch.')} {n} x {d}, s = {rank}"

    def ours(k: int) -> None:
        torch.ops.loft_fast.project(x[k], basis, center)

    yield from compete(machine, "project", case, ours, rivals, error, cost.project(n, d, rank, dtype))


def request(machine: Machine) -> Iterator[Row]:
    """A forget request: stored moments to a folded head, by products and by eigendecompositions."""
    d, rank, classes = machine.size(2048, 32), machine.size(500, 8), machine.size(50, 4)
    x = machine.rows(classes * machine.size(2000, 60), d, 0, torch.float32)
    x *= torch.arange(1, d + 1, device=machine.device) ** -0.4
    label = torch.arange(len(x), device=machine.device) % classes
    stored = loft.GroupedMoments(d, device=machine.device).update(x + 0.3 * x[label], label)
    head = torch.nn.Linear(d, classes).to(machine.device)

    def forget(by_products: bool) -> loft.Certificate:
        with _solved_by(by_products):
            solved = loft.solve(stored.without([3]), stored.select([3]), rank)
        loft.fold(torch.nn.Sequential(copy.deepcopy(head)), solved)
        return solved.certificate

    found = [forget(by_products) for by_products in (False, True)]
    gap = max(one.relative_gap for one in found)
    assert gap <= 1e-6, gap
    rivals: Rivals = {"the same by eigendecompositions": Rival(lambda k: forget(False), package="loft_fast")}
    if peer("geoopt", "Stiefel") is not None:
        from loft_fast.objective import build_objective
        from loft_fast.peers.riemannian_adam import descend

        def published(k: int) -> None:
            built = build_objective(stored.without([3]).total(), stored.select([3]).total())
            assert descend(built.retain, built.forget, rank).loss > found[0].loss

        rivals["50 steps of Riemannian Adam"] = Rival(published, 100.0, "geoopt")
    yield from compete(machine, "request", f"d = {d}, s = {rank}, by products", lambda k: forget(True), rivals, gap)


@contextmanager
def _solved_by(products: bool) -> Iterator[None]:
    """Let `solve` search by products, or not, whatever the table says."""
    pays = purified.pays
    purified.pays = lambda objective: products
    try:
        yield
    finally:
        purified.pays = pays


def sizes(machine: Machine) -> Iterator[Row]:
    """Other block sizes for the moments of bfloat16 rows: each against the one in the table."""
    n, d = machine.size(1 << 19, 100), machine.size(2048, 40)
    x = machine.sets(lambda seed: machine.rows(n, d, seed, torch.bfloat16))
    made = state(d, 1, machine.device)
    table = choice.blocks_for("moments_update", torch.bfloat16, d, machine.device)
    options = [
        choice.Blocks(tile, rows, warps, stages)
        for tile, rows in ((128, 32), (128, 64), (128, 128), (64, 64))
        for warps in (4, 8)
        for stages in (3, 4, 5)
    ][: machine.size(100, 1)]

    def with_sizes(blocks: choice.Blocks) -> Run:
        return lambda k: moments_update.launch(x[k], *made, None, blocks=blocks)

    rivals: Rivals = {}
    for blocks in options:
        try:
            with_sizes(blocks)(0)
        except triton.OutOfResources as error:  # not a size to choose
            print(f"{blocks}: {error}", file=sys.stderr)
            continue
        rivals[str(blocks)] = Rival(with_sizes(blocks), package="loft_fast")
    yield from compete(machine, "sizes", f"bfloat16 {n} x {d}, {table}", with_sizes(table), rivals, 0.0)


# ---- problems and peers ----


def state(d: int, groups: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Moments of no rows."""
    zeros = {"dtype": torch.float64, "device": device}
    count = torch.zeros(groups, dtype=torch.int64, device=device)
    return count, torch.zeros(groups, d, **zeros), [torch.zeros(d, d, **zeros) for _ in range(groups)]


def covariance_error(x: torch.Tensor, count: torch.Tensor, mean: torch.Tensor, scatter: torch.Tensor) -> float:
    """Relative error of the scatter, Frobenius, against float64."""
    center = sum(part.double().sum(0) for part in x.split(1 << 14)) / len(x)
    truth = torch.zeros_like(scatter)
    for part in x.split(1 << 14):
        z = part.double() - center
        truth += z.T @ z
    assert int(count) == len(x)
    assert float((mean - center).abs().max()) < 1e-9
    return float((scatter - truth).norm() / truth.norm())


def trade_off(machine: Machine, d: int, seed: int) -> torch.Tensor:
    """M(0.7) of two covariances whose variances fall off, (1, d, d) float32 of trace about zero."""
    matrices = []
    for k in range(2):
        x = machine.rows(3 * d, d, 2 * seed + k, torch.float32)
        x = (x - x.mean(0)) * torch.arange(1, d + 1, device=machine.device).roll(3 * k) ** -0.6
        matrices.append(x.T @ x / x.square().sum())
    matrix = 0.765 * matrices[0] - 0.644 * matrices[1]
    return ((matrix + matrix.T) / 2).unsqueeze(0)


def peer(module: str, name: str) -> Any:
    """From a package that may not be there."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer that breaks on import is not there either
        print(f"left out: {module} ({type(error).__name__})", file=sys.stderr)
        return None


def _agrees(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Whether a peer computes X^T X for rows of this dtype: one made for another is not timed."""
    try:
        got = product(x).double()
    except Exception as error:  # of any kind: it may be Triton's own
        print(f"left out for {x.dtype}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    want = x.double().T @ x.double()
    off = float((got - want).norm() / want.norm())
    if off > 1e-2:
        print(f"left out for {x.dtype}: off by {off:.1e}", file=sys.stderr)
    return off <= 1e-2


CASES = (ceilings, moments, grouped, projector, small, exact, request, projection, sizes)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    return command(__doc__, CASES, arguments)


if __name__ == "__main__":
    sys.exit(main())
