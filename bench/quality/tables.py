"""Rows as tables: for people, in Markdown, in HTML or in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from bench.quality.methods import RETRAIN, RETRAIN_AGAIN
from bench.quality.summary import PLACE, Row, against_best, against_target, short

Table = tuple[list[str], list[list[str]]]
"""Titles, and rows of cells."""

SIZES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


def overview_table(lines: Iterable[Row]) -> Table:
    """Ours on every task, next to the noise floor, the best other method and the target."""
    titles = [*PLACE, "ours", "retrain again", "best other", "target", "reached", "against the best"]
    return titles, [
        [
            *(line[key] for key in PLACE),
            f"{_gap(line['ours'])} ({line['ours']['method']})" if line["ours"] else "-",
            _gap(line["noise"]),
            f"{_gap(line['best'])} ({line['best']['method']})" if line["best"] else "-",
            f"≤ {line['target']:g}",
            against_target(line),
            against_best(line),
        ]
        for line in lines
    ]


def blocks_table(lines: Iterable[dict[str, Row | None]]) -> Table:
    """What probes find behind the blocks beyond what they find in the retrained network, and what that cost."""
    methods = ("original", "ours", "ours blocks", RETRAIN_AGAIN)
    titles = [*PLACE, *methods, "retain test: ours blocks", "retrained"]
    cells = []
    for line in lines:
        place = next(row for row in line.values() if row)
        found = [_number(line[name], "block_excess", "+.3f") for name in methods]
        kept = [_number(line[name], "retain_test", ".2f") for name in ("ours blocks", RETRAIN)]
        cells.append([*(place[key] for key in PLACE), *found, *kept])
    return titles, cells


def task_table(rows: list[Row]) -> Table:
    """All methods on one task; without columns of which nothing was measured."""
    columns = {
        "method": [row["method"] for row in rows],
        "like retrained: gap": [_gap(row) for row in rows],
        "erased: probe AUC": _numbers(rows, "probe_auc", ".3f"),
        "probe excess": _numbers(rows, "probe_excess", "+.3f"),
        "retain / forget train": [_pair(row, "train") for row in rows],
        "retain / forget test": [_pair(row, "test") for row in rows],
        "MIA": _numbers(rows, "mia", ".1f"),
        "LiRA": _numbers(rows, "lira", ".1f"),
        "relearn": _numbers(rows, "relearn", ".0f"),
        "KL": _numbers(rows, "kl", ".3f"),
        "ToW": _numbers(rows, "tug_of_war", ".3f"),
        "seconds": [_seconds(row, "seconds") for row in rows],
        "once moments exist": [_seconds(row, "request_seconds") for row in rows],
        "times faster than retraining": [_faster(row) for row in rows],
        "bytes": [_bytes(row["bytes"]) for row in rows],
    }
    if len({row["runs"] for row in rows}) > 1:  # not all of them are done
        columns["runs"] = [str(row["runs"]) for row in rows]
    kept = {title: cells for title, cells in columns.items() if set(cells) != {"-"}}
    return list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)]


def markdown(table: Table, align: str = "---") -> str:
    """align: of all columns but the first; "---:" for numbers."""
    titles, rows = table
    lines = (titles, ["---", *[align] * (len(titles) - 1)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text(table: Table) -> str:
    """A table for a terminal."""
    titles, rows = table
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _gap(row: Row | None) -> str:
    return f"{row['gap_mean']:.2f} ± {row['gap_spread']:.2f}" if row else "-"


def _number(row: Row | None, key: str, form: str) -> str:
    return "-" if row is None or row[key] is None else f"{row[key]:{form}}"


def _numbers(rows: list[Row], key: str, form: str) -> list[str]:
    return [_number(row, key, form) for row in rows]


def _pair(row: Row, part: str) -> str:
    retain, forget = (_number(row, f"{side}_{part}", ".2f") for side in ("retain", "forget"))
    return f"{retain} / {forget}" if forget != "-" else retain


def _seconds(row: Row, key: str) -> str:
    return "-" if row.get(key) is None else short(row[key])


def _faster(row: Row) -> str:
    seconds = row.get("request_seconds") or row["seconds"]
    known = row["retrain_seconds"] and seconds and row["touched"]  # nothing is touched where nothing is done
    return short(row["retrain_seconds"] / seconds) if known else "-"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    unit = next((unit for unit in ("GB", "MB", "kB") if value >= SIZES[unit]), "B")
    return f"{value / SIZES[unit]:.3g} {unit}"
