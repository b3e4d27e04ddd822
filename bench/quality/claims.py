"""Whether what the papers state of their methods holds here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.quality.methods import METHODS
from bench.quality.methods.method import Method
from bench.quality.summary import PLACE, Row, groups

Place = tuple[str, ...]
"""(data, model, task)."""


@dataclass
class Claim:
    """A method's claim, and where it held; in neither list is a place where what it speaks of was not run."""

    method: str
    text: str
    held: list[Place] = field(default_factory=list)
    failed: list[Place] = field(default_factory=list)


def check(rows: Iterable[Row], methods: dict[str, Method] = METHODS) -> list[Claim]:
    """Every claim on every task of the kind that it is made for."""
    places = {place: (part[0]["kind"], _means(part)) for place, part in groups(rows, *PLACE).items()}
    found = []
    for name, method in methods.items():
        if not method.claim or method.holds is None:
            continue
        claim = Claim(name, method.claim)
        for place, (kind, means) in places.items():
            if kind not in method.claimed_for or name not in means:
                continue
            try:
                held = method.holds(means)
            except KeyError:
                continue
            (claim.held if held else claim.failed).append(place)
        found.append(claim)
    return found


def table(claims: Iterable[Claim]) -> tuple[list[str], list[list[str]]]:
    """Titles, and one row of cells per claim."""
    titles = ["method", "claim", "reproduced on", "not reproduced on"]
    return titles, [[claim.method, claim.text, *_cells(claim)] for claim in claims]


def _means(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By method, under the names of a run; without what was not measured, so that a claim that asks for it fails."""
    return {
        row["method"]: {key: value for key, value in row.items() if value is not None} | {"gap": row["gap_mean"]}
        for row in rows
    }


def _cells(claim: Claim) -> list[str]:
    total = len(claim.held) + len(claim.failed)
    if not total:
        return ["not run", "not run"]
    return [f"{len(part)} of {total}: {_list(part)}" if part else "-" for part in (claim.held, claim.failed)]


def _list(places: list[Place]) -> str:
    networks: dict[str, list[str]] = {}
    for data, model, task in places:
        networks.setdefault(f"{data} {model}", []).append(task)
    return "; ".join(f"{network} ({', '.join(tasks)})" for network, tasks in networks.items())
