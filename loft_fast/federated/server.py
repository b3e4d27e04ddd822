"""The server's side: it asks, looks at every answer, sums what it accepts, and forgets by subtraction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from loft_fast.continual import solve_next
from loft_fast.errors import FederatedError, InputError
from loft_fast.federated import messages
from loft_fast.federated.answers import Judge
from loft_fast.federated.archive import Archive, Event
from loft_fast.federated.contributions import Contributions
from loft_fast.federated.hearing import hear, take
from loft_fast.federated.keys import from_keys
from loft_fast.federated.rounds import Round, ask, check_nodes, wait_for_nodes
from loft_fast.grouped_moments import GroupedMoments, Key, plain_keys
from loft_fast.moments import Moments
from loft_fast.ops.arguments import check_integer, check_positive
from loft_fast.projection import Projection
from loft_fast.sites import find_site

_FILE = "federated.sqlite"


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
        check_integer("max_groups", max_groups)
        blank: Moments | GroupedMoments = (GroupedMoments if grouped else Moments)(dim, exact=exact)
        blank.site = site
        self._judge = Judge(blank, norm, max_groups, trust_names)
        about = {"dim": dim, "exact": blank.exact, "keep": keep, "grouped": grouped}
        self._archive = Archive(Path(folder) / _FILE, about)
        self._kept = Contributions(self._archive, blank, keep)

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
        return self._kept.clients

    @property
    def moments(self) -> Moments | GroupedMoments:
        """Moments of the rows of all clients that count; floats are summed in the order of the clients' names."""
        return self._kept.pooled()

    @property
    def projection(self) -> Projection | None:
        """What the forget requests so far ask for."""
        return self._archive.projection

    def log(self) -> list[Event]:
        """All that happened, and why."""
        return self._archive.log()

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
        if quorum is not None:
            check_integer("quorum", quorum)
        nodes = check_nodes(nodes)
        kept, archive = self._kept, self._archive
        number = kept.open_round(refresh)
        result = Round(number)
        asked = wait_for_nodes(grid, nodes, timeout)
        here = {node for node, _, _ in archive.members(number).values()}
        left = [node for node in asked if str(node) not in here]
        anew = bool(archive.get("refresh"))
        question = partial(messages.question, round=number, exact=kept.blank.exact, refresh=anew)
        taken = partial(take, kept, self._judge, result)
        silent = ask(grid, messages.MOMENTS, question, left, timeout, str(number), taken, progress)
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
        kept.close_round(number)
        return result

    def abandon(self) -> None:
        """Give up a round that is not complete: what was accepted in it is deleted. Without one, nothing happens."""
        self._kept.abandon_round()

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
        known = self.clients
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            there = ", ".join(map(repr, known[:10])) or "none"
            raise InputError(f"clients: no client {unknown!r}; there are {there}")
        if self._kept.keep == "sum":
            raise InputError("clients: contributions are not kept (keep='sum'); ask them: forget_rows(grid, node)")
        part = self._kept.pooled(names)
        change = partial(self._kept.drop_clients, names, part)
        return self._forget(id, self._kept.rest(names, part), part, what, change, options)

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
        return self._forget(id, rest, part, what, partial(self._kept.drop_groups, part), options)

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
        kept, own = self._kept, None
        client, moments, left = hear(kept, self._judge, grid, node, id, timeout, everything)
        part = from_keys(kept.still(moments), moments)
        try:
            if kept.keep == "clients" and not everything:
                own = kept.pooled([client]) - part  # type: ignore[operator] # both are of one kind
            rest = kept.rest([client], part, own)
        except InputError as error:
            raise FederatedError(f"client {client}: these rows are not its own: {error}") from error
        if everything:
            return self._forget(id, rest, part, what, partial(kept.drop_clients, [client], part), options)
        change = partial(kept.drop_rows, client, part, own, moments.count, left)
        return self._forget(id, rest, part, what, change, options, client)

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
        """Project `part` away, so far as `rest` can spare it, and `change` what is kept, in one transaction."""
        if self._archive.get("open") is not None:
            raise FederatedError(f"round {self._archive.round + 1} is open: collect or abandon() first")
        project = options.pop("project", True) and part.count  # of rows in groups that are gone, nothing is left to do
        projection = self.projection
        if project:
            projection = solve_next(projection, rest, part, None, **options)  # type: ignore[arg-type]
            projection.site = self._kept.site(self._archive.round)
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

        def confirm(node: int, answer: Message) -> None:
            if answer.has_error():
                failed.append(node)

        asked = wait_for_nodes(grid, wanted, timeout)
        silent = ask(grid, messages.UPDATE, content, asked, timeout, str(self._archive.round), confirm, progress)
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
