"""The demo's four pictures as PNG bytes, drawn from numbers that a JSON file can hold."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from loft_fast.errors import MissingExtraError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as missing:
    raise MissingExtraError("reports need matplotlib and jinja2: pip install 'loft-fast[demo]'") from missing

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLORS = {
    "original": "#999999",
    "retrain": "#000000",
    "paper": "#E69F00",
    "leace": "#56B4E9",
    "ours": "#0072B2",
    "ours erase": "#009E73",
}
_ALARM = "#D55E00"
_DESCENTS = ("#9a5b86", "#b37700", "#2b7fb0")  # shades of the same set that can also be read as text
_INK = "#222222"
_STYLE: dict[str, Any] = {"fontsize": 11, "color": _INK}

Result = dict[str, Any]


def draw(result: Result) -> dict[str, bytes]:
    """File name -> PNG of every picture, in the order of the report."""
    return {
        "predictions.png": _png(predictions(result)),
        "accuracies.png": _png(accuracies(result)),
        "spectra.png": _png(spectra(result)),
        "frontier.png": _png(frontier(result)),
    }


def predictions(result: Result) -> Figure:
    """A row of forgotten test images with every model's answers below, then the answers to all of them as bars."""
    data, rows, forget = result["predictions"], result["rows"], set(result["forget"])
    figure = Figure(figsize=(8, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1], squeeze=False)[:, 0]
    _samples(top.subplots(), data, rows, forget)
    panels = bottom.subplots(2, 3, sharex=True, sharey=True)
    bottom.suptitle(f"Answers to all {sum(data['counts']['original'])} forgotten test images", **_STYLE)
    for axes, row in zip(panels.flat, rows, strict=True):
        counts = np.array(data["counts"][row["method"]])
        shares = counts / counts.sum()
        bars = axes.bar(range(10), shares, color=[_ALARM if digit in forget else "#7a8fa6" for digit in range(10)])
        largest = int(counts.argmax())
        axes.bar_label(bars, [f"{share:.0%}" if d == largest or d in forget else "" for d, share in enumerate(shares)])
        axes.set_title(row["label"], **_STYLE)
        axes.set_xticks(range(10))
        axes.set_ylim(0, 1.12)
        axes.set_yticks([])
        _clean(axes, "left")
    bottom.supxlabel("answer", **_STYLE)
    return figure


