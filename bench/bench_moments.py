"""Streaming moments against the dense ways to a covariance. Checked before the clock starts: the float64 covariance."""

import pytest
import torch

from bench.problems import features
from loft_fast import Moments

SHAPES = [(32768, 768), (8192, 2048)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def rows(request):
    """(n, d) float32."""
    return features(*request.param, seed=0)


def ours(x):
    return Moments(x.shape[1]).update(x).covariance()


def torch_cov(x):
    return torch.cov(x.T)


def gram_without_centring(x):
    return x.T @ x


@pytest.mark.parametrize("method", [ours, torch_cov, gram_without_centring], ids=lambda method: method.__name__)
def test_moments(rows, method, benchmark):
    benchmark.group = f"moments, float32 {rows.shape[0]} x {rows.shape[1]}"
    if method is not gram_without_centring:
        truth = torch.cov(rows.double().T)
        assert float((method(rows) - truth).norm() / truth.norm()) < 1e-5
    benchmark.pedantic(method, (rows,), rounds=5, warmup_rounds=1)
