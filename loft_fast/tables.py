"""Moments of feature tables that are far larger than memory: Parquet files in one process, any data set on Ray."""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from loft_fast.errors import InputError, MissingExtraError
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments

_ROWS = 65536  # that one process holds at once
_TASKS = 8  # per core: the last to end keep the others waiting for an eighth of the time at most
_FAN_IN = 32  # moments that are merged at once, where there are more tasks than that

_FLOATS = np.float16, np.float32, np.float64

Features = str | Sequence[str]
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def block_moments(
    block: Any, features: Features, group: str | None = None, exact: float | None = None
) -> Moments | GroupedMoments:
    """Moments of one block of rows, for whatever engine has blocks; they add up with `+`.

    Args:
        block: a table or record batch of pyarrow, a data frame of pandas, or a dictionary of arrays.
        features: a column of vectors, or the columns that are one feature each. Integers of more than 16 bits become
            float64, others float32.
        group: a column with the key of each row, integers or strings; None: `Moments` of all.
        exact: as for `Moments`; a number, or None.

    Raises:
        InputError: no such column, columns that are no features or keys, missing values, NaN or Inf.
    """
    return _update(None, block, features, group, exact)


def parquet_moments(
    paths: Paths,
    features: Features,
    group: str | None = None,
    exact: float | None = None,
    *,
    engine: Literal["ray"] | None = None,
    progress: bool = True,
) -> Moments | GroupedMoments:
    """Moments of the rows of Parquet files; memory is that of some row groups, whatever the size of the files.

    Args:
        paths: a file, a folder of `*.parquet` files, or several of them.
        features, group, exact: as for `block_moments`.
        engine: None: in this process. "ray": as tasks of Ray Data, which have to reach the paths. A task adds up row
            groups as it reads them, and its moments are all that leaves it; these are merged as a tree. Exact moments
            are bit for bit the same either way; others up to rounding, as tasks end in no order.
        progress: show a progress bar.

    Raises:
        InputError: as for `block_moments`, or a file that is not there or is not Parquet.
        MissingExtraError: pyarrow or Ray is not installed.
    """
    check_given(exact)
    if engine not in (None, "ray"):
        raise InputError(f"engine: got {engine!r}, expected None or 'ray'")
    pieces = list(_pieces(paths, _columns(features, group)))
    with tqdm(
        total=sum(rows for *_, rows in pieces),
        desc="moments",
        unit="row",
        unit_scale=True,
        disable=not progress,
        leave=False,
    ) as bar:
        if engine == "ray":
            found = _on_ray(pieces, features, group, exact, bar)
        else:
            found = None
            for path, number, rows in pieces:
                found = _read(found, path, number, features, group, exact)
                bar.update(rows)
    if found is None:
        raise InputError("paths: there are no rows in these files")
    return found


def dataset_moments(
    dataset: Any, features: Features, group: str | None = None, exact: float | None = None
) -> Moments | GroupedMoments:
    """Moments of a Ray Data set, such as what a backbone in an actor makes of images; of files, see `parquet_moments`.

    Every block becomes its moments where it is, and these are merged here: no row is moved or shuffled.

    Args:
        dataset: ray.data.Dataset.
        features, group, exact: as for `block_moments`.

    Raises:
        InputError: as for `block_moments`.
        MissingExtraError: Ray is not installed.
    """
    data = _ray_data()
    if not isinstance(dataset, data.Dataset):
        raise InputError(f"dataset: got {type(dataset).__name__}, expected a ray.data.Dataset")
    check_given(exact)
    parts = dataset.select_columns(_columns(features, group)).map_batches(
        _partial, batch_size=None, batch_format="pyarrow", fn_args=(features, group, exact)
    )
    found = _collect(parts, grouped=group is not None)
    if found is None:
        raise InputError("dataset: it has no rows")
    return found


def check_given(exact: float | None) -> None:
    """Refuse to calibrate, which every block would do for itself."""
    if exact is True:
        raise InputError("exact: got True, expected None or a number, the same for all blocks")


# ---- Parquet ----


def _pieces(paths: Paths, columns: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, number, rows) of every row group that has rows."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'loft-fast[ray]'") from error
    for path in _files(paths):
        try:
            with parquet.ParquetFile(path) as file:
                missing = next((name for name in columns if name not in file.schema_arrow.names), None)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        except (OSError, ValueError) as error:
            raise InputError(f"paths: cannot read {str(path)!r} as Parquet: {error}") from error
        if missing is not None:
            raise InputError(f"features: {str(path)!r} has no column {missing!r}")
        yield from ((str(path), i, rows) for i, rows in enumerate(sizes) if rows)


