"""Chances that depend on one number."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from loft_fast.logistic import logistic


@pytest.mark.parametrize(("n", "ones"), [(30, 15), (200, 196), (200, 3), (5000, 3000), (3, 1)])
@pytest.mark.parametrize("slope", [-3.0, 0.0, 8.0])
def test_as_scikit_learn_fits_it(n, ones, slope):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, generator=generator, dtype=torch.float64)
    y = torch.zeros(n, dtype=torch.float64)
    y[(slope * x + torch.randn(n, generator=generator)).argsort(descending=True)[:ones]] = 1
    found = logistic(x, y)
    peer = LogisticRegression(C=100, tol=1e-10, max_iter=1000).fit(x.unsqueeze(1).numpy(), y.numpy())
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    wanted = peer.predict_proba(at.unsqueeze(1).numpy())[:, 1]
    np.testing.assert_allclose(found(at).numpy(), wanted, atol=1e-5)


def test_classes_that_are_told_apart_leave_finite_chances():
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    chance = logistic(x, (x > 0.97).double())(x)
    assert chance.isfinite().all()
    assert float(chance[-1]) > 0.3 > 0.01 > float(chance[0])
    assert float(chance.mean()) == pytest.approx(0.03, abs=1e-6)
