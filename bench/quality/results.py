"""Results as tables for people and as rows of a JSON file for scripts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

from loft_fast.evaluate import SETS, Evaluation


@dataclass(frozen=True)
class Run:
    """One method on one task of one original model, next to the model retrained for the same task."""

    task: str
    method: str
    original: int  # the seed it was trained with
    score: Evaluation
    retrained: Evaluation
    seconds: float
    retrain_seconds: float

    def gaps(self, *measures: str) -> list[float]:
        """Absolute differences to the retrained model, in points."""
        return [abs(getattr(self.score, name) - getattr(self.retrained, name)) for name in measures]


def summarise(runs: list[Run], data: str, model: str) -> list[dict[str, Any]]:
    """One row per task and method, means over the runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.method), []).append(run)
    return [
        {"data": data, "model": model, "task": task, "method": method, **_row(group)}
        for (task, method), group in groups.items()
    ]


def _row(runs: list[Run]) -> dict[str, Any]:
    gaps = [fmean(run.gaps(*SETS, "mia")) for run in runs]
    return {
        "originals": len({run.original for run in runs}),
        "runs": len(runs),
        **{name: fmean(getattr(run.score, name) for run in runs) for name in (*SETS, "mia", "probe_auc")},
        "gap_mean": fmean(gaps),
        "gap_spread": pstdev(gaps),
        "gap_accuracies": fmean(fmean(run.gaps(*SETS)) for run in runs),
        "median_gaps": {name: median(run.gaps(name)[0] for run in runs) for name in SETS},
        "median_probe_auc": median(run.score.probe_auc for run in runs),
        "seconds": fmean(run.seconds for run in runs),
        "retrain_seconds": fmean(run.retrain_seconds for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means. Accuracies in percent; gap: mean absolute difference to the retrained model over the four of them."""
    titles = ("retain train", "forget train", "retain test", "forget test", "gap", "probe", "MIA", "seconds")
    columns = (*SETS, "gap_accuracies", "probe_auc", "mia", "seconds")
    return _table(rows, titles, [[row[key] for key in columns] for row in rows])


def median_table(rows: list[dict[str, Any]]) -> str:
    """Medians over the runs of the absolute difference to the retrained model, in points, and of the probe's AUC."""
    titles = ("|retain train|", "|forget train|", "|retain test|", "|forget test|", "probe")
    return _table(
        rows, titles, [[*(row["median_gaps"][name] for name in SETS), row["median_probe_auc"]] for row in rows]
    )


def _table(rows: list[dict[str, Any]], titles: Sequence[str], values: list[list[float]]) -> str:
    lines = [f"{'task':10}{'method':17}" + "".join(f"{title:>15}" for title in titles)]
    for row, cells in zip(rows, values, strict=True):
        shown = (
            f"{cell:15.3f}" if title in ("probe", "seconds") else f"{cell:15.2f}"
            for title, cell in zip(titles, cells, strict=True)
        )
        lines.append(f"{row['task']:10}{row['method']:17}" + "".join(shown))
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to the file, replacing those of the same data, task and method; the file is whole at any time."""
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    by_key = {(row["data"], row["task"], row["method"]): row for row in [*stored, *rows]}
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps({"rows": list(by_key.values())}, indent=1) + "\n")
    unfinished.replace(path)
