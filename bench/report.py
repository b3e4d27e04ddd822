"""What `make bench` measured: one table of ratios, a file per machine to compare with later, a plot per suite.

python -m bench.report .benchmarks/last.json --save     write bench/results/<machine>.json and the plots
python -m bench.report .benchmarks/last.json --check    fail where a ratio fell by more than a fifth
"""

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOSS = 0.2  # of a ratio: more than that is a regression

Ratios = dict[str, dict[str, float]]
"""By "suite: case" and rival: how many times as long as ours the rival takes."""


def read(path: Path) -> Ratios:
    """The ratios in a file that pytest-benchmark wrote."""
    return {
        f"{Path(run['fullname'].split('::')[0]).stem.removeprefix('bench_')}: {run['extra_info']['case']}": run[
            "extra_info"
        ]["ratios"]
        for run in json.loads(path.read_text())["benchmarks"]
        if "ratios" in run["extra_info"]
    }


def machine() -> str:
    """A name for this kind of machine: its processor and how many cores there are."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1]
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores".lower()).strip("-")


def table(ratios: Ratios, stored: Ratios) -> str:
    """One line per case and rival; with the stored ratio next to it where there is one."""
    lines = [f"{'suite: case':56}{'rival':36}{'times as long':>14}{'stored':>9}"]
    for case, rivals in ratios.items():
        for rival, ratio in rivals.items():
            before = stored.get(case, {}).get(rival)
            lines.append(f"{case:56}{rival:36}{ratio:14.2f}" + (f"{before:9.2f}" if before else ""))
    return "\n".join(lines)


def regressions(ratios: Ratios, stored: Ratios) -> list[str]:
    """What is slower against a rival than it was, and what is no longer measured."""
    found = []
    for case, rivals in stored.items():
        for rival, before in rivals.items():
            now = ratios.get(case, {}).get(rival)
            if now is None:
                found.append(f"{case}: no longer measured against {rival}")
            elif now < (1 - LOSS) * before:
                found.append(f"{case}: {rival} takes {now:.2f} times as long, was {before:.2f}")
    return found


def plot(ratios: Ratios, suite: str, path: Path) -> None:
    """Bars: how many times as long as ours every rival takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"{case.removeprefix(suite + ': ')}\n{rival}", ratio) for case, rivals in ratios.items()
            for rival, ratio in rivals.items() if case.startswith(suite + ": ")]  # fmt: skip
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.62 * len(rows)), layout="constrained")
    for place, (_, ratio) in enumerate(rows):
        axes.barh(place, ratio - 1, left=1, color="#7a8fa6" if ratio >= 1 else "#d95f02")
        side = 4 if ratio >= 1 else -4
        align = "left" if ratio >= 1 else "right"
        axes.annotate(f"{ratio:.3g}", (ratio, place), (side, 0), textcoords="offset points", ha=align, va="center")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xscale="log", xlabel="time taken, as a multiple of ours", title=f"bench_{suite}")
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

    ratios, name = read(options.measured), machine()
    path = options.results / f"{name}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    print(table(ratios, stored.get("ratios", {})))
    if options.check:
        if not stored:
            print(f"no stored ratios for this machine, {name}: make bench writes them", file=sys.stderr)
            return 2
        found = regressions(ratios, stored["ratios"])
        print("\n".join(found) or "no regression", file=sys.stderr)
        return 1 if found else 0
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        short = {case: {rival: round(ratio, 2) for rival, ratio in rivals.items()} for case, rivals in ratios.items()}
        path.write_text(json.dumps({**_versions(), "ratios": short}, indent=1) + "\n")
        for suite in dict.fromkeys(case.split(": ")[0] for case in ratios):
            plot(ratios, suite, options.results / f"{name}-{suite}.png")
    return 0


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


if __name__ == "__main__":
    sys.exit(main())
