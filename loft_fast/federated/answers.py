"""What a server asks of an answer before it believes it."""

from __future__ import annotations

from flwr.app import Message

from loft_fast import files
from loft_fast.federated import messages
from loft_fast.federated.keys import by_key
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.moments import Moments
from loft_fast.plausible import implausible

_WORDS = 300  # characters of a reason, of which a client may have written most


class RefusedError(Exception):
    """Why an answer does not count."""


def reason(error: Exception) -> str:
    """What an error says, for logs and the database: in one line of limited length, as parts of it are the client's."""
    text = str(error)
    text = text if len(text) <= _WORDS else text[:_WORDS] + "..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Judge:
    """Raises RefusedError, or a FileFormatError, for whatever is not the answer of a client to the question asked.

    Args:
        blank: of no rows, of the kind that is expected.
        norm: Euclidean norm that no row exceeds; None: any.
        max_groups: that one client may have.
        trust_names: whether a client is who it says, or the node that it is.
    """

    def __init__(self, blank: Moments | GroupedMoments, norm: float | None, max_groups: int, trust_names: bool) -> None:
        self._blank, self._norm, self._max_groups, self._trust_names = blank, norm, max_groups, trust_names
        self._grouped = isinstance(blank, GroupedMoments)
        self._limit = messages.largest(blank.dim, max_groups if self._grouped else None)

    def sender(self, node: int, answer: Message, round: int, id: str | None = None) -> str:
        """The name of the client whose answer this is, to a question of this round and request that `node` got."""
        if answer.has_error():
            raise RefusedError(f"it failed: {answer.error.reason}")
        if answer.metadata.src_node_id != node:
            raise RefusedError(f"the answer is of node {answer.metadata.src_node_id}, which was not asked")
        fields = messages.fields_of(answer.content)
        if fields.get("round") != round:
            raise RefusedError(f"it answers round {fields.get('round')!r}")
        if id is not None and fields.get("id") != id:
            raise RefusedError(f"it answers request {fields.get('id')!r}")
        if not self._trust_names:
            return str(node)
        name = fields.get("client")
        if not isinstance(name, str) or not 1 <= len(name) <= 200 or not name.isprintable():
            raise RefusedError("it has no name, or one that is too long or not printable")
        return name

    def data(self, answer: Message) -> bytes:
        """The moments that came along, unread, no longer than they may be."""
        data = messages.bytes_in(answer.content, "moments", self._limit)
        if not data:
            raise RefusedError("it sent no moments")
        return data

    def moments(self, data: bytes, site: str | None) -> Moments | GroupedMoments:
        """Moments that can be added, from data that anyone may have made."""
        # Before a matrix is made of it; that the header tells the truth is then found on reading.
        claimed = files.read_header(data).get("dim", str(self._blank.dim))
        if claimed != str(self._blank.dim):
            raise RefusedError(f"dim: got {claimed}, expected {self._blank.dim}")
        moments = messages.moments_of(data, self._grouped)
        for name, got, expected in (
            ("exact", moments.exact, self._blank.exact),
            ("site", moments.site or site, site or moments.site),
        ):
            if got != expected:
                raise RefusedError(f"{name}: got {got!r}, expected {expected!r}")
        if isinstance(moments, GroupedMoments) and len(moments) > self._max_groups:
            raise RefusedError(f"it has {len(moments)} groups, expected at most {self._max_groups}")
        for key, part in by_key(moments).items():
            why = implausible(part, self._norm)
            if why is not None:
                raise RefusedError(f"no rows have such moments: {why} (group {key})")
        return moments
