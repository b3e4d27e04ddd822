"""GroupedMoments against one Moments per group, and what forgetting a group leaves."""

import numpy as np
import pytest
import torch
from conftest import check_moments, normal, state
from hypothesis import given
from hypothesis import strategies as st

from loft_fast import GroupedMoments, InputError, Moments, backends

F64, F32 = torch.float64, torch.float32
KEYS = [0, 7, -2, "0", "b"]  # 0 and "0" are two groups


@st.composite
def streams(draw):
    """Blocks of (rows, one key per row), some empty."""
    sizes = draw(st.lists(st.integers(0, 15), min_size=1, max_size=5))
    d = draw(st.sampled_from([1, 3, 20]))
    keys = st.sampled_from(KEYS)
    return [
        (normal(n, d, mean=2.0, seed=100 * i), draw(st.lists(keys, min_size=n, max_size=n)))
        for i, n in enumerate(sizes)
    ]


def grouped(stream):
    moments = GroupedMoments(stream[0][0].shape[1])
    for x, group in stream:
        assert moments.update(x, group) is moments
    return moments


def flat(stream):
    """(all rows, all keys)."""
    return torch.cat([x for x, _ in stream]), [key for _, group in stream for key in group]


def of_key(x, group, key):
    return x[torch.tensor([each == key for each in group], dtype=torch.bool)]


def check(moments, x, group, tolerance=1e-12, among=None):
    """Every group and the total are those of the rows x."""
    for key in moments:
        check_moments(moments[key], of_key(x, group, key), tolerance, among)
    check_moments(moments.total(), x, tolerance, among)
    assert moments.count == len(x)
    assert set(group) <= set(moments)


def some(n=40, keys=(0, 1, 2), d=3, seed=0):
    """A GroupedMoments whose n rows go to `keys` in turn."""
    return GroupedMoments(d).update(normal(n, d, seed=seed), [keys[i % len(keys)] for i in range(n)])


# ---- the stream and its algebra ----


@given(streams())
def test_each_group_and_the_total_are_those_of_their_rows(stream):
    x, group = flat(stream)
    moments = grouped(stream)
    assert set(moments) == set(group)
    check(moments, x, group)


@given(streams())
def test_one_by_one_equals_per_group_moments(stream):
    parts = {key: Moments(stream[0][0].shape[1]) for key in KEYS}
    for x, group in stream:
        for key in KEYS:
            parts[key].update(of_key(x, group, key))
    moments = grouped(stream)
    for key in moments:
        part = moments[key]
        assert part.count == parts[key].count
        torch.testing.assert_close(part.mean, parts[key].mean, rtol=0, atol=1e-13)
        torch.testing.assert_close(part.scatter, parts[key].scatter, rtol=0, atol=1e-11)


@given(streams(), st.integers(0, 5))
def test_split_and_merge_do_not_matter(stream, cut):
    x, group = flat(stream)
    dim = x.shape[1]
    left = GroupedMoments(dim).update(x[:cut], group[:cut])
    right = GroupedMoments(dim).update(x[cut:], group[cut:])
    check(left + right, x, group)
    check(right + left, x, group)
    assert left.merge(right) is left
    check(left, x, group)


@given(streams(), streams())
def test_remove_undoes_update(kept, gone):
    x, group = flat(kept)
    more = normal(len(flat(gone)[1]), x.shape[1], seed=3)
    everything = torch.cat([x, more])
    moments = grouped(kept).update(more, flat(gone)[1])
    assert moments.remove(more, flat(gone)[1]) is moments
    check(moments, x, group, 1e-10, among=everything)
    both = grouped(kept) + GroupedMoments(x.shape[1]).update(more, flat(gone)[1])
    check(both - grouped(kept), more, flat(gone)[1], 1e-10, among=everything)


def test_every_position_needs_its_key():
    x, group = normal(4, 5, 3), torch.arange(20).reshape(4, 5) % 3
    check(GroupedMoments(3).update(x, group), x.reshape(-1, 3), group.flatten().tolist())


# ---- forgetting ----


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    if request.param not in backends.available():
        pytest.skip(f"{request.param} is not available here")
    monkeypatch.setenv(backends.VARIABLE, request.param)


