"""The certified optimum against the published way to it: 50 steps of Riemannian Adam (geoopt), same matrices.

Checked before the clock starts: a relative gap of at most 1e-6, and a loss below the peer's.
"""

import pytest

from bench.peers.riemannian_adam import descend
from bench.problems import features
from loft_fast import Moments, solve
from loft_fast.objective import build_objective

RANK = 250  # the paper's, for d = 768


@pytest.fixture(scope="module", params=[512, 768], ids=lambda dim: f"d={dim}")
def sets(request):
    """Moments of a retain and a forget set."""
    dim = request.param
    retain, forget = (Moments(dim).update(features(3 * dim, dim, seed)) for seed in (0, 1))
    return retain, forget


def test_peer(sets, benchmark):
    benchmark.group = f"solve, d = {sets[0].dim}, s = {RANK}"
    objective = build_objective(*sets, about="own")
    benchmark.pedantic(descend, (objective.retain, objective.forget, RANK), rounds=3, warmup_rounds=1)


def test_ours(sets, benchmark):
    benchmark.group = f"solve, d = {sets[0].dim}, s = {RANK}"
    objective = build_objective(*sets, about="own")
    certificate = solve(*sets, rank=RANK, about="own").certificate
    assert certificate.relative_gap <= 1e-6
    assert certificate.loss < descend(objective.retain, objective.forget, RANK).loss
    benchmark.extra_info |= {"relative gap": certificate.relative_gap, "eigen-solves": certificate.eigen_solves}
    benchmark.pedantic(solve, sets, {"rank": RANK, "about": "own"}, rounds=9, warmup_rounds=1)