def _read(
    found: Moments | GroupedMoments | None,
    path: str,
    number: int,
    features: Features,
    group: str | None,
    exact: float | None,
    threads: bool = True,
) -> Moments | GroupedMoments:
    """`found` with the rows of a row group, decoded by several threads or one."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            columns = _columns(features, group)
            for block in file.iter_batches(_ROWS, row_groups=[number], columns=columns, use_threads=threads):
                found = _update(found, block, features, group, exact)
    except OSError as error:
        raise InputError(f"paths: cannot read {path!r}: {error}") from error
    assert found is not None
    return found


def _files(paths: Paths) -> Iterator[Path]:
    for one in [paths] if isinstance(paths, str | os.PathLike) else paths:
        place = Path(one).absolute()
        if not place.is_dir():
            yield place
            continue
        found = sorted(place.glob("*.parquet"))
        if not found:
            raise InputError(f"paths: there is no *.parquet in {str(place)!r}")
        yield from found


# ---- Ray ----


def _ray_data() -> Any:
    try:
        import ray.data

        return ray.data
    except ImportError as error:
        raise MissingExtraError("this needs Ray: pip install 'loft-fast[ray]'") from error


def _on_ray(
    pieces: list[tuple[str, int, int]], features: Features, group: str | None, exact: float | None, bar: Any
) -> Moments | GroupedMoments | None:
    data = _ray_data()
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    tasks = min(len(pieces), _TASKS * int(ray.cluster_resources().get("CPU", 1)))
    if not tasks:
        return None
    bounds = [len(pieces) * i // tasks for i in range(tasks + 1)]
    items = [{"pieces": json.dumps(pieces[a:b])} for a, b in itertools.pairwise(bounds)]
    parts = data.from_items(items, override_num_blocks=tasks).map_batches(
        _read_all, batch_size=1, batch_format="pyarrow", fn_args=(features, group, exact)
    )
    if tasks > _FAN_IN:
        parts = parts.map_batches(_merge, batch_size=_FAN_IN, batch_format="pyarrow", fn_args=(group is not None,))
    return _collect(parts, grouped=group is not None, bar=bar)


def _collect(parts: Any, grouped: bool, bar: Any = None) -> Moments | GroupedMoments | None:
    """The sum of what comes, as it comes."""
    found: Moments | GroupedMoments | None = None
    for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow"):
        found = _sum(found, batch, grouped)
        if bar is not None:
            bar.update(sum(batch.column("rows").to_pylist()))
    return found


# ---- what runs where the blocks are ----


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bad input becomes a row that says so: Ray would run the task again, and loses what an exception was."""

    @functools.wraps(function)
    def told(*arguments: Any) -> Any:
        try:
            return _table(function(*arguments))
        except InputError as error:
            return _table(None, str(error))

    return told


@_telling
def _partial(block: Any, features: Features, group: str | None, exact: float | None) -> Any:
    torch.set_num_threads(1)  # the engine has as many workers as there are cores
    return _update(None, block, features, group, exact) if block.num_rows else None


@_telling
def _read_all(items: Any, features: Features, group: str | None, exact: float | None) -> Any:
    torch.set_num_threads(1)
    found: Moments | GroupedMoments | None = None
    for text in items.column("pieces").to_pylist():
        for path, number, _ in json.loads(text):
            found = _read(found, path, number, features, group, exact, threads=False)
    return found


@_telling
def _merge(block: Any, grouped: bool) -> Any:
    return _sum(None, block, grouped)


def _sum(found: Moments | GroupedMoments | None, block: Any, grouped: bool) -> Moments | GroupedMoments | None:
    for data, error in zip(block.column("moments"), block.column("error").to_pylist(), strict=True):
        if error is not None:
            raise InputError(error)
        part = (GroupedMoments if grouped else Moments).from_bytes(data.as_buffer().to_pybytes())
        found = part if found is None else found.merge(part)  # type: ignore[arg-type] # both are of one kind
    return found


def _table(moments: Moments | GroupedMoments | None, error: str | None = None) -> Any:
    import pyarrow as pa

    there = moments is not None or error is not None
    data = [None if moments is None else moments.to_bytes()] if there else []
    rows = [0 if moments is None else moments.count] if there else []
    return pa.table(
        {
            "moments": pa.array(data, pa.large_binary()),
            "rows": pa.array(rows, pa.int64()),
            "error": pa.array([error] if there else [], pa.string()),
        }
    )


