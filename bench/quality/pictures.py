"""The results as pictures: gaps as dots, and gap against time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from bench.quality.methods import RETRAIN, RETRAIN_AGAIN
from bench.quality.summary import TARGETS, Row, groups
from loft_fast.plots import COLORS

FLOOR, CEILING = 0.01, 100.0  # of the axis of gaps, in points; what is below is drawn at its end
TICKS = {0.01: "≤ 0.01", 0.1: "0.1", 1: "1", 10: "10", 100: "100"}
INK, OTHER, NOISE = "#222222", "#7a8fa6", "#D55E00"
HUES = {**COLORS, "ours match": COLORS["ours"], "ours blocks": COLORS["ours"], RETRAIN_AGAIN: NOISE}
TITLES = {"class": "Classes to forget", "rows": "Rows to forget"}
SCATTERED = {"class": "several classes", "rows": "random 10%"}
DPI = 130
CROWDED = 1e4  # from end to end of an axis: numbers between the powers of ten would overlap
NEAR = 10  # points: a name this near to its dot needs no line
DETOUR = 25  # points further off that a name goes for its line not to cross a dot or another name


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def dots(rows: list[Row]) -> Figure:
    """The gaps of one network: a panel for each task, a line for each method, best on average at the top."""
    kinds = {name: part for (name,), part in groups(rows, "kind").items()}
    ranked = {name: _ranked(part) for name, part in kinds.items()}
    heights = [1.1 + 0.2 * len(names) for names in ranked.values()]
    figure = Figure(figsize=(12, sum(heights) + 0.4), dpi=DPI, layout="constrained")
    parts = figure.subfigures(len(kinds), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, name in zip(parts, kinds, strict=True):
        _panels(part, kinds[name], ranked[name], name)
    marks = [
        Line2D([], [], color=NOISE, lw=1.5, label="noise floor: retrained with another seed"),
        Line2D([], [], color=INK, lw=1.2, ls=":", label="target"),
        Line2D([], [], color=COLORS["ours"], marker="o", ls="", label="this package"),
    ]
    figure.suptitle("{data}, {model}".format(**rows[0]), fontsize=13, color=INK)
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _ranked(rows: list[Row]) -> list[str]:
    """Methods, smallest geometric mean of the gap first."""
    named = groups([row for row in rows if row["method"] not in (RETRAIN, RETRAIN_AGAIN)], "method")
    return sorted((name for (name,) in named), key=lambda name: fmean(math.log(_shown(row)) for row in named[name,]))


def _panels(figure: SubFigure, rows: list[Row], names: list[str], kind: str) -> None:
    tasks = groups(rows, "task")
    figure.suptitle(TITLES[kind], fontsize=12, color=INK, weight="bold")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, ((task,), part) in zip(panels, tasks.items(), strict=True):
        _panel(axes, {row["method"]: row for row in part}, names)
        axes.axvline(TARGETS[kind], color=INK, lw=1.2, ls=":", zorder=1)
        axes.set_title(task, fontsize=11, color=INK)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for label in panels[0].get_yticklabels():
        label.set_weight("bold" if label.get_text().startswith("ours") else "normal")
    figure.supxlabel("gap to the retrained network, points", fontsize=10, color=INK)


def _panel(axes: Axes, rows: dict[str, Row], names: list[str]) -> None:
    if RETRAIN_AGAIN in rows:
        axes.axvline(_shown(rows[RETRAIN_AGAIN]), color=NOISE, lw=1.5, zorder=1)
    for height, name in enumerate(names):
        if name not in rows:
            continue
        value, color = _shown(rows[name]), HUES.get(name, OTHER)
        spread = [max(FLOOR, value - rows[name]["gap_spread"]), min(2 * CEILING, value + rows[name]["gap_spread"])]
        axes.plot(spread, [height] * 2, color=color, lw=1.5, alpha=0.6)
        axes.plot(value, height, "o", color=color, ms=7 if name.startswith("ours") else 5)
    axes.set(xscale="log", xlim=(0.8 * FLOOR, 1.3 * CEILING), axisbelow=True)
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.minorticks_off()
    axes.grid(axis="both", color="#e8ecf0", lw=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def scatter(rows: list[Row]) -> Figure:
    """Gap against seconds: a task of each kind."""
    chosen = []
    for (kind,), part in groups(rows, "kind").items():
        tasks = groups(part, "task")
        chosen.append(tasks.get((SCATTERED[kind],)) or next(iter(tasks.values())))
    figure = Figure(figsize=(6.2 * len(chosen), 6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    for axes, part in zip(panels, chosen, strict=True):
        _cloud(axes, part)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for the panels as they are now
    for axes, part in zip(panels, chosen, strict=True):
        _label(axes, _timed(part))
    return figure


def _timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["method"] not in (RETRAIN, "original") and row["seconds"]]


def _cloud(axes: Axes, rows: list[Row]) -> None:
    for row in _timed(rows):
        axes.plot(row["seconds"], _shown(row), "o", color=HUES.get(row["method"], OTHER), ms=7, mec="white", mew=0.7)
    axes.axhline(TARGETS[rows[0]["kind"]], color=INK, lw=1.2, ls=":", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="gap to the retrained network, points")
    axes.set_title("{data}, {model}: {task} (dotted: the target)".format(**rows[0]), fontsize=11, color=INK)
    axes.minorticks_off()
    axes.margins(0.14, 0.1)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        between = (2, 5) if high / low < CROWDED else ()
        axis.set_major_locator(LogLocator(subs=(1, *between)))
        axis.set_major_formatter("{x:g}")
    axes.grid(color="#e8ecf0", lw=0.8)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass
class _Drawn:
    """What a name has to go around, in pixels."""

    frame: Bbox
    pixels: float  # a point
    dots: list[Bbox]
    names: list[Bbox] = field(default_factory=list)
    lines: list[Path] = field(default_factory=list)

    def place(self, dot: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, bool]:
        """Where the middle of a name of this size goes, covering no dot and no other name; whether it needs a line."""
        least, best, far = math.inf, dot, False
        for distance, way in _around(*size / self.pixels):
            if distance >= least:
                break
            middle = dot + way * self.pixels
            box = _box(middle, size)
            if not _inside(box, self.frame) or any(box.overlaps(other) for other in self.dots + self.names):
                continue
            crossings = sum(line.intersects_bbox(box) for line in self.lines)
            if distance > NEAR:
                line = Path([dot, middle])
                crossings += sum(line.intersects_bbox(other) for other in self.dots + self.names) - 1  # its own dot
            if distance + DETOUR * crossings < least:
                least, best, far = distance + DETOUR * crossings, middle, distance > NEAR
        self.names.append(_box(best, size))
        if far:
            self.lines.append(Path([dot, best]))
        return best, far


def _label(axes: Axes, rows: list[Row]) -> None:
    """Names next to their dots; thin lines lead to those further off."""
    places = axes.transData.transform([(row["seconds"], _shown(row)) for row in rows])
    pixels = axes.figure.dpi / 72
    drawn = _Drawn(axes.bbox, pixels, [_box(place, 8 * pixels * np.ones(2)) for place in places])
    style = {"fontsize": 9, "color": INK, "ha": "center", "va": "center"}
    for place, row in zip(places, rows, strict=True):
        text = axes.text(0, 0, row["method"], weight="bold" if row["method"].startswith("ours") else "normal", **style)
        middle, far = drawn.place(place, text.get_window_extent().size + 2)
        ends = axes.transData.inverted().transform([place, middle])
        text.set_position(ends[1])
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.3})
        if far:
            axes.plot(*ends.T, color="#a3afbb", lw=0.8, zorder=1.5, scalex=False, scaley=False)


def _around(width: float, height: float) -> Iterator[tuple[int, np.ndarray]]:
    """Distances from a dot, and the way from it to the middle of a name that far off, nearest first."""
    for distance in range(6, 240, 4):
        for turn in (0, 12, 6, 18, 2, 10, 14, 22, 4, 8, 16, 20, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23):
            angle = math.pi * turn / 12
            yield distance, np.array([np.cos(angle) * (distance + width / 2), np.sin(angle) * (distance + height / 2)])


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _box(middle: np.ndarray, size: np.ndarray) -> Bbox:
    return Bbox([middle - size / 2, middle + size / 2])


def _shown(row: Row) -> float:
    """The gap, on the axis."""
    return min(max(row["gap_mean"], FLOOR), CEILING) if math.isfinite(row["gap_mean"]) else CEILING
