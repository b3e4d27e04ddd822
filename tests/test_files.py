"""What is not the package's own file is refused with one error, and a write leaves the old file or the new one."""

import errno
import json
import os
import stat
import struct

import pytest
import torch
from conftest import normal, state
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loft_fast import FileFormatError, GroupedMoments, InputError, Moments, files

F64, F32 = torch.float64, torch.float32


def moments(seed=0):
    return Moments(3).update(normal(9, 3, seed=seed))


def groups(seed=0):
    return GroupedMoments(3).update(normal(9, 3, seed=seed), [0, "a", 1] * 3)


MAKERS = {Moments: moments, GroupedMoments: groups}
both = pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)


def refuses(kind, path, *words):
    """`kind.load` raises FileFormatError, and nothing else; the message names the file and has the words."""
    with pytest.raises(FileFormatError) as caught:
        kind.load(path)
    message = str(caught.value)
    assert message.startswith("path: ")
    assert all(word in message for word in (repr(str(path)), *words)), message


def rewritten(path, kind, tensors=None, header=None, drop=()):
    """A good file of the kind with some of its tensors and header entries replaced or dropped."""
    MAKERS[kind]().save(path)
    name = {Moments: "moments", GroupedMoments: "grouped_moments"}[kind]
    old_tensors, old_header = files.read_tensors(path, name, ("count", "clipped", "mean", "scatter"))
    new = {key: value for key, value in {**old_tensors, **(tensors or {})}.items() if key not in drop}
    new_header = {key: value for key, value in {**old_header, **(header or {})}.items() if key not in drop}
    save_file(new, path, {**new_header, "sha256": files._digest(new, new_header)})
    return path


# ---- reading what is not a file of ours ----


@both
def test_a_rewritten_file_is_read(tmp_path, kind):
    # Or else the refusals below would show nothing.
    assert state(kind.load(rewritten(tmp_path / "file", kind))) == state(MAKERS[kind]())


# Within the length, the header, at its end, within the data, one byte short.
@both
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 60, -200, -73, -9, -1])
def test_truncated(tmp_path, kind, cut):
    path = tmp_path / "file"
    MAKERS[kind]().save(path)
    path.write_bytes(path.read_bytes()[:cut])
    refuses(kind, path)


@both
def test_more_than_the_file_should_hold(tmp_path, kind):
    path = tmp_path / "file"
    MAKERS[kind]().save(path)
    path.write_bytes(path.read_bytes() + b"\0")
    refuses(kind, path)


@both
def test_not_a_file(tmp_path, kind):
    refuses(kind, tmp_path)
    refuses(kind, tmp_path / "nothing here", "No such file")
    (tmp_path / "plain").write_text("not a folder")
    refuses(kind, tmp_path / "plain" / "file")
    refuses(kind, tmp_path / ("x" * 300))


def raw(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


FOREIGN = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "ones": b"\xff" * 100,
    "text": b"loft_fast.moments\n" * 10,
    "pickle": b"\x80\x04\x95" + b"." * 50,
    "zip": b"PK\x03\x04" + b"\0" * 50,
    "header is a list": raw(b"[]"),
    "header is null": raw(b"null"),
    "header is not UTF-8": raw(b"\xff\xfe{}"),
    "header never ends": raw(b'{"a":' * 3000),
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
}


@both
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_bytes(tmp_path, kind, case):
    path = tmp_path / "file"
    path.write_bytes(FOREIGN[case])
    refuses(kind, path)