def _update(
    found: Moments | GroupedMoments | None, block: Any, features: Features, group: str | None, exact: float | None
) -> Moments | GroupedMoments:
    """`found` with the rows of a block; None is none so far."""
    check_given(exact)
    rows = _rows(block, features)
    if found is None:
        found = (Moments if group is None else GroupedMoments)(rows.shape[1], exact=exact)
    if group is None or isinstance(found, Moments):
        return found.update(rows)  # type: ignore[call-arg]
    keys = _column(block, group, "group")
    plain = keys.dtype.kind == "i" or (keys.dtype.kind == "u" and not bool((keys > np.iinfo(np.int64).max).any()))
    return found.update(rows, torch.from_numpy(keys.astype(np.int64)) if plain else keys.tolist())


# ---- columns ----


def _rows(block: Any, features: Features) -> Tensor:
    """(n, d), shared with the block where that is possible."""
    if not isinstance(features, str):
        columns = [_column(block, name, "features") for name in _columns(features, None)]
        if not columns:
            raise InputError("features: got no columns, expected at least one")
        shapes = sorted({column.shape for column in columns})
        if len(shapes) > 1:
            raise InputError(f"features: got columns of shapes {shapes[0]} and {shapes[-1]}, expected a number per row")
        found = np.stack(columns, axis=1)
    else:
        found = _column(block, features, "features")
        if found.ndim == 1 and found.dtype == object and len(found):
            lengths = {len(row) if hasattr(row, "__len__") else -1 for row in found}
            if len(lengths) != 1 or -1 in lengths:
                raise InputError(f"features: column {features!r} holds vectors of lengths {sorted(lengths)[:5]}")
            found = np.stack(list(found))
    integers = found.dtype.kind in "iu"
    if found.ndim != 2 or not (integers or found.dtype in _FLOATS):
        got = f"{found.dtype} of shape {found.shape}"
        expected = "vectors of integers, or of floats of 16, 32 or 64 bits in this machine's order of bytes"
        raise InputError(f"features: got {got} in {features!r}, expected {expected}")
    if integers:  # float32 has 24 bits
        found = found.astype(np.float32 if found.dtype.itemsize <= 2 else np.float64)
    with warnings.catch_warnings():  # that the block's memory is not to be written; nothing here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(found))


def _columns(features: Features, group: str | None) -> list[str]:
    if not isinstance(features, Iterable):
        raise InputError(f"features: got {features!r}, expected the name of a column, or names")
    return [*([features] if isinstance(features, str) else features), *([] if group is None else [group])]


def _column(block: Any, name: str, argument: str) -> np.ndarray[Any, Any]:
    """A column as an array: (n,), or (n, d) of a column of vectors of one length."""
    arrow = hasattr(block, "schema")
    names = block.schema.names if arrow else list(getattr(block, "columns", ()))
    if names.count(name) > 1:
        raise InputError(f"{argument}: there are {names.count(name)} columns {name!r}, expected one")
    if arrow:
        if name not in names:
            raise InputError(f"{argument}: there is no column {name!r}; there are {', '.join(names[:10])}")
        return _arrow(block.column(name), name, argument)
    try:
        column = block[name]
    except KeyError as error:
        raise InputError(f"{argument}: there is no column {name!r}") from error
    except (IndexError, TypeError) as error:
        got = type(block).__name__
        raise InputError(f"block: got {got}, expected a table, a data frame or a dictionary of arrays") from error
    try:
        return np.asarray(column)
    except ValueError as error:
        raise InputError(f"{argument}: column {name!r} is no array: {error}") from error


def _arrow(column: Any, name: str, argument: str) -> np.ndarray[Any, Any]:
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if isinstance(column, pa.ExtensionArray):  # tensors of Ray
        return np.asarray(column.to_numpy() if hasattr(column, "to_numpy") else column.storage.to_numpy())
    if column.null_count:
        raise InputError(f"{argument}: column {name!r} has {column.null_count} missing values")
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = column.flatten()
        if values.null_count:
            raise InputError(f"{argument}: column {name!r} has {values.null_count} missing values in its vectors")
        flat = values.to_numpy(zero_copy_only=False)
        width = len(flat) // max(len(column), 1)
        if not pa.types.is_fixed_size_list(kind):
            lengths = np.diff(column.offsets.to_numpy())
            if len(lengths) and (lengths != width).any():
                raise InputError(
                    f"{argument}: column {name!r} holds vectors of {lengths.min()} to {lengths.max()} numbers"
                )
        return flat.reshape(len(column), width)
    return np.asarray(column.to_numpy(zero_copy_only=False))
