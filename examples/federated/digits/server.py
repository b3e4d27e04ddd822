"""The server's app: collect once, then forget what the run configuration asks for."""

from flwr.serverapp import ServerApp

from digits.task import DIM, EXACT, model
from loft_fast.federated import MomentsServer

app = ServerApp()


@app.main()
def main(grid, context):
    """`flwr run . --run-config 'forget-clients="3"'`"""
    config = context.run_config
    head, clients = model()[-1], int(config["clients"])
    clients_to_forget = [name for name in str(config["forget-clients"]).split(",") if name]
    digits_to_forget = [int(digit) for digit in str(config["forget-digits"]).split(",") if digit]
    with MomentsServer(str(config["folder"]), DIM, exact=EXACT, trust_names=bool(config["trust-names"])) as server:
        if not server.clients:
            print(server.collect(grid, clients, timeout=float(config["timeout"]), progress=False))
        # The ids make it safe to repeat a run: a request is answered once.
        if clients_to_forget:
            server.forget_clients(clients_to_forget, f"clients {clients_to_forget}", head=head)
        if digits_to_forget:
            server.forget_groups(digits_to_forget, f"digits {digits_to_forget}", head=head)
        print(f"{len(server.clients)} clients, {server.moments.count} rows, digest {server.moments.digest()[:16]}")
        if server.projection is not None:
            print(server.projection.certificate)
            print("not told:", server.ship(grid, progress=False) or "nobody")