@given(st.binary(max_size=300))
def test_random_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random bytes"
    path.write_bytes(data)
    refuses(Moments, path)


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(tmp_path_factory, kind, changes):
    path = tmp_path_factory.getbasetemp() / "changed bytes"
    MAKERS[kind]().save(path)
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    if bytes(data) != path.read_bytes():
        path.write_bytes(data)
        refuses(kind, path)


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
def test_any_flipped_bit(tmp_path, kind):
    path = tmp_path / "file"
    MAKERS[kind]().save(path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            refuses(kind, path)


def test_damage_is_named(tmp_path):
    path = tmp_path / "file"
    for kind in MAKERS:
        MAKERS[kind]().save(path)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        refuses(kind, path, "is damaged: its content is not what was written")


@both
def test_foreign_safetensors(tmp_path, kind):
    path = tmp_path / "file"
    save_file({"mean": torch.zeros(3, dtype=F64), "scatter": torch.zeros(6, dtype=F64)}, path)
    refuses(kind, path, "a foreign file")
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    refuses(kind, path, "holds pt")


def test_wrong_kind(tmp_path):
    path = tmp_path / "file"
    moments().save(path)
    refuses(GroupedMoments, path, "holds loft_fast.moments, expected loft_fast.grouped_moments")
    groups().save(path)
    refuses(Moments, path, "holds loft_fast.grouped_moments, expected loft_fast.moments")


@both
def test_wrong_schema(tmp_path, kind):
    refuses(kind, rewritten(tmp_path / "file", kind, header={"schema": "99"}), "schema '99', this version reads '2'")
    refuses(kind, rewritten(tmp_path / "file", kind, drop=["schema"]), "schema None")


@both
@pytest.mark.parametrize("name", ["count", "clipped", "mean", "scatter"])
def test_missing_tensor(tmp_path, kind, name):
    refuses(kind, rewritten(tmp_path / "file", kind, drop=[name]), f"lacks {name}")


NAN, INF = float("nan"), float("inf")
CONTRADICTIONS = {
    "two of them": {
        "tensors": {
            "count": torch.ones(2, dtype=torch.int64),
            "clipped": torch.zeros(2, dtype=torch.int64),
            "mean": torch.zeros(2, 3, dtype=F64),
            "scatter": torch.zeros(2, 6, dtype=F64),
        }
    },
    "none": {
        "tensors": {
            "count": torch.ones(0, dtype=torch.int64),
            "clipped": torch.zeros(0, dtype=torch.int64),
            "mean": torch.zeros(0, 3, dtype=F64),
            "scatter": torch.zeros(0, 6, dtype=F64),
        }
    },
    "mean too long": {"tensors": {"mean": torch.zeros(1, 4, dtype=F64)}},
    "mean is a vector": {"tensors": {"mean": torch.zeros(3, dtype=F64)}},
    "mean is a number": {"tensors": {"mean": torch.zeros((), dtype=F64)}},
    "mean is empty": {"tensors": {"mean": torch.zeros(1, 0, dtype=F64), "scatter": torch.zeros(1, 0, dtype=F64)}},
    "mean is float32": {"tensors": {"mean": torch.zeros(1, 3)}},
    "mean is an integer": {"tensors": {"mean": torch.zeros(1, 3, dtype=torch.int64)}},
    "mean is NaN": {"tensors": {"mean": torch.full((1, 3), NAN, dtype=F64)}},
    "scatter not packed": {"tensors": {"scatter": torch.zeros(1, 3, 3, dtype=F64)}},
    "scatter too short": {"tensors": {"scatter": torch.zeros(1, 5, dtype=F64)}},
    "scatter is float32": {"tensors": {"scatter": torch.zeros(1, 6)}},
    "scatter is infinite": {"tensors": {"scatter": torch.full((1, 6), INF, dtype=F64)}},
    "count is a number": {"tensors": {"count": torch.tensor(9)}},
    "count is a float": {"tensors": {"count": torch.tensor([9.0])}},
    "count is negative": {"tensors": {"count": torch.tensor([-1])}},
    "no rows but a scatter": {"tensors": {"count": torch.tensor([0])}},
    "clipped floats": {"tensors": {"clipped": torch.tensor([1])}},
    "residue is no number": {"header": {"residue": "little"}},
    "residue is NaN": {"header": {"residue": "nan"}},
    "residue is infinite": {"header": {"residue": "inf"}},
    "residue is negative": {"header": {"residue": "-1"}},
    "no residue": {"drop": ["residue"]},
    "no dim": {"drop": ["dim"]},
    "dim is endless": {"header": {"dim": "9" * 5000}},
    "dim beyond 64 bits": {"header": {"dim": str(2**63)}},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictory_moments(tmp_path, case):
    refuses(Moments, rewritten(tmp_path / "file", Moments, **CONTRADICTIONS[case]))


def test_no_more_memory_than_the_file_has(tmp_path):
    # A file without groups holds no bytes of any dimension.
    d = 2**30
    header = {"dim": str(d), "site": "", "residue": "0.0", "keys": "[]"}
    nothing = {"count": torch.zeros(0, dtype=torch.int64), "clipped": torch.zeros(0, dtype=torch.int64)}
    nothing |= {"mean": torch.zeros(0, d, dtype=F64), "scatter": torch.zeros(0, d * (d + 1) // 2, dtype=F64)}
    files.write_tensors(tmp_path / "file", "grouped_moments", nothing, header)
    refuses(GroupedMoments, tmp_path / "file", "contradict")


# Three groups of three features each.
GROUP_CONTRADICTIONS = {
    "count too short": {"tensors": {"count": torch.ones(2, dtype=torch.int64)}},
    "count is a matrix": {"tensors": {"count": torch.ones(3, 1, dtype=torch.int64)}},
    "count is NaN": {"tensors": {"count": torch.full((3,), NAN, dtype=F64)}},
    "count is a fraction": {"tensors": {"count": torch.full((3,), 2.5)}},
    "count is negative": {"tensors": {"count": torch.tensor([3, -3, 3])}},
    "no rows but a scatter": {"tensors": {"count": torch.tensor([3, 0, 3])}},
    "mean lacks a group": {"tensors": {"mean": torch.zeros(2, 3, dtype=F64)}},
    "mean has another dim": {"tensors": {"mean": torch.zeros(3, 4, dtype=F64)}},
    "mean is a vector": {"tensors": {"mean": torch.zeros(3, dtype=F64)}},
    "mean is float32": {"tensors": {"mean": torch.zeros(3, 3)}},
    "mean is NaN": {"tensors": {"mean": torch.full((3, 3), NAN, dtype=F64)}},
    "scatter lacks a group": {"tensors": {"scatter": torch.zeros(2, 6, dtype=F64)}},
    "scatter has another dim": {"tensors": {"scatter": torch.zeros(3, 10, dtype=F64)}},
    "scatter not packed": {"tensors": {"scatter": torch.zeros(3, 3, 3, dtype=F64)}},
    "scatter is a number": {"tensors": {"scatter": torch.zeros((), dtype=F64)}},
    "scatter is infinite": {"tensors": {"scatter": torch.full((3, 6), INF, dtype=F64)}},
    "no dim": {"drop": ["dim"]},
    "dim is no number": {"header": {"dim": "three"}},
    "dim is another": {"header": {"dim": "4"}},
    "dim is 0": {"header": {"dim": "0"}},
    "no keys": {"drop": ["keys"]},
    "keys are not JSON": {"header": {"keys": "[0, 1"}},
    "keys are too few": {"header": {"keys": "[0, 1]"}},
    "keys repeat": {"header": {"keys": "[0, 1, 0]"}},
    "keys are an object": {"header": {"keys": '{"a": 1, "b": 2, "c": 3}'}},
    "keys are a string": {"header": {"keys": '"abc"'}},
    "keys are null": {"header": {"keys": "null"}},
    "a key is a fraction": {"header": {"keys": "[0, 1, 2.5]"}},
    "a key is a truth value": {"header": {"keys": "[0, 2, true]"}},
    "a key is a list": {"header": {"keys": "[0, 1, [2]]"}},
    "keys never end": {"header": {"keys": "[" * 100_000}},
    "residue is NaN": {"header": {"residue": "nan"}},
    "clipped is too short": {"tensors": {"clipped": torch.zeros(2, dtype=torch.int64)}},
}


@pytest.mark.parametrize("case", GROUP_CONTRADICTIONS)
def test_contradictory_groups(tmp_path, case):
    refuses(GroupedMoments, rewritten(tmp_path / "file", GroupedMoments, **GROUP_CONTRADICTIONS[case]))


def test_data_types_that_torch_lacks(tmp_path):
    header = {
        "__metadata__": {"format": "loft_fast.moments", "schema": files.SCHEMA},
        "clipped": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        "count": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [1, 4]},
        "mean": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]},
        "scatter": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]},
    }
    path = tmp_path / "file"
    path.write_bytes(raw(json.dumps(header).encode(), b"\0" * 4))
    refuses(Moments, path)