# 9000 rows in two blocks: more than the 4096 that any backend takes at once, so that groups share blocks.
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", backends.FLOATS, ids=str)
def test_forgotten_is_bit_for_bit_never_seen(dtype):
    x = normal(9000, 6, mean=3.0, dtype=dtype)
    group = torch.randint(0, 5, (9000,), generator=torch.Generator().manual_seed(0))
    seen, never_seen = GroupedMoments(6), GroupedMoments(6)
    for rows, keys in zip(x.split(6000), group.split(6000), strict=True):
        seen.update(rows, keys)
        stays = (keys != 1) & (keys != 4)
        never_seen.update(rows[stays], keys[stays])
    assert state(seen.without([4, 1]).total()) == state(never_seen.total())
    assert seen.forget([1, 4]) is seen
    assert state(seen) == state(never_seen)
    assert state(seen.total()) == state(never_seen.total())


def test_total_does_not_depend_on_the_order_in_which_groups_came():
    x, keys = normal(30, 3), [2, "a", 1, "b", 0] * 6
    first, second = GroupedMoments(3), GroupedMoments(3)
    for key in (0, 1, 2, "a", "b"):
        first.update(of_key(x, keys, key), [key] * 6)
    for key in ("b", 2, "a", 0, 1):
        second.update(of_key(x, keys, key), [key] * 6)
    assert first.keys() == second.keys() == [0, 1, 2, "a", "b"]
    assert state(first.total()) == state(second.total())


def test_select_and_without_split_the_groups():
    moments = some(keys=(3, 1, "x"))
    chosen, rest = moments.select([3, "x"]), moments.without([3, "x"])
    assert (chosen.keys(), rest.keys()) == ([3, "x"], [1])
    assert state(chosen + rest) == state(moments)
    assert moments.select([]).keys() == []
    assert state(moments.without([])) == state(moments)


def test_forgetting_every_group_leaves_nothing():
    moments = some().forget([0, 1, 2])
    assert (len(moments), moments.count) == (0, 0)
    assert state(moments.total()) == state(Moments(3))


# ---- nothing shared ----


@given(st.randoms(use_true_random=False), st.integers(0, 10**6))
def test_views_share_nothing_that_can_be_seen(random, seed):
    # Any program of updates, selections and merges: each object keeps to its own rows.
    objects = [(GroupedMoments(2), normal(0, 2), [])]
    for step in range(10):
        at, other = random.randrange(len(objects)), random.randrange(len(objects))
        moments, x, group = objects[at]
        chosen = [key for key in moments if random.random() < 0.5]
        stays = torch.tensor([key in chosen for key in group], dtype=torch.bool)
        kept = x[stays], [key for key in group if key in chosen]
        more = normal(random.randrange(4), 2, seed=seed + step)
        their_keys = [random.choice(KEYS) for _ in more]
        action = random.choice(["update", "select", "without", "forget", "merge", "add", "read"])
        if action == "update":
            moments.update(more, their_keys)
            objects[at] = moments, torch.cat([x, more]), group + their_keys
        elif action == "select":
            objects.append((moments.select(chosen), *kept))
        elif action == "without":
            objects.append((moments.without([key for key in moments if key not in chosen]), *kept))
        elif action == "forget":
            objects[at] = moments.forget([key for key in moments if key not in chosen]), *kept
        elif action == "merge":
            objects[at] = moments.merge(objects[other][0]), torch.cat([x, objects[other][1]]), group + objects[other][2]
        elif action == "add":
            objects.append((moments + objects[other][0], torch.cat([x, objects[other][1]]), group + objects[other][2]))
        else:
            # What is read off belongs to the reader.
            for part in [moments.total(), *(moments[key] for key in moments)]:
                part.update(normal(3, 2, seed=seed))
        for each, rows, keys in objects:
            check(each, rows, keys, 1e-10, among=torch.cat([rows for _, rows, _ in objects]))


def test_made_in_inference_mode_used_outside(tmp_path):
    with torch.inference_mode():
        some().save(tmp_path / "groups")
        made = [some(), some().select([0]), some() + some(), GroupedMoments.load(tmp_path / "groups")]
    for moments in made:
        before = moments.count
        weight = torch.ones(3, dtype=F64, requires_grad=True)
        for part in (moments[0], moments.total()):
            (part.scatter @ (weight * part.mean)).sum().backward()  # saved for backward: inference tensors refuse
        assert moments.update(normal(3, 3), [0, 0, 9]).count == before + 3


# ---- keys ----


