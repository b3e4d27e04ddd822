"""The store as a user meets it: requests, the ledger, receipts, and what is refused."""

import copy
import dataclasses
import json
import multiprocessing
import os
import stat
import sys

import pytest
import torch
from conftest import normal
from safetensors import safe_open
from stores import DIM, content, moments, new_store, rows

import loft_fast as loft
from loft_fast import Continual, GroupedMoments, InputError, MissingExtraError, StoreError, UnlearningStore
from loft_fast.fingerprint import fingerprint
from loft_fast.store import verify_receipt

NAMES = ["alice", "bob", "carol", "dave", "erin", "frank"]


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path) as made:
        yield made


def same(one, other):
    return torch.equal(one.basis, other.basis) and torch.equal(one.center, other.center)


# ---- requests ----


def test_a_new_store_holds_the_moments_and_nothing_else(store):
    assert store.moments.digest() == moments().digest()
    assert store.projection is None
    (entry,) = store.ledger()
    assert (entry.action, entry.count, entry.after) == ("create", 480, moments().digest())
    assert repr(store) == f"UnlearningStore({str(store.path)!r}, entries=1)"
    for path in (store.path / "moments").iterdir():
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert (header["schema"], header["exact"], header["site"]) == ("2", repr(moments().exact), "")
    for secret in ("subjects.key", "signing.key"):
        assert stat.S_IMODE((store.path / secret).stat().st_mode) == 0o600


def test_a_request_changes_moments_projection_and_ledger(store):
    entry = store.forget([2, 4], id="first", rank=4)
    assert (entry.number, entry.id, entry.action, entry.count) == (1, "first", "groups", 160)
    assert entry.before == moments().digest()
    assert entry.after == store.moments.digest() == moments().without([2, 4]).digest()
    expected = loft.solve(moments().without([2, 4]), moments().select([2, 4]), rank=4)
    assert same(store.projection, expected)
    assert entry.projection == store.projection.digest()
    assert entry.certificate["rank"] == 4
    assert entry.details["options"] == {"rank": 4}
    assert [each.id for each in store.ledger()] == ["create", "first"]
    assert store.find("first") == entry
    assert [store.forgot(key) for key in (2, torch.tensor(4), "2", 3, 9)] == [True, True, False, False, False]


def test_all_of_it_is_there_after_opening_again(store):
    entry = store.forget([2], rank=4)
    with UnlearningStore(store.path) as again:
        assert again.moments.digest() == store.moments.digest()
        assert same(again.projection, store.projection)
        assert list(again.ledger()) == list(store.ledger())
        assert again.find(entry.id) == entry


