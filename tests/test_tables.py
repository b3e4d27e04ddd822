"""Tables larger than memory: blocks of any engine, Parquet files in this process and on Ray, Ray data sets."""

import os

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import loft_fast as loft
from loft_fast import InputError, tables

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
N, DIM, EXACT = 1000, 6, 20.0


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


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_on_ray_the_same_bits_come_out(ray, folder, monkeypatch):
    def fetch(*arguments):
        return tables.parquet_moments(folder, *arguments, engine="ray", progress=False)

    assert fetch("features", "label", EXACT).digest() == whole().digest()
    assert fetch(COLUMNS, None, EXACT).digest() == whole().total().digest()
    floats, expected = fetch("features").scatter, whole(exact=None).total().scatter
    torch.testing.assert_close(floats, expected, rtol=0, atol=1e-6 * float(expected.max()))
    monkeypatch.setattr(tables, "_FAN_IN", 3)
    assert fetch("features", "name", EXACT).digest() == whole(lambda label: f"class {label}").digest()


def test_a_data_set_of_ray_may_come_from_anywhere(ray, folder):
    dataset = ray.data.read_parquet(str(folder)).filter(lambda row: row["label"] != 2)
    assert tables.dataset_moments(dataset, "features", "label", EXACT).digest() == whole().without([2]).digest()
    x = content()[0]
    arrays = ray.data.from_numpy([x[:500].numpy(), x[500:].numpy()])  # tensors of Ray
    assert tables.dataset_moments(arrays, "data", exact=EXACT).digest() == whole().total().digest()


def test_errors_of_tasks_are_those_of_one_process(ray, folder, tmp_path):
    x, labels = content()
    x[700, 2] = float("nan")
    parquet.write_table(table(x, labels), tmp_path / "nan.parquet", row_group_size=100)
    for engine in (None, "ray"):
        with pytest.raises(InputError, match=r"x: .*NaN"):
            tables.parquet_moments(tmp_path, "features", "label", EXACT, engine=engine, progress=False)
    with pytest.raises(InputError, match=r"x: .*NaN"):
        tables.dataset_moments(ray.data.read_parquet(str(tmp_path)), "features")
    with pytest.raises(InputError, match="dataset: it has no rows"):
        tables.dataset_moments(ray.data.from_items([{"features": [1.0]}]).filter(lambda row: False), "features")
    with pytest.raises(InputError, match="dataset: got list, expected a ray"):
        tables.dataset_moments([], "features")


def test_bad_input_is_refused(folder, tmp_path):
    one = table(*content())
    missing = one.set_column(7, "f4", pa.array([None, *one["f4"].to_pylist()[1:]], pa.float32()))
    holes = one.set_column(
        0, "features", pa.array([None, *one["features"].to_pylist()[1:]], pa.list_(pa.float32(), DIM))
    )
    ragged = pa.table({"features": [[1.0], [1.0, 2.0]]})
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
