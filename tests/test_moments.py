"""Moments of a stream against two-pass moments in extended precision, whatever is added, merged, removed and copied."""

import numpy as np
import pytest
import torch
from conftest import check_moments as check
from conftest import normal, state, truth
from hypothesis import given
from hypothesis import strategies as st

from loft_fast import GroupedMoments, InputError, Moments
from loft_fast.backends import FLOATS

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# 20: more than a vector register holds, and a rest.
sizes, dims, seeds = st.integers(0, 40), st.sampled_from([1, 2, 3, 5, 20]), st.integers(0, 10**6)


@st.composite
def rows(draw, dim=None):
    """Normal rows about some mean; a feature may be constant, rows may repeat."""
    n, d = draw(sizes), draw(dims) if dim is None else dim
    x = normal(n, d, mean=draw(st.sampled_from([0.0, -3.0, 10.0])), seed=draw(seeds))
    if draw(st.booleans()):
        x[:, 0] = 0.1
    if draw(st.booleans()):
        x[1::2] = x[: n // 2]
    return x


@st.composite
def pieces(draw):
    """The same rows in another order, cut into blocks, some of them empty. Returns (rows, blocks)."""
    x = draw(rows())
    order = draw(st.permutations(range(len(x))))
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=6)))
    return x, list(x[list(order)].tensor_split(cuts)) if len(x) else [x, x]


@st.composite
def pairs(draw):
    d = draw(dims)
    return draw(rows(dim=d)), draw(rows(dim=d))


# ---- the stream and its algebra ----


@given(pieces())
def test_split_and_order_do_not_matter(case):
    x, blocks = case
    moments = Moments(x.shape[1])
    for block in blocks:
        assert moments.update(block) is moments
    check(moments, x, 1e-12)


@given(pieces(), st.randoms(use_true_random=False))
def test_merge_tree_does_not_matter(case, random):
    x, blocks = case
    parts = [Moments(x.shape[1]).update(block) for block in blocks]
    while len(parts) > 1:
        left, right = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        parts.append(left + right if random.random() < 0.5 else left.merge(right))
    check(parts[0], x, 1e-12)


@given(pairs())
def test_remove_undoes_update(case):
    kept, gone = case
    moments = Moments(kept.shape[1]).update(kept).update(gone)
    assert moments.remove(gone) is moments
    check(moments, kept, 1e-10, among=torch.cat(case))


@given(pairs())
def test_subtracting_undoes_adding(case):
    a, b = (Moments(x.shape[1]).update(x) for x in case)
    check((a + b) - b, case[0], 1e-10, among=torch.cat(case))
    check((a + b) - a, case[1], 1e-10, among=torch.cat(case))
    assert state(a - a) == state(Moments(a.dim))


# A stream shrinks to nothing in steps, and what rounding leaves of a feature that no remaining row has (ReLU) must not
# be taken for rows that were never added; nor after a save.
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "constant", "wide"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_everything_can_be_removed_in_steps(tmp_path, dtype, kind, saved):
    x = normal(150, 12, dtype=F64)
    if kind == "sparse":
        x = x.relu() * (normal(150, 12, seed=1) > 1.5)
    elif kind == "constant":
        x[:, ::2] = torch.tensor([0.1, 1 / 3, 7e-5, 30.1, 100.3, -2.7], dtype=F64)
    else:
        x = x * torch.logspace(-4, 3, 12, dtype=F64) + 10
    x = x.to(dtype)
    moments = Moments(12)
    for block in x.split(17):
        moments.update(block)
    for block in x.split([40, 1, 1, 60, 20, 1, 1, 1, 20, 3, 1, 1]):
        moments.remove(block)
        if saved:
            moments.save(tmp_path / "moments")
            moments = Moments.load(tmp_path / "moments")
    assert state(moments) == state(Moments(12))


class Tracked:
    """A Moments beside the rows that it should hold."""

    def __init__(self, moments, x):
        self.moments, self.x = moments, x


