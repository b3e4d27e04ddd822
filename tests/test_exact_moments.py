"""Exact moments: the state is a function of the rows it holds, bit for bit, whatever happened on the way."""

import random

import numpy as np
import pytest
import torch
from conftest import normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loft_fast as loft
from loft_fast import FileFormatError, GroupedMoments, InputError, Moments
from loft_fast.ops.quantized_update import MOST_ROWS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STEP = 2.0**-11  # of exact=16.0 and of anything from 8.0 on
everywhere = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(moments):
    """The state as it is kept: count, clipped numbers, sums and products."""
    state = moments._settled()
    product = state.read_matrix().numpy().tobytes()
    return state.exact, state.count, state.clipped, state.vector.numpy().tobytes(), product


def by_hand(rows, exact=15.0):
    """The same from NumPy integers."""
    step = 2.0 ** np.ceil(np.log2(exact / 32767))
    scaled = rows.double().numpy() / step
    integers = np.rint(scaled.clip(-32767, 32767)).astype(np.int64)
    total, product = integers.sum(0), integers.T @ integers
    return 32767 * step, len(rows), int((abs(scaled) > 32767).sum()), total.tobytes(), product.tobytes()


# ---- programmes ----


class Program:
    """Sets of rows, each as numbers of a pool and as the moments that a random history has made of them."""

    def __init__(self, seed, dtype, d=3, exact=15.0):
        self.random = random.Random(seed)
        self.pool = (normal(40, d, std=6.0, seed=seed)).to(dtype)  # a few are clipped
        self.exact = exact
        self.sets = [([], Moments(d, exact=exact))]

    def step(self):
        number = self.random.randrange(len(self.sets))
        held, moments = self.sets[number]
        action = self.random.choice(["update", "update", "remove", "merge", "fork", "subtract"])
        if action == "update":
            new = self.random.choices(range(len(self.pool)), k=self.random.randrange(8))
            for piece in pieces(new, self.random):
                moments.update(self.pool[piece])
            held.extend(new)
        elif action == "remove":
            gone = self.random.sample(held, k=self.random.randint(0, len(held)))
            for piece in pieces(gone, self.random):
                moments.remove(self.pool[piece])
            for row in gone:
                held.remove(row)
        elif action == "merge":
            other = self.random.choice(self.sets)
            moments.merge(other[1])
            held.extend(list(other[0]))
        elif action == "fork":
            self.sets.append((list(held), moments.copy()))
        else:
            more = self.random.choices(range(len(self.pool)), k=5)
            other = Moments(moments.dim, exact=self.exact).update(self.pool[more])
            self.sets[number] = (held, (moments + other) - other)

    def check(self):
        for held, moments in self.sets:
            rows = self.pool[self.random.sample(held, k=len(held))]
            assert bits(moments) == bits(Moments(moments.dim, exact=self.exact).update(rows)) == by_hand(rows)


def pieces(rows, random):
    """The same, in random order, cut in random places."""
    rows = random.sample(rows, k=len(rows))
    cut = random.randint(0, len(rows))
    return rows[:cut], rows[cut:]


@everywhere
@settings(max_examples=2500, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 6))
def test_programs(dtype, seed, steps):
    program = Program(seed, dtype)
    for _ in range(steps):
        program.step()
    program.check()


@everywhere
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 7, 100, 300, 700]), threads=st.sampled_from([1, 2]))
def test_rows_in_any_order_batches_and_threads_and_from_workers(dtype, seed, size, threads):
    x = normal(1500, 9, std=4.0, seed=seed).to(dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = Moments(9, exact=15.0).update(x)
    workers = [Moments(9, exact=15.0) for _ in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, block in enumerate(x[order].split(size)):
            workers[i % 3].update(block)
    finally:
        torch.set_num_threads(before)
    left, right = (workers[0] + workers[1]) + workers[2], workers[2] + (workers[1] + workers[0])
    assert bits(left) == bits(right) == bits(whole) == by_hand(x)
    assert left.digest() == whole.digest()


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 50, 1000]))
def test_groups_that_came_and_went_leave_nothing(seed, size):
    x, keys = normal(1000, 5, std=4.0, seed=seed), torch.arange(1000) % 7
    other = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(seed))
    y = normal(300, 5, seed=seed + 1)
    plain = GroupedMoments(5, exact=15.0).update(x, keys)
    eventful = GroupedMoments(5, exact=15.0)
    eventful.update(y, other)
    for block, names in zip(x.split(size), keys.split(size), strict=True):
        eventful.update(block, names)
    eventful.remove(y, other)
    assert eventful.digest() == plain.digest()
    assert bits(eventful.total()) == bits(Moments(5, exact=15.0).update(x)) == by_hand(x)
    eventful.forget([0, 3])
    kept = (keys != 0) & (keys != 3)
    assert bits(eventful.total()) == by_hand(x[kept])


