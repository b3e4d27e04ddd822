"""Forget clients of a federated model of digits: by moments, by FedEraser, and by retraining without them.

python -m bench.scale.clients --json bench/scale/clients.json
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import loft_fast as loft
from bench.peers.fed_eraser import Data, Weights, fed_avg, fed_eraser
from loft_fast import files
from loft_fast.demo.digits import SmallCNN, batches, load_digits

CLIENTS, ROUNDS, EPOCHS = 16, 20, 2
INTERVAL, CALIBRATION = 2, 1  # FedEraser: rounds between kept updates, and epochs of calibration


def split(kind: str, x: Tensor, y: Tensor, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Rows of clients: "alone", where client 0 has all of digit 3 and no one else any, or "mixed", Dirichlet(0.3)."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.empty_like(y)
    for digit in range(10):
        rows = torch.where(y == digit)[0]
        if kind == "alone":
            owner[rows] = 0 if digit == 3 else torch.randint(1, CLIENTS, (len(rows),), generator=generator)
        else:
            shares = torch._sample_dirichlet(torch.full((CLIENTS,), 0.3), generator=generator)
            owner[rows] = torch.multinomial(shares, len(rows), replacement=True, generator=generator)
    return {client: (x[owner == client], y[owner == client]) for client in range(CLIENTS) if (owner == client).any()}


@torch.inference_mode()
def accuracy(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> float:
    right = [model(x).argmax(1) == y for one in parts for x, y in batches(*one)]
    return 100 * float(torch.cat(right).double().mean())


def scores(model: nn.Module, data: Data, gone: list[int], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {
        "retain": accuracy(model, [rows for client, rows in data.items() if client not in gone]),
        "forget": accuracy(model, [data[client] for client in gone]),
        "test": accuracy(model, [test]),
    }


def size(weights: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    return model.eval()


def compare(kind: str, gone: list[int], seed: int) -> list[dict[str, object]]:
    """A row per method: accuracies in percent, seconds, bytes that go between clients and server for the request."""
    digits = load_digits()
    data = split(kind, digits.train_x, digits.train_y, seed)
    test = digits.test_x, digits.test_y
    torch.manual_seed(seed)
    model = SmallCNN()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights, kept, before = fed_avg(model, data, ROUNDS, EPOCHS, INTERVAL)
    original, left = with_weights(model, weights), {client: data[client] for client in data if client not in gone}
    one = 2 * size(weights)  # down and up again
    rows = []

    def note(method: str, made: nn.Module, seconds: float, sent: int, stored: int = 0) -> None:
        about = {"split": kind, "forgotten": len(gone), "seed": seed, "method": method}
        rows.append({**about, **scores(made, data, gone, test), "seconds": seconds, "bytes": sent, "stored": stored})

    note("original", original, 0.0, 0)
    begin = time.perf_counter()
    retrained = with_weights(model, fed_avg(with_weights(model, start), left, ROUNDS, EPOCHS)[0])
    note("retrained", retrained, time.perf_counter() - begin, ROUNDS * len(left) * one)
    begin = time.perf_counter()
    erased = fed_eraser(model, kept, before[0], left, CALIBRATION)
    seconds = time.perf_counter() - begin
    stored = sum(size(update) for updates in kept for update in updates.values())
    note("FedEraser", with_weights(model, erased), seconds, (len(kept) - 1) * len(left) * one, stored)

    moments = {
        client: loft.fetch_moments(original, batches(*rows), group="label", exact=100.0, progress=False)
        for client, rows in data.items()
    }
    stored = sum(len(one.to_bytes()) for one in moments.values())
    begin = time.perf_counter()
    whole, part = loft.GroupedMoments(512, exact=100.0), loft.GroupedMoments(512, exact=100.0)
    for client, one_client in moments.items():
        (part if client in gone else whole).merge(one_client)
    ours = copy.deepcopy(original)
    projection = loft.solve(whole, part, head=ours.fc, close=True)
    loft.fold(ours, projection)
    loft.close_outputs(ours, [digit for digit in part if digit not in whole])
    note("ours", ours, time.perf_counter() - begin, len(left) * len(projection.to_bytes()), stored)
    return rows


def line(row: dict[str, object]) -> str:
    shares = "  ".join(f"{name} {row[name]:6.2f}" for name in ("retain", "forget", "test"))
    task = f"{row['split']:6} {row['forgotten']} of {CLIENTS}  {row['method']:10}"
    return f"{task} {shares}  {row['seconds']:8.2f} s  {row['bytes']:>11} bytes"


def main() -> None:
    """Every split, number of clients and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tasks = [
        (kind, gone, seed)
        for seed in options.seeds
        for kind, gone in (("alone", [0]), ("mixed", [0]), ("mixed", [0, 1, 2, 3]))
    ]
    found = []
    for kind, gone, seed in tqdm(tasks, desc="tasks", leave=False):
        for row in compare(kind, gone, seed):
            found.append(row)
            print(line(row), flush=True)
        if options.json is not None:  # after every task: what was measured is not lost
            files.write_bytes(options.json, json.dumps({"rows": found}, indent=1).encode())


if __name__ == "__main__":
    main()
