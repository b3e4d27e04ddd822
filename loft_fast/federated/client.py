"""The client's side: its moments are fetched once, and answer every question."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from loft_fast import files
from loft_fast.errors import InputError
from loft_fast.federated import messages
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.projection import Projection

_STATE = "loft_fast.client."  # in the context, which Flower keeps from message to message of a run

Fetch = Callable[[Context, float | None], Moments | GroupedMoments]
Rows = Callable[[Context, str], Moments | GroupedMoments | None]
Receive = Callable[[Context, Projection | dict[str, Tensor]], Any]


def client_app(fetch: Fetch, *, forget: Rows | None = None, receive: Receive | None = None) -> ClientApp:
    """A ClientApp that answers a `MomentsServer`.

    Args:
        fetch: (context, exact) -> moments of this client's rows, with the `exact` that the server asks for. Called
            once: the result is kept from message to message, and in the file that the node's configuration calls
            `moments`, if there is one, from run to run.
        forget: (context, id of the request) -> moments of the rows that this client wants to be forgotten; None: none.
            Called once per request; what it returns is subtracted from the client's own moments, too.
        receive: (context, projection or weights), called with what the server sends at the end.
    """
    for name, function in (("fetch", fetch), ("forget", forget), ("receive", receive)):
        if not callable(function) and (function is not None or name == "fetch"):
            raise InputError(f"{name}: got {type(function).__name__}, expected a function")
    app = ClientApp()

    @app.query("moments")
    def moments(message: Message, context: Context) -> Message:
        asked = messages.fields_of(message.content)
        data = _read(context)
        if data is None or bool(asked.get("refresh")):
            exact = asked.get("exact")
            data = _keep(context, fetch(context, None if exact is None else float(exact)))
        return _answer(message, context, asked, data)

    @app.query("rows")
    def rows(message: Message, context: Context) -> Message:
        asked = messages.fields_of(message.content)
        id = str(asked["id"])
        kept = _read(context, id)
        if kept is not None:  # asked before: the same answer
            return _answer(message, context, asked, kept)
        part = None if forget is None else forget(context, id)
        data = b"" if part is None else part.to_bytes()
        known = _read(context)
        if part is not None and known is not None:
            whole = messages.moments_of(known, isinstance(part, GroupedMoments))
            _keep(context, whole - part)  # type: ignore[operator] # both are of one kind
        _write(context, data, id)
        return _answer(message, context, asked, data)

    @app.query("update")
    def update(message: Message, context: Context) -> Message:
        asked = messages.fields_of(message.content)
        projection = messages.bytes_in(message.content, "projection")
        weights = message.content.array_records.get("weights")
        if receive is not None and projection is not None:
            receive(context, Projection.from_bytes(projection))
        elif receive is not None and weights is not None:
            receive(context, dict(weights.to_torch_state_dict()))
        return _answer(message, context, asked, None)

    return app


def _answer(message: Message, context: Context, asked: dict[str, Any], data: bytes | None) -> Message:
    name = context.node_config.get("client", context.node_config.get("partition-id"))
    fields = {"round": asked.get("round"), "id": asked.get("id"), "client": None if name is None else str(name)}
    content = messages.question(**fields)
    return Message(content if data is None else messages.with_bytes(content, "moments", data), reply_to=message)


def _read(context: Context, id: str = "") -> bytes | None:
    """The moments that were fetched before, or what a request of this id was answered."""
    kept = context.state.array_records.get(_STATE + id)
    if kept is not None:
        return kept["data"].data
    path = _path(context, id)
    return path.read_bytes() if path is not None and path.exists() else None


def _write(context: Context, data: bytes, id: str = "") -> None:
    context.state[_STATE + id] = ArrayRecord({"data": Array("uint8", (len(data),), "bytes", data)})
    if (path := _path(context, id)) is not None:
        files.write_bytes(path, data, 0o600)


def _path(context: Context, id: str) -> Path | None:
    """The node's file, and beside it one for each request."""
    place = context.node_config.get("moments")
    if place is None:
        return None
    return Path(f"{place}.{hashlib.sha256(id.encode()).hexdigest()[:32]}" if id else str(place))


def _keep(context: Context, moments: Moments | GroupedMoments) -> bytes:
    data = moments.to_bytes()
    _write(context, data)
    return data
