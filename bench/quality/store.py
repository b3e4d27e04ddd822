"""Where results are kept: a line of JSON for every run, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loft_fast import files

HERE = Path(__file__).parent
RUNS, TUNED, RESULTS = HERE / "runs.jsonl", HERE / "tuned.json", HERE / "results.json"
KEY = ("data", "model", "task", "method", "original", "seed")

Record = dict[str, Any]


def key(record: Record) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(record[name] for name in KEY)


def read_runs(path: Path = RUNS) -> list[Record]:
    """All runs; of two of the same, the later one. A line that was cut off is left out."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[key(record)] = record
    return list(found.values())


def versions(records: list[Record]) -> dict[str, set[str | None]]:
    """The data sets that results are of several versions of, and which; None: of before versions were kept."""
    found: dict[str, set[str | None]] = {}
    for record in records:
        found.setdefault(record["data"], set()).add(record.get("version"))
    return {name: known for name, known in found.items() if len(known) > 1}


def add_run(record: Record, path: Path = RUNS) -> None:
    """Append one line, whole even when several processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")
        file.write(((b"\n" if cut else b"") + json.dumps(_short(record)).encode()) + b"\n")


def write_json(content: Any, path: Path) -> None:
    """The file is whole at any time."""
    files.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _short(value: Any) -> Any:
    """Numbers to five digits: what is known of them, in a file that is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value