# ---- writing ----


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@both
def test_a_save_replaces_the_old_file(tmp_path, kind):
    path = tmp_path / "file"
    for seed in (0, 1):
        MAKERS[kind](seed).save(path)
        assert state(kind.load(path)) == state(MAKERS[kind](seed))
    assert names(tmp_path) == ["file"]


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    moments().save(tmp_path / "file")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_permissions_are_found_without_a_change_of_the_umask(tmp_path, monkeypatch):
    """Other threads make files, too."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(files.os, "umask", fail(AssertionError("changed")))
        moments().save(tmp_path / "file")
        files.write_bytes(tmp_path / "secret", b"", 0o600)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "secret")] == [0o640, 0o600]


def test_a_save_through_a_link_replaces_what_it_points_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "other").symlink_to(tmp_path / "folder" / "file")
    for seed in (0, 1):  # a new file, and one that is there
        moments(seed).save(tmp_path / "link")
        assert state(Moments.load(tmp_path / "folder" / "file")) == state(moments(seed))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other").is_symlink()
    assert names(tmp_path / "folder") == ["file"]


def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    for name in before:
        for write in (moments().save, lambda path: files.writable_file("path", path)):
            with pytest.raises(InputError, match=r"^path: cannot write "):
                write(tmp_path / name)
    assert names(tmp_path) == before
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)


def test_a_path_may_be_a_string_with_any_letters(tmp_path):
    path = os.fspath(tmp_path / "größe 'x' $(y)\n.safetensors")
    moments().save(path)
    assert state(Moments.load(path)) == state(moments())


def test_a_path_need_not_be_utf_8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/q\xff")
    moments().save(path)
    assert state(Moments.load(path)) == state(moments())
    with pytest.raises(FileFormatError, match="cannot read"):
        Moments.load(f"{path}.missing")


@both
def test_nowhere_to_write(tmp_path, kind):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no folder" / "file", blocked / "file", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"^path: cannot write"):
            MAKERS[kind]().save(path)
    assert blocked.read_text() == "a file, not a folder"
    assert names(tmp_path) == ["blocked", "folder"]


class Full:
    """An open file on a disk that is full, or that fails when flushed."""

    def __init__(self, file, method):
        self.file, self.method = file, method

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        if name == self.method:
            raise OSError(errno.ENOSPC, "No space left on device")
        return getattr(self.file, name)


def fail(error):
    def failing(*arguments, **keywords):
        raise error

    return failing


FAILURES = {
    "no temporary file": lambda patch, error: patch.setattr(files.os, "open", fail(error)),
    "write": lambda patch, error: patch.setattr(
        files.os, "fdopen", lambda fd, mode, o=os.fdopen: Full(o(fd, mode), "write")
    ),
    "flush": lambda patch, error: patch.setattr(
        files.os, "fdopen", lambda fd, mode, o=os.fdopen: Full(o(fd, mode), "flush")
    ),
    "sync": lambda patch, error: patch.setattr(files.os, "fsync", fail(error)),
    "rename": lambda patch, error: patch.setattr(files.os, "replace", fail(error)),
}


@pytest.mark.parametrize("step", FAILURES)
@both
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind, step):
    path = tmp_path / "file"
    MAKERS[kind](0).save(path)
    with monkeypatch.context() as patch:
        FAILURES[step](patch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(InputError, match=r"^path: cannot write .*: No space left on device"):
            MAKERS[kind](1).save(path)
    assert names(tmp_path) == ["file"]
    assert state(kind.load(path)) == state(MAKERS[kind](0))


@pytest.mark.parametrize("step", ["sync", "rename"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    moments(0).save(path)
    with monkeypatch.context() as patch:
        FAILURES[step](patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            moments(1).save(path)
    assert names(tmp_path) == ["file"]
    assert state(Moments.load(path)) == state(moments(0))


# ---- folders ----


def test_writable_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert files.writable_folder("out", folder) == folder
    assert names(folder) == []
    assert files.writable_folder("out", folder) == folder


def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(InputError, match=r"^out: cannot write to "):
            files.writable_folder("out", folder)
    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match=r"^out: cannot write to .*: Permission denied"):
        files.writable_folder("out", tmp_path)
