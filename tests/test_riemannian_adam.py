import math
import sys

import numpy as np
import pytest
import torch
from problems import make_problem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from loft_fast import MissingExtraError
from loft_fast.peers.leace import Leace
from loft_fast.peers.riemannian_adam import LEARNING_RATE, STEPS, descend


def matrices(kind="power law", dim=24):
    return tuple(torch.from_numpy(matrix) for matrix in make_problem(kind, dim).matrices("own"))


def loss(a, b):
    return (1 - a) ** 2 + b**2


@pytest.mark.parametrize("learning_rate", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["power law", "gaussian rows", "low rank"])
def test_descent_descends_and_stays_orthonormal(kind, learning_rate):
    A, B = matrices(kind)
    descent = descend(A, B, rank=6, learning_rate=learning_rate)
    a, b = (float(torch.trace(descent.basis.T @ matrix @ descent.basis)) for matrix in (A, B))
    assert descent.basis.dtype == torch.float64
    assert descent.basis.shape == (24, 6)
    torch.testing.assert_close(descent.basis.T @ descent.basis, torch.eye(6, dtype=torch.float64))
    assert descent.loss == pytest.approx(loss(a, b), abs=1e-12)
    assert descent.loss < loss(*descent.path[0]) - 0.01
    assert descent.seconds > 0


def test_path_has_every_step_from_a_random_start_to_the_end():
    A, B = matrices()
    descent = descend(A, B, rank=6, steps=20)
    assert len(descent.path) == 21
    assert loss(*descent.path[-1]) == pytest.approx(descent.loss, abs=1e-15)
    # A random subspace of a quarter of the dimensions keeps about a quarter of each.
    assert descent.path[0] == pytest.approx((0.25, 0.25), abs=0.15)
    shorter = descend(A, B, rank=6, steps=10)
    assert shorter.path[:-1] == descent.path[:10]


def test_seed_decides_everything():
    A, B = matrices()
    first, again, other = (descend(A, B, rank=4, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.basis, again.basis)
    assert first.path == again.path
    assert first.path[0] != other.path[0]


def test_settings_are_the_published_ones():
    A, B = matrices()
    assert (STEPS, LEARNING_RATE) == (50, 1.0)
    assert len(descend(A, B, rank=4).path) == 51


def test_arguments_are_not_changed():
    A, B = matrices()
    before = A.clone(), B.clone()
    descend(A, B, rank=4, steps=3)
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "geoopt", None)
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(MissingExtraError, match=r"geoopt: pip install 'loft-fast\[demo\]'"):
        descend(*matrices(), rank=4)
    with pytest.raises(MissingExtraError, match=r"concept-erasure: pip install 'loft-fast\[demo\]'"):
        Leace(torch.ones(3, 2), torch.ones(3))


# ---- LEACE ----


def probe_auc(rows, labels):
    probe = LogisticRegression(max_iter=1000).fit(rows, labels)
    return roc_auc_score(labels, probe.decision_function(rows))


def test_leace_blinds_a_linear_probe_and_changes_little_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    rows = torch.randn(600, 8, generator=generator, dtype=torch.float64)
    rows[:, 0] += 3 * labels
    eraser = Leace(rows, labels)
    erased = eraser(rows)
    assert probe_auc(rows.numpy(), labels.numpy()) > 0.95
    assert probe_auc(erased.numpy(), labels.numpy()) == pytest.approx(0.5, abs=0.05)
    # The class means are where every other direction of the classes is untouched.
    means = [erased[labels == label].mean(0) for label in (0, 1)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-8)
    assert float((erased - rows)[:, 1:].abs().mean()) < 0.2 * float((erased - rows)[:, 0].abs().mean())
    assert math.isclose(np.linalg.matrix_rank((erased - rows).numpy(), tol=1e-6), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_leace_returns_the_dtype_it_got(dtype):
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert Leace(rows, torch.arange(40) % 2)(rows).dtype == dtype
