"""The store where things go wrong: killed, disk full, damaged files, foreign files, a ledger that grows."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import content, moments, new_store, rows

from loft_fast import InputError, LoftError, StoreError, UnlearningStore, cli, files
from loft_fast.store import ledger as ledgers
from loft_fast.store.ledger import Entry, append

KILLS = 300
PLACES = ["ledger.sqlite", "ledger.sums", "subjects.key", "signing.key", "moments", "projection"]


# ---- kill -9 ----


def stream(path, report):
    """Requests without end: groups until two are left, rows in between; each is told of before and after."""
    with UnlearningStore(path) as store:
        x, keys = rows()
        for number in range(1000):
            left = store.moments.keys()
            id = f"{store._ledger.last().number}-{os.getpid()}-{number}"
            report(f"ask {id}\n")
            if number % 3 == 2 and len(left) > 2:
                store.forget([left[-1]], id=id, rank=8)
            else:
                gone = 80 - store.moments[left[0]].count  # of the 80 rows of a group, the first ones go first
                if gone >= 78:
                    return
                index = (keys == left[0]).nonzero().flatten()[gone : gone + 2]
                store.forget_rows(x[index], keys[index], id=id, rank=8)
            report(f"done {id}\n")


def start(path, log):
    """The stream in a process of its own; torch is loaded already."""
    process = os.fork()
    if process:
        return process
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        stream(path, lambda line: os.write(handle, line.encode()))
    except BaseException as error:
        os.write(handle, f"failed {error!r}\n".encode())
    finally:
        os._exit(0)


def test_killed_at_any_moment(tmp_path):
    """The store opens, holds the state before or after the request that was cut off, and ledger and moments agree."""
    chance = random.Random(0)
    path, log = tmp_path / "store", tmp_path / "log"
    cut_off = lost = done = 0
    for _ in range(KILLS):
        if not path.exists():
            new_store(tmp_path, keep_forgotten=chance.random() < 0.5).close()
        log.unlink(missing_ok=True)
        process = start(path, log)
        while not log.exists():
            time.sleep(0.001)
        time.sleep(chance.expovariate(1 / 0.03))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with UnlearningStore(path) as store:
            found = store.verify()
            entries = [entry.id for entry in store.ledger()]
            told = [line.split() for line in log.read_text().splitlines()]
            assert not [line for line in told if line[0] == "failed"]
            finished = [id for word, id in told if word == "done"]
            assert all(id in entries for id in finished)  # what was answered has happened
            asked = told[-1][1] if told and told[-1][0] == "ask" else None
            cut_off += asked is not None
            lost += asked is not None and asked not in entries
            done += asked is not None and asked in entries
            assert len(set(entries)) == len(entries)
            assert store.moments.digest() == found["digest"] == list(store.ledger())[-1].after
            wanted = {f"{subject}-{digest[:32]}.safetensors" for (subject, _), digest in store._ledger.groups().items()}
            assert {file.name for file in (path / "moments").iterdir()} == wanted
            assert len(list((path / "projection").iterdir())) == (len(entries) > 1)
            worn = len(store.moments) <= 2 or store.moments.count < 200
        if worn or chance.random() < 0.1:
            shutil.rmtree(path)
    assert cut_off > KILLS / 10  # or else next to nothing was interrupted; a third of them where nothing else runs
    assert lost > 10
    assert done > 0


def test_killed_while_it_is_made(tmp_path):
    for milliseconds in range(30):
        process = os.fork()
        if not process:
            new_store(tmp_path)
            os._exit(0)
        time.sleep(milliseconds / 1000)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if (tmp_path / "store").exists():
            with UnlearningStore(tmp_path / "store") as store:
                assert store.verify()["entries"] == 1
            shutil.rmtree(tmp_path / "store")


def test_what_a_killed_creation_left_goes_with_the_next_one(tmp_path, monkeypatch):
    """That of a process that is still at work stays, and so does what only looks like it."""

    def stop(folder):
        if (folder / "ledger.sums").exists():
            os.write(told[1], b"!")
            time.sleep(60)

    told = os.pipe()
    drafts = []
    for _ in range(2):
        process = os.fork()
        if not process:
            monkeypatch.setattr(files, "sync_folder", stop)
            new_store(tmp_path)
            os._exit(0)
        drafts.append(process)
        os.read(told[0], 1)
    (tmp_path / ".store.unfinished.backup").mkdir()
    (tmp_path / ".store.unfinished.backup" / "file").write_text("mine")
    os.kill(drafts[0], signal.SIGKILL)
    os.waitpid(drafts[0], 0)
    new_store(tmp_path).close()
    left = [path for path in tmp_path.iterdir() if (path / "subjects.key").exists()]
    os.kill(drafts[1], signal.SIGKILL)
    os.waitpid(drafts[1], 0)
    assert len(left) == 2  # the store, and the draft of the process that was at work
    with pytest.raises(InputError, match="is there already"):
        new_store(tmp_path)
    shutil.rmtree(tmp_path / "store")
    new_store(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".store.unfinished.backup", "store"]


# ---- nowhere to write ----


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("at", ["write", "sync", "rename", "folder"])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_disk_full_while_files_are_written(tmp_path, monkeypatch, at, nth):
    with new_store(tmp_path, keep_forgotten=True) as store:
        x, keys = rows()
        before = content(store.path)
        name = {"write": "fdopen", "sync": "fsync", "rename": "replace", "folder": "fsync"}[at]
        original, calls = getattr(files.os, name), iter(range(1000))

        def failing(*arguments):
            wanted = 2 * nth + (at == "folder") if name == "fsync" else nth
            return full() if next(calls) == wanted else original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, failing)
            with pytest.raises(LoftError, match="No space left on device"):
                store.forget_rows(x[:2], keys[:2], rank=4)
        assert store.moments.digest() == moments().digest()
        with UnlearningStore(store.path) as again:  # sweeps what is left of it
            assert again.verify()["entries"] == 1
            assert content(store.path).keys() == before.keys()
            again.forget_rows(x[:2], keys[:2], rank=4)
        assert store.verify()["entries"] == 2


def test_disk_full_while_the_ledger_is_written(tmp_path):
    with new_store(tmp_path) as store:
        pages = store._ledger._all("PRAGMA page_count")[0][0]
        store._ledger._all(f"PRAGMA max_page_count = {pages}")
        x, keys = rows()
        with pytest.raises(StoreError, match="database or disk is full"):
            store.forget_rows(x[::2], keys[::2], rank=4)
        store._ledger._all("PRAGMA max_page_count = 100000")
        assert store.moments.digest() == moments().digest()
        assert store.verify()["entries"] == 1
        assert store.forget_rows(x[::2], keys[::2], rank=4).number == 1
        assert store.verify()["entries"] == 2


def test_a_limit_of_the_system(tmp_path):
    """A process that may not write more than so many bytes to a file: the same as a full disk, without tricks."""
    new_store(tmp_path).close()
    before = content(tmp_path / "store")
    process = os.fork()
    if not process:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        status = 1
        try:
            UnlearningStore(tmp_path / "store").forget([1], rank=4)
        except LoftError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    with UnlearningStore(tmp_path / "store") as store:
        assert store.verify()["entries"] == 1
    assert content(tmp_path / "store").keys() == before.keys()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_read_only_folder(tmp_path):
    with new_store(tmp_path) as store:
        (store.path / "moments").chmod(0o500)
        (store.path / "projection").chmod(0o500)
        with pytest.raises(LoftError, match="Permission denied"):
            store.forget([1], rank=4)
        (store.path / "moments").chmod(0o700)
        (store.path / "projection").chmod(0o700)
        assert store.verify()["entries"] == 1


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    original = os.open

    def denied(path, flags, *mode):
        if flags & os.O_EXCL:
            raise PermissionError(13, "Permission denied")
        return original(path, flags, *mode)

    with new_store(tmp_path) as store:
        monkeypatch.setattr(files.os, "open", denied)
        with pytest.raises(InputError, match=r"cannot write .* Permission denied"):
            store.forget([1], rank=4)
        monkeypatch.undo()
        assert store.verify()["entries"] == 1
        assert store.forget([1], rank=4).number == 1


def test_busy(tmp_path, monkeypatch):
    from loft_fast.store import store as module
    from loft_fast.store.lock import locked

    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with new_store(tmp_path) as store:
        with locked(store.path / "lock", 1), pytest.raises(StoreError, match="held by another process"):
            store.forget([1], rank=4)
        assert store.forget([1], rank=4).number == 1


def test_what_a_killed_write_left_goes_at_the_next_opening(tmp_path):
    new_store(tmp_path).close()
    path = tmp_path / "store"
    before = content(path).keys()
    group = next((path / "moments").iterdir()).name
    names = [".ledger.sums.0a1b2c3d", ".ledger.changing.k3_x9abc", f"moments/.{group}.0a1b2c3d"]
    for name in [*names, f"projection/{'0' * 64}.safetensors"]:
        (path / name).write_bytes(b"part of")
    UnlearningStore(path).close()
    assert content(path).keys() == before


# ---- damaged and foreign files ----


def test_files_of_others_stay_where_they_are(tmp_path):
    new_store(tmp_path).close()
    path = tmp_path / "store"
    for folder in (path / "moments", path / "projection"):
        (folder / ".snapshot").mkdir()
        (folder / "notes.txt").write_text("mine")
        (folder / f"{'0' * 64}.safetensors").symlink_to("notes.txt")
    with UnlearningStore(path) as store:
        store.forget([1], rank=4)
        assert store.verify()["groups"] == 5
    for folder in (path / "moments", path / "projection"):
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / ".snapshot").is_dir()
        assert (folder / f"{'0' * 64}.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["moments", "projection"])
def test_a_folder_that_is_a_link_is_refused(tmp_path, name):
    with new_store(tmp_path) as store:
        (store.path / name).rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / f"{'0' * 64}.safetensors").write_text("mine")
        there = content(tmp_path / "elsewhere")
        (store.path / name).symlink_to(tmp_path / "elsewhere")
        for attempt in (lambda: UnlearningStore(store.path), lambda: store.forget([1], rank=4)):
            with pytest.raises(StoreError, match=rf"^{name}: .* is a link, expected the store's own folder"):
                attempt()
        assert content(tmp_path / "elsewhere") == there
        (store.path / name).unlink()
        with pytest.raises(StoreError, match=rf"^{name}: .* is missing"):
            UnlearningStore(store.path)


def test_links_in_place_of_files_are_not_followed(tmp_path):
    with new_store(tmp_path) as store:
        (tmp_path / "precious").write_text("mine")
        for name in ("ledger.sums", "ledger.changing"):
            (store.path / name).unlink(missing_ok=True)
            (store.path / name).symlink_to(tmp_path / "precious")
        store.forget([1], rank=4)
        assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A store after two requests, closed."""
    folder = tmp_path_factory.mktemp("used")
    x, keys = rows()
    with new_store(folder, keep_forgotten=True) as store:
        store.index_rows(x[:40], keys[:40])
        store.forget([1], id="first", rank=5)
        store.forget_rows(x[:3:2], keys[:3:2], id="second", rank=5)
        receipt = store.receipt("second")
    return folder / "store", receipt


