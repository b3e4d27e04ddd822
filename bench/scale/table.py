"""Moments of a Parquet table far larger than memory, by group: on Ray against one process, in time and in memory.

One process uses all cores for its products as it is; it is also timed on one core.

python -m bench.scale.table --rows 20000000 --folder table --json bench/scale/table.json
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import ray
import torch
from pyarrow import parquet
from tqdm.auto import tqdm

from loft_fast import files
from loft_fast.tables import parquet_moments

DIM, GROUPS, EXACT = 256, 10, 8.0
FILE, PIECE = 1_000_000, 100_000  # rows of a file, and of a row group


def make(folder: Path, rows: int) -> None:
    """Normal rows and labels, in files of a million; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(rows // FILE), desc="making the table", unit="file", leave=False):
        path = folder / f"{number:03}.parquet"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(number)
        kind = pa.schema([("features", pa.list_(pa.float32(), DIM)), ("label", pa.int64())])
        unfinished = path.with_suffix(".unfinished")
        with parquet.ParquetWriter(unfinished, kind, compression="none", use_dictionary=False) as writer:
            for _ in range(FILE // PIECE):
                x = torch.randn(PIECE, DIM, generator=generator)
                labels = torch.randint(0, GROUPS, (PIECE,), generator=generator)
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), DIM)
                writer.write_table(pa.table({"features": vectors, "label": labels.numpy()}, schema=kind))
        unfinished.rename(path)


class Memory:
    """The most that all processes of this one and of Ray, which share some of it, have held at once, in bytes."""

    def __enter__(self) -> "Memory":
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            total = 0
            for process in psutil.process_iter(["name", "cmdline"]):
                try:
                    mine = process.pid == psutil.Process().pid or "ray" in " ".join(process.info["cmdline"] or [])
                    total += process.memory_full_info().pss if mine else 0
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.most = max(self.most, total)


def main() -> None:
    """Both ways in turn, `--repeats` times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, default=Path("table"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    make(options.folder, options.rows)
    ray.init(num_cpus=options.cpus, object_store_memory=300 * 2**20, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    ways = {"one core": (None, 1), "one": (None, options.cpus), "ray": ("ray", options.cpus)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory = dict.fromkeys(ways, 0)
    digests = set()
    for _ in range(options.repeats):
        for name, (engine, threads) in ways.items():
            torch.set_num_threads(threads)
            pa.set_cpu_count(threads)
            with Memory() as watched:
                begin = time.perf_counter()
                moments = parquet_moments(options.folder, "features", "label", EXACT, engine=engine)  # type: ignore[arg-type]
                times[name].append(time.perf_counter() - begin)
            digests.add(moments.digest())
            memory[name] = max(memory[name], watched.most)
            print(f"{name}: {times[name][-1]:.1f} s, {watched.most / 2**30:.2f} GiB", flush=True)
    assert len(digests) == 1, "not the same moments"
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: round(median[name] / median["ray"], 3) for name in ("one core", "one")}
    print(f"{moments.count} rows x {DIM}, {GROUPS} groups: as multiples of the time of Ray, {ratios}")
    if options.json is not None:
        found = {
            "rows": moments.count,
            "dim": DIM,
            "groups": GROUPS,
            "cpus": options.cpus,
            "ratios": ratios,
            "peak_bytes": memory,
            "seconds": times,
        }
        files.write_bytes(options.json, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
