"""Streaming moments against the dense and the streaming ways to a covariance.

Checked before the clock starts: the covariance in float64, which some rivals compute and others (no centring) do not.
"""

import pytest
import torch
from concept_erasure import LeaceFitter
from sklearn.decomposition import IncrementalPCA
from welford_torch import OnlineCovariance

from bench.compete import Rival, compete, multiply_adds
from bench.problems import features
from loft_fast import GroupedMoments, Moments

SHAPES = [(32768, 768), (8192, 2048)]


def ours(x):
    return Moments(x.shape[1]).update(x)


def error(got, x):
    """Relative Frobenius error of a covariance of the rows of x."""
    truth = torch.cov(x.double().T)
    return float((got - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_float32(shape, benchmark):
    x = features(*shape, seed=0)
    off = error(ours(x).covariance(), x)
    assert off < 1e-6
    array, (n, dim) = x.numpy(), shape
    rivals = {
        "torch.cov": Rival(lambda: torch.cov(x.T), target=2.2),
        "torch X^T X, not centred": Rival(lambda: x.T @ x),
        "numpy X^T X, not centred": Rival(lambda: array.T @ array, "numpy", target=1.15),
        **multiply_adds(n * dim * (dim + 1) // 2),
    }
    compete(benchmark, f"float32 {n} x {dim}", lambda: ours(x), rivals, off)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_bfloat16(shape, benchmark):
    x = features(*shape, seed=0).bfloat16()
    off = error(ours(x).covariance(), x)
    assert off < 4e-6
    rivals = {
        "torch bfloat16 X^T X, not centred": Rival(lambda: x.T @ x, target=1.7),
        "torch.cov of float32 copies": Rival(lambda: torch.cov(x.float().T)),
    }
    compete(benchmark, f"bfloat16 {shape[0]} x {shape[1]}", lambda: ours(x), rivals, off, rounds=3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_exact(shape, benchmark):
    x = features(*shape, seed=0)
    largest = float(x.abs().max())

    def exact():
        return Moments(shape[1], exact=largest).update(x)

    off = error(exact().covariance(), x)
    assert off < 1e-5
    rivals = {
        "Moments that are not exact": Rival(lambda: ours(x), "loft_fast", target=0.5),
        "torch.cov": Rival(lambda: torch.cov(x.T)),
    }
    compete(benchmark, f"exact, float32 {shape[0]} x {shape[1]}", exact, rivals, off)


def test_small_batches(benchmark):
    dim, batches = 768, features(32 * 128, 768, seed=0).split(128)
    labels = [torch.zeros(128, 1) for _ in batches]

    def stream():
        moments = Moments(dim)
        for batch in batches:
            moments.update(batch)
        return moments

    def leace():
        fitter = LeaceFitter(dim, 1)
        for batch, label in zip(batches, labels, strict=True):
            fitter.update(batch, label)

    def welford():
        covariance = OnlineCovariance()
        for batch in batches:
            covariance.add_all(batch)

    off = error(stream().covariance(), torch.cat(batches))
    assert off < 1e-6
    rivals = {
        "LeaceFitter.update": Rival(leace, "concept-erasure", target=2.5),
        "welford-torch": Rival(welford, "welford-torch", target=2.5),
    }
    compete(benchmark, "32 batches of 128 rows, d = 768", stream, rivals, off)


def test_batches_with_principal_components(benchmark):
    batches = features(8 * 1024, 256, seed=0).split(1024)

    def stream():
        moments = Moments(256)
        for batch in batches:
            moments.update(batch)
        return torch.linalg.eigh(moments.covariance())

    def pca():
        fit = IncrementalPCA(n_components=32)
        for batch in batches:
            fit.partial_fit(batch.numpy())
        return fit

    exact, approximate = stream().eigenvalues[-32:].flip(0), torch.from_numpy(pca().explained_variance_)
    assert torch.allclose(exact, approximate.double(), rtol=0.1)  # it drops what it takes for noise
    truth = torch.linalg.eigvalsh(torch.cov(torch.cat(batches).double().T))[-32:].flip(0)
    off = float((exact - truth).norm() / truth.norm())
    assert off < 1e-6
    rivals = {"scikit-learn IncrementalPCA": Rival(pca, "scikit-learn")}
    compete(benchmark, "8 batches of 1024 rows, d = 256, eigenvectors", stream, rivals, off, 5)


def test_groups(benchmark):
    x = features(65536, 256, seed=0)
    group = torch.randint(0, 200, (len(x),), generator=torch.Generator().manual_seed(0))

    def grouped():
        return GroupedMoments(256).update(x, group)

    def one_by_one():
        return {g: Moments(256).update(x[group == g]) for g in range(200)}

    off = error(grouped()[7].covariance(), x[group == 7])
    assert off < 1e-6
    rivals = {"select, then update, by group": Rival(one_by_one, "loft_fast", target=5)}
    compete(benchmark, "65536 rows of 200 groups, d = 256", grouped, rivals, off, 5)