@given(st.randoms(use_true_random=False), seeds)
def test_copies_share_nothing_that_can_be_seen(random, seed):
    # Any program of updates, merges and copies: each object keeps to its own rows.
    objects = [Tracked(Moments(3), torch.zeros(0, 3, dtype=F64))]
    for step in range(12):
        one, other = random.choice(objects), random.choice(objects)
        x = normal(random.randrange(4), 3, seed=seed + step)
        action = random.choice(["update", "merge", "copy", "add", "subtract"])
        if action == "update":
            one.moments.update(x)
            one.x = torch.cat([one.x, x])
        elif action == "merge":
            one.moments.merge(other.moments)
            one.x = torch.cat([one.x, other.x])
        elif action == "copy":
            objects.append(Tracked(one.moments.copy(), one.x))
        elif action == "add":
            objects.append(Tracked(one.moments + other.moments, torch.cat([one.x, other.x])))
        else:
            objects.append(Tracked((one.moments + other.moments) - other.moments, one.x))
        everything = torch.cat([each.x for each in objects])
        for each in objects:
            check(each.moments, each.x, 1e-10, among=everything)


# ---- numerics ----


@pytest.mark.parametrize("blocks", [1, 7, 500])
def test_mean_a_million_times_the_spread(blocks):
    x = normal(3000, 8, mean=1e6, dtype=F32)
    moments = Moments(8)
    for block in x.tensor_split(blocks):
        moments.update(block)
    covariance = truth(x)[1] / 2999
    assert np.abs(moments.covariance().numpy() - covariance).max() <= 1e-4 * covariance.max()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_features(dtype):
    x = normal(1500, 20, mean=5.0, dtype=dtype)
    moments = Moments(20)
    for block in x.split(400):
        moments.update(block)
    # Their own values are exact in float64; only the products are rounded, to 32 bits.
    check(moments, x, 1e-6)


def test_largest_accepted_features_do_not_overflow():
    for dtype, largest in ((F64, 1e150), (F32, 9e16), (BF16, 9e16), (F16, 65504.0)):
        x = torch.tensor([[largest, -largest], [-largest, -largest]], dtype=dtype).repeat(600, 1)
        moments = Moments(2).update(x).update(x)
        assert torch.isfinite(moments.covariance()).all()
        assert moments.covariance(ddof=0)[0, 0] == pytest.approx(float(x[0, 0]) ** 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [2.0**-36, 2.0**-66, 2.0**-80])
@pytest.mark.parametrize("blocks", [1, 9])  # a block merged into nothing; and further ones
def test_small_features_do_not_underflow(use, dtype, scale, blocks):
    for backend in ("native", "torch"):
        use("moments_update", backend, dtype)
        x = normal(900, 6, mean=1.0, dtype=dtype)
        moments = Moments(6)
        for block in (x * scale).split(900 // blocks):
            moments.update(block)
        check(moments, x * scale, 1e-6)
        moments = GroupedMoments(6).update(x * scale, torch.arange(900) % 2)
        check(moments.total(), x * scale, 1e-6)


def test_no_rows_change_nothing():
    moments = Moments(3).update(normal(5, 3))
    before = state(moments)
    moments.update(torch.zeros(0, 3)).update(torch.zeros(2, 0, 3)).remove(torch.zeros(0, 3)).merge(Moments(3))
    assert state(moments) == before
    assert state(Moments(3).update(torch.zeros(0, 3))) == state(Moments(3))


def test_one_row():
    x = normal(1, 4, dtype=F32)
    moments = Moments(4).update(x)
    assert torch.equal(moments.mean, x[0].double())
    assert not moments.scatter.any()


def test_every_position_is_a_row():
    x = normal(2, 5, 3, seed=2)
    check(Moments(3).update(x), x.reshape(-1, 3), 1e-12)
    check(Moments(3).update(x.transpose(0, 1)), x.reshape(-1, 3), 1e-12)
    check(Moments(3).update(x[:, 0]).remove(x[:1, 0]), x[1:, 0], 1e-12, among=x[:, 0])


# ---- what is read off ----


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_covariance(ddof):
    x = normal(9, 4, mean=2.0)
    got = Moments(4).update(x).covariance(ddof)
    np.testing.assert_allclose(got, np.cov(x.numpy().T, ddof=ddof), rtol=1e-12)


@pytest.mark.parametrize(("n", "ddof"), [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3)])
def test_covariance_needs_more_rows_than_ddof(n, ddof):
    with pytest.raises(InputError, match=f"ddof={ddof} needs more than {ddof} rows, got {n}"):
        Moments(3).update(normal(n, 3)).covariance(ddof)


