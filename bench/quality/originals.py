"""Trained networks, kept on disk: originals, retrained ones, shadows for membership inference."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.quality.data.data import Data
from bench.quality.networks import Chain
from bench.quality.problem import Rows
from bench.quality.training import Recipe, train
from loft_fast import files
from loft_fast.errors import FileFormatError

SHADOWS = 16


class Trained(NamedTuple):
    """A network and how long its training took, whenever that was."""

    model: Chain
    seconds: float


def trained(recipe: Recipe, rows: Rows, classes: int, seed: int, cache: Path) -> Trained:
    """The network of this recipe on exactly these rows, from `cache` if it was trained before."""
    model = recipe.build(classes).eval()
    shapes = [tuple(tensor.shape) for tensor in model.state_dict().values()]
    name = recipe.build.__name__
    digest = hashlib.sha256(f"{name} {recipe.epochs} {recipe.batch} {recipe.rate} {seed} {shapes}".encode())
    digest.update(f"{torch.__version__} {torch.get_num_threads()}".encode())
    for tensor in (rows.x, rows.y):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    path = cache / f"{name}-{digest.hexdigest()[:20]}.safetensors"
    if path.exists():
        with suppress(FileFormatError):  # a damaged one is trained again
            tensors, header = files.read_tensors(path, "quality_model", tuple(model.state_dict()))
            model.load_state_dict(tensors)
            return Trained(model, float(header["seconds"]))
    start = time.perf_counter()
    model = train(recipe, rows, classes, seed)
    seconds = time.perf_counter() - start
    cache.mkdir(parents=True, exist_ok=True)
    files.write_tensors(path, "quality_model", model.state_dict(), {"seconds": repr(seconds)})
    return Trained(model, seconds)


@torch.inference_mode()
def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    """(n, classes) of many rows."""
    return torch.cat([model(part) for part in x.split(250)])


def hardness(recipe: Recipe, data: Data, cache: Path) -> Tensor:
    """(n,) of the training rows: minus the log-probability of the label by a network that was trained on the others."""
    fold = torch.rand(len(data.train), generator=torch.Generator().manual_seed(1)) < 0.5
    found = torch.empty(len(data.train))
    for part in (fold, ~fold):
        model = trained(recipe, data.train[~part], data.classes, 900, cache).model
        rows = data.train[part]
        found[part] = -logits(model, rows.x).log_softmax(1).gather(1, rows.y.unsqueeze(1)).squeeze(1)
    return found


def shadows(recipe: Recipe, rows: Rows, classes: int, cache: Path) -> tuple[Tensor, list[Chain]]:
    """(SHADOWS, n) bool, which rows each was trained on (every row in half of them), and the networks."""
    generator = torch.Generator().manual_seed(2)
    rank = torch.rand(SHADOWS, len(rows), generator=generator).argsort(0)
    inside = rank < SHADOWS // 2
    return inside, [trained(recipe, rows[inside[i]], classes, 500 + i, cache).model for i in range(SHADOWS)]
