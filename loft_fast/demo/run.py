"""`loft-fast demo`: train, retrain, unlearn in four ways, measure, and write down everything a report needs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loft_fast import files
from loft_fast.demo import pictures
from loft_fast.demo.cache import Trained, trained
from loft_fast.demo.compare import Outcome, Problem, compare
from loft_fast.demo.digits import FEATURES, Digits, load_digits
from loft_fast.errors import InputError
from loft_fast.projection import Certificate, Projection

CLASSES = 10
_SEEDS = 2**63  # torch takes those of 64 bits
_LABELS = {
    "original": "original",
    "retrain": "retrained",
    "paper": "paper (s = {rank})",
    "leace": "LEACE",
    "ours": "ours",
    "ours erase": "ours, erase",
}


@dataclass(frozen=True)
class Options:
    """What to forget and where to put things.

    Attributes:
        forget: digits, at least one, at most eight, so that two stay.
        rank: of the paper's method; ours finds its own.
        seed: of the networks and of the paper's random start.
        out: folder of the report; cache: folder of trained networks.
        threads: of torch.
        progress: show progress bars on stderr.
    """

    forget: tuple[int, ...]
    rank: int
    seed: int
    out: Path
    cache: Path
    threads: int
    progress: bool = True


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole demonstration; the result is what `report.write` needs. `say` gets a line whenever something is done.

    Raises:
        LoftError: bad options, or a folder that cannot be written: before anything is trained.
    """
    forget = tuple(sorted(set(options.forget)))
    if not 1 <= len(forget) <= CLASSES - 2 or not set(forget) <= set(range(CLASSES)):
        raise InputError(f"forget: got {list(options.forget)}, expected one to eight of the digits 0 to 9")
    if not 1 <= options.rank < FEATURES:
        raise InputError(f"rank: got {options.rank}, expected 1 to {FEATURES - 1}")
    if options.threads < 1:
        raise InputError(f"threads: got {options.threads}, expected at least 1")
    if not -_SEEDS <= options.seed < _SEEDS:
        raise InputError(f"seed: got {options.seed}, expected {-_SEEDS} to {_SEEDS - 1}")
    files.writable_folder("out", options.out)
    with _threads(options.threads):
        data = load_digits()
        problem, originals = prepare(data, forget, options.rank, options.seed, options.cache, say, options.progress)
        outcomes = []
        for outcome in compare(problem, *originals):
            say(f"measured: {outcome.method}")
            outcomes.append(outcome)
        return _result(options, problem, outcomes)


def prepare(
    data: Digits,
    forget: tuple[int, ...],
    rank: int,
    seed: int,
    cache: Path,
    say: Callable[[str], None],
    progress: bool = True,
) -> tuple[Problem, tuple[Trained, Trained]]:
    """The problem of forgetting these digits, and the original and the retrained network, from the cache if there."""
    original = trained(data, (), seed, cache, say, progress)
    retrained = trained(data, forget, seed, cache, say, progress)
    return Problem(original.model, data, forget, rank, seed, progress), (original, retrained)


def _result(options: Options, problem: Problem, outcomes: list[Outcome]) -> dict[str, Any]:
    named = {outcome.method: outcome for outcome in outcomes}
    retraining = named["retrain"].seconds
    steps = {name: named["ours"].stages[name] for name in ("solve", "fold")}
    return {
        "forget": list(problem.forget),
        "rank": problem.rank,
        "seed": problem.seed,
        "threads": options.threads,
        "versions": {"loft-fast": _version(), "torch": torch.__version__, "python": platform.python_version()},
        "rows": [_row(outcome, problem) for outcome in outcomes],
        "certificates": {name: asdict(_certificate(named[name])) for name in ("ours", "ours erase")},
        "certificate_text": str(_certificate(named["ours"])),
        "speed": {**steps, "retraining": retraining, "times_faster": retraining / sum(steps.values())},
        "predictions": pictures.predictions(problem, outcomes),
        "spectra": pictures.spectra(problem, _certificate(named["ours"])),
        "frontier": pictures.frontier(problem),
    }


def _row(outcome: Outcome, problem: Problem) -> dict[str, Any]:
    measured = asdict(outcome.evaluation)
    measured.pop("seconds")  # of measuring; a row's seconds are what the method costs
    label = _LABELS[outcome.method].format(rank=problem.rank)
    return {
        "method": outcome.method,
        "label": label,
        **measured,
        "seconds": outcome.seconds,
        "stages": outcome.stages,
    }


def _certificate(outcome: Outcome) -> Certificate:
    assert isinstance(outcome.change, Projection)
    assert outcome.change.certificate is not None
    return outcome.change.certificate


def _version() -> str:
    try:
        return version("loft-fast")
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
