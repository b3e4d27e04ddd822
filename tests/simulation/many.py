"""Both apps of test_scale.py: clients with rows of their own, a server that forgets more and more of them."""

from client_rows import EXACT, rows
from flwr.serverapp import ServerApp

import loft_fast as loft
from loft_fast.federated import MomentsServer, client_app


def fetch(context, exact):
    """Once; by the number that the engine gives the client."""
    dim = int(context.run_config["dim"])
    return loft.GroupedMoments(dim, exact=exact).update(*rows(int(context.node_config["partition-id"]), dim=dim))


client = client_app(fetch)
server = ServerApp()


@server.main()
def main(grid, context):
    """Prints how many clients are left, and the digest of their moments."""
    config = context.run_config
    with MomentsServer(str(config["folder"]), int(config["dim"]), exact=EXACT, trust_names=True) as moments:
        print(moments.collect(grid, int(config["clients"]), timeout=200, progress=False))
        for gone in (range(0), range(1), range(1, 9), range(9, 41)):
            if gone:
                moments.forget_clients([str(one) for one in gone], project=False)
            print(f"{len(moments.clients)} clients, {moments.moments.count} rows, digest {moments.moments.digest()}")
