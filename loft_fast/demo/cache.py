"""Trained networks on disk: trained once for a recipe, a seed and a machine set-up, reused ever after."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loft_fast import files
from loft_fast.demo import digits
from loft_fast.errors import FileFormatError, InputError


@dataclass(frozen=True)
class Trained:
    """A network and the wall time its training took, whenever that was."""

    model: digits.SmallCNN
    seconds: float


def default_folder() -> Path:
    """`loft_fast` in the user's cache folder.

    Raises:
        InputError: the user has none.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loft_fast"
    except RuntimeError as error:
        raise InputError(f"cache: got no folder, expected one, as there is no default: {error}") from error


def trained(
    data: digits.Digits,
    without: Sequence[int],
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    progress: bool = True,
) -> Trained:
    """The network trained on all digits but `without`: from `folder`, or trained now and put there.

    Raises:
        InputError: the folder cannot be written.
    """
    name = "retrained without " + ", ".join(map(str, without)) if without else "original"
    path = folder / _file_name(without, seed)
    model = digits.SmallCNN()
    if path.exists():
        try:
            tensors, header = files.read_tensors(path, "demo_model", tuple(model.state_dict()))
            model.load_state_dict(tensors)
            say(f"{name}: reusing {path}")
            return Trained(model.eval(), float(header["seconds"]))
        except (FileFormatError, KeyError, RuntimeError, ValueError):
            say(f"{name}: {path} is damaged, training again")
    files.writable_folder("cache", folder)
    parts = data.split(without)
    start = time.perf_counter()
    model = digits.train(*parts["retain_train"], seed, name, progress)
    seconds = time.perf_counter() - start
    files.write_tensors(path, "demo_model", model.state_dict(), {"seconds": repr(seconds)})
    say(f"{name}: trained in {seconds:.1f} s, kept in {path}")
    return Trained(model, seconds)


def _file_name(without: Sequence[int], seed: int) -> str:
    recipe = {
        "without": sorted(without),
        "seed": seed,
        "epochs": digits.EPOCHS,
        "batch": digits.BATCH,
        "rate": digits.RATE,
        "shapes": {name: list(tensor.shape) for name, tensor in digits.SmallCNN().state_dict().items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # sums split among threads round differently, and the time differs
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    what = "without-" + "-".join(map(str, sorted(without))) if without else "original"
    return f"digits-{what}-seed{seed}-{key}.safetensors"
