"""Tables on Ray; run by test_tables.py in a process of its own."""

import os

import pytest
import torch
from pyarrow import parquet
from test_tables import COLUMNS, EXACT, content, folder, table, whole

from loft_fast import InputError, tables

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
__all__ = ["folder"]  # a fixture


@pytest.fixture(scope="module")
def ray():
    import ray

    ray.init(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


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
        with pytest.raises(InputError, match=r"^x: 1 of \d+ rows contain NaN"):
            tables.parquet_moments(tmp_path, "features", "label", EXACT, engine=engine, progress=False)
    with pytest.raises(InputError, match=r"^x: 1 of \d+ rows contain NaN"):
        tables.dataset_moments(ray.data.read_parquet(str(tmp_path)), "features")
    with pytest.raises(InputError, match="dataset: it has no rows"):
        tables.dataset_moments(ray.data.from_items([{"features": [1.0]}]).filter(lambda row: False), "features")
    with pytest.raises(InputError, match="dataset: got list, expected a ray"):
        tables.dataset_moments([], "features")
