"""The claim of the package on real digits: like a network that never saw them, at a fraction of the cost."""

import os
from statistics import median

import pytest
import torch

from loft_fast.demo import compare as methods
from loft_fast.demo.digits import load_digits, train
from loft_fast.demo.run import prepare
from loft_fast.evaluate import SETS

DIGITS = (3,)  # the rest of the ten, and other seeds: bench/quality/digits.py
THREADS = min(2, os.cpu_count() or 1)


@pytest.fixture(scope="module")
def outcomes(networks):
    """Method -> one outcome per digit, each forgotten by itself."""
    data = load_digits()
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    for digit in DIGITS:
        problem, originals = prepare(data, (digit,), 32, 0, networks, print, progress=False)
        for outcome in methods.compare(problem, *originals):
            found.setdefault(outcome.method, []).append(outcome)
    torch.set_num_threads(before)
    return found


def gaps(outcomes, method):
    """Median over the digits of the absolute difference to the retrained network, by set, in points."""
    pairs = list(zip(outcomes[method], outcomes["retrain"], strict=True))
    return {
        name: median(abs(getattr(mine.evaluation, name) - getattr(goal.evaluation, name)) for mine, goal in pairs)
        for name in SETS
    }


LIMITS = {"retain_train": 0.3, "forget_train": 0.5, "retain_test": 0.5, "forget_test": 0.5}


def test_defaults_are_like_retrained(outcomes):
    found = gaps(outcomes, "ours")
    assert all(found[name] <= limit for name, limit in LIMITS.items()), found


def test_erase_blinds_the_probe_as_well(outcomes):
    found = gaps(outcomes, "ours erase")
    assert all(found[name] <= 2 * limit for name, limit in LIMITS.items()), found
    assert median(outcome.evaluation.probe_auc for outcome in outcomes["ours erase"]) <= 0.65


def test_nearer_to_retrained_than_the_published_method(outcomes):
    assert sum(gaps(outcomes, "ours").values()) < sum(gaps(outcomes, "paper").values())


def test_certificate_holds_for_what_was_folded(outcomes):
    for outcome in outcomes["ours"]:
        certificate = outcome.change.certificate
        assert certificate.relative_gap <= 1e-6
        assert certificate.predicted["forget accuracy"] < 1


def test_training_is_the_same_for_the_same_seed():
    data = load_digits()
    x, y = data.train_x[:256], data.train_y[:256]
    first, again = (train(x, y, seed=5, progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = train(x, y, seed=6, progress=False).state_dict()
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