def test_a_store_stays_where_it_was_opened(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        UnlearningStore.create("store", moments()).close()
    elsewhere = content(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    with UnlearningStore("store") as store:
        monkeypatch.chdir(tmp_path / "there")
        store.forget([2], rank=4)
        assert store.verify()["groups"] == 5
    assert content(tmp_path / "there") == elsewhere
    with UnlearningStore(tmp_path / "here" / "store") as again:
        assert again.verify()["entries"] == 2


def test_a_store_in_a_folder_whose_name_is_not_utf_8(tmp_path):
    with UnlearningStore.create(os.fsdecode(os.fsencode(tmp_path) + b"/q\xff"), moments()) as store:
        store.forget([2], rank=4)
        assert store.verify()["groups"] == 5


def test_the_same_request_twice_is_one(store):
    first = store.forget([2], id="once", rank=4)
    before = content(store.path)
    assert store.forget([2], id="once", rank=4) == first
    with UnlearningStore(store.path) as again:
        assert again.forget([2], id="once", rank=4) == first
        assert again.forget([2]) == first
        assert again.forget([2, 2], id="another name for it") == first
    assert content(store.path) == before
    for wrong in (lambda: store.forget([3], id="once"), lambda: store.forget_rows(*rows(n=6), id="once")):
        with pytest.raises(InputError, match=r"^id: 'once' was another request, number 1"):
            wrong()


def test_groups_that_went_before_are_no_matter(store):
    store.forget([2], rank=6)
    entry = store.forget([2, 3], rank=5)
    assert entry.count == 80
    assert store.moments.keys() == [0, 1, 4, 5]


def test_rows(store):
    x, keys = rows()
    entry = store.forget_rows(x[:50], keys[:50], id="some", rank=4)
    left = GroupedMoments(DIM, exact=16.0).update(x[50:], keys[50:])
    assert (entry.action, entry.count, len(entry.subjects)) == ("rows", 50, 50)
    assert store.moments.digest() == left.digest() == entry.after
    assert store.forget_rows(x[:50], keys[:50], id="some") == entry
    assert same(store.projection, loft.solve(left, moments() - left, rank=4))


def test_a_group_whose_last_row_goes_is_gone(store):
    x, keys = rows()
    store.forget_rows(x[keys == 2], keys[keys == 2], rank=4)
    assert 2 not in store.moments
    assert store.forget([2]).number == 1
    assert store.verify()["groups"] == 5


@pytest.mark.parametrize("order", [[1, 2, 5], [5, 1, 2], [2, 5, 1]])
def test_kept_forgotten_moments_make_every_request_the_union(tmp_path, order):
    with new_store(tmp_path, keep_forgotten=True) as store:
        for key in order:
            store.forget([key], rank=4)
        at_once = loft.solve(moments().without(order), moments().select(order), rank=4)
        assert same(store.projection, at_once)
        store.verify()
        x, keys = rows()
        store.forget_rows(x[keys == 0][:9], [0] * 9, rank=4)
        kept, gone = store.moments, moments() - store.moments
    with UnlearningStore(tmp_path / "store") as again:
        assert same(again.projection, loft.solve(kept, gone, rank=4))
        again.verify()


def test_without_them_projections_are_nested(store):
    continual = Continual(moments(), keep_forgotten=False, rank=6)
    last = None
    for key in (1, 2, 5):
        store.forget([key], rank=6)
        assert same(store.projection, continual.forget([key]))
        assert last is None or torch.allclose(last.matrix() @ store.projection.basis, store.projection.basis)
        last = store.projection


def test_measured_before_it_is_written(store):
    def measure(projection):
        assert store._ledger.last().number == 0
        return {"accuracy": 99.5, "rank": projection.rank}

    assert store.forget([1], rank=5, measure=measure).details["measured"] == {"accuracy": 99.5, "rank": 5}

    def fail(projection):
        raise RuntimeError("no")

    before = content(store.path)
    with pytest.raises(RuntimeError, match="no"):
        store.forget([2], rank=4, measure=fail)
    with pytest.raises(InputError, match=r"^measure: it returned what JSON cannot write"):
        store.forget([2], rank=4, measure=lambda projection: {"accuracy": projection})
    with pytest.raises(InputError, match=r"^measure: it returned what JSON cannot write"):
        store.forget([2], rank=4, measure=lambda projection: {"accuracy": float("nan")})
    assert content(store.path) == before


# ---- what is left of what went ----


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_of_a_removed_group_is_in_any_file(tmp_path, keep):
    names = dict(enumerate(NAMES))
    x, keys = rows()
    with new_store(tmp_path, names, keep_forgotten=keep) as store:
        store.index_rows(x, [names[key] for key in keys.tolist()])
        gone = moments(names)["carol"]._settled()
        row = gone.matrix[3].numpy().tobytes()[24:]  # of the upper triangle, as files have it
        traces = {"name": b"carol", "sums": gone.vector.numpy().tobytes(), "products": row}
        digest = gone.digest().encode()
        there = b"".join(content(store.path).values())
        assert all(trace in there for trace in [*traces.values(), digest])
        subject = next(iter(store.forget(["carol"], rank=4).subjects)).encode()
        for held in (store, UnlearningStore(store.path)):
            there = b"".join(content(held.path).values())
            assert subject in there
            assert {name: trace in there for name, trace in traces.items()} == dict.fromkeys(traces, keep)
            assert (digest in there) == keep
        indexed = store._ledger._all("SELECT count(*) FROM rows")[0][0]
        assert indexed == 400


def test_the_ledger_has_pseudonyms_that_need_the_key(tmp_path):
    one = new_store(tmp_path / "one", dict(enumerate(NAMES)))
    other = new_store(tmp_path / "other", dict(enumerate(NAMES)))
    entries = [store.forget(["bob"], rank=4) for store in (one, other)]
    assert entries[0].subjects != entries[1].subjects
    for store in (one, other):
        assert b"bob" not in (store.path / "ledger.sqlite").read_bytes()
    assert (tmp_path / "one" / "store" / "subjects.key").read_bytes() not in b"".join(
        data for name, data in content(one.path).items() if name != "subjects.key"
    )


def test_integer_and_string_keys_are_different_subjects(tmp_path):
    x, keys = rows()
    mixed = GroupedMoments(DIM, exact=16.0).update(x, [[0, "0", 1][key % 3] for key in keys.tolist()])
    with UnlearningStore.create(tmp_path / "store", mixed) as store:
        store.forget(["0"], rank=4)
        assert store.moments.keys() == [0, 1]


# ---- the index of rows ----


def test_a_row_that_is_not_in_the_data_is_found_out(store):
    x, keys = rows()
    assert store.index_rows(x[:300], keys[:300]) == 300
    with pytest.raises(InputError, match=r"^x: that would be 100 rows of group 0 in the index, expected at most 80"):
        store.index_rows(x[:300], keys[:300])
    with pytest.raises(InputError, match=r"^x: that would be 1 rows of group 7 in the index, expected at most 0"):
        store.index_rows(x[:1], [7])
    assert store.index_rows(x[300:], keys[300:]) == 480
    other = x[:3].clone()
    other[1, 5] += 0.01  # by a few steps: sums alone do not tell
    before = content(store.path)
    with pytest.raises(InputError, match=r"^x: row 1 is not in the data, or was forgotten before"):
        store.forget_rows(other, keys[:3], rank=4)
    with pytest.raises(InputError, match=r"^x: row 2 is not in the data"):
        store.forget_rows(x[[0, 1, 0]], keys[[0, 1, 0]], rank=4)
    with pytest.raises(InputError, match=r"^x: row 0 is not in the data"):
        store.forget_rows(x[:1], keys[1:2], rank=4)
    assert content(store.path) == before
    store.forget_rows(x[:3], keys[:3], rank=4)
    with pytest.raises(InputError, match=r"^x: row 0 is not in the data, or was forgotten before"):
        store.forget_rows(x[:1], keys[:1])
    store.forget([3], rank=3)
    store.forget_rows(x[4:6], keys[4:6], rank=2)
    assert store.verify()["indexed"] == store.moments.count


def test_an_index_that_went_wrong_is_made_again(store):
    x, keys = rows()
    for _ in range(2):  # once too often, which cannot be told from rows that are there twice
        assert store.index_rows(x[:240], keys[:240])
    with pytest.raises(InputError, match=r"clear_index\(\) and begin again"):
        store.index_rows(x[240:], keys[240:])
    with pytest.raises(InputError, match=r"^x: row 0 is not in the data"):
        store.forget_rows(x[240:241], keys[240:241], rank=4)
    store.clear_index()
    assert store.verify()["indexed"] == 0
    assert store.index_rows(x, keys) == 480
    assert store.forget_rows(x[240:241], keys[240:241], rank=4).count == 1


def test_an_index_of_some_rows_refuses_none(store):
    x, keys = rows()
    store.index_rows(x[:300], keys[:300])
    store.forget_rows(x[400:402], keys[400:402], rank=4)
    assert store.moments.count == 478


# ---- checks ----


def test_verify_says_what_there_is(store):
    store.forget([2], id="first", rank=4)
    found = store.verify(store.receipt("first"))
    assert found == {
        "entries": 2,
        "groups": 5,
        "rows": 400,
        "indexed": 0,
        "digest": moments().without([2]).digest(),
        "projection": store.projection.digest(),
    }


def test_undo_check(store):
    store.forget([2], id="first", rank=4)
    assert store.undo_check("first", moments().select([2]))
    assert not store.undo_check("first", moments().select([3]))
    store.forget([4], id="second", rank=3)
    assert store.undo_check("second", moments().select([4]))
    assert not store.undo_check("first", moments().select([2]))
    assert store.undo_check("first", moments().select([2, 4]))
    with pytest.raises(InputError, match=r"^id: no request 'third'"):
        store.undo_check("third", moments())
    with pytest.raises(InputError, match=r"^other: got moments with exact="):
        store.undo_check("first", GroupedMoments(DIM, exact=99.0))


def test_receipts_are_verified_with_and_without_the_store(store, tmp_path):
    entry = store.forget([2], id="first", rank=4)
    receipt = json.loads(json.dumps(store.receipt("first")))
    assert verify_receipt(receipt, store.public_key) == entry
    store.forget([3], rank=3)
    store.verify(receipt)
    stranger = new_store(tmp_path / "stranger")
    with pytest.raises(StoreError, match=r"^receipt: it was signed with another key"):
        stranger.verify(receipt)
    with pytest.raises(InputError, match=r"^id: no request 'zero'"):
        store.receipt("zero")


def forged(receipt, path, value):
    changed = copy.deepcopy(receipt)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["entry", "count"], 81),
        (["entry", "time"], "2020-01-01T00:00:00+00:00"),
        (["entry", "subjects"], []),
        (["entry", "id"], "zeroth"),
        (["entry", "certificate", "rank"], 5),
        (["store"], "another"),
        (["signature"], "00" * 64),
        (["signature"], "not hexadecimal"),
        (["signature"], None),
        (["more"], 1),
    ],
)
def test_forged_receipts(store, path, value):
    store.forget([2], id="first", rank=4)
    with pytest.raises(StoreError, match=r"^receipt: it was changed after it was signed"):
        store.verify(forged(store.receipt("first"), path, value))


