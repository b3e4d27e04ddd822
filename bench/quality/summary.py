"""From runs to one row for each method on each task; and ours next to the noise floor and the best other method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from bench.quality.methods import METHODS, RETRAIN, RETRAIN_AGAIN
from bench.quality.setups import SETUPS
from bench.quality.store import Record
from bench.quality.tasks import TASKS

CLASS_TASKS = ("one class", "several classes", "extreme", "continual")
TARGETS = {"class": 0.5, "rows": 1.0}  # of the gap, in points
PLACE = ("data", "model", "task")
ORDER = (RETRAIN, RETRAIN_AGAIN, *METHODS)
# "closed outputs" forgets nothing, and "oracle matching" is told what the retrained network says.
NO_RIVALS = (RETRAIN, RETRAIN_AGAIN, "original", "closed outputs", "oracle matching")
MEANS = (
    *("retain_train", "forget_train", "retain_test", "forget_test", "mia", "mia_entropy", "agreement", "kl"),
    *("tug_of_war", "seconds", "request_seconds", "touched", "bytes", "peak_mib", "relearn", "lira"),
)

Row = dict[str, Any]
"""Means over the runs of one method on one task of one network; None for what was not measured."""
Probes = list[dict[str, float]]
"""AUC of each probe behind each block."""


def kind(task: str) -> str:
    """ "class" or "rows": what goes."""
    return "class" if task in CLASS_TASKS else "rows"


def summarise(runs: Iterable[Record]) -> list[Row]:
    """A row for each (data, model, task, method): retrained networks first, then by gap."""
    places: dict[tuple[str, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        places[tuple(run[name] for name in PLACE)][run["method"]].append(run)
    rows = []
    for place in sorted(places, key=_place_order):
        methods = places[place]
        retrained = methods.get(RETRAIN, [])
        rows += sorted((_row(methods[name], retrained) for name in methods), key=_method_order)
    return rows


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by these keys, in their order."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(found)


def overview(rows: Iterable[Row]) -> list[Row]:
    """For each task: our row, that of a second retrained network, the best other method's, and the target."""
    found = []
    for place, part in groups(rows, *PLACE).items():
        named = {row["method"]: row for row in part}
        wanted = part[0]["kind"]
        ours = (named.get("ours match") if wanted == "rows" else None) or named.get("ours")
        others = [row for row in part if row["method"] not in NO_RIVALS and not row["method"].startswith("ours")]
        about = {**dict(zip(PLACE, place, strict=True)), "kind": wanted, "target": TARGETS[wanted]}
        best = min(others, key=_by_gap) if others else None
        found.append({**about, "ours": ours, "noise": named.get(RETRAIN_AGAIN), "best": best})
    return found


def earlier(rows: Iterable[Row]) -> list[dict[str, Row | None]]:
    """For each task on which every block was projected: the rows that say what that did, by method."""
    wanted = ("original", "ours", "ours blocks", RETRAIN, RETRAIN_AGAIN)
    found = [{row["method"]: row for row in part} for part in groups(rows, *PLACE).values()]
    return [{name: named.get(name) for name in wanted} for named in found if "ours blocks" in named]


def against_target(line: Row) -> str:
    """ "met", or by how much it was missed."""
    if line["ours"] is None:
        return "not run"
    over = line["ours"]["gap_mean"] - line["target"]
    return "met" if over <= 0 else f"missed by {short(over)}"


def against_best(line: Row) -> str:
    """Ahead or behind by how much; "tied" within the spread of the best other method."""
    ours, best = line["ours"], line["best"]
    if ours is None or best is None:
        return "not run"
    ahead = best["gap_mean"] - ours["gap_mean"]
    if abs(ahead) <= best["gap_spread"]:
        return "tied"
    return f"ahead by {short(ahead)}" if ahead > 0 else f"behind by {short(-ahead)}"


def short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def plain(value: Any) -> Any:
    """For JSON: numbers to five digits, and null for one that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def _row(runs: list[Record], retrained: list[Record]) -> Row:
    first, gaps = runs[0], [run["gap"] for run in runs]
    known = {run["original"]: run["probes"] for run in retrained if "probes" in run}
    probed = [run for run in runs if run.get("probes")]
    pairs = [(run["probes"], known[run["original"]]) for run in probed if run["original"] in known]
    linear = _mean(run["probes"][-1]["linear"] for run in probed)
    return {
        **{name: first[name] for name in (*PLACE, "method")},
        "kind": kind(first["task"]),
        "originals": len({run["original"] for run in runs}),
        "runs": len(runs),
        **{name: _mean(run[name] for run in runs if name in run) for name in MEANS},
        "gap_mean": fmean(gaps),
        "gap_spread": float(np.std(gaps)),
        "probe_auc": linear,
        "probe_linear": linear,
        "probe_neighbours": _mean(run["probes"][-1]["neighbours"] for run in probed),
        "probe_excess": _mean(max(_excess(*pair).values()) for pair in pairs),
        "block_excess": _block_excess(pairs),
        "retrain_seconds": _mean(run["seconds"] for run in retrained),
    }


def _excess(probes: Probes, retrained: Probes) -> dict[tuple[int, str], float]:
    """How much more each probe finds than in the network retrained from the same start, by block and probe."""
    blocks = enumerate(zip(probes, retrained, strict=True))
    return {(i, probe): found[probe] - wanted[probe] for i, (found, wanted) in blocks for probe in wanted}


def _block_excess(pairs: list[tuple[Probes, Probes]]) -> float | None:
    """The most, over blocks and probes, of the mean over originals: what one network has by chance evens out."""
    if not pairs:
        return None
    excesses = [_excess(*pair) for pair in pairs]
    return max(fmean(one[place] for one in excesses) for place in excesses[0])


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _place_order(place: tuple[str, ...]) -> tuple[Any, ...]:
    data, model, task = place
    return _index(SETUPS, (data, model)), data, model, _index(TASKS, task), task


def _method_order(row: Row) -> tuple[Any, ...]:
    fixed = (RETRAIN, RETRAIN_AGAIN)
    return _index(fixed, row["method"]), _by_gap(row), _index(ORDER, row["method"])


def _by_gap(row: Row) -> float:
    return row["gap_mean"] if math.isfinite(row["gap_mean"]) else math.inf


def _index(names: Sequence[Any], name: Any) -> int:
    return names.index(name) if name in names else len(names)
