"""Every reader of files, fed with bytes that nobody wrote on purpose: the package's own error, or a good result.

`make fuzz` runs this for minutes; the ledger of a store is in test_store_faults.
"""

import contextlib
import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from conftest import normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loft_fast import FileFormatError, GroupedMoments, LoftError, Moments, Projection, files, report
from loft_fast.cli_store import _read_receipt
from loft_fast.store import verify_receipt

F64 = torch.float64
KEY = "00" * 32


def moments(exact):
    return Moments(3, exact=exact).update(normal(9, 3))


def groups(exact):
    return GroupedMoments(3, exact=exact).update(normal(9, 3), [0, "a", 1] * 3)


def projection():
    return Projection(torch.eye(4, dtype=F64)[:, :2], torch.ones(4, dtype=F64), site="fc:input")


RESULT = {"rows": [{"method": "ours", "retain_train": 1.0}], "forget": [3], "speed": {"times_faster": 1.0}}


def saved(thing):
    return lambda path: thing().save(path)


# Name -> how to write a good file, and how to read one.
READERS = {
    "moments": (saved(lambda: moments(None)), Moments.load),
    "exact moments": (saved(lambda: moments(8.0)), Moments.load),
    "groups": (saved(lambda: groups(None)), GroupedMoments.load),
    "exact groups": (saved(lambda: groups(8.0)), GroupedMoments.load),
    "projection": (saved(projection), Projection.load),
    "report": (lambda path: path.write_text(json.dumps(RESULT)), report.read),
    "receipt": (
        lambda path: path.write_text(json.dumps({"format": "loft_fast.receipt", "schema": 1, "entry": {}})),
        lambda path: verify_receipt(_read_receipt(path), KEY),
    ),
}
TENSORS = ["moments", "exact moments", "groups", "exact groups", "projection"]
readers = pytest.mark.parametrize("name", READERS)
kinds = pytest.mark.parametrize("name", TENSORS)
fuzzing = settings(suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


def good(name, place):
    READERS[name][0](place)
    return place.read_bytes()


@contextlib.contextmanager
def little_memory():
    """Whoever asks for much more than there is now gets an error: Python and torch alike."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def feed(name, place, data):
    """Read `data`: nothing but the package's own error may come out, and not much more memory may be asked for."""
    place.write_bytes(data)
    with little_memory(), contextlib.suppress(LoftError):
        READERS[name][1](place)


def test_more_memory_would_be_noticed():
    with little_memory(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.zeros(2**29, dtype=torch.int8)


@readers
@fuzzing
@given(data=st.binary(max_size=2000))
def test_random_bytes(place, name, data):
    feed(name, place, data)


@readers
@fuzzing
@given(seed=st.integers(0, 2**64), edits=st.integers(1, 6))
def test_edited_bytes(place, name, seed, edits):
    chance, data = random.Random(seed), bytearray(good(name, place))
    for _ in range(edits):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 1, 1, 2, 8, 40]))
        new = chance.choice([b"", chance.randbytes(end - start), data[chance.randrange(len(data) + 1) :][:30]])
        data[start:end] = new
    feed(name, place, bytes(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@readers
@fuzzing
@given(value=json_values)
def test_json_of_any_kind(place, name, value):
    text = json.dumps(value).encode()
    feed(name, place, text)
    feed(name, place, struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("name", ["report", "receipt"])
@fuzzing
@given(data=st.data())
def test_json_with_one_value_replaced(place, name, data):
    value = json.loads(good(name, place))
    node = value
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(json_values)
        break
    feed(name, place, json.dumps(value).encode())


@readers
@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 50_000, b"\xff" * 1000, b"1" * 100_000], ids=range(4))
def test_without_end(place, name, data):
    feed(name, place, data)
    feed(name, place, struct.pack("<Q", len(data)) + data)


numbers = st.sampled_from(
    ["", "0", "-1", "1", "3", "1e400", "nan", "inf", "True", "None", "9" * 5000, "[]", "0.5", "8.0"]
)
shapes = st.lists(st.integers(0, 7), max_size=3)
dtypes = st.sampled_from([F64, torch.float32, torch.int64, torch.int8, torch.bool, torch.bfloat16])


@kinds
@fuzzing
@given(data=st.data())
def test_tensors_and_headers_that_are_signed_as_good(place, name, data):
    # With a digest that is right: so that what is checked after it is reached.
    good(name, place)
    with safe_open(place, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kind = header["format"].removeprefix("loft_fast.")
    del header["sha256"]
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        shape, dtype = data.draw(shapes), data.draw(dtypes)
        fill = data.draw(st.sampled_from([0, 1, -1, 2**40, float("nan"), float("inf")]))
        kept = data.draw(st.booleans())
        new = tensors[key].clone() if kept else torch.zeros(shape, dtype=dtype)
        if new.numel():
            index = data.draw(st.integers(0, new.numel() - 1))
            fits = new.is_floating_point() or (new.dtype == torch.int64 and fill == fill and abs(fill) != float("inf"))
            new.view(-1)[index] = fill if fits else 1
        tensors[key] = new
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=2)):
        if key not in ("format", "schema"):
            header[key] = data.draw(numbers | st.text(max_size=20) | json_values.map(json.dumps))
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=1)):
        if key not in ("format", "schema"):
            del header[key]
    files.write_tensors(place, kind, tensors, header)
    feed(name, place, place.read_bytes())


def test_good_files_are_read(place):
    for name in TENSORS:
        good(name, place)
        READERS[name][1](place)
    with pytest.raises(FileFormatError):
        Moments.load(place)
