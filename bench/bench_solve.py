"""The certified optimum against the published way to it: 50 steps of Riemannian Adam (geoopt), same matrices.

Checked before the clock starts: a relative gap of at most 1e-6 (the row's error), and a loss below the peer's.
What solving and proving is made of is timed against torch; there the error is relative to float64 or torch's result.
"""

import pytest
import torch

from bench.compete import Rival, compete
from bench.peers.riemannian_adam import descend
from bench.problems import features
from loft_fast import Moments, solve, solve_batch
from loft_fast.objective import build_objective
from loft_fast.ops import eigh, gram, inverse_form, reference


@pytest.mark.parametrize(("dim", "rank"), [(512, 250), (768, 250), (2048, 500)])
def test_solve(dim, rank, benchmark):
    sets = [Moments(dim).update(features(3 * dim, dim, seed)) for seed in (0, 1)]
    objective = build_objective(*sets, about="own")

    def ours():
        return solve(*sets, rank=rank, about="own").certificate

    def peer():
        return descend(objective.retain, objective.forget, rank)

    certificate = ours()
    assert certificate.relative_gap <= 1e-6
    assert certificate.loss < peer().loss
    rivals = {"Riemannian Adam, 50 steps": Rival(peer, "geoopt", target=20 if dim == 512 else 30)}
    rounds = 9 if dim < 1024 else 2
    compete(benchmark, f"d = {dim}, s = {rank}", ours, rivals, certificate.relative_gap, rounds)


def test_solve_batch(benchmark):
    dim, rank, count = 128, 32, 64
    retain, forget = ([Moments(dim).update(features(3 * dim, dim, 2 * i + j)) for i in range(count)] for j in (0, 1))

    def one_by_one():
        return [solve(*pair, rank) for pair in zip(retain, forget, strict=True)]

    def ours():
        return solve_batch(retain, forget, rank)

    together = [projection.certificate for projection in ours()]
    for certificate, alone in zip(together, one_by_one(), strict=True):
        assert certificate.relative_gap <= 1e-6
        assert certificate.loss <= (1 + 2e-6) * alone.certificate.loss
    rivals = {"a loop of solve": Rival(one_by_one, "loft_fast", target=4)}
    gap = max(certificate.relative_gap for certificate in together)
    compete(benchmark, f"{count} problems, d = {dim}, s = {rank}", ours, rivals, gap)


def test_proof(benchmark):
    dim, rank = 768, 250
    matrix = Moments(dim).update(features(3 * dim, dim, 0)).covariance().unsqueeze(0)
    matrix.diagonal(dim1=1, dim2=2).add_(matrix.diagonal(dim1=1, dim2=2).mean())
    border = features(dim, rank, 1).double().unsqueeze(0)
    want, _ = reference.inverse_form(matrix, border)
    found, positive = inverse_form(matrix, border)
    error = float((found - want).norm() / want.norm())
    assert positive.all()
    assert error < 1e-12
    rivals = {"torch: Cholesky, triangular solve, product": Rival(lambda: reference.inverse_form(matrix, border))}
    case = f"U^T N^-1 U in float64, d = {dim}, s = {rank}"
    compete(benchmark, case, lambda: inverse_form(matrix, border), rivals, error, 9)


def test_products(benchmark):
    dim, rank = 768, 250
    x, y = (features(dim, columns, seed).unsqueeze(0) for seed, columns in enumerate((dim, rank)))
    want = x.double().mT @ y.double()
    error = float((gram(x, y).double() - want).norm() / want.norm())
    assert error < 1e-6
    rivals = {"torch X.T @ Y": Rival(lambda: torch.bmm(x.mT, y))}
    compete(benchmark, f"X^T Y in float32, {dim} x {dim} and {dim} x {rank}", lambda: gram(x, y), rivals, error, 25)


@pytest.mark.parametrize(("many", "dim"), [(1, 768), (1, 2048), (64, 128)])
def test_eigenvectors(many, dim, benchmark):
    rows = [features(3 * dim, dim, seed) for seed in range(many)]
    matrix = torch.stack([Moments(dim).update(part).covariance().float() for part in rows])

    def error(found):
        values, vectors = (part.double() for part in found)
        exact = matrix.double()
        return float((exact @ vectors - vectors * values.unsqueeze(1)).norm() / exact.norm())

    own = error(eigh(matrix))
    assert own < 2e-6
    assert own < error(torch.linalg.eigh(matrix))
    rivals = {"torch.linalg.eigh (LAPACK)": Rival(lambda: torch.linalg.eigh(matrix))}
    case = f"eigenvectors in float32, d = {dim}" + (f", {many} of them" if many > 1 else "")
    compete(benchmark, case, lambda: eigh(matrix), rivals, own, 5)
