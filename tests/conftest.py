"""What several test files share."""

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

from loft_fast import GroupedMoments, Moments, backends

# Read when Triton is imported, which loft_fast does at the first call. With a GPU the kernels run there instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The problems are small: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

# The same examples in every run, and no clock: how long an example takes says nothing about right or wrong.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=40)
settings.register_profile("fuzz", deadline=None, database=None, max_examples=1500)  # other examples in every run
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """A folder for trained networks: every one is trained once."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def use(monkeypatch):
    """Ask for a backend of an op; returns the device that it computes on."""

    def ask(op, backend, dtype):
        if backend not in backends.available():
            pytest.skip(f"{backend} is not available here")
        device = "cuda" if backend == "triton" and not backends.interpreting() else "cpu"
        monkeypatch.setenv(backends.VARIABLE, backend)
        assert backends.choose(op, device, dtype) == backend
        return device

    return ask


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """So many threads for torch and the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape, mean=0.0, std=1.0, seed=0, dtype=torch.float64):
    """Normal rows with correlated columns, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if shape[-1] > 1:
        values = values + 0.5 * values.roll(1, -1)
    return (mean + std * values).to(dtype)


def state(moments):
    """Everything a (Grouped)Moments holds, bit for bit: equal states, equal values."""
    if isinstance(moments, GroupedMoments):
        return moments.site, {key: state(moments[key]) for key in moments}
    assert isinstance(moments, Moments)
    bits = (tensor.contiguous().view(torch.int64).tolist() for tensor in (moments.mean, moments.scatter))
    return moments.dim, moments.count, moments.site, *bits


def truth(x):
    """Mean and scatter of rows, in two passes of extended precision."""
    rows = x.to(torch.float64).numpy().astype(np.longdouble)
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
    return mean, (rows - mean).T @ (rows - mean)


def check_moments(moments, x, tolerance, among=None):
    """`moments` are those of the rows x; errors are relative to the size and spread of x, or of the rows of `among`."""
    mean, scatter = truth(x)
    widest = (x if among is None else among).to(torch.float64)
    size = float(widest.abs().max()) if len(widest) else 0.0
    spread = float((widest - widest.mean(0)).abs().max()) if len(widest) else 0.0
    assert moments.count == len(x)
    assert np.abs(moments.mean.numpy() - mean).max() <= tolerance * size
    # Of rows that are all the same, the mean's last digit is left.
    bound = len(widest) * (tolerance * spread**2 + (1e-15 * size) ** 2)
    assert np.abs(moments.scatter.numpy() - scatter).max() <= bound
    assert torch.equal(moments.scatter, moments.scatter.T)
