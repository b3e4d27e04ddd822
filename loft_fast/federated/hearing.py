"""What becomes of an answer: taken into a round, or heard as a request to forget; else refused, and logged with why."""

from __future__ import annotations

import logging

from flwr.app import Message
from flwr.serverapp import Grid

from loft_fast.errors import FederatedError, FileFormatError
from loft_fast.federated import messages
from loft_fast.federated.answers import Judge, RefusedError, reason
from loft_fast.federated.contributions import Contributions
from loft_fast.federated.rounds import Round, ask
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments

log = logging.getLogger("loft_fast")

_DIGEST = 64  # hexadecimal digits


def take(kept: Contributions, judge: Judge, result: Round, node: int, answer: Message) -> None:
    """Look at an answer; accept it, or say why not."""
    archive, number = kept.archive, result.number
    client = None
    try:
        client = judge.sender(node, answer, number)
        if archive.is_gone("client", client):
            result.settled.add(str(node))
            raise RefusedError("it was forgotten")
        _check_memory(kept, client, answer)
        moments = judge.moments(judge.data(answer), kept.site(number))
        known, digest = archive.known(number, client), moments.digest()
        if known == digest:
            result.settled.add(str(node))
            raise RefusedError("the same answer again")
        if known is not None:
            raise RefusedError("another answer than before, which stands")
        kept.accept(number, client, str(node), digest, moments)
    except (RefusedError, FileFormatError) as error:
        why = reason(error)
        result.refused[client or str(node)] = why
        log.warning("round %d: %s is refused: %s", number, client or node, why)
        with archive.change():
            archive.write(number, "refused", why, client, str(node))
        return
    result.accepted.append(client)
    result.settled.add(str(node))


def _check_memory(kept: Contributions, client: str, answer: Message) -> None:
    """Refuse a client that has lost what it answered: it does not know which rows to leave out."""
    known = messages.fields_of(answer.content).get("answered")
    tags = known if isinstance(known, list) else []
    lost = [id for id in kept.archive.requests(client) if messages.tag_of(id) not in tags]
    if lost:
        raise RefusedError(f"it knows nothing of request {lost[0]!r}, and the rows of it would come back")


def hear(
    kept: Contributions, judge: Judge, grid: Grid, node: int, id: str, timeout: float, everything: bool
) -> tuple[str, Moments | GroupedMoments, str]:
    """Who answers a request, what it wants to be forgotten, and the digest of what is then left of it, or ""."""
    archive, round = kept.archive, kept.archive.round
    found: list[tuple[str, Moments | GroupedMoments, str]] = []
    refused: list[str] = []

    def listen(node: int, answer: Message) -> None:
        try:
            client = judge.sender(node, answer, round, None if everything else id)
            if client not in kept.clients:
                raise RefusedError("it has not contributed")
            if everything and kept.keep == "clients":  # its word is not needed
                found.append((client, kept.pooled([client]), ""))
                return
            moments = judge.moments(judge.data(answer), kept.site(round))
            _, digest, count = archive.members(round)[client]
            if moments.count > count or (everything and moments.count != count):
                raise RefusedError(f"it sent {moments.count} rows, expected {count}, as it contributed")
            if everything and digest and moments.digest() != digest:
                raise RefusedError("it sent other rows than it contributed")
            left = messages.fields_of(answer.content).get("left")
            found.append((client, moments, left if isinstance(left, str) and len(left) == _DIGEST else ""))
        except (RefusedError, FileFormatError) as error:
            refused.append(reason(error))

    kind = messages.MOMENTS if everything else messages.ROWS
    content = {"round": round, "exact": kept.blank.exact, "id": id}
    ask(grid, kind, lambda: messages.question(**content), [node], timeout, str(round), listen)
    if found:
        return found[0]
    why = refused[0] if refused else f"no answer within {timeout:g} s"
    with archive.change():
        archive.write(round, "refused" if refused else "missing", f"request {id}: {why}", None, str(node))
    raise FederatedError(f"node {node}: {why}")
