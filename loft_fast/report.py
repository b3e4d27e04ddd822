"""A demo's result for people: a table for the terminal, and a folder with a self-contained page and its pictures."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from loft_fast import files
from loft_fast.errors import FileFormatError, MissingExtraError

Result = dict[str, Any]

RESULT = "result.json"
PAGE = "report.html"

# Key of a row, title, digits after the point.
_COLUMNS = (
    ("retain_train", "retain train", 2),
    ("forget_train", "forget train", 2),
    ("retain_test", "retain test", 2),
    ("forget_test", "forget test", 2),
    ("mia", "attack", 1),
    ("probe_auc", "probe", 3),
    ("agreement", "agreement", 1),
    ("kl", "KL", 3),
    ("seconds", "seconds", 2),
)
_PARTS = ("forget", "seed", "versions", "certificates", "certificate_text", "predictions", "spectra", "frontier")
_KINDS = {"retrain": "goal", "ours": "ours"}
_PICTURES = {
    "predictions.png": (
        "What each network sees in the forgotten digits",
        "Answers that name a forgotten digit are set off in colour.",
    ),
    "accuracies.png": (
        "Accuracy on the four sets",
        "The dotted line is the retrained network, which the others should meet.",
    ),
    "spectra.png": (
        "What is kept and what is dropped",
        "Left, the eigenvalues of both second moments. Right, every direction by what it holds of each; those above "
        "the dashed line hold too much of the forgotten rows for what they are worth to the others.",
    ),
    "frontier.png": (
        "The published objective, solved",
        "Every projector is a point; the dashed arc is the lower bound of the certificate, and the optimum lies on it. "
        "Squares show where 50 steps of Riemannian Adam end, by learning rate.",
    ),
}


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Titles, and one row of cells per network."""
    rows = [[row["label"], *(_cell(row[key], digits) for key, _, digits in _COLUMNS)] for row in result["rows"]]
    return ["", *(title for _, title, _ in _COLUMNS)], rows


def text(result: Result) -> str:
    """The table and the headline for a terminal."""
    titles, rows = table(result)
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(cells: list[str]) -> str:
        name, *numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return "  ".join([name.strip().ljust(widths[0]), *numbers])

    return "\n".join([line(titles), *map(line, rows), "", headline(result)])


def headline(result: Result) -> str:
    """What happened, in a sentence."""
    speed, frontier = result["speed"], result["frontier"]
    published = next(run for run in frontier["descents"] if run["published"])
    return (
        f"Solving and folding took {1000 * (speed['solve'] + speed['fold']):.0f} ms; retraining took "
        f"{speed['retraining']:.1f} s, {speed['times_faster']:.0f} times as long. On the published objective at rank "
        f"{frontier['rank']}, the certified optimum has a loss of {frontier['loss']:.4f} after "
        f"{1000 * frontier['seconds']:.0f} ms; {published['steps']} steps of Riemannian Adam reach "
        f"{published['loss']:.4f} in {1000 * published['seconds']:.0f} ms."
    )


def write(result: Result, folder: Path) -> Path:
    """Write result.json, the pictures and report.html into `folder`; returns the path of the page.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: matplotlib or jinja2 is missing.
    """
    pictures, page = _draw(result)
    folder = files.writable_folder("out", folder)
    files.write_bytes(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    for name, data in pictures.items():
        files.write_bytes(folder / name, data)
    files.write_bytes(folder / PAGE, page.encode())
    return folder / PAGE


def read(path: str | os.PathLike[str]) -> Result:
    """The result that `write` put into a folder, or into the file itself.

    Raises:
        FileFormatError: no such file, or not a result of this version's demo.
    """
    place = Path(path)
    place = place / RESULT if place.is_dir() else place
    try:
        result = json.loads(place.read_text())
        text(result)
        missing = next((name for name in _PARTS if name not in result), None)
        if missing is not None:
            raise KeyError(missing)
    except (AttributeError, OSError, RecursionError, ValueError, TypeError, LookupError, StopIteration) as error:
        raise FileFormatError(f"path: cannot read {str(place)!r} as a demo's result: {error!r}") from error
    return result  # type: ignore[no-any-return]


def _draw(result: Result) -> tuple[dict[str, bytes], str]:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("reports need matplotlib and jinja2: pip install 'loft-fast[demo]'") from error
    from loft_fast import plots

    pictures = plots.draw(result)
    titles, cells = table(result)
    rows = zip(result["rows"], cells, strict=True)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("loft_fast", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        digits=_digits(result["forget"]),
        headline=headline(result),
        facts=_facts(result),
        titles=titles,
        table=[{"kind": _KINDS.get(row["method"], ""), "cells": line} for row, line in rows],
        pictures=[
            {"title": title, "caption": caption, "data": base64.b64encode(pictures[name]).decode()}
            for name, (title, caption) in _PICTURES.items()
        ],
        certificate=result["certificate_text"],
        footer=", ".join([f"seed {result['seed']}", *(f"{k} {v}" for k, v in result["versions"].items())]),
    )
    return pictures, page


def _facts(result: Result) -> list[tuple[str, str]]:
    ours = next(row for row in result["rows"] if row["method"] == "ours")
    goal = next(row for row in result["rows"] if row["method"] == "retrain")
    certificate, speed = result["certificates"]["ours"], result["speed"]
    return [
        ("forgotten digits answered right", f"{ours['forget_test']:.1f} %"),
        ("other digits, against retrained", f"{ours['retain_test'] - goal['retain_test']:+.2f} points"),
        ("solve and fold", f"{1000 * (speed['solve'] + speed['fold']):.0f} ms"),
        ("retraining takes", f"{speed['times_faster']:.0f} times as long"),
        ("dimensions kept", f"{certificate['rank']} of {len(result['spectra']['retain'])}"),
        ("proven within", f"{certificate['relative_gap']:.0e} of the optimum"),
    ]


def _digits(forget: list[int]) -> str:
    names = [str(digit) for digit in forget]
    return f"digit {names[0]}" if len(names) == 1 else f"digits {', '.join(names[:-1])} and {names[-1]}"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


__all__ = ["headline", "read", "table", "text", "write"]