@pytest.mark.parametrize(
    "group",
    [
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0, 1], dtype=torch.uint8),
        torch.tensor([[1], [0], [1]]),
        np.array([1, 0, 1]),
        list(torch.tensor([1, 0, 1])),
        list(np.array([1, 0, 1], dtype=np.int16)),
        (1, 0, 1),
        iter([1, 0, 1]),
    ],
    ids=lambda group: type(group).__name__,
)
def test_any_integers_are_keys(group):
    x = normal(3, 2)
    assert state(GroupedMoments(2).update(x, group)) == state(GroupedMoments(2).update(x, [1, 0, 1]))


def test_numpy_strings_are_keys():
    moments = GroupedMoments(2).update(normal(3, 2), np.array(["b", "a", "b"]))
    assert [(type(key), key) for key in moments] == [(str, "a"), (str, "b")]


@pytest.mark.parametrize(
    "keys",
    [np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0]), {2, 0}, (2, 0, 2)],
    ids=lambda keys: type(keys).__name__,
)
def test_groups_are_chosen_by_any_integers(tmp_path, keys):
    chosen = some().select(keys)
    chosen.save(tmp_path / "groups")  # the keys are plain numbers again
    assert state(GroupedMoments.load(tmp_path / "groups")) == state(some().select([0, 2]))


def test_behaves_as_a_mapping():
    moments = some(keys=(2, "a", 1))
    assert (moments.keys(), list(moments), len(moments)) == ([1, 2, "a"], [1, 2, "a"], 3)
    assert "a" in moments
    assert 7 not in moments
    assert moments.dim == 3
    assert repr(moments) == "GroupedMoments(dim=3, groups=3, count=40)"


def test_no_rows_make_no_groups():
    assert len(GroupedMoments(3).update(torch.zeros(0, 3), [])) == 0
    moments = some()
    before = state(moments)
    moments.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).remove(torch.zeros(0, 3), [])
    assert state(moments) == before


# ---- files ----


@pytest.mark.parametrize("keys", [(0, 1, 2), ("a", "b"), (1, "1", -5, 2**40, "ü/\n\"'", "")], ids=str)
def test_file_round_trip_is_exact(tmp_path, keys):
    moments = some(keys=keys, d=7)
    moments.site = "layer4:output"
    moments.save(tmp_path / "groups.safetensors")
    loaded = GroupedMoments.load(tmp_path / "groups.safetensors")
    assert loaded.keys() == moments.keys()
    assert state(loaded) == state(moments)
    assert state(loaded.total()) == state(moments.total())
    assert loaded[keys[0]].site == loaded.total().site == "layer4:output"


def test_file_round_trip_without_groups_and_without_rows(tmp_path):
    for moments in (GroupedMoments(4), some(d=4) - some(d=4)):
        moments.save(tmp_path / "groups")
        assert state(GroupedMoments.load(tmp_path / "groups")) == state(moments)


# ---- wrong arguments ----

BAD_X = torch.ones(3, 3)
BAD_X[1, 1] = float("nan")
# (x, group) for update and remove
WRONG_ROWS = {
    "x: got shape (3, 4), expected (n, 3)": (torch.ones(3, 4), [0, 1, 2]),
    "x: got dtype torch.int64": (torch.ones(3, 3, dtype=torch.int64), [0, 1, 2]),
    "x: 1 of 3 rows contain NaN or Inf": (BAD_X, [0, 1, 2]),
    "x: got features up to 1.0e+18": (torch.full((3, 3), 1e18), [0, 1, 2]),
    "group: got 2 keys for 3 rows": (torch.ones(3, 3), [0, 1]),
    "group: got 4 keys for 3 rows": (torch.ones(3, 3), torch.zeros(4, dtype=torch.int64)),
    "group: got 0 keys for 3 rows": (torch.ones(3, 3), []),
    "group: got dtype torch.float32, expected integer keys": (torch.ones(3, 3), torch.zeros(3)),
    "group: got dtype torch.complex64, expected integer keys": (
        torch.ones(3, 3),
        torch.zeros(3, dtype=torch.complex64),
    ),
    "group: got int, expected one key per row (3)": (torch.ones(3, 3), 0),
    "group: got str, expected one key per row (3)": (torch.ones(3, 3), "abc"),
    "group: got NoneType, expected one key per row (3)": (torch.ones(3, 3), None),
    "group: got the key None": (torch.ones(3, 3), [0, None, 1]),
    "group: got the key 1.5": (torch.ones(3, 3), [0, "a", 1.5]),
    "group: got the key 1.0": (torch.ones(3, 3), np.array([1.0, 0.0, 1.0])),
    "group: got the key True": (torch.ones(3, 3), [0, True, 1]),
    "group: got the key [0]": (torch.ones(3, 3), [[0], [1], [2]]),
    "group: got the key tensor([0, 1])": (torch.ones(3, 3), [torch.tensor([0, 1]), 1, 2]),
    "group: got the key array([0, 1])": (torch.ones(3, 3), np.array([[0, 1]] * 3)),
    "group: got the key b'a'": (torch.ones(3, 3), [b"a", 1, 2]),
}