@pytest.mark.parametrize("ddof", [-1, 1.0, True, None])
def test_wrong_ddof(ddof):
    with pytest.raises(InputError, match="ddof: got"):
        Moments(3).update(normal(5, 3)).covariance(ddof)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_second_moment(dtype):
    x, about = normal(9, 20, mean=2.0), normal(20, seed=1, dtype=dtype)
    want = sum(np.outer(z, z) for z in (x - about.double()).numpy()) / 9
    got = Moments(20).update(x).second_moment(about)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("about", [None, 0.0, [0.0] * 3, torch.zeros(2), torch.zeros(1, 3), torch.tensor(0.0)], ids=str)
def test_wrong_about(about):
    with pytest.raises(InputError, match="about: got"):
        Moments(3).update(normal(5, 3)).second_moment(about)


def test_second_moment_needs_rows():
    with pytest.raises(InputError, match="no rows"):
        Moments(3).second_moment(torch.zeros(3))


def test_repr_tells_size_and_count():
    assert repr(Moments(3).update(normal(5, 3))) == "Moments(dim=3, count=5, device='cpu')"


# ---- autograd and inference mode ----

MAKERS = {
    "updated": lambda path: Moments(3).update(normal(5, 3)),
    "copied": lambda path: Moments(3).update(normal(5, 3)).copy(),
    "added": lambda path: Moments(3).update(normal(5, 3)) + Moments(3).update(normal(5, 3)),
    "removed": lambda path: Moments(3).update(normal(5, 3)).remove(normal(5, 3)[:2]),
    "loaded": Moments.load,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_made_in_inference_mode_used_outside(tmp_path, maker):
    path = tmp_path / "moments"
    MAKERS["updated"](path).save(path)
    with torch.inference_mode():
        moments = MAKERS[maker](path)
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    (moments.scatter @ (weight * moments.mean)).sum().backward()  # saved for backward, which inference tensors refuse
    assert torch.equal(weight.grad, moments.scatter.sum(0) * moments.mean)
    before = moments.count
    assert moments.update(normal(4, 3)).count == before + 4
    with torch.inference_mode():
        assert moments.update(normal(4, 3)).count == before + 8


def test_state_keeps_no_graph():
    moments = Moments(3).update(normal(5, 3).requires_grad_())
    assert not moments.mean.requires_grad
    assert not moments.scatter.requires_grad


# ---- files ----


@pytest.mark.parametrize("n", [0, 1, 50])
def test_file_round_trip_is_exact(tmp_path, n):
    moments = Moments(7).update(normal(n, 7, mean=1 / 3))
    moments.site = "fc:input"
    moments.save(tmp_path / "moments.safetensors")
    assert state(Moments.load(tmp_path / "moments.safetensors")) == state(moments)


# ---- wrong arguments ----


def spoiled(value, dtype=F32):
    x = torch.ones(6, 3, dtype=dtype)
    x[1, 2] = x[4, 0] = x[4, 1] = value
    return x


WRONG_ROWS = {
    "x: got list": [[1.0, 2.0, 3.0]],
    "x: got dtype torch.int64": torch.ones(2, 3, dtype=torch.int64),
    "x: got dtype torch.bool": torch.ones(2, 3, dtype=torch.bool),
    "x: got dtype torch.complex64": torch.ones(2, 3, dtype=torch.complex64),
    "x: got shape (2, 4), expected (n, 3)": torch.ones(2, 4),
    "x: got shape (3,)": torch.ones(3),
    "x: got shape ()": torch.tensor(1.0),
    "x: 2 of 6 rows contain NaN or Inf": spoiled(float("nan")),
    "x: 2 of 6 rows contain NaN or Inf (float64)": spoiled(float("inf"), F64),
    "x: 2 of 6 rows contain NaN or Inf (float16)": spoiled(float("-inf"), F16),
    "x: 2 of 6 rows contain NaN or Inf (bfloat16)": spoiled(float("nan"), BF16),
    "x: got features up to 1.0e+18": spoiled(-1e18),
    "x: got features up to 1.0e+151": spoiled(1e151, F64),
}


@pytest.mark.parametrize("method", ["update", "remove"])
@pytest.mark.parametrize("message", WRONG_ROWS)
def test_wrong_rows_are_refused_and_nothing_changes(method, message):
    moments = Moments(3).update(normal(9, 3))
    before = state(moments)
    with pytest.raises(InputError) as caught:
        getattr(moments, method)(WRONG_ROWS[message])
    assert str(caught.value).startswith(message.split(" (float")[0].split(" (bfloat")[0])
    assert state(moments) == before


@pytest.mark.parametrize("make", [lambda: Moments(3), lambda: GroupedMoments(3)], ids=["moments", "groups"])
def test_an_interrupted_first_update_leaves_nothing(make, monkeypatch):
    # A fresh matrix holds anything until rows have come.
    def interrupted(rows, count, mean, scatter, group):
        scatter[0].fill_(7.0)
        raise KeyboardInterrupt

    moments, x = make(), normal(2000, 3)
    keys = [torch.zeros(len(x), dtype=torch.int64)] if isinstance(moments, GroupedMoments) else []
    before = state(moments)
    with monkeypatch.context() as patch:
        patch.setattr("loft_fast.ops.moments_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            moments.update(x, *keys)
    assert state(moments) == before
    assert state(moments.update(x, *keys)) == state(make().update(x, *keys))


# 5 rows are there. A removal can only be refused where no set of rows could be what it leaves.
NEVER_ADDED = {
    "more than there are": normal(6, 3),
    "one, far away": torch.full((1, 3), 50.0),
    "a spread of their own": 20 * normal(3, 3, seed=1),
    "all but one": normal(4, 3, seed=1),
    "as many as there are": normal(5, 3, seed=1),
    "as many, but without spread": normal(5, 3).mean(0).expand(5, 3),
}


@pytest.mark.parametrize("case", NEVER_ADDED)
def test_rows_never_added_cannot_be_removed(case):
    moments = Moments(3).update(normal(5, 3))
    before = state(moments)
    with pytest.raises(InputError, match=r"^x: (cannot remove 6 rows from moments of 5|these rows were never added)"):
        moments.remove(NEVER_ADDED[case])
    with pytest.raises(InputError, match=r"^other: "):
        moments - Moments(3).update(NEVER_ADDED[case])
    assert state(moments) == before


@pytest.mark.parametrize("action", ["__add__", "__sub__", "merge"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (3, "other: got int, expected Moments"),
        (Moments(4), "other: got dim 4, expected 3"),
        (None, "other: got NoneType"),
    ],
)
def test_wrong_partner(action, other, message):
    moments = Moments(3).update(normal(5, 3))
    before = state(moments)
    with pytest.raises(InputError, match=message):
        getattr(moments, action)(other)
    assert state(moments) == before


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, "3", None])
def test_wrong_dim(dim):
    with pytest.raises(InputError, match="dim: got"):
        Moments(dim)