def test_digests_tell_states_apart():
    x = normal(50, 4)
    base = Moments(4, exact=8.0).update(x)
    others = [
        Moments(4).update(x),
        Moments(4, exact=16.0).update(x),
        Moments(4, exact=8.0).update(x[:49]),
        Moments(4, exact=8.0).update(torch.cat([x, x[:1]])),
        Moments(4, exact=8.0).update(torch.cat([x[:49], x[49:] + 0.01])),
        Moments(4, exact=8.0),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 7
    groups = GroupedMoments(4, exact=8.0).update(x, [0, 1] * 25)
    renamed = GroupedMoments(4, exact=8.0).update(x, ["0", "1"] * 25)
    swapped = GroupedMoments(4, exact=8.0).update(x, [1, 0] * 25)
    assert len({one.digest() for one in (groups, renamed, swapped)}) == 3


# ---- what is read off ----


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_error_of_the_covariance(mean):
    # What Moments documents: a feature is off by at most half a step, and its variance by about a step^2 / 12.
    x = normal(4000, 16, mean=mean, seed=3)
    exact = Moments(16, exact=float(x.abs().max())).update(x)
    step = exact.exact / 32767
    assert exact.clipped == 0
    assert exact.exact >= float(x.abs().max()) > exact.exact / 2
    assert float((exact.mean - x.mean(0)).abs().max()) <= step / 2
    error = exact.covariance(0) - torch.cov(x.T, correction=0)
    assert float((error.diagonal() - step**2 / 12).abs().max()) <= 6 * step * float(x.std()) / 4000**0.5
    assert float(error.fill_diagonal_(0).abs().max()) <= 6 * step * float(x.std()) / 4000**0.5
    assert torch.equal(exact.scatter, exact.scatter.T)


def test_scatter_of_many_equal_rows_is_zero():
    x = torch.full((5000, 3), 7.0, dtype=torch.float64)
    moments = Moments(3, exact=7.0).update(x)
    assert not moments.scatter.any()
    assert torch.equal(moments.mean, x[0])


def test_what_is_clipped_is_counted():
    moments = Moments(2, exact=1.0).update(torch.tensor([[0.5, 2.0], [-3.0, -1.0], [1.0, 40.0]]))
    assert moments.exact == 32767 * 2.0**-14
    assert moments.clipped == 3
    assert repr(moments) == "Moments(dim=2, count=3, device='cpu', exact=1.99993896484375, clipped=3)"
    assert moments.remove(torch.tensor([[-3.0, -1.0]])).clipped == 2
    groups = GroupedMoments(2, exact=1.0).update(torch.tensor([[0.5, 2.0], [-3.0, -1.0]]), ["a", "b"])
    assert groups.clipped == 2
    assert "exact=1.99" in repr(groups)
    assert Moments(2).update(torch.full((3, 2), 1e9)).clipped == 0


# ---- calibration ----


@everywhere
@pytest.mark.parametrize("n", [5, 2000])
def test_calibrated_on_the_first_rows_and_then_frozen(dtype, n):
    x = normal(n, 4, seed=1).to(dtype)
    largest = float(x.abs().max())
    moments = Moments(4, exact=True)
    assert moments.exact is True
    moments.update(x[:0])
    assert moments.exact is True
    moments.update(x)
    limit = moments.exact
    assert 2 * largest <= limit <= 4 * largest
    moments.update(100 * x)
    assert moments.exact == limit
    assert moments.clipped > 0
    assert bits(moments) == bits(Moments(4, exact=limit).update(torch.cat([x, 100 * x])))


def test_groups_share_one_scale():
    x = normal(30, 4)
    groups = GroupedMoments(4, exact=True).update(x, [0, 1, 2] * 10).update(10 * x, [2, 3, 4] * 10)
    assert {groups[key].exact for key in groups} == {groups.exact, groups.total().exact} == {groups.without([0]).exact}
    other = GroupedMoments(4, exact=groups.exact).update(x, [5, 1, 2] * 10)
    assert (groups + other).exact == groups.exact
    assert (GroupedMoments(4, exact=True) + groups).digest() == groups.digest()
    assert (groups + GroupedMoments(4, exact=True)).digest() == groups.digest()
    merged = GroupedMoments(4, exact=True).merge(groups)
    assert merged.exact == groups.exact
    assert merged.update(x, [7] * 30).exact == groups.exact
    assert groups.select([]).total().exact == groups.exact


def test_uncalibrated_and_calibrated_merge():
    x = normal(30, 4)
    moments = Moments(4, exact=True).update(x)
    assert bits(Moments(4, exact=True) + moments) == bits(moments)
    assert bits(moments + Moments(4, exact=True)) == bits(moments)
    assert bits(moments - Moments(4, exact=True)) == bits(moments)
    both = Moments(4, exact=True) + Moments(4, exact=True)
    assert both.exact is True
    assert Moments(4, exact=True).merge(Moments(4, exact=8.0)).exact == Moments(4, exact=8.0).exact


# ---- refusals ----


@pytest.mark.parametrize(
    "exact", [0, 0.0, -1.0, float("nan"), float("inf"), 1e-101, 1e101, False, "16", torch.tensor(1.0)], ids=repr
)
def test_impossible_scale(exact):
    for kind in (Moments, GroupedMoments):
        with pytest.raises(InputError, match=r"^exact: got .* expected None, True or the largest magnitude"):
            kind(4, exact=exact)


@pytest.mark.parametrize("exact", [True, 8.0])
@pytest.mark.parametrize("n", [3, 600])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(exact, n, bad):
    x = normal(n, 4)
    x[1, 2] = bad
    for start in (0, 20):
        moments = Moments(4, exact=exact).update(normal(start, 4))
        before, was = bits(moments), moments.exact
        with pytest.raises(InputError, match=rf"^x: 1 of {n} rows contain NaN or Inf"):
            moments.update(x)
        assert bits(moments) == before
        groups = GroupedMoments(4, exact=exact).update(normal(start, 4), [1] * start)
        digest = groups.digest()
        with pytest.raises(InputError, match=r"^x: 1 of"):
            groups.update(x, [0] * n)
        assert (groups.exact, groups.digest()) == (was, digest)


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((3, 4), 1e200, dtype=torch.float64)])
def test_nothing_to_calibrate_on(x):
    moments = Moments(4, exact=True)
    with pytest.raises(InputError, match="nothing for exact=True to calibrate on"):
        moments.update(x)
    assert moments.exact is True
    assert Moments(4, exact=1.0).update(torch.zeros(3, 4)).count == 3