@pytest.mark.parametrize("method", ["update", "remove"])
@pytest.mark.parametrize("message", WRONG_ROWS)
def test_wrong_rows_are_refused_and_nothing_changes(method, message):
    moments = some()
    before = state(moments)
    with pytest.raises(InputError) as caught:
        getattr(moments, method)(*WRONG_ROWS[message])
    assert str(caught.value).startswith(message)
    assert state(moments) == before


@pytest.mark.parametrize(
    ("x", "group", "message"),
    [
        (normal(2, 3), [0, 5], "group: no group 5; there are 0, 1, 2"),
        (normal(2, 3), [0, "1"], "group: no group '1'; there are 0, 1, 2"),
        (normal(16, 3), [0, 1] + [2] * 14, "x (group 2): cannot remove 14 rows from moments of 13"),
        (torch.cat([normal(40, 3)[:1], torch.full((1, 3), 99.0)]), [0, 1], "x (group 1): these rows were never added"),
    ],
)
def test_rows_never_added_cannot_be_removed(x, group, message):
    # All or nothing: in each case the rows of group 0 could go.
    moments = some()
    before = state(moments)
    with pytest.raises(InputError) as caught:
        moments.remove(x, group)
    assert str(caught.value).startswith(message)
    assert state(moments) == before


UNKNOWN = {
    "keys: no group 9; there are 0, 1, 2": [0, 9],
    "keys: no group '1'; there are": ["1"],
    "keys: got the key None, expected integers or strings": [None],
    "keys: got the key True, expected integers or strings": [0, True],
    "keys: got the key 1.0, expected integers or strings": [1.0],
    "keys: got the key [0], expected integers or strings": [[0]],
    "keys: got 1, expected a list of keys": 1,
    "keys: got 'ab', expected a list of keys": "ab",
    "keys: got None, expected a list of keys": None,
}


@pytest.mark.parametrize("method", ["select", "without", "forget"])
@pytest.mark.parametrize("message", UNKNOWN)
def test_unknown_keys_are_refused_and_nothing_changes(method, message):
    moments = some()
    before = state(moments)
    with pytest.raises(InputError) as caught:
        getattr(moments, method)(UNKNOWN[message])
    assert str(caught.value).startswith(message)
    assert state(moments) == before


def test_reading_an_unknown_key_lists_those_there_are():
    with pytest.raises(InputError, match=r"keys: no group 12; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        some(keys=range(11))[12]
    with pytest.raises(InputError, match="keys: no group 0; there are none"):
        GroupedMoments(3)[0]


@pytest.mark.parametrize("action", ["__add__", "__sub__", "merge"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Moments(3), "other: got Moments, expected GroupedMoments"),
        (some(d=4), "other: got dim 4, expected 3"),
        (None, "other: got NoneType"),
    ],
)
def test_wrong_partner(action, other, message):
    moments = some()
    before = state(moments)
    with pytest.raises(InputError, match=message):
        getattr(moments, action)(other)
    assert state(moments) == before


def test_subtracting_groups_that_are_not_there():
    with pytest.raises(InputError, match="other: no group 9; there are 0, 1, 2"):
        some() - some(keys=(0, 9))
    with pytest.raises(InputError, match=r"other \(group 1\): cannot remove 20 rows from moments of 13"):
        some() - some(20, keys=(1,))


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, None])
def test_wrong_dim(dim):
    with pytest.raises(InputError, match="dim: got"):
        GroupedMoments(dim)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("spread", [1, 3, 40, 10**12], ids="keys up to {}".format)
def test_keys_of_any_integer_type_and_range(dtype, spread):
    keys = (torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0)) * spread - spread).to(dtype)
    x = normal(50, 3)
    moments = GroupedMoments(3).update(x, keys)
    assert moments.keys() == sorted({int(key) for key in keys})
    for key in moments:
        check_moments(moments[key], x[keys == key], 1e-14, among=x)