def copied(used, tmp_path):
    shutil.copytree(used[0], tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


def checked(path):
    """Open and verify; returns all that can be read from the store."""
    with UnlearningStore(path) as store:
        found = store.verify()
        entries = [(entry.id, entry.hash) for entry in store.ledger()]
        return found, entries, store.moments.digest(), store.projection.digest(), store._about


def flipped(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_detected(used, tmp_path):
    chance = random.Random(1)
    checked(copied(used, tmp_path))
    names = [path.relative_to(used[0]) for path in used[0].rglob("*") if path.stat().st_size and path.is_file()]
    assert {name.parts[0] for name in names} == set(PLACES)
    for name in names:
        size = (used[0] / name).stat().st_size
        for _ in range(200 if name.name == "ledger.sqlite" else 10):
            path = copied(used, tmp_path)
            flipped(path / name, chance.randrange(size), chance.randrange(8))
            with pytest.raises(StoreError):
                checked(path)


TAMPERING = {
    "an entry is missing": "DELETE FROM entries WHERE number = 1",
    "the first entry is missing": "DELETE FROM entries WHERE number = 0",
    "all entries are missing": "DELETE FROM entries",
    "the last entry is missing": "DELETE FROM entries WHERE number = 2",
    "an entry has another number": "UPDATE entries SET number = 7 WHERE number = 1",
    "an entry has another id": "UPDATE entries SET id = 'other' WHERE number = 1",
    "an entry is repeated": "INSERT INTO entries SELECT 3, 'again', entry FROM entries WHERE number = 2",
    "an entry is no JSON": "UPDATE entries SET entry = 'nothing' WHERE number = 1",
    "an entry is a number": "UPDATE entries SET entry = 3 WHERE number = 1",
    "the last entry is no JSON": "UPDATE entries SET entry = '[' WHERE number = 2",
    "a group is missing": "DELETE FROM groups WHERE subject = (SELECT min(subject) FROM groups WHERE kept = 1)",
    "all groups are missing": "DELETE FROM groups",
    "a group has another digest": "UPDATE groups SET digest = 'x' WHERE kept = 1",
    "forgotten moments are retained": "UPDATE OR IGNORE groups SET kept = 1 WHERE kept = 0",
    "a forgotten group is forgotten about": "DELETE FROM gone",
    "a group is said to be gone": "INSERT INTO gone VALUES ('x', 1)",
    "another scale": "UPDATE about SET value = '1.0' WHERE name = 'exact'",
    "another fingerprint": "UPDATE about SET value = 'x' WHERE name = 'fingerprint'",
    "another minimum": "UPDATE about SET value = '0' WHERE name = 'min_rows'",
    "another signing key": "UPDATE about SET value = '00' WHERE name = 'signing'",
    "no key check": "DELETE FROM about WHERE name = 'key'",
    "nothing about it": "DELETE FROM about",
    "no table of entries": "DROP TABLE entries",
    "no table of groups": "DROP TABLE groups",
    "no table of what is gone": "DROP TABLE gone",
    "no table of rows": "DROP TABLE rows",
}


@pytest.mark.parametrize("case", TAMPERING)
def test_a_ledger_that_was_tampered_with(used, tmp_path, case):
    path = copied(used, tmp_path)
    connection = sqlite3.connect(path / "ledger.sqlite")
    with connection:
        connection.execute(TAMPERING[case])
    connection.close()
    (path / "ledger.changing").touch()  # as if it had been the store itself: sums of pages do not tell
    with pytest.raises(StoreError):
        checked(path)


def test_an_entry_that_was_written_anew(used, tmp_path):
    """Somebody who can compute hashes changes history, and all the hashes after it: receipts still tell."""
    path = copied(used, tmp_path)
    with UnlearningStore(path) as store:
        entries = list(store.ledger())
    changed, previous = [], ""
    for entry in entries:
        entry = Entry(**{**vars(entry), "time": "2020-01-01T00:00:00+00:00"}).sealed(previous)
        changed.append(entry)
        previous = entry.hash
    connection = sqlite3.connect(path / "ledger.sqlite")
    with connection:
        connection.execute("DELETE FROM entries")
        for entry in changed:
            append(connection, entry)
    connection.close()
    (path / "ledger.changing").touch()
    with UnlearningStore(path) as store:
        store.verify()
        with pytest.raises(StoreError, match="the ledger has no such entry"):
            store.verify(used[1])


@pytest.mark.parametrize("name", PLACES)
def test_missing_files(used, tmp_path, name):
    path = copied(used, tmp_path)
    target = path / name
    if target.is_dir():
        next(target.iterdir()).unlink()
    else:
        target.unlink()
    with pytest.raises(StoreError):
        checked(path)


@given(st.binary(max_size=3000), st.sampled_from(PLACES))
def test_foreign_bytes_in_place_of_any_file(used, tmp_path_factory, data, name):
    path = copied(used, tmp_path_factory.mktemp("foreign"))
    target = path / name
    target = sorted(target.iterdir())[0] if target.is_dir() else target
    if data == target.read_bytes():
        return
    target.write_bytes(data)
    with pytest.raises(StoreError):
        checked(path)


@given(st.lists(st.tuples(st.integers(0, 2**30), st.binary(min_size=1, max_size=40)), min_size=1, max_size=5))
def test_changed_bytes_in_the_ledger_raise_nothing_but_our_own_error(used, tmp_path_factory, changes):
    path = copied(used, tmp_path_factory.mktemp("changed"))
    data = bytearray((path / "ledger.sqlite").read_bytes())
    for position, more in changes:
        position %= len(data)
        data[position : position + len(more)] = more
    (path / "ledger.sqlite").write_bytes(data)
    (path / "ledger.changing").touch()  # or else the sums of its pages would tell before anything is read
    with contextlib.suppress(StoreError):
        checked(path)


@given(st.binary(max_size=400))
def test_foreign_receipts(used, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("receipt")
    path = copied(used, folder)
    (folder / "receipt.json").write_bytes(data)
    assert cli.main(["store", "verify", str(path), str(folder / "receipt.json")]) == 1


# ---- many requests ----


def grown(tmp_path, count):
    """A store with so many requests in its ledger that say they changed nothing."""
    store = new_store(tmp_path)
    last = store._ledger.last()
    with store._changing() as change:
        for number in range(1, count + 1):
            last = Entry(
                number, f"request {number}", last.time, "rows", [f"{number:064x}"], 1, last.after, last.after
            ).sealed(last.hash)
            append(change, last)
    store.close()
    return UnlearningStore(tmp_path / "store")


def test_many_requests_in_the_ledger_are_not_read_for_the_next(tmp_path, monkeypatch):
    count = 3000
    parsed = 0
    original = ledgers._parse

    def counting(text):
        nonlocal parsed
        parsed += 1
        return original(text)

    monkeypatch.setattr(ledgers, "_parse", counting)
    with grown(tmp_path, count) as store:
        parsed = 0
        assert store.forget([1], id="new", rank=4).number == count + 1
        assert store.forget([1], id="new", rank=4).number == count + 1
        assert store.find("request 77").number == 77
        assert parsed < 20
        assert sum(1 for _ in store.ledger()) == count + 2
        plan = store._ledger._all("EXPLAIN QUERY PLAN SELECT entry FROM entries WHERE id = ?", "x")
        assert "USING INDEX" in plan[0][3]
