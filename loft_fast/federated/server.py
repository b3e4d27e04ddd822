"""The server's side: it asks, looks at every answer, sums what it accepts, and forgets by subtraction."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from loft_fast.continual import solve_next
from loft_fast.errors import FederatedError, FileFormatError, InputError
from loft_fast.federated import messages
from loft_fast.federated.answers import Judge, RefusedError, reason
from loft_fast.federated.archive import Archive, Event, by_key, from_keys
from loft_fast.federated.rounds import ask, check_nodes, wait_for_nodes
from loft_fast.float_state import FloatState
from loft_fast.grouped_moments import GroupedMoments, Key, plain_keys
from loft_fast.moments import Moments
from loft_fast.ops.arguments import check_positive
from loft_fast.projection import Projection
from loft_fast.sites import find_site

log = logging.getLogger("loft_fast")

_FILE = "federated.sqlite"
_DIGEST = 64  # hexadecimal digits


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


class MomentsServer:
    """Moments of the rows of many clients, in a folder that outlives the process.

    Every answer is looked at, and what is accepted is on disk before the next one: a server that was killed in the
    middle of a round goes on with those it has not heard of. A round counts once it is complete.

    Two ways to keep contributions. "clients" keeps each: a client, or its rows of a class, is then forgotten without
    asking anyone. "sum" keeps nothing but their sum, and needs exact moments: to be forgotten, a client sends its
    contribution once more, and it is subtracted.

    A node is known by the number that Flower gives it, which is worth as much as the authentication of nodes. Where
    that is off, and numbers change from run to run, as in simulations, `trust_names` takes the client's own word.

    Args:
        folder: where to keep everything; made if it is not there.
        dim: number of features d.
        exact: largest magnitude of a feature, for exact moments; None for moments in float64.
        keep: "clients" or "sum".
        grouped: whether clients send `GroupedMoments`, or else `Moments`.
        site: where features have to come from; None: wherever the first answer says.
        norm: Euclidean norm that no row of a client exceeds; answers that cannot keep to it are refused. None: any.
        max_groups: of one client: longer answers are refused unread.
        trust_names: know clients by the name in the node's configuration, `client` or `partition-id`.

    Raises:
        StoreError: the folder is damaged or in use.
        InputError: on any call with bad input; nothing has changed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dim: int,
        *,
        exact: float | None = None,
        keep: Literal["clients", "sum"] = "clients",
        grouped: bool = True,
        site: str | None = None,
        norm: float | None = None,
        max_groups: int = 1000,
        trust_names: bool = False,
    ) -> None:
        if exact is True:
            raise InputError("exact: got True, expected None or a number, as all clients need the same")
        if keep not in ("clients", "sum"):
            raise InputError(f"keep: got {keep!r}, expected 'clients' or 'sum'")
        if keep == "sum" and exact is None:
            raise InputError("exact: got None with keep='sum', expected a number: floats do not come apart again")
        if norm is not None:
            check_positive("norm", norm)
        if isinstance(max_groups, bool) or not isinstance(max_groups, int) or max_groups < 1:
            raise InputError(f"max_groups: got {max_groups!r}, expected an integer >= 1")
        self._blank: Moments | GroupedMoments = (GroupedMoments if grouped else Moments)(dim, exact=exact)
        self._blank.site = site
        self._judge = Judge(self._blank, norm, max_groups, trust_names)
        about = {"dim": dim, "exact": self._blank.exact, "keep": keep, "grouped": grouped}
        self._archive = Archive(Path(folder) / _FILE, about)
        self._keep = keep

    def close(self) -> None:
        """Let another process open the folder."""
        self._archive.close()

    def __enter__(self) -> MomentsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- what there is ----

    @property
    def clients(self) -> list[str]:
        """Clients that count, by name."""
        return list(self._archive.members(self._archive.round))

    @property
    def moments(self) -> Moments | GroupedMoments:
        """Moments of the rows of all clients that count; floats are summed in the order of the clients' names."""
        return self._pooled(self._archive.round)

    @property
    def projection(self) -> Projection | None:
        """What the forget requests so far ask for."""
        return self._archive.projection

    def log(self) -> list[Event]:
        """All that happened, and why."""
        return self._archive.log()

    def _pooled(self, round: int, clients: Iterable[str] | None = None) -> Moments | GroupedMoments:
        parts: dict[str, Moments] = {}
        if clients is None and self._blank.exact is not None:
            parts = self._archive.total(round)
        else:
            for _, key, moments in self._archive.parts(round, clients):
                parts[key] = parts[key] + moments if key in parts else moments
        pooled = from_keys(parts, self._blank)
        pooled.site = self._site
        return pooled

    @property
    def _site(self) -> str | None:
        return self._site_in(self._archive.round)

    def _site_in(self, round: int) -> str | None:
        return self._blank.site or self._archive.site(round)

    # ---- rounds ----

    def collect(
        self,
        grid: Grid,
        nodes: Iterable[int] | int | None = None,
        *,
        quorum: int | None = None,
        timeout: float = 300.0,
        refresh: bool = False,
        progress: bool = True,
    ) -> Round:
        """Ask clients for their moments. A round that was not completed, or not finished, goes on.

        Args:
            grid: Flower's.
            nodes: which nodes to ask, or how many to wait for. None: all there are.
            quorum: clients that have to count at the end. None: all that were asked.
            timeout: seconds to wait for nodes, and then for their answers.
            refresh: begin anew: ask all, also those who have answered before, to fetch again.

        Returns:
            Who was accepted in this call, and why others were not.

        Raises:
            FederatedError: fewer clients than the quorum. The moments are what they were before the round; what was
                accepted is kept for when the round goes on.
        """
        check_positive("timeout", timeout)
        if quorum is not None and (isinstance(quorum, bool) or not isinstance(quorum, int) or quorum < 1):
            raise InputError(f"quorum: got {quorum!r}, expected an integer >= 1")
        nodes = check_nodes(nodes)
        archive, number = self._archive, self._open(refresh)
        result = Round(number)
        asked = wait_for_nodes(grid, nodes, timeout)
        here = {node for node, _, _ in archive.members(number).values()}
        left = [node for node in asked if str(node) not in here]
        question = {"round": number, "exact": self._blank.exact, "refresh": bool(archive.get("refresh"))}
        silent = ask(
            grid,
            messages.MOMENTS,
            lambda: messages.question(**question),
            left,
            timeout,
            str(number),
            lambda node, answer: self._take(result, node, answer),
            progress,
        )
        result.missing = list(map(str, silent))
        with archive.change():
            for node in result.missing:
                archive.write(number, "missing", f"no answer within {timeout:g} s", node=node)
        there = len(archive.members(number))
        settled = here | result.settled
        absent = sum(str(node) not in settled for node in asked)
        absent += max(0, (nodes if isinstance(nodes, int) else 1) - len(asked))
        wanted = quorum or there + absent
        if there < wanted:
            with archive.change():
                archive.write(number, "incomplete", f"{there} clients of {wanted}")
            raise FederatedError(f"round {number} is incomplete: {there} clients of {wanted}. {result}")
        with archive.change():
            archive.put("round", str(number))
            archive.put("open", None)
            archive.put("refresh", None)
            archive.drop_rounds(number)
            archive.write(number, "closed", f"{there} clients")
        return result

    def abandon(self) -> None:
        """Give up a round that is not complete: what was accepted in it is deleted. Without one, nothing happens."""
        archive = self._archive
        if archive.get("open") is None:
            return
        with archive.change():
            archive.drop_rounds(archive.round)
            archive.put("open", None)
            archive.put("refresh", None)
            archive.write(archive.round + 1, "abandoned", "what was accepted in it is deleted")

    def _open(self, refresh: bool) -> int:
        """The number of the round that goes on, or of a new one."""
        archive = self._archive
        number = archive.round + 1
        if refresh and archive.get("open") is not None and archive.get("refresh") is None:
            self.abandon()
        if archive.get("open") is None:
            with archive.change():
                archive.put("open", "1")
                if refresh:
                    archive.put("refresh", "1")
                else:
                    archive.inherit(number, archive.round)
                archive.write(number, "opened", "all are asked anew" if refresh else "those who are not in are asked")
        return number

    def _take(self, result: Round, node: int, answer: Message) -> None:
        """Look at an answer; accept it, or say why not."""
        archive = self._archive
        client, who = None, str(node)
        try:
            client = self._judge.sender(node, answer, result.number)
            who = client
            if archive.is_gone("client", client):
                result.settled.add(str(node))
                raise RefusedError("it was forgotten")
            self._check_memory(client, answer)
            moments = self._judge.moments(self._judge.data(answer), self._site_in(result.number))
            known, digest = archive.known(result.number, client), moments.digest()
            if known == digest:
                result.settled.add(str(node))
                raise RefusedError("the same answer again")
            if known is not None:
                raise RefusedError("another answer than before, which stands")
            parts = self._still(moments)
            sums = self._sums(result.number, moments.count, parts)
        except (RefusedError, FileFormatError) as error:
            why = reason(error)
            result.refused[who] = why
            log.warning("round %d: %s is refused: %s", result.number, who, why)
            with archive.change():
                archive.write(result.number, "refused", why, client, str(node))
            return
        with archive.change():
            self._accept(result.number, client, str(node), digest, moments, parts, sums)
        result.accepted.append(client)
        result.settled.add(str(node))

    def _check_memory(self, client: str, answer: Message) -> None:
        """Refuse a client that has lost what it answered: it does not know which rows to leave out."""
        known = messages.fields_of(answer.content).get("answered")
        tags = known if isinstance(known, list) else []
        lost = [id for id in self._archive.requests(client) if messages.tag_of(id) not in tags]
        if lost:
            raise RefusedError(f"it knows nothing of request {lost[0]!r}, and the rows of it would come back")

    def _still(self, moments: Moments | GroupedMoments) -> dict[str, Moments]:
        """What there is of groups that were not forgotten."""
        gone = self._archive.gone("group")
        return {key: part for key, part in by_key(moments).items() if key not in gone}

    def _sums(self, round: int, count: int, parts: dict[str, Moments]) -> dict[str, Moments]:
        """What the kept sums become with these of a client, of so many rows; refuses more than they can hold."""
        if self._blank.exact is None:
            rows = self._archive.count(round) + count
            if rows > FloatState.most_rows:
                raise RefusedError(f"with it there would be {rows} rows, expected at most {FloatState.most_rows}")
            return {}
        total = self._archive.total(round, parts)
        try:
            return {key: total[key] + part if key in total else part for key, part in parts.items()}
        except InputError as error:
            raise RefusedError(f"it cannot be added to the others: {error}") from error

    def _accept(
        self,
        round: int,
        client: str,
        node: str,
        digest: str,
        moments: Moments | GroupedMoments,
        parts: dict[str, Moments],
        sums: dict[str, Moments],
    ) -> None:
        archive = self._archive
        kept = {key: part.to_bytes() for key, part in parts.items()} if self._keep == "clients" else {}
        archive.add_member(round, client, node, digest, moments, kept)
        for key, total in sums.items():
            archive.set_total(round, key, total)
        archive.write(round, "accepted", f"{moments.count} rows, SHA-256 {digest}", client, node)

    # ---- requests ----

    def forget_clients(self, clients: Iterable[str], id: str | None = None, **options: Any) -> Projection | None:
        """Forget clients: as if they had never taken part. Without their contributions, see `forget_rows`.

        Args:
            clients: names, as in `clients`.
            id: of the request; a second one of the same id changes nothing.
            options: for `solve`: rank, head, ...; `project=False` only subtracts.

        Raises:
            InputError: no such client, contributions are not kept, or what `solve` refuses; nothing has changed.
        """
        names = _listed(clients)
        what = f"clients {', '.join(names)}"
        if self._answered(id, what):
            return self.projection
        unknown = next((name for name in names if name not in self.clients), None)
        if unknown is not None:
            there = ", ".join(map(repr, self.clients[:10])) or "none"
            raise InputError(f"clients: no client {unknown!r}; there are {there}")
        if self._keep == "sum":
            raise InputError("clients: contributions are not kept (keep='sum'); ask them: forget_rows(grid, node)")
        part = self._pooled(self._archive.round, names)
        return self._drop(names, self._rest(self._archive.round, names, part), part, what, id, options)

    def forget_groups(self, keys: Iterable[Key], id: str | None = None, **options: Any) -> Projection | None:
        """Forget groups, such as classes, of all clients; as for `forget_clients`. No client brings them back."""
        whole = self.moments
        if not isinstance(whole, GroupedMoments):
            raise InputError("keys: clients send moments that are not grouped (grouped=False)")
        wanted = plain_keys(keys)
        what = f"groups {', '.join(map(repr, wanted))}"
        if self._answered(id, what):
            return self.projection
        part, rest = whole.select(wanted), whole.without(wanted)
        texts = list(by_key(part))

        def change() -> None:
            for text in texts:
                self._archive.drop_key(text)
            self._archive.set_gone("group", texts)

        return self._forget(id, rest, part, what, change, options)

    def forget_rows(
        self, grid: Grid, node: int, id: str, timeout: float = 300.0, everything: bool = False, **options: Any
    ) -> Projection | None:
        """Ask a client which of its rows to forget, and forget these; as for `forget_clients`.

        Args:
            grid: Flower's.
            node: the client's.
            id: of the request, which the client gets to hear; a second one of the same id changes nothing.
            timeout: seconds to wait.
            everything: take the client out altogether: it sends all its moments, and no rows may remain of it.

        Raises:
            FederatedError: no answer, or one that cannot be: rows that the client has never had.
        """
        if id is None:
            raise InputError("id: got None, expected a text that can be printed")
        check_positive("timeout", timeout)
        check_nodes([node], "node")
        what = f"{'everything' if everything else 'rows'} of node {node}"
        if self._answered(id, what):
            return self.projection
        client, moments, left = self._hear(grid, node, id, timeout, everything)
        part = from_keys(self._still(moments), moments)
        round, own = self._archive.round, None
        try:
            if self._keep == "clients" and not everything:
                own = self._pooled(round, [client]) - part  # type: ignore[operator] # both are of one kind
            rest = self._rest(round, [client], part, own)
        except InputError as error:
            raise FederatedError(f"client {client}: these rows are not its own: {error}") from error
        if everything:
            return self._drop([client], rest, part, what, id, options)

        def change() -> None:
            self._subtract(round, by_key(part))
            kept = {} if own is None else {key: own_part.to_bytes() for key, own_part in by_key(own).items()}
            self._archive.replace_parts(round, client, kept, moments.count, left)

        return self._forget(id, rest, part, what, change, options, client)

    def _hear(
        self, grid: Grid, node: int, id: str, timeout: float, everything: bool
    ) -> tuple[str, Moments | GroupedMoments, str]:
        """Who answers a request, what it wants to be forgotten, and the digest of what is then left of it, or ""."""
        archive, round = self._archive, self._archive.round
        found: list[tuple[str, Moments | GroupedMoments, str]] = []
        refused: list[str] = []

        def take(node: int, answer: Message) -> None:
            try:
                client = self._judge.sender(node, answer, round, None if everything else id)
                if client not in self.clients:
                    raise RefusedError("it has not contributed")
                if everything and self._keep == "clients":  # its word is not needed
                    found.append((client, self._pooled(round, [client]), ""))
                    return
                moments = self._judge.moments(self._judge.data(answer), self._site)
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
        content = {"round": round, "exact": self._blank.exact, "id": id}
        ask(grid, kind, lambda: messages.question(**content), [node], timeout, str(round), take)
        if found:
            return found[0]
        why = refused[0] if refused else f"no answer within {timeout:g} s"
        with archive.change():
            archive.write(round, "refused" if refused else "missing", f"request {id}: {why}", None, str(node))
        raise FederatedError(f"node {node}: {why}")

    def _drop(
        self,
        names: list[str],
        rest: Moments | GroupedMoments,
        part: Moments | GroupedMoments,
        what: str,
        id: str | None,
        options: dict[str, Any],
    ) -> Projection | None:
        """Forget clients that contributed `part`, so that `rest` is left."""

        def change() -> None:
            self._subtract(self._archive.round, by_key(part))
            self._archive.drop_members(self._archive.round, names)
            self._archive.set_gone("client", names)

        return self._forget(id, rest, part, what, change, options)

    def _rest(
        self,
        round: int,
        without: list[str],
        part: Moments | GroupedMoments,
        instead: Moments | GroupedMoments | None = None,
    ) -> Moments | GroupedMoments:
        """What is left: by subtraction where that is exact, else summed again, as if the clients had never been."""
        if self._blank.exact is not None:
            return self.moments - part  # type: ignore[operator] # both are of one kind
        rest = self._pooled(round, [client for client in self.clients if client not in without])
        return rest if instead is None else rest + instead  # type: ignore[operator]

    def _subtract(self, round: int, parts: dict[str, Moments]) -> None:
        if self._blank.exact is not None:
            total = self._archive.total(round, parts)
            for key, part in parts.items():
                self._archive.set_total(round, key, total[key] - part)

    def _forget(
        self,
        id: str | None,
        rest: Moments | GroupedMoments,
        part: Moments | GroupedMoments,
        what: str,
        change: Callable[[], None],
        options: dict[str, Any],
        client: str | None = None,
    ) -> Projection | None:
        if self._archive.get("open") is not None:
            raise FederatedError(f"round {self._archive.round + 1} is open: collect or abandon() first")
        project = options.pop("project", True) and part.count  # of rows in groups that are gone, nothing is left to do
        projection = self.projection
        if project:
            projection = solve_next(projection, rest, part, None, **options)  # type: ignore[arg-type]
            projection.site = self._site
        with self._archive.change():
            change()
            self._archive.put("projection", None if projection is None else projection.to_bytes())
            self._archive.write(self._archive.round, "forgotten", what, client, id=id)
        return projection

    def _answered(self, id: str | None, what: str) -> bool:
        """Whether there was a request of this id, which must have been the same."""
        if id is not None and not (isinstance(id, str) and id and id.isprintable()):
            raise InputError(f"id: got {id!r}, expected a text that can be printed")
        event = None if id is None else self._archive.request(id)
        if event is not None and event.reason != what:
            raise InputError(f"id: {id!r} was another request: {event.reason}")
        return event is not None

    # ---- and back to the clients ----

    def ship(
        self,
        grid: Grid,
        nodes: Iterable[int] | None = None,
        model: nn.Module | None = None,
        timeout: float = 300.0,
        progress: bool = True,
    ) -> list[str]:
        """Send the projection to the clients, or the weights of the layer of `model` that it was folded into.

        Returns:
            Nodes that did not confirm it in time.
        """
        projection = self.projection
        if projection is None:
            raise InputError("projection: there is none yet, as nothing was forgotten")
        check_positive("timeout", timeout)
        wanted = check_nodes(nodes)
        data = projection.to_bytes()
        weights = None
        if model is not None:
            place = find_site(model, projection.site)
            state = place.plain.state_dict()
            weights = ArrayRecord({f"{place.name}.{name}": Array(tensor) for name, tensor in state.items()})

        def content() -> RecordDict:
            record = messages.question(round=self._archive.round)
            if weights is None:
                return messages.with_bytes(record, "projection", data)
            record["weights"] = weights
            return record

        failed: list[int] = []

        def take(node: int, answer: Message) -> None:
            if answer.has_error():
                failed.append(node)

        asked = wait_for_nodes(grid, wanted, timeout)
        silent = ask(grid, messages.UPDATE, content, asked, timeout, str(self._archive.round), take, progress)
        return [str(node) for node in sorted({*silent, *failed})]


def _listed(clients: Iterable[str]) -> list[str]:
    if isinstance(clients, str) or not isinstance(clients, Iterable):
        raise InputError(f"clients: got {clients!r}, expected a list of names")
    listed = list(clients)
    wrong = [name for name in listed if not isinstance(name, str)]
    if wrong:
        raise InputError(f"clients: got {wrong[0]!r}, expected names, such as {str(wrong[0])!r}")
    names = sorted(set(listed))
    if not names:
        raise InputError("clients: got none, expected at least one name")
    return names
