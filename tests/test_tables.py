"""Tables larger than memory: blocks of any engine, Parquet files in this process and on Ray, Ray data sets."""

import functools
import operator
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import loft_fast as loft
from loft_fast import InputError, MissingExtraError, tables

N, DIM, EXACT = 1000, 6, 20.0
ROOT = Path(__file__).parent.parent


def content(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float32) + 3
    return x, torch.randint(0, 4, (n,), generator=generator)


def table(x, labels):
    flat = pa.array(x.numpy().ravel())
    return pa.table(
        {
            "features": pa.FixedSizeListArray.from_arrays(flat, x.shape[1]),
            "label": pa.array(labels.numpy()),
            "name": pa.array([f"class {label}" for label in labels.tolist()]),
            **{f"f{i}": pa.array(x[:, i].numpy()) for i in range(x.shape[1])},
        }
    )


def whole(key=lambda label: label, exact=EXACT):
    x, labels = content()
    return loft.GroupedMoments(DIM, exact=exact).update(x, [key(label) for label in labels.tolist()])


COLUMNS = [f"f{i}" for i in range(DIM)]


def shapes(one):
    """The same rows in the kinds of blocks that engines have."""
    x = one["features"].to_pylist()
    return {
        "table": one,
        "batch": one.to_batches()[0],
        "lists": one.set_column(0, "features", pa.array(x, pa.list_(pa.float32()))),
        "large lists": one.set_column(0, "features", pa.array(x, pa.large_list(pa.float64()))),
        "chunked": pa.concat_tables([one.slice(0, 100), one.slice(100, 0), one.slice(100)]),
        "sliced": pa.concat_tables([one, one]).slice(0, len(one)),
        "pandas": one.to_pandas(),
        "arrays": {
            name: np.stack(column.to_numpy()) for name, column in zip(one.column_names, one.columns, strict=True)
        },
    }


@pytest.mark.parametrize("features", ["features", COLUMNS], ids=["vectors", "columns"])
@pytest.mark.parametrize("kind", shapes(table(*content(n=2))))
def test_blocks_of_every_kind_are_the_same_rows(kind, features):
    block = shapes(table(*content()))[kind]
    assert tables.block_moments(block, features, "label", EXACT).digest() == whole().digest()
    named = whole(lambda label: f"class {label}")
    assert tables.block_moments(block, features, "name", EXACT).digest() == named.digest()
    assert tables.block_moments(block, features, exact=EXACT).digest() == whole().total().digest()
    assert tables.block_moments(block, features).count == N


def test_blocks_add_up_as_the_docs_say():
    blocks, block_moments = table(*content()).to_batches(max_chunksize=77), tables.block_moments
    snippet = next(line for line in (ROOT / "docs" / "scale.md").read_text().splitlines() if "functools.reduce" in line)
    scope = {"functools": functools, "operator": operator, "block_moments": block_moments, "blocks": blocks}
    exec(snippet, scope)
    assert scope["moments"].digest() == whole(exact=8.0).digest()