@pytest.mark.parametrize(
    "receipt", [{}, [], None, 3, {"format": "loft_fast.receipt"}, {"format": 1, "schema": 1, "entry": {}}]
)
def test_what_is_no_receipt(store, receipt):
    with pytest.raises(StoreError, match=r"^receipt: "):
        verify_receipt(receipt, store.public_key)


def test_a_receipt_of_a_newer_schema(store):
    store.forget([2], id="first", rank=4)
    with pytest.raises(StoreError, match=r"^receipt: got .*'schema': 2"):
        store.verify(forged(store.receipt("first"), ["schema"], 2))


def test_a_receipt_for_an_entry_that_the_ledger_lacks(tmp_path):
    import shutil

    with new_store(tmp_path) as store:
        shutil.copytree(store.path, tmp_path / "before")
        store.forget([2], id="first", rank=4)
        receipt = store.receipt("first")
    with (
        UnlearningStore(tmp_path / "before") as rolled_back,
        pytest.raises(StoreError, match=r"^receipt: the ledger has no such entry"),
    ):
        rolled_back.verify(receipt)


def test_without_cryptography_everything_but_receipts_works(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with new_store(tmp_path) as store:
        store.forget([2], id="first", rank=4)
        assert store.verify()["entries"] == 2
        for receipts in (lambda: store.receipt("first"), lambda: store.public_key):
            with pytest.raises(MissingExtraError, match=r"pip install 'loft-fast\[store\]'"):
                receipts()
        monkeypatch.undo()  # and when it is there, so are receipts
        assert store.verify(store.receipt("first"))["entries"] == 2


# ---- models ----


class Net(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.fc = torch.nn.Linear(5, DIM), torch.nn.Linear(DIM, 6)

    def forward(self, x):
        return self.fc(self.body(x))


def fitted(net):
    """The net with a head that tells the groups of `rows` apart."""
    with torch.no_grad():
        net.fc.weight.copy_(torch.eye(6, DIM))
        net.fc.bias.fill_(-1.5)
    return net


def at_site():
    found = moments()
    found.site = "fc:input"
    return found


def test_the_head_finds_the_angle_and_another_model_is_refused(tmp_path):
    net = fitted(Net())
    with UnlearningStore.create(tmp_path / "store", at_site(), net) as store:
        for other in (Net(seed=1), torch.nn.Sequential(Net())):
            with pytest.raises((InputError, loft.SiteError), match=r"^(model: its fingerprint|site: no module)"):
                store.forget([2], model=other)
        with safe_open(next((store.path / "moments").iterdir()), "pt") as file:
            header = file.metadata()
        assert (header["site"], header["fingerprint"]) == ("fc:input", fingerprint(net, "fc", whole=False))
        entry = store.forget([2], model=net)
        expected = loft.solve(at_site().without([2]), at_site().select([2]), head=net.fc)
        assert same(store.projection, expected)
        assert store.projection.site == store.site == "fc:input"
        assert entry.certificate["predicted"]["forget accuracy"] < 1
        loft.fold(net, store.projection)
        store.forget([3], model=net)  # into which the last projection was folded
        assert store.verify()["groups"] == 4


def test_a_folded_model_is_another_where_projections_are_for_the_original(tmp_path):
    net = fitted(Net())
    with UnlearningStore.create(tmp_path / "store", at_site(), net, keep_forgotten=True) as store:
        store.forget([2], model=net)
        loft.fold(net, store.projection)
        with pytest.raises(InputError, match=r"^model: its fingerprint is"):
            store.forget([3], model=net)


def test_fingerprints_do_not_depend_on_wrappers_and_dtypes_count():
    net = Net()
    inside = Net()
    inside.body = torch.compile(inside.body)
    assert fingerprint(inside) == fingerprint(net)
    assert fingerprint(torch.compile(net), "fc") == fingerprint(torch.nn.DataParallel(net), "fc") == fingerprint(net)
    assert fingerprint(copy.deepcopy(net).double()) != fingerprint(net)
    changed = copy.deepcopy(net)
    changed.fc.bias.data[0] += 1
    assert fingerprint(changed) != fingerprint(net)
    assert fingerprint(changed, "fc", whole=False) == fingerprint(net, "fc", whole=False)
    assert fingerprint(changed, "fc:output", whole=False) != fingerprint(net, "fc:output", whole=False)


# ---- refusals ----


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda s: s.forget([9]), r"^keys: no group 9; there are 0, 1, 2"),
        (lambda s: s.forget("2"), r"^keys: got '2', expected a list"),
        (lambda s: s.forget([2.5]), r"^keys: got the key 2.5, expected integers or strings"),
        (lambda s: s.forget([[1]]), r"^keys: got the key \[1\]"),
        (lambda s: s.index_rows(normal(2, DIM) * float("nan"), [0, 0]), r"^x: 2 of 2 rows contain NaN"),
        (lambda s: s.forget([]), r"^forget: the set is empty"),
        (lambda s: s.forget(range(6)), r"^retain: the set is empty"),
        (lambda s: s.forget([1], id=""), r"^id: got '', expected a text of 1 to 200"),
        (lambda s: s.forget([1], id="x" * 201), r"^id: got "),
        (lambda s: s.forget([1], id=7), r"^id: got 7"),
        (lambda s: s.forget([1], id="\ud800"), r"^id: got '\\ud800', expected a text"),
        (lambda s: s.find("\udcff"), r"^id: no request '\\udcff' in the ledger"),
        (lambda s: s.forget([1], rank=12), r"^rank: got 12"),
        (lambda s: s.forget([1], model=3), r"^model: got int"),
        (lambda s: s.forget_rows(normal(3, 11), [0, 0, 0]), r"^x: got shape"),
        (lambda s: s.forget_rows(normal(3, DIM), [0, 0]), r"^group: got 2 keys for 3 rows"),
        (lambda s: s.forget_rows(9 * normal(3, DIM), [0, 0, 0]), r"never added"),
        (lambda s: s.forget_rows(normal(3, DIM), [0, 0, 7]), r"^other: no group 7"),
        (lambda s: s.index_rows(normal(3, 11), [0, 0, 0]), r"^x: got shape"),
        (lambda s: s.find("nothing"), r"^id: no request 'nothing' in the ledger"),
    ],
)
def test_refusals_leave_the_store_as_it_was(store, request_, message):
    before = content(store.path)
    with pytest.raises(InputError, match=message):
        request_(store)
    assert content(store.path) == before
    assert store.verify()["entries"] == 1


