"""What the runs come to: a file for scripts, tables in Markdown, and a page with pictures.

python -m bench.quality.page
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from bench.quality import claims, store, tables
from bench.quality.claims import Claim
from bench.quality.summary import Row, earlier, groups, overview, plain, summarise
from loft_fast import files

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
MARKDOWN, PAGE, PICTURES = "quality-results.md", "quality.html", "pictures"

TITLE = "Forgetting, measured"
INTRODUCTION = (
    "There are two things to want of a network that forgets. It can be **like retrained**: as if the rows had never "
    "been there. The gap says how far it is from that, in points: the mean absolute difference of its accuracies and "
    "of membership inference from those of the network retrained without the rows. Or the rows can be **erased**: a "
    "linear probe on the features before the head tells them from the others no better than chance, an AUC of 0.5. "
    "A retrained network has not erased them: what tells a class apart can be learned from other classes.",
    "All numbers are means over independently trained networks and seeds; ± is the standard deviation over the runs. "
    "“retrain again” is a network retrained with another seed, the noise floor: nothing can be expected to be nearer. "
    "“oracle matching” is told what the retrained network says, so that it is a bound and no rival. “closed outputs” "
    "only forbids the network to say the classes: how small a gap can be with nothing forgotten.",
)
LEGEND = (
    "Accuracies and membership inference (MIA) are in percent. LiRA: percent of the forgotten rows that a "
    "likelihood-ratio attack, with one variance for all, takes for training rows. "
    "Relearn: steps of fine-tuning on the forgotten rows until nine "
    "tenths of the original's accuracy on them are back, 60 at most. Probe excess: how much more a linear or a "
    "nearest-neighbour probe finds, after any block, than in the retrained network. KL: from the retrained network's "
    "predictions on test rows, in nats. ToW: tug of war, 1 for a network like the retrained one. Seconds: all that a "
    "method needs, passes over the data included; on the continual task those of all requests, next to one retraining. "
    "Once moments exist: the same without what can be there before a request comes. "
    "Bytes: of the tensors that change.",
)
OVERVIEW_NOTE = (
    "Ours is what the package does by default: `unlearn` where classes go, `match_retrained` where rows go. "
    "Tied: the difference is within the spread of the best other method.",
)
BLOCKS_NOTE = (
    "How much more a probe finds of the forgotten classes than in the retrained network, in AUC: the worst of all "
    "blocks and both probes, each the mean over the originals. “ours blocks” is `erase_layers` at every block before "
    "the last, and there what `unlearn` does, trimmed to what the open outputs read.",
)
CLAIMS_NOTE = (
    "Each claim is our reading of what a paper says of its method; where it has no number that could be compared, the "
    "threshold is ours. It is looked at on every task of its kind on which all that it speaks of was run.",
)
READING, BLOCKS, CLAIMS = "How to read the tables", "Earlier blocks", "What the papers say of their methods"


def markdown(rows: list[Row], checked: list[Claim]) -> str:
    """The tables."""
    parts = [f"# {TITLE}", *INTRODUCTION, "## Overview", *OVERVIEW_NOTE]
    parts += [tables.markdown(tables.overview_table(overview(rows)))]
    parts += [f"## {BLOCKS}", *BLOCKS_NOTE, tables.markdown(tables.blocks_table(earlier(rows)))]
    parts += [f"## {READING}", *LEGEND]
    for (data, model), network in groups(rows, "data", "model").items():
        parts += [f"## {data}, {model}", *(f"![{name}]({PICTURES}/{name}.png)" for name in _names(data, model))]
        for (task,), part in groups(network, "task").items():
            parts += [f"### {data}, {model}: {task}", _runs(part), tables.markdown(tables.task_table(part), "---:")]
    parts += [f"## {CLAIMS}", *CLAIMS_NOTE, tables.markdown(claims.table(checked))]
    return "\n\n".join(parts) + "\n"


def html(rows: list[Row], checked: list[Claim], drawn: dict[str, bytes]) -> str:
    """A page that needs no other file."""
    import jinja2

    networks = []
    for (data, model), network in groups(rows, "data", "model").items():
        pictures = [(name, base64.b64encode(drawn[name]).decode()) for name in _names(data, model)]
        tasks = [(task, _runs(part), tables.task_table(part)) for (task,), part in groups(network, "task").items()]
        networks.append({"name": f"{data}, {model}", "pictures": pictures, "tasks": tasks})
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        introduction=INTRODUCTION,
        overview_note=OVERVIEW_NOTE,
        overview=tables.overview_table(overview(rows)),
        blocks_title=BLOCKS,
        blocks_note=BLOCKS_NOTE,
        blocks=tables.blocks_table(earlier(rows)),
        reading=READING,
        legend=LEGEND,
        networks=networks,
        claims_title=CLAIMS,
        claims_note=CLAIMS_NOTE,
        claims=claims.table(checked),
    )


def draw(rows: list[Row]) -> dict[str, bytes]:
    """File name without its end -> PNG, two for each network."""
    from bench.quality import pictures

    drawn = {}
    for (data, model), network in groups(rows, "data", "model").items():
        for name, picture in zip(_names(data, model), (pictures.dots, pictures.scatter), strict=True):
            drawn[name] = pictures.png(picture(network))
    return drawn


def write(rows: list[Row], folder: Path, results: Path) -> None:
    """All files."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    store.write_json({"rows": [plain(row) for row in rows]}, results)
    checked, drawn = claims.check(rows), draw(rows)
    for name, data in drawn.items():
        files.write_bytes(folder / PICTURES / f"{name}.png", data)
    files.write_bytes(folder / MARKDOWN, markdown(rows, checked).encode())
    files.write_bytes(folder / PAGE, html(rows, checked, drawn).encode())


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=store.RUNS, help="what bench.quality.run wrote")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the tables, the page and the pictures")
    parser.add_argument("--json", type=Path, default=store.RESULTS, help="file for scripts")
    options = parser.parse_args(arguments)
    if not options.runs.is_file():
        print(f"no runs: {options.runs} is not there; python -m bench.quality.run writes it", file=sys.stderr)
        return 1
    runs = store.read_runs(options.runs)
    if not runs:
        print(f"no runs: {options.runs} has not one whole line", file=sys.stderr)
        return 1
    for name, known in store.versions(runs).items():
        print(f"{options.runs}: got {len(known)} versions of {name}, expected one: run it all again", file=sys.stderr)
        return 1
    rows = summarise(runs)
    write(rows, options.out, options.json)
    print(tables.text(tables.overview_table(overview(rows))))
    return 0


def _names(data: str, model: str) -> tuple[str, str]:
    return f"quality-{data}-{model}-gaps", f"quality-{data}-{model}-seconds"


def _runs(rows: list[Row]) -> str:
    originals, runs = (max(row[key] for row in rows) for key in ("originals", "runs"))
    return f"Original networks: {originals}. Runs of a method: {runs} at most."


if __name__ == "__main__":
    sys.exit(main())
