"""The client's app: moments of its own digits."""

import loft_fast as loft
from digits.task import model, share
from loft_fast.federated import client_app


def fetch(context, exact):
    """Once per run; afterwards the moments answer every question."""
    client = int(context.node_config["partition-id"])
    return loft.fetch_moments(model(), share(client), group="label", exact=exact, progress=False)


def receive(context, update):
    """What the server sends at the end: here the projection, to fold into this client's own copy."""
    loft.fold(model(), update)


app = client_app(fetch, receive=receive)
