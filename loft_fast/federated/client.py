"""The client's side: its moments are fetched once, and answer every question."""

from __future__ import annotations

import glob
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


def client_app(
    fetch: Fetch, *, forget: Rows | None = None, receive: Receive | None = None, deletes: bool = False
) -> ClientApp:
    """A ClientApp that answers a `MomentsServer`.

    Args:
        fetch: (context, exact) -> moments of this client's rows, with the `exact` that the server asks for. Called
            once, and again when the server begins anew (`refresh`): the result is kept from message to message, and in
            the file that the node's configuration calls `moments`, if there is one, from run to run.
        forget: (context, id of the request) -> moments of the rows that this client wants to be forgotten; None: none.
            Called once per request: what it returns is kept, as the result of `fetch` is.
        receive: (context, projection or weights), called with what the server sends at the end.
        deletes: whether rows are deleted where they lie once they were forgotten, so that a later `fetch` no longer
            finds them. Otherwise they are subtracted from what it returns, every time.
    """
    for name, function in (("fetch", fetch), ("forget", forget), ("receive", receive)):
        if not callable(function) and (function is not None or name == "fetch"):
            raise InputError(f"{name}: got {type(function).__name__}, expected a function")
    app = ClientApp()

    @app.query("moments")
    def moments(message: Message, context: Context) -> Message:
        asked = messages.fields_of(message.content)
        tags, data = _tags(context), _read(context)
        if data is None or bool(asked.get("refresh")):
            exact = asked.get("exact")
            whole = fetch(context, None if exact is None else float(exact))
            if deletes:
                whole = sum(_answers(context), whole)  # type: ignore[arg-type] # as if they were still there
            left, data = _left(context, whole), whole.to_bytes()
            _write(context, data)
        elif tags:
            left = _left(context, _moments_of(data))
        return _answer(message, context, asked, left.to_bytes() if tags else data, answered=tags or None)

    @app.query("rows")
    def rows(message: Message, context: Context) -> Message:
        asked = messages.fields_of(message.content)
        tag, known = messages.tag_of(str(asked["id"])), _read(context)
        data = _read(context, tag)
        if data is None:  # or asked before: the same answer
            part = None if forget is None else forget(context, str(asked["id"]))
            if part is not None and known is not None:
                _left(context, _moments_of(known)) - part  # type: ignore[operator] # refuses rows that are not there
            data = b"" if part is None else part.to_bytes()
            _write(context, data, tag)  # all that changes, so that a client that is killed has answered or has not
        left = None if known is None else _left(context, _moments_of(known)).digest()
        return _answer(message, context, asked, data, left=left)

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


def _answer(message: Message, context: Context, asked: dict[str, Any], data: bytes | None, **more: Any) -> Message:
    name = context.node_config.get("client", context.node_config.get("partition-id"))
    fields = {"round": asked.get("round"), "id": asked.get("id"), "client": None if name is None else str(name), **more}
    content = messages.question(**fields)
    return Message(content if data is None else messages.with_bytes(content, "moments", data), reply_to=message)


# What is kept: the moments that were fetched, as they were, and the answer to every request, each under its tag.


def _left(context: Context, whole: Moments | GroupedMoments) -> Moments | GroupedMoments:
    """Moments that were fetched without the rows that were forgotten since."""
    try:
        for part in _answers(context):
            whole = whole - part  # type: ignore[operator] # both are of one kind
    except InputError as error:
        raise InputError(f"fetch: got moments without rows that were forgotten, expected them, too: {error}") from error
    return whole


def _answers(context: Context) -> list[Moments | GroupedMoments]:
    """The moments of all rows that were forgotten so far."""
    return [_moments_of(part) for tag in _tags(context) if (part := _read(context, tag))]


def _moments_of(data: bytes) -> Moments | GroupedMoments:
    return messages.moments_of(data, files.read_header(data).get("format") == "loft_fast.grouped_moments")


def _tags(context: Context) -> list[str]:
    """Of the requests that were answered."""
    found = {name[len(_STATE) :] for name in context.state.array_records if name.startswith(_STATE)} - {""}
    if (path := _path(context)) is not None:
        pattern = f"{glob.escape(path.name)}.{'[0-9a-f]' * messages.TAG}"
        found |= {file.name[-messages.TAG :] for file in path.parent.glob(pattern)}
    return sorted(found)


def _read(context: Context, tag: str = "") -> bytes | None:
    """The moments that were fetched before, or what a request was answered."""
    kept = context.state.array_records.get(_STATE + tag)
    if kept is not None:
        return kept["data"].data
    path = _path(context, tag)
    return path.read_bytes() if path is not None and path.exists() else None


def _write(context: Context, data: bytes, tag: str = "") -> None:
    if (path := _path(context, tag)) is not None:
        files.write_bytes(path, data, 0o600)
    context.state[_STATE + tag] = ArrayRecord({"data": Array("uint8", (len(data),), "bytes", data)})


def _path(context: Context, tag: str = "") -> Path | None:
    """The node's file, and beside it one for each request."""
    place = context.node_config.get("moments")
    return None if place is None else Path(f"{place}.{tag}" if tag else str(place))
