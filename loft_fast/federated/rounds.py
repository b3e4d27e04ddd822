"""One round of questions: asked, waited for, every answer handed on as it comes, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from tqdm.auto import tqdm

from loft_fast.errors import InputError

_PAUSE = 0.05  # seconds between two looks for answers


@dataclass
class Round:
    """What came of a round.

    Attributes:
        number: 1, 2, ...
        accepted: clients whose answers were new and count.
        refused: why others do not, by client or node.
        missing: nodes that did not answer in time.
    """

    number: int
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    settled: set[str] = field(default_factory=set, repr=False)
    """Nodes of which nothing more is expected."""

    def __str__(self) -> str:
        told = "".join(f"; {name}: {why}" for name, why in self.refused.items())
        silent = f"; no answer from {', '.join(self.missing)}" if self.missing else ""
        return f"round {self.number}: {len(self.accepted)} new contributions accepted{told}{silent}"


def check_nodes(nodes: Iterable[int] | int | None, name: str = "nodes") -> list[int] | int | None:
    """The argument `nodes`: a list without doubles, how many, or None for all."""
    if nodes is None or (_is_number(nodes) and nodes >= 1):
        return nodes
    listed: list[Any] = list(nodes) if isinstance(nodes, Iterable) and not isinstance(nodes, str | bytes) else [None]
    if not all(map(_is_number, listed)):
        raise InputError(f"{name}: got {nodes!r}, expected a list of numbers of nodes, or how many")
    return sorted(set(listed))


def _is_number(node: object) -> TypeGuard[int]:
    return isinstance(node, int) and not isinstance(node, bool)


def wait_for_nodes(grid: Grid, nodes: list[int] | int | None, timeout: float) -> list[int]:
    """Nodes to ask: these, or all there are, once there are as many as a number says or time is up."""
    if isinstance(nodes, list):
        return nodes
    give_up = time.monotonic() + timeout
    while True:
        found = sorted(set(grid.get_node_ids()))
        if len(found) >= (nodes or 1) or time.monotonic() > give_up:
            return found
        time.sleep(_PAUSE)


def ask(
    grid: Grid,
    kind: str,
    content: Callable[[], RecordDict],
    nodes: list[int],
    timeout: float,
    group: str,
    take: Callable[[int, Message], None],
    progress: bool = False,
) -> list[int]:
    """Ask the nodes, and call `take` with every answer of one who was asked, in the order in which they come.

    Returns:
        Nodes that have not answered in time.
    """
    questions = [
        Message(content(), dst_node_id=node, message_type=kind, group_id=group, ttl=timeout + 60) for node in nodes
    ]
    if not questions:
        return []
    sent = dict(zip(grid.push_messages(questions), nodes, strict=True))
    waiting = set(sent)
    give_up = time.monotonic() + timeout
    with tqdm(total=len(nodes), desc=kind, unit="client", disable=not progress, leave=False) as bar:
        while waiting:
            for answer in grid.pull_messages(sorted(waiting)):
                to = answer.metadata.reply_to_message_id
                if to in sent:
                    take(sent[to], answer)
                if to in waiting:
                    waiting.remove(to)
                    bar.update()
            if not waiting or time.monotonic() > give_up:
                break
            time.sleep(_PAUSE)
    return sorted(sent[id] for id in waiting)
