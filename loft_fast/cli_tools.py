"""What the commands share: models and keys by name, and the options of `solve`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loft_fast import files
from loft_fast.errors import InputError
from loft_fast.grouped_moments import Key
from loft_fast.outputs import close_outputs
from loft_fast.projection import Projection
from loft_fast.sites import unwrap
from loft_fast.surgery import fold


def solving() -> argparse.ArgumentParser:
    """The options of a command that solves for a projection."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", metavar="MODEL", help="module:name; its head finds the angle, --weights needs it")
    parser.add_argument("--rank", type=int, help="dimensions to keep (default: found)")
    parser.add_argument("--about", choices=("retain", "own"), default="retain", help="own: the paper's variant")
    parser.add_argument("--erase", action="store_true", help="blind a new linear probe as well (with --model)")
    parser.add_argument("--min-retain-kept", type=float, metavar="SHARE", help="keep this share of retain variance")
    parser.add_argument("--weights", type=Path, help="also write the model's state, projection folded in (safetensors)")
    return parser


def check_solving(options: argparse.Namespace) -> None:
    """Refuse, before any work, options whose result could not be written."""
    if options.model is None and (options.weights or options.erase):
        raise InputError(f"{'--weights' if options.weights else '--erase'}: got it without --model, which it needs")
    for name, path in (("--out", options.out), ("--weights", options.weights)):
        if path is not None:
            files.writable_folder(name, path.parent)


def finds_angle(options: argparse.Namespace) -> bool:
    """Whether a head, where there is one, is to find the angle."""
    return options.rank is None and options.min_retain_kept is None


def write_weights(path: Path, model: nn.Module, projection: Projection, closed: Sequence[int] = ()) -> None:
    """Fold the projection into the model, close these outputs, and write its state."""
    fold(model, projection)
    close_outputs(model, closed, projection.site)
    files.write_tensors(path, "weights", unwrap(model).state_dict(), {"site": projection.site or ""})


def key_of(text: str, known: Callable[[Key], bool]) -> Key:
    """The group that the text names: a string key if it is known, or else an integer one if it looks like it."""
    if not known(text) and text.lstrip("-").isdigit():
        return int(text)
    return text


def load_model(name: str) -> nn.Module:
    """The model that `module:name` holds, or makes when it is called."""
    model = load("MODEL", name)
    if not isinstance(model, nn.Module):
        raise InputError(f"MODEL: {name!r} is a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load(argument: str, name: str) -> Any:
    """What `module:name` holds; a function (but not a model) is called."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise InputError(f"{argument}: got {name!r}, expected module:name")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{argument}: cannot find {name!r}: {error}") from error
    return found() if callable(found) and not isinstance(found, nn.Module) else found