def test_the_last_groups_cannot_go(store):
    store.forget([0], rank=1)
    before = content(store.path)
    x, keys = rows()
    with pytest.raises(InputError, match=r"^retain: the set is empty"):
        store.forget([1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=r"^retain: the set is empty"):
        store.forget_rows(x[keys > 0], keys[keys > 0])
    assert content(store.path) == before
    assert store.forget([1]).certificate["why"].startswith("one dimension cannot be narrowed")
    assert UnlearningStore(store.path).verify()["groups"] == 4


@pytest.mark.parametrize("keep", [False, True])
def test_a_later_request_for_nothing_is_refused(tmp_path, keep):
    with new_store(tmp_path, keep_forgotten=keep) as store:
        store.forget([0], rank=4)
        before = content(store.path)
        with pytest.raises(InputError, match=r"^forget: the set is empty"):
            store.forget([])
        assert content(store.path) == before


def test_near_names(tmp_path):
    with (
        new_store(tmp_path, dict(enumerate(NAMES))) as store,
        pytest.raises(InputError, match=r"^keys: no group 'alise'; there are 'alice', "),
    ):
        store.forget(["alise"])


def test_groups_below_the_minimum(tmp_path):
    x, keys = rows()
    with pytest.raises(InputError, match=r"^moments: group 0 would hold 80 rows, expected at least min_rows=81"):
        new_store(tmp_path, min_rows=81)
    assert not (tmp_path / "store").exists()
    with new_store(tmp_path, min_rows=80) as store:
        with pytest.raises(InputError, match=r"^moments: group 1 would hold 79 rows"):
            store.forget_rows(x[1:2], keys[1:2], rank=4)
        assert store.forget_rows(x[keys == 1], keys[keys == 1], rank=4).count == 80


def test_forgotten_rows_that_are_kept_count_as_a_group(tmp_path):
    x, keys = rows()
    with new_store(tmp_path, min_rows=20, keep_forgotten=True) as store:
        before = content(store.path)
        with pytest.raises(InputError, match=r"^moments: group 0 would hold 1 forgotten rows, expected at least min_"):
            store.forget_rows(x[:1], keys[:1], rank=4)
        assert content(store.path) == before
        first = keys == 0
        store.forget_rows(x[first][:20], keys[first][:20], rank=4)
        assert store.forget_rows(x[first][20:21], keys[first][20:21], rank=4).count == 1


def test_projections_are_given_away_as_copies(store):
    def halved(projection):
        projection.half()
        return {}

    store.forget([0], rank=5, measure=halved)
    store.projection.half()
    store.forget([1], rank=4)
    assert store.projection.basis.dtype == torch.float64
    store.verify()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([GroupedMoments(3)], {}, r"^moments: got GroupedMoments\(dim=3, .*expected exact ones"),
        ([GroupedMoments(3, exact=True)], {}, r"expected exact ones, of at least one row"),
        ([moments().total()], {}, r"^moments: got Moments, expected GroupedMoments"),
        ([moments()], {"min_rows": 0}, r"^min_rows: got 0"),
        ([moments()], {"min_rows": True}, r"^min_rows: got True"),
        ([moments(), 3], {}, r"^model: got int"),
    ],
)
def test_what_no_store_is_made_of(tmp_path, arguments, options, message):
    with pytest.raises(InputError, match=message):
        UnlearningStore.create(tmp_path / "store", *arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "file").write_text("something")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("something")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(InputError, match=r"^path: .* is there already"):
            UnlearningStore.create(tmp_path / name, moments())
    with pytest.raises(InputError, match=r"^path: cannot write"):
        UnlearningStore.create(tmp_path / "file" / "store", moments())
    UnlearningStore.create(tmp_path / "empty", moments()).close()
    UnlearningStore.create(tmp_path / "new" / "folders" / "store", moments()).close()
    for path in (tmp_path / "nothing", tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(StoreError, match=r"^path: .* holds no store"):
            UnlearningStore(path)


def test_a_store_of_a_newer_schema(store):
    with store._changing() as change:
        change.execute("UPDATE about SET value = '2' WHERE name = 'schema'")
    with pytest.raises(StoreError, match="has schema '2', this version reads '1'"):
        UnlearningStore(store.path)


# ---- two at a time ----


def other_process(path, key):
    torch.set_num_threads(1)
    with UnlearningStore(path) as store:
        store.forget([key], id=f"request {key}", rank=8)


def test_two_hands_on_one_store_see_each_other(store):
    with UnlearningStore(store.path) as other:
        store.forget([1], id="mine", rank=6)
        assert 1 not in other.moments
        assert same(other.projection, store.projection)
        other.forget([2], id="theirs", rank=5)
        assert store.forget([2], id="theirs").number == 2
        assert store.moments.keys() == [0, 3, 4, 5]
        assert [entry.id for entry in store.ledger()] == ["create", "mine", "theirs"]


def test_processes_take_turns(tmp_path):
    new_store(tmp_path, keep_forgotten=True).close()
    context = multiprocessing.get_context("fork")
    work = [context.Process(target=other_process, args=(tmp_path / "store", key)) for key in (0, 1, 2, 3, 1, 2)]
    for one in work:
        one.start()
    for one in work:
        one.join(120)
        assert one.exitcode == 0
    with UnlearningStore(tmp_path / "store") as store:
        assert store.verify()["entries"] == 5
        assert store.moments.digest() == moments().select([4, 5]).digest()
        assert same(store.projection, loft.solve(moments().select([4, 5]), moments().without([4, 5]), rank=8))


def test_entries_are_frozen(store):
    with pytest.raises(dataclasses.FrozenInstanceError):
        next(store.ledger()).count = 3
