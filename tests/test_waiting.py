"""Updates of a few rows are worked off together: nobody can tell, but for the time it takes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import check_moments, normal, state

from loft_fast import GroupedMoments, InputError, Moments

DIM = 40
ROOM = 256  # rows that may wait where d is small


def streamed(x, size):
    moments = Moments(x.shape[1])
    for batch in x.split(size):
        moments.update(batch)
    return moments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 128])
def test_small_batches_are_one_update_bit_for_bit(size, dtype):
    x = normal(ROOM, DIM, dtype=dtype)
    assert state(streamed(x, size)) == state(Moments(DIM).update(x))


@pytest.mark.parametrize("size", [1, 100, 128, 129, 300])
def test_more_rows_than_can_wait(size):
    x = normal(1000, DIM, mean=3.0)
    check_moments(streamed(x, size), x, 1e-13)


def test_few_and_many_rows_in_turn():
    x = normal(2000, DIM, mean=-2.0)
    moments = Moments(DIM)
    for batch in x.split([5, 900, 3, 100, 100, 100, 700, 92]):
        moments.update(batch)
    check_moments(moments, x, 1e-13)


def test_dtypes_in_turn():
    x = normal(90, DIM, dtype=torch.float16)
    moments = Moments(DIM)
    for i, batch in enumerate(x.split(10)):
        moments.update(batch.to((torch.float16, torch.float64, torch.float32)[i % 3]))
    check_moments(moments, x, 1e-5)


def test_waiting_rows_count_and_are_the_callers_no_longer():
    x = normal(20, DIM)
    batch = x.clone()
    moments = Moments(DIM).update(batch)
    batch.fill_(7.0)
    assert moments.count == 20
    assert repr(moments) == f"Moments(dim={DIM}, count=20, device='cpu')"
    check_moments(moments, x, 1e-13)


def test_reading_in_between_does_not_disturb():
    x = normal(300, DIM)
    moments = Moments(DIM)
    for i, batch in enumerate(x.split(50)):
        moments.update(batch)
        check_moments(moments, x[: 50 * (i + 1)], 1e-13)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), Moments.copy])
def test_copies_hold_the_waiting_rows(twin):
    x = normal(60, DIM)
    moments = Moments(DIM).update(x[:40])
    other = twin(moments)
    moments.update(normal(9, DIM, seed=1))
    check_moments(other.update(x[40:]), x, 1e-13)


@pytest.mark.parametrize("action", [
    lambda m, x: m.remove(x),
    lambda m, x: m - Moments(DIM).update(x),
    lambda m, x: m.merge(Moments(DIM).update(x)).remove(x).remove(x),
])  # fmt: skip
def test_the_algebra_sees_waiting_rows(action):
    x = normal(80, DIM)
    check_moments(action(streamed(x, 10), x[50:]), x[:50], 1e-12, among=x)


def test_threads_may_read_at_once():
    x = normal(200, DIM)
    expected = state(Moments(DIM).update(x))
    for _ in range(20):
        moments = streamed(x, 50)
        with ThreadPoolExecutor(8) as pool:
            assert all(got == expected for got in pool.map(lambda _, m=moments: state(m), range(8)))


@pytest.mark.parametrize("before", [0, 30, 500])
@pytest.mark.parametrize("n", [3, 400, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_bad_rows_are_refused_at_once_and_nothing_changes(bad, n, before):
    moments, same = (Moments(DIM).update(normal(before, DIM)) for _ in range(2))
    x = normal(n, DIM, seed=1)
    x[n // 2, 5] = bad
    with pytest.raises(InputError, match=r"^x: (1 of \d+ rows contain|got features up to 1.0e\+200)"):
        moments.update(x)
    assert moments.count == before
    assert state(moments) == state(same)


def test_many_rows_near_the_largest_are_accepted():
    x = normal(3000, DIM) * 1e148
    assert bool(torch.isfinite(Moments(DIM).update(x).scatter).all())


def grouped(x, group, size):
    moments = GroupedMoments(DIM)
    for rows, keys in zip(x.split(size), group.split(size), strict=True):
        moments.update(rows, keys)
    return moments


@pytest.mark.parametrize("size", [16, 700, 3000])
def test_groups_of_all_sizes(size):
    x = normal(3000, DIM)
    group = torch.cat([torch.zeros(2000), torch.arange(1000) % 50]).long()[torch.randperm(3000)]
    moments = grouped(x, group, size)
    for key in range(50):
        check_moments(moments[key], x[group == key], 1e-13)
    check_moments(moments.total(), x, 1e-13)


@pytest.mark.parametrize("size", [16, 700])
def test_waiting_beside_others_leaves_no_trace(size):
    x, group = normal(3000, DIM), torch.arange(3000) % 7 % 5
    stays = group != 3
    without = GroupedMoments(DIM)
    for rows, keys, kept in zip(x.split(size), group.split(size), stays.split(size), strict=True):
        without.update(rows[kept], keys[kept])
    assert state(grouped(x, group, size).forget([3])) == state(without)
