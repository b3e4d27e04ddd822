"""What `make bench` measured: one table of ratios, a file per machine to compare with later, a plot per suite.

python -m bench.report .benchmarks/last.json --save     write bench/results/<machine>.json and the plots
python -m bench.report .benchmarks/last.json --check    fail where a ratio fell by more than a fifth
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loft_fast import backends

RESULTS = Path(__file__).parent / "results"
LOSS = 0.2  # of a ratio: more than that is a regression

Row = dict[str, Any]
"""What `bench.compete` says of one rival in one case, and the suite it belongs to."""


def read(path: Path) -> list[Row]:
    """The rows in a file that pytest-benchmark wrote."""
    return [
        {"suite": Path(run["fullname"].split("::")[0]).stem.removeprefix("bench_"), **row}
        for run in json.loads(path.read_text())["benchmarks"]
        for row in run["extra_info"].get("rows", [])
    ]


def machine() -> str:
    """A name for this kind of machine: its processor, how many cores there are and the instructions that serve."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        told = dict(re.findall(r"^(model name|cpu family)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE))
        # The name alone may be "AMD EPYC", be it of one generation or of another.
        model = " family ".join(told[key] for key in ("model name", "cpu family") if key in told) or model
    instructions = backends.native_module().instructions() if "native" in backends.available() else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores {instructions}".lower()).strip("-")


def commit() -> str:
    """What is measured; nothing where it is no checkout, or git is not there."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def table(rows: list[Row], stored: list[Row]) -> str:
    """One line per case and rival; the ratio aimed at, and the stored one, next to it where there is one."""
    before = _by_rival(stored)
    lines = [f"{'suite: case':56}{'rival':36}{'times as long':>14}{'target':>9}{'stored':>9}"]
    for place, row in _by_rival(rows).items():
        suite, case, peer = place
        beside = (row["target"], before[place]["ratio"] if place in before else None)
        numbers = "".join(f"{number:9.2f}" if number else " " * 9 for number in beside)
        lines.append(f"{f'{suite}: {case}':56}{peer:36}{row['ratio']:14.2f}{numbers}".rstrip())
    return "\n".join(lines)


def regressions(rows: list[Row], stored: list[Row]) -> list[str]:
    """What is slower against a rival than it was, and what is no longer measured."""
    found, now = [], _by_rival(rows)
    for place, row in _by_rival(stored).items():
        suite, case, peer = place
        if place not in now:
            found.append(f"{suite}: {case}: no longer measured against {peer}")
        elif now[place]["ratio"] < (1 - LOSS) * row["ratio"]:
            ratio = now[place]["ratio"]
            found.append(f"{suite}: {case}: {peer} takes {ratio:.2f} times as long, was {row['ratio']:.2f}")
    return found


def _by_rival(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row["suite"], row["case"], row["peer"]): row for row in rows}


def plot(rows: list[Row], suite: str, path: Path) -> None:
    """Bars: how many times as long as ours every rival of a suite takes; a line where it is aimed to be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["suite"] == suite]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.62 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        ratio = row["ratio"]
        axes.barh(place, ratio - 1, left=1, color="#7a8fa6" if ratio >= 1 else "#d95f02")
        side = 4 if ratio >= 1 else -4
        align = "left" if ratio >= 1 else "right"
        axes.annotate(f"{ratio:.3g}", (ratio, place), (side, 0), textcoords="offset points", ha=align, va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        if row["target"]:
            axes.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="#222222", linestyle=":")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['case']}\n{row['peer']}" for row in rows])
    axes.set(xscale="log", xlabel="time taken, as a multiple of ours (dotted: the target)", title=f"bench_{suite}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    rows, name = read(options.measured), machine()
    path = options.results / f"{name}.json"
    stored: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    print(table(rows, stored))
    if options.check:
        if not stored:
            print(f"no stored ratios for this machine, {name}: make bench writes them", file=sys.stderr)
            return 2
        found = regressions(rows, stored)
        print("\n".join(found) or "no regression", file=sys.stderr)
        return 1 if found else 0
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_provenance(name), "rows": [_short(row) for row in rows]}, indent=1) + "\n")
        for suite in dict.fromkeys(row["suite"] for row in rows):
            plot(rows, suite, options.results / f"{name}-{suite}.png")
    return 0


def _short(row: Row) -> Row:
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()}


def _provenance(device: str) -> Row:
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "loft_fast")}
    return {"device": device, "date": date.today().isoformat(), "commit": commit(), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
