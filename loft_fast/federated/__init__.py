"""Moments of many clients on Flower: a client app that answers, and a server that sums, checks and forgets."""

from loft_fast.errors import MissingExtraError

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise MissingExtraError("loft_fast.federated needs Flower: pip install 'loft-fast[federated]'") from error

from loft_fast.federated.archive import Event
from loft_fast.federated.client import client_app
from loft_fast.federated.rounds import Round
from loft_fast.federated.server import MomentsServer

__all__ = ["Event", "MomentsServer", "Round", "client_app"]
