"""FedAvg, and FedEraser (Liu, Ma, Yang, Wang, Liu 2021): retraining by calibrated updates that the server has kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = dict[str, Tensor]
Data = Mapping[int, tuple[Tensor, Tensor]]
"""Images and labels by client."""


def local_update(model: nn.Module, start: Weights, x: Tensor, y: Tensor, epochs: int, seed: int) -> Weights:
    """What a client's training adds to the weights: SGD with momentum."""
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: tensor.detach() - start[name] for name, tensor in model.state_dict().items()}


def average(updates: Mapping[int, Weights], data: Data) -> Weights:
    """The mean of the clients' updates, by rows."""
    total = sum(len(data[client][1]) for client in updates)
    names = next(iter(updates.values()))
    return {
        name: sum((len(data[client][1]) / total) * update[name] for client, update in updates.items())  # type: ignore
        for name in names
    }


def add(weights: Weights, update: Weights) -> Weights:
    """Their sum."""
    return {name: tensor + update[name] for name, tensor in weights.items()}


def fed_avg(
    model: nn.Module, data: Data, rounds: int, epochs: int, interval: int = 0
) -> tuple[Weights, list[dict[int, Weights]], list[Weights]]:
    """Train; with an interval, also every interval-th round's updates by client and the weights it began with."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept: list[dict[int, Weights]] = []
    before: list[Weights] = []
    worker = copy.deepcopy(model)
    for number in range(rounds):
        updates = {
            client: local_update(worker, weights, x, y, epochs, 1000 * number + client)
            for client, (x, y) in data.items()
        }
        if interval and number % interval == 0:
            kept.append(updates)
            before.append(weights)
        weights = add(weights, average(updates, data))
    return weights, kept, before


def fed_eraser(model: nn.Module, kept: list[dict[int, Weights]], start: Weights, data: Data, epochs: int) -> Weights:
    """Weights without the clients that are not in `data`.

    The first kept updates are summed as they are; from then on every client trains for fewer epochs than it did, and
    its kept update takes that direction: U' = |U| C / |C|, layer by layer (equation 3 of the paper).
    """
    weights, worker = start, copy.deepcopy(model)
    for number, updates in enumerate(kept):
        old = {client: updates[client] for client in data}
        if number:
            fresh = {
                client: local_update(worker, weights, x, y, epochs, 1000 * number + client)
                for client, (x, y) in data.items()
            }
            old = {
                client: {
                    name: direction * (old[client][name].norm() / direction.norm().clamp_min(1e-12))
                    for name, direction in update.items()
                }
                for client, update in fresh.items()
            }
        weights = add(weights, average(old, data))
    return weights
