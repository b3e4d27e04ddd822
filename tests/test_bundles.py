"""Totals of many groups, of which only what changed is added up again: the same bits as if all had been."""

import pytest
import torch
from conftest import check_moments, normal, state
from hypothesis import given
from hypothesis import strategies as st

from loft_fast import GroupedMoments, bundles

KEYS = [*range(-20, 60), "a", "7", *(f"client {i}" for i in range(20))]


def filled(keys=KEYS, exact=None, seed=0):
    """Three rows of three features for each of the keys."""
    n = 3 * len(keys)
    return GroupedMoments(3, exact=exact).update(normal(n, 3, mean=2.0, seed=seed), [keys[i // 3] for i in range(n)])


def fresh(moments):
    """The total of the same groups, of which nothing has been added up yet."""
    return GroupedMoments.of({key: moments[key] for key in moments}, like=moments).total()


@pytest.fixture
def added(monkeypatch):
    """How many moments each call of `pool` has added up."""
    calls, pool = [], bundles.pool

    def counting(parts, name):
        calls.append(len(parts) - 1)
        return pool(parts, name)

    monkeypatch.setattr(bundles, "pool", counting)
    return calls


def change_nothing(moments, key, other):
    return moments


def change_row(moments, key, other):
    return moments.update(torch.tensor([[1.0, 2.0, 3.0]]), [key])


def add_row_to_copy(moments, key, other):
    return moments + GroupedMoments(3).update(torch.tensor([[1.0, 2.0, 3.0]]), [key])


def merge(moments, key, other):
    return moments.merge(GroupedMoments(3).update(torch.tensor([[1.0, 2.0, 3.0]]), [key]))


def add_and_remove_row(moments, key, other):
    row = torch.tensor([[3.0, 2.0, 1.0]])
    moments.update(row, [key]).total()
    return moments.remove(row, [key])


def subtract(moments, key, other):
    return moments - GroupedMoments.of({key: moments[key]})


def exchange(moments, key, other):
    return moments.without([key]).join([GroupedMoments.of({key: moments[other]})])


def forget(moments, key, other):
    return moments.forget({key, other})


def without(moments, key, other):
    return moments.without({key, other})


def select(moments, key, other):
    return moments.select({key, other})


def new_group(moments, key, other):
    return moments.update(torch.ones(2, 3), [f"new {key}", f"new {other}"])


CHANGES = [
    change_nothing,
    change_row,
    add_row_to_copy,
    merge,
    add_and_remove_row,
    subtract,
    exchange,
    forget,
    without,
    select,
    new_group,
]


def kept(moments):
    """The groups that are in sums."""
    return {key for inside, _ in moments._bundles._known.values() for key in inside}


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=8))
def test_totals_have_the_bits_of_a_fresh_sum_whatever_happened(changes):
    moments = filled()
    for change, first, second in changes:
        before, was = moments, state(moments.total())
        keys = moments.keys() or ["first"]
        if len(moments) or change is new_group:
            moments = change(moments, keys[first % len(keys)], keys[second % len(keys)])
        assert state(moments.total()) == state(fresh(moments))
        if moments is not before:
            assert state(before.total()) == was
    assert moments.total().count == moments.count


@pytest.mark.parametrize("change", [forget, without, select])
def test_no_sum_remembers_groups_that_are_gone(change):
    """Less the groups that stay, a sum from before would give the forgotten ones away."""
    moments = filled()
    moments.total()
    changed = change(moments, 5, "a")
    assert kept(changed) <= set(changed.keys())
    if change is not select:
        assert len(kept(changed)) > len(KEYS) / 2  # most sums do not concern them


@pytest.mark.parametrize("change", [change_row, add_row_to_copy, merge, add_and_remove_row, subtract])
def test_no_sum_remembers_rows_that_are_gone(change):
    moments = filled()
    moments.total()
    assert kept(moments) == set(KEYS)
    assert 5 not in kept(change(moments, 5, "a"))


@pytest.mark.parametrize("exact", [None, 16.0])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 100])
def test_the_total_is_that_of_all_rows(size, exact):
    moments = filled(KEYS[:size], exact)
    rows = normal(3 * size, 3, mean=2.0, seed=0)
    for _ in range(2):
        check_moments(moments.total(), rows, 1e-12 if exact is None else 1e-3)


def test_forgotten_is_bit_for_bit_never_seen():
    keys = [key for key in KEYS for _ in range(3)]
    rows, gone = normal(len(keys), 3), {5, "a", "client 3"}
    moments = GroupedMoments(3).update(rows, keys)
    moments.total()
    kept = [i for i, key in enumerate(keys) if key not in gone]
    never_seen = GroupedMoments(3).update(rows[kept], [keys[i] for i in kept])
    assert state(moments.forget(gone).total()) == state(never_seen.total())


def test_forgetting_a_group_adds_up_its_bundle_again_and_the_bundles(added):
    moments = filled()
    k = len(moments)
    moments.total()
    assert sum(added) > k  # all groups, and the bundles
    bundles_of = added[-1]
    for key in (0, "a", "client 3"):
        added.clear()
        moments.without([key]).total()
        assert len(added) == 2
        assert added[0] <= 3 * k / bundles_of
        assert added[1] == bundles_of <= 2 * k**0.5
    added.clear()
    moments.total()
    assert added == [bundles_of]


def test_few_groups_are_added_up_as_they_are(added):
    moments = filled(KEYS[:32])
    moments.total()
    assert added == [32]


def test_a_change_is_not_seen_from_views_made_before_it():
    moments = filled()
    moments.total()
    view = moments.without([0])
    before = state(view.total())
    moments.update(torch.full((4, 3), 9.0), [1, 1, 2, "a"])
    assert state(view.total()) == before
    assert state(moments.without([0]).total()) != before