@pytest.mark.parametrize("pair", [(None, 8.0), (8.0, None), (8.0, 16.0), (True, None), (None, True)])
def test_kinds_that_do_not_mix(pair):
    for kind in (Moments, GroupedMoments):
        one, other = (kind(3, exact=exact) for exact in pair)
        for combine in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a.merge(b)):
            with pytest.raises(InputError, match=r"^other: got moments with exact=.*, expected exact="):
                combine(one, other)


def full(count):
    """Moments of so many rows, made of nothing but zeros."""
    moments = Moments(3, exact=8.0).update(torch.zeros(1, 3))
    moments._settled().count = count
    return moments


@pytest.mark.parametrize("n", [2, 600])
def test_too_many_rows_are_refused_before(n):
    x = torch.zeros(n, 3)
    moments = full(MOST_ROWS - 1)
    with pytest.raises(InputError, match=rf"^x: that would be {MOST_ROWS - 1 + n} rows, expected at most {MOST_ROWS}"):
        moments.update(x)
    assert moments.count == MOST_ROWS - 1
    assert moments.update(x[:1]).count == MOST_ROWS
    with pytest.raises(InputError, match=r"^x: that would be"):
        moments.update(x[:1])
    with pytest.raises(InputError, match=r"^other: that would be"):
        full(MOST_ROWS // 2) + full(MOST_ROWS // 2 + 1)
    assert (full(MOST_ROWS // 2) + full(MOST_ROWS // 2)).count == MOST_ROWS


def test_sums_at_the_limit_do_not_overflow():
    # As many rows as there may be, all at the largest magnitude: by doubling, from one.
    row = torch.tensor([[32767.0, -32767.0, 32766.0]], dtype=torch.float64)
    moments = Moments(3, exact=32767.0).update(row)
    for _ in range(32):
        moments = moments + moments
    assert moments.count == MOST_ROWS
    assert torch.equal(moments.mean, row[0])
    assert not moments.scatter.any()
    assert moments._settled().consistent()
    alternating = moments + Moments(3, exact=32767.0)
    assert bits(alternating - moments) == bits(Moments(3, exact=32767.0))


def test_rows_that_were_never_added():
    x = normal(50, 4)
    moments = Moments(4, exact=8.0).update(x)
    before = bits(moments)
    for wrong in (normal(50, 4, seed=1), 7 * x[:1], torch.cat([x[:49], x[49:] + STEP]), x[:49] * 1.01, x[:49] - 1):
        with pytest.raises(InputError, match=r"^x: these rows were never added"):
            moments.remove(wrong)
        assert bits(moments) == before
    with pytest.raises(InputError, match="cannot remove 51 rows from moments of 50"):
        moments.remove(torch.cat([x, x[:1]]))
    groups = GroupedMoments(4, exact=8.0).update(x, [0, 1] * 25)
    with pytest.raises(InputError, match=r"^x \(group 1\): these rows were never added"):
        groups.remove(x[:25], [1] * 25)
    assert groups.digest() == GroupedMoments(4, exact=8.0).update(x, [0, 1] * 25).digest()


# ---- files ----


@pytest.mark.parametrize("exact", [8.0, True])
def test_saved_and_loaded(tmp_path, exact):
    for moments in (Moments(5, exact=exact), Moments(5, exact=exact).update(9 * normal(70, 5))):
        moments.site = "fc:input"
        moments.save(tmp_path / "file")
        loaded = Moments.load(tmp_path / "file")
        assert (bits(loaded), loaded.site) == (bits(moments), moments.site)
    for groups in (GroupedMoments(5, exact=exact), GroupedMoments(5, exact=exact).update(normal(70, 5), [1, "b"] * 35)):
        groups.save(tmp_path / "file")
        loaded = GroupedMoments.load(tmp_path / "file")
        assert (loaded.digest(), loaded.exact, loaded.keys()) == (groups.digest(), groups.exact, groups.keys())
        assert loaded.update(normal(9, 5), [3] * 9).exact == groups.update(normal(9, 5), [3] * 9).exact


def test_a_smaller_file_than_that_of_as_many_floats(tmp_path):
    x = normal(70, 40)
    Moments(40, exact=8.0).update(x).save(tmp_path / "exact")
    Moments(40).update(x).save(tmp_path / "floats")
    assert (tmp_path / "exact").stat().st_size < 1.02 * (tmp_path / "floats").stat().st_size


def damage(change):
    """A file of 50 rows whose state was changed before it was written."""

    def write(path):
        moments = Moments(3, exact=8.0).update(normal(50, 3))
        change(moments._settled())
        moments.save(path)

    return write


def add(name, index, amount):
    def change(state):
        vector, matrix = state.vector.clone(), state.own_matrix()
        tensor = vector if name == "vector" else matrix
        tensor[index] += amount
        if name == "matrix" and index[0] != index[1]:
            tensor[index[::-1]] += amount
        state.vector = vector

    return damage(change)


IMPOSSIBLE = {
    "count": damage(lambda state: setattr(state, "count", 0)),
    "negative count": damage(lambda state: setattr(state, "count", -1)),
    "count beyond the limit": damage(lambda state: setattr(state, "count", MOST_ROWS + 1)),
    "negative clipped": damage(lambda state: setattr(state, "clipped", -1)),
    "more clipped than numbers": damage(lambda state: setattr(state, "clipped", 151)),
    "odd sum": add("vector", 1, 1),
    "sum beyond all rows": add("vector", 1, 2 * 50 * 32767),
    "negative square": add("matrix", (2, 2), -(2**50)),
    "square beyond all rows": add("matrix", (2, 2), 2**50),
    "covariance above both variances": add("matrix", (0, 2), 2**40),
    "no scale": damage(lambda state: setattr(state, "scale", None)),
    "another scale": damage(lambda state: setattr(state, "scale", 3.0)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_states_are_not_loaded(tmp_path, case):
    IMPOSSIBLE[case](tmp_path / "file")
    with pytest.raises(FileFormatError, match="contradict"):
        Moments.load(tmp_path / "file")


# ---- the job ----


def test_solved_from_exact_moments_as_from_floats():
    x, keys = normal(3000, 24, seed=5), torch.arange(3000) % 6
    x += torch.nn.functional.one_hot(keys, 24) * 3
    head = torch.nn.Linear(24, 6)
    with torch.no_grad():
        head.weight.copy_(torch.eye(24)[:6])
    bases = []
    for exact in (None, True):
        moments = GroupedMoments(24, exact=exact).update(x, keys)
        projection = loft.solve(moments.without([2]), moments.select([2]), head=head)
        bases.append(projection.matrix())
    assert float((bases[0] - bases[1]).abs().max()) <= 1e-4
