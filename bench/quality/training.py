"""Training from scratch: the recipe that made the original, and makes the retrained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.quality.networks import Chain
from bench.quality.problem import Rows, cross_entropy


@dataclass(frozen=True)
class Recipe:
    """Adam with a one-cycle learning rate. `build(classes)` makes the network."""

    build: Callable[[int], Chain]
    epochs: int
    batch: int
    rate: float


def train(recipe: Recipe, rows: Rows, classes: int, seed: int) -> Chain:
    """A network trained on these rows only; `seed` sets its start and the order of the batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.build(classes).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, fused=True)
        count = -(-len(rows) // recipe.batch)  # of equal size: a last batch of a few rows would undo what others learnt
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.epochs * count)
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(rows)).tensor_split(count):
                optimizer.zero_grad()
                cross_entropy(model, rows[chosen]).backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()  # a copy would carry the last gradients along
    return model.eval()
