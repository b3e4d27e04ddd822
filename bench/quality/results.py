"""Results as a table for people and as rows of a JSON file for scripts."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from bench.quality.measures import Score


@dataclass(frozen=True)
class Run:
    """One method on one task of one original model, next to the model retrained for the same task."""

    task: str
    method: str
    score: Score
    retrained: Score
    seconds: float
    retrain_seconds: float


def summarise(runs: list[Run], data: str, model: str) -> list[dict[str, Any]]:
    """One row per task and method, means over the runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.method), []).append(run)
    return [
        {"data": data, "model": model, "task": task, "method": method, **_means(group)}
        for (task, method), group in groups.items()
    ]


def _means(runs: list[Run]) -> dict[str, Any]:
    gaps = [run.score.gap(run.retrained, mia=True) for run in runs]
    accuracies = [asdict(run.score.accuracies) for run in runs]
    return {
        "originals": len(runs),  # one original model per seed, and one run on each
        "runs": len(runs),
        **{key: fmean(each[key] for each in accuracies) for key in accuracies[0]},
        "mia": fmean(run.score.mia for run in runs),
        "gap_mean": fmean(gaps),
        "gap_spread": pstdev(gaps),
        "gap_accuracies": fmean(run.score.gap(run.retrained, mia=False) for run in runs),
        "probe_auc": fmean(run.score.probe_auc for run in runs),
        "seconds": fmean(run.seconds for run in runs),
        "retrain_seconds": fmean(run.retrain_seconds for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies in percent; gap: mean absolute difference to the retrained model over the four of them."""
    columns = ("retain_train", "forget_train", "retain_test", "forget_test", "gap_accuracies", "probe_auc", "mia")
    titles = ("retain train", "forget train", "retain test", "forget test", "gap", "probe", "MIA")
    lines = [f"{'task':10}{'method':17}" + "".join(f"{title:>13}" for title in titles) + f"{'seconds':>10}"]
    for row in rows:
        cells = "".join(f"{row[key]:13.3f}" if key == "probe_auc" else f"{row[key]:13.2f}" for key in columns)
        lines.append(f"{row['task']:10}{row['method']:17}{cells}{row['seconds']:10.3f}")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to the file, replacing those of the same data, task and method; the file is whole at any time."""
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    by_key = {(row["data"], row["task"], row["method"]): row for row in [*stored, *rows]}
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps({"rows": list(by_key.values())}, indent=1) + "\n")
    unfinished.replace(path)