def _samples(axes: Axes, data: Result, rows: list[Result], forget: set[int]) -> None:
    images = [np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(28, 28) for pixels in data["images"]]
    for column, image in enumerate(images):
        extent = (column - 0.46, column + 0.46, 0.08, 1.0)
        axes.imshow(255 - image, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    for line, row in enumerate(rows):
        height = -0.3 - 0.5 * line
        axes.text(-0.75, height, row["label"], ha="right", va="center", **_STYLE)
        for column, answer in enumerate(data["answers"][row["method"]]):
            known = answer in forget
            weight, color = ("bold", _ALARM) if known else ("normal", _INK)
            axes.text(column, height, str(answer), ha="center", va="center", fontsize=13, weight=weight, color=color)
    axes.set_xlim(-2.9, len(images) - 0.4)
    axes.set_ylim(-0.5 * len(rows) - 0.1, 1.05)
    axes.axis("off")


def accuracies(result: Result) -> Figure:
    """Accuracy of every model on the four sets."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    names = {
        "retain_train": "retain, training rows",
        "retain_test": "retain, test rows",
        "forget_train": "forget, training rows",
        "forget_test": "forget, test rows",
    }
    labels = [row["label"] for row in result["rows"]]
    for axes, (key, title) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, names.items(), strict=True):
        values = [row[key] for row in result["rows"]]
        bars = axes.barh(labels, values, color=[COLORS[row["method"]] for row in result["rows"]], height=0.7)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, **_STYLE)
        target = next(row[key] for row in result["rows"] if row["method"] == "retrain")
        axes.axvline(target, color="black", lw=1, ls=":")
        axes.set_title(title, **_STYLE)
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        _clean(axes, "left")
    return figure


def spectra(result: Result) -> Figure:
    """Eigenvalues of both matrices, and every direction of the chosen basis by the shares it holds."""
    data = result["spectra"]
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    floor = 1e-7
    for key, color, name in (("retain", COLORS["ours"], "retain"), ("forget", _ALARM, "forget")):
        values = np.array(data[key])
        values = values[values > floor]
        left.plot(range(1, len(values) + 1), values, color=color, lw=2)
        at = len(values) // 2 if key == "retain" else len(values) // 4
        lift, align = (1.5, "left") if key == "retain" else (0.55, "right")
        left.text(at + 1, values[at] * lift, name, color=color, ha=align, va="center", fontsize=12)
    left.set(yscale="log", xlabel="eigenvalue, in order of size", ylabel="share of the variance")
    left.set_title("Spectra", **_STYLE)
    retain, forget = (np.array(data[f"{key}_shares"]) for key in ("retain", "forget"))
    kept = np.arange(len(retain)) < data["kept"]
    seen = np.maximum(retain, forget) > floor  # units that never fire span directions without any variance
    right.scatter(retain[kept & seen], forget[kept & seen], s=12, color=COLORS["ours"], lw=0, alpha=0.7)
    right.scatter(retain[~kept & seen], forget[~kept & seen], s=16, color=_ALARM, marker="x", lw=1)
    ends = np.array([floor, 1.0])
    right.plot(ends, ends / math.tan(data["angle"]), color=_INK, lw=1, ls="--")
    right.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1))
    right.set(xlabel="share of the retain variance", ylabel="share of the forget variance")
    right.set_title("Every direction of feature space", **_STYLE)
    for part, name, color, place, ha, va in (
        (~kept, "dropped", _ALARM, (0.04, 0.97), "left", "top"),
        (kept, "kept", COLORS["ours"], (0.98, 0.03), "right", "bottom"),
    ):
        shares = f"{forget[part].sum():.0%} of forget,\n{retain[part].sum():.0%} of retain"
        text = f"{name}: {part.sum()} directions,\n{shares}"
        right.text(*place, text, transform=right.transAxes, color=color, fontsize=11, ha=ha, va=va)
    for axes in (left, right):
        _clean(axes)
    return figure


def frontier(result: Result) -> Figure:
    """What projectors can reach, the certified optimum with its bound, and where Riemannian Adam goes; then closer."""
    data = result["frontier"]
    figure = Figure(figsize=(8, 4.25), layout="constrained")
    whole, near = figure.subplots(1, 2)
    curve, (x, y) = np.array(data["curve"]), data["optimum"]
    radius = math.sqrt(data["lower_bound"])
    turns = np.linspace(0, math.pi / 2, 100)
    ends = np.array([run["path"][-1] for run in data["descents"]])
    low, high = (f(np.vstack([ends, [x, y]]), axis=0) for f in (np.min, np.max))
    span = 1.7 * max(*(high - low), 0.15 * radius)
    corner = (low + high) / 2 - [0.5 * span, 0.5 * span]
    for axes, (left, bottom), size in ((whole, (0.0, 0.0), 1.0), (near, corner, span)):
        axes.fill_between(curve[:, 0], curve[:, 1], 1.0, color="#eaf0f5", lw=0)
        axes.plot(curve[:, 0], curve[:, 1], color=_INK, lw=1.5)
        axes.plot(radius * np.cos(turns), radius * np.sin(turns), color=COLORS["ours erase"], lw=1.5, ls="--")
        for run, end, color in zip(data["descents"], ends, _DESCENTS, strict=True):
            axes.plot(*np.array(run["path"]).T, color=color, lw=1.2, alpha=1.0 if axes is whole else 0.45)
            axes.plot(*end, "s", color=color, ms=5 if axes is whole else 9)
        axes.plot(x, y, "*", color=COLORS["ours"], ms=15, mec="white", mew=0.8)
        axes.set(xlim=(left, left + size), ylim=(bottom, bottom + size), aspect="equal", xlabel="retain variance lost")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _clean(axes)
    whole.set_ylabel("forget variance kept")
    whole.set_title(f"All projectors of rank {data['rank']}", **_STYLE)
    whole.text(radius * 0.08, radius * 0.3, "cannot", **_STYLE)
    near.set_title("Near the optimum", **_STYLE)
    names = [f"Riemannian Adam, lr {run['learning_rate']:g}: {run['loss']:.4f}" for run in data["descents"]]
    colors = [*_DESCENTS, COLORS["ours"]]
    marks = [Line2D([], [], ls="", marker="s" if color in _DESCENTS else "*", ms=9, color=color) for color in colors]
    whole.legend(
        marks, [*names, f"optimum: {data['loss']:.4f}"], title="loss", loc="upper right", labelcolor=colors, fontsize=10
    )
    return figure


def _clean(axes: Axes, *more: str) -> None:
    for side in ("top", "right", *more):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=10)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