def test_without_the_extras_there_is_a_clear_error(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loft-fast\[ray\]'"):
        tables.parquet_moments(folder, "features", engine="ray", progress=False)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loft-fast\[ray\]'"):
        tables.parquet_moments(folder, "features")


@pytest.mark.parametrize("kind", ["int32", "uint32", "int64", "uint64", "float64"])
def test_large_numbers_keep_their_digits(kind):
    x = np.arange(40).reshape(20, 2) + 1_700_000_000
    moments = tables.block_moments({"features": x.astype(kind)}, "features")
    expected = loft.Moments(2).update(torch.from_numpy(x).double())
    assert moments.covariance().tolist() == expected.covariance().tolist() == [[140.0, 140.0], [140.0, 140.0]]


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", "uint64"])
def test_keys_are_the_numbers_they_are(kind):
    ends = np.iinfo(kind)
    block = {"features": np.ones((4, 2)), "label": np.array([ends.min, ends.max, 1, ends.max], kind)}
    assert tables.block_moments(block, "features", "label").keys() == sorted({ends.min, 1, ends.max})


def test_no_rows_are_no_rows():
    moments = tables.block_moments(table(*content(n=2)).slice(0, 0), COLUMNS, "label")
    assert (moments.dim, moments.count) == (DIM, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files with row groups of many sizes, one of them empty."""
    place = tmp_path_factory.mktemp("table")
    one = table(*content())
    for i, (start, stop, size) in enumerate([(0, 313, 100), (313, 313, 10), (313, N, 7)]):
        parquet.write_table(one.slice(start, stop - start), place / f"{i}.parquet", row_group_size=size)
    return place


@pytest.mark.parametrize("features", ["features", COLUMNS], ids=["vectors", "columns"])
def test_files_are_read_row_group_by_row_group(folder, features):
    assert tables.parquet_moments(folder, features, "label", EXACT, progress=False).digest() == whole().digest()
    files = sorted(folder.glob("*.parquet"))
    grouped = tables.parquet_moments(files, features, "name", EXACT, progress=False)
    assert grouped.digest() == whole(lambda label: f"class {label}").digest()
    assert tables.parquet_moments(str(folder), features, exact=EXACT).digest() == whole().total().digest()
    floats, expected = tables.parquet_moments(folder, features, progress=False), whole(exact=None).total()
    assert floats.count == N
    torch.testing.assert_close(floats.scatter, expected.scatter, rtol=0, atol=1e-6 * float(expected.scatter.max()))


def test_on_ray():
    """In a process of its own: what Ray leaves behind would end this one at its next use."""
    command = [sys.executable, "-m", "pytest", Path(__file__).parent / "ray_tables.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"^3 passed", done.stdout, flags=re.MULTILINE), done.stdout


def test_bad_input_is_refused(folder, tmp_path):
    one = table(*content())
    missing = one.set_column(7, "f4", pa.array([None, *one["f4"].to_pylist()[1:]], pa.float32()))
    holes = one.set_column(
        0, "features", pa.array([None, *one["features"].to_pylist()[1:]], pa.list_(pa.float32(), DIM))
    )
    ragged = pa.table({"features": [[1.0], [1.0, 2.0]]})
    double = pa.table([one["f0"], one["f1"], one["f1"]], names=["f0", "f1", "f1"])
    parquet.write_table(double, tmp_path / "twice.parquet")
    x = one["f0"].to_numpy().reshape(-1, 2)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing else")
    for call, message in (
        (lambda: tables.block_moments(one, "nothing"), "features: there is no column 'nothing'; there are features"),
        (lambda: tables.block_moments(one, "features", "nothing"), "group: there is no column 'nothing'"),
        (lambda: tables.block_moments(one.to_pandas(), "nothing"), "features: there is no column 'nothing'"),
        (lambda: tables.block_moments(one, "name"), "features: got"),
        (lambda: tables.block_moments(one, "label"), "features: got"),
        (lambda: tables.block_moments(one, []), "features: got no columns"),
        (lambda: tables.block_moments(one, "features", "f0"), "group: got the key"),
        (lambda: tables.block_moments(one, "features", exact=True), "exact: got True"),
        (lambda: tables.block_moments(missing, COLUMNS), "features: column 'f4' has 1 missing values"),
        (lambda: tables.block_moments(holes, "features"), "features: column 'features' has 1 missing values"),
        (
            lambda: tables.block_moments(ragged, "features"),
            "features: column 'features' holds vectors of 1 to 2 numbers",
        ),
        (lambda: tables.block_moments(ragged.to_pandas(), "features"), "features: column 'features' holds vectors of"),
        (lambda: tables.block_moments({"features": [[1.0], [1.0, 2.0]]}, "features"), "column 'features' is no array"),
        (lambda: tables.block_moments(double, ["f0", "f1"]), "features: there are 2 columns 'f1', expected one"),
        (lambda: tables.block_moments(double.to_pandas(), "f1"), "features: there are 2 columns 'f1', expected one"),
        (lambda: tables.parquet_moments(tmp_path / "twice.parquet", ["f0", "f1"]), "there are 2 columns 'f1'"),
        (lambda: tables.block_moments({"x": x.astype(">f4")}, "x"), "features: got >f4 of shape .500, 2. in 'x'"),
        (lambda: tables.block_moments({"x": x.astype(np.longdouble)}, "x"), "features: got float128 of shape"),
        (
            lambda: tables.block_moments({"a": x[:, 0], "b": x[1:, 0]}, ["a", "b"]),
            "columns of shapes .499,. and .500,.",
        ),
        (lambda: tables.block_moments({"a": x[:, 0], "b": x}, ["a", "b"]), "columns of shapes .500,. and .500, 2."),
        (lambda: tables.block_moments({"x": x}, 5), "features: got 5, expected the name"),
        (lambda: tables.block_moments(5, "x"), "block: got int, expected a table"),
        (lambda: tables.block_moments(x, "x"), "block: got ndarray, expected a table"),
        (lambda: tables.parquet_moments(tmp_path / "nothing", "features"), "paths: cannot read .*nothing"),
        (lambda: tables.parquet_moments(tmp_path, "features"), r"paths: cannot read .*no\.parquet"),
        (lambda: tables.parquet_moments(folder, "nothing"), "features: .* has no column 'nothing'"),
        (lambda: tables.parquet_moments(folder, "features", exact=True), "exact: got True"),
        (lambda: tables.parquet_moments(folder, "features", engine="spark"), "engine: got 'spark'"),
        (lambda: tables.parquet_moments([], "features"), "paths: there are no rows"),
        (lambda: tables.parquet_moments(tmp_path / ".." / tmp_path.name / "sub", "features"), "paths: cannot read"),
    ):
        with pytest.raises(InputError, match=message):
            call()
