"""The command loft-fast: `demo` and `report` for people, `fetch`, `forget` and `store` for your own models."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loft_fast
from loft_fast.cli_store import add_store
from loft_fast.cli_tools import (
    check_outputs,
    check_solving,
    check_weights,
    finds_angle,
    key_of,
    load,
    load_model,
    solving,
    write_weights,
)
from loft_fast.demo.cache import default_folder
from loft_fast.errors import LoftError
from loft_fast.fetch import fetch_moments
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.sites import find_site
from loft_fast.solver import solve
from loft_fast.unlearn import outputs_gone, predicting_head

_EPILOG = """MODEL and LOADER are written module:name and looked up from the current folder; a function is called to get
the model or the loader. For example, with mine.py holding net() and loader():

  loft-fast fetch mine:net mine:loader --out moments.safetensors
  loft-fast forget moments.safetensors 3 --model mine:net --out projection.safetensors --weights net.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a refusal with its reason on stderr, 130 for Ctrl-C.

    It is 141, as of other commands, where who reads the output stops before its end.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        result, words = options.run(options)
    except LoftError as error:
        print(f"loft-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loft-fast: interrupted; whatever was finished before is complete", file=sys.stderr)
        return 130
    return _show(json.dumps(result) if options.json else words)


def _show(text: str) -> int:
    """Print the result of finished work; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name need not fit the terminal
    try:
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"loft-fast: stdout: the work is done, but cannot be shown: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loft-fast",
        description="Make a trained torch model forget, without retraining, with a certificate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loft-fast {loft_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")

    demo = commands.add_parser(
        "demo", parents=[common], help="a real network forgets real digits, next to one retrained without them"
    )
    demo.add_argument("--forget", type=int, nargs="+", default=[3], metavar="DIGIT", help="default: 3")
    demo.add_argument("--rank", type=int, default=32, help="of the published method; ours finds its own (default: 32)")
    demo.add_argument("--seed", type=int, default=0, help="of training and of the published method (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the report (default: demo-out)")
    demo.add_argument("--cache", type=Path, help="folder of trained networks (default: loft_fast in your cache folder)")
    demo.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", parents=[common], help="write a demo's page and pictures again")
    report.add_argument("result", type=Path, help="folder of an earlier demo, or its result.json")
    report.add_argument("--out", type=Path, help="folder to write to (default: the same)")
    report.set_defaults(run=_report)

    fetch = commands.add_parser("fetch", parents=[common], help="one pass over data: moments of a model's features")
    fetch.add_argument("model", metavar="MODEL", help="module:name of a torch model")
    fetch.add_argument("loader", metavar="LOADER", help="module:name of an iterable of batches")
    fetch.add_argument("--site", help="module whose input, or NAME:output, to look at (default: the last linear layer)")
    fetch.add_argument("--group", default="label", help="label, prediction, or a key of the batches (default: label)")
    fetch.add_argument("--device", help="where to run, as torch names it")
    fetch.add_argument(
        "--exact",
        nargs="?",
        type=float,
        const=True,
        metavar="LARGEST",
        help="keep integers, so that removal is bit for bit; features above LARGEST are clipped (default: calibrated)",
    )
    fetch.add_argument("--out", type=Path, required=True, help="moments file to write")
    fetch.set_defaults(run=_fetch)

    forget = commands.add_parser(
        "forget", parents=[common, solving()], help="moments in, projection (and folded weights) out"
    )
    forget.add_argument("moments", type=Path, help="file that fetch wrote, with groups")
    forget.add_argument("keys", nargs="+", metavar="KEY", help="groups to forget")
    forget.add_argument("--out", type=Path, required=True, help="projection file to write")
    forget.set_defaults(run=_forget)

    add_store(commands, common)
    return parser


def _demo(options: argparse.Namespace) -> tuple[Any, str]:
    from loft_fast import report
    from loft_fast.demo import run as demo

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    result = demo.run(
        demo.Options(
            forget=tuple(options.forget),
            rank=options.rank,
            seed=options.seed,
            out=options.out,
            cache=options.cache or default_folder(),
            threads=options.threads,
            progress=not options.quiet,
        ),
        say,
    )
    page = report.write(result, options.out)
    return result, f"{report.text(result)}\n\nreport: {page}"


def _report(options: argparse.Namespace) -> tuple[Any, str]:
    from loft_fast import report

    result = report.read(options.result)
    source = options.result if options.result.is_dir() else options.result.parent
    page = report.write(result, options.out or source)
    return {"report": str(page)}, f"{report.text(result)}\n\nreport: {page}"


def _fetch(options: argparse.Namespace) -> tuple[Any, str]:
    check_outputs({"--out": options.out})
    model, loader = load_model(options.model), load("LOADER", options.loader)
    moments = fetch_moments(
        model, loader, options.site, options.group, options.device, not options.quiet, options.exact
    )
    assert isinstance(moments, GroupedMoments)
    moments.save(options.out)
    numbers = {str(key) for key in moments if isinstance(key, int)}
    # A text that looks like a number that is there, too, is told from it by quotation marks.
    groups = {json.dumps(key) if key in numbers else str(key): moments[key].count for key in moments}
    result: dict[str, Any] = {"file": str(options.out), "site": moments.site}
    result |= {"dim": moments.dim, "count": moments.count}
    if moments.exact is not None:
        result.update(exact=moments.exact, clipped=moments.clipped)
    words = f"{moments.count} rows of {moments.dim} features at {moments.site} in {options.out}\n"
    return {**result, "groups": groups}, words + ", ".join(f"{key}: {count}" for key, count in groups.items())


def _forget(options: argparse.Namespace) -> tuple[Any, str]:
    check_solving(options, MOMENTS=options.moments)
    moments = GroupedMoments.load(options.moments)
    keys = [key_of(text, moments.__contains__) for text in options.keys]
    model = None if options.model is None else load_model(options.model)
    if model is not None and options.weights:
        check_weights(model, moments.site, moments.dim)
    kept, gone = moments.without(keys), moments.select(keys)
    found = finds_angle(options)
    head = None
    if model is not None and (found or options.weights):
        head = predicting_head(model, find_site(model, moments.site), kept, gone)
    closed = outputs_gone(kept, gone) if head is not None and options.weights else []
    guide = head if found else None
    projection = solve(
        kept,
        gone,
        options.rank,
        options.about,
        guide,
        erase=options.erase,
        close=bool(closed) and guide is not None,
        min_retain_kept=options.min_retain_kept,
    )
    certificate = projection.certificate
    assert certificate is not None
    result: dict[str, Any] = {"file": str(options.out), "keys": keys, "site": projection.site}
    result["certificate"] = asdict(certificate)
    if options.weights is not None:
        assert model is not None
        write_weights(options.weights, model, projection, closed)
        result |= {"weights": str(options.weights), "closed": closed}
    projection.save(options.out)
    return result, f"{certificate}\nwritten       {', '.join(str(p) for p in (options.out, options.weights) if p)}"


if __name__ == "__main__":
    sys.exit(main())
