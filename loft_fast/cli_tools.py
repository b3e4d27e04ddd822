"""What the commands share: models and keys by name, and the options of `solve`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from loft_fast import files
from loft_fast.errors import InputError
from loft_fast.grouped_moments import Key
from loft_fast.outputs import close_outputs
from loft_fast.projection import Projection
from loft_fast.sites import find_site, unwrap
from loft_fast.surgery import fold, foldable, known_width


def solving() -> argparse.ArgumentParser:
    """The options of a command that solves for a projection."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", metavar="MODEL", help="module:name; its head finds the angle, --weights needs it")
    parser.add_argument("--rank", type=int, help="dimensions to keep (default: found)")
    parser.add_argument("--about", choices=("retain", "own"), default="retain", help="own: the paper's variant")
    parser.add_argument(
        "--erase", action="store_true", help="features in which no linear probe finds the rows (with --model)"
    )
    parser.add_argument("--min-retain-kept", type=float, metavar="SHARE", help="keep this share of retain variance")
    parser.add_argument("--weights", type=Path, help="also write the model's state, projection folded in (safetensors)")
    return parser


def check_solving(options: argparse.Namespace, **inputs: Path) -> None:
    """Refuse, before any work, options whose result could not be written, or would be written over an input."""
    if options.model is None and (options.weights or options.erase):
        raise InputError(f"{'--weights' if options.weights else '--erase'}: got it without --model, which it needs")
    check_outputs({"--out": options.out, "--weights": options.weights}, **inputs)


def check_outputs(outputs: dict[str, Path | None], **inputs: Path) -> None:
    """Refuse, before any work, files that cannot be written, or are those of another argument (or in its folder)."""
    taken = {name: Path(os.path.realpath(path)) for name, path in inputs.items()}
    for name, path in outputs.items():
        if path is None:
            continue
        place = Path(os.path.realpath(path))
        for other, there in taken.items():
            if there in (place, *place.parents):
                raise InputError(f"{name}: got {str(path)!r}, which {other} is or holds, expected another file")
        taken[name] = place
        files.writable_file(name, path)


def finds_angle(options: argparse.Namespace) -> bool:
    """Whether a head, where there is one, is to find the angle."""
    return options.rank is None and options.min_retain_kept is None


def check_weights(model: nn.Module, site: str | None, dim: int) -> None:
    """Refuse, before any work, a model whose state with a projection of this dimension folded in cannot be written."""
    place = find_site(model, site)
    foldable(model, place)
    width = known_width(place)
    if width not in (None, dim):
        raise InputError(f"MODEL: it has {width} features at {str(place)!r}, expected {dim} as in the moments")
    for name, value in _state(model).items():
        try:
            files.to_bytes("weights", {name: value})
        except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            what = f"{value.dtype} and {value.layout} on {value.device}"
            raise InputError(f"--weights: cannot write {name!r} of the model, {what}: {error}") from error


def write_weights(path: Path, model: nn.Module, projection: Projection, closed: Sequence[int] = ()) -> None:
    """Fold the projection into the model, close these outputs, and write its state."""
    fold(model, projection)
    close_outputs(model, closed, projection.site)
    files.write_tensors(path, "weights", _state(model), {"site": projection.site or ""})


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state; tied tensors are written once each, as `load_state_dict` wants them."""
    state = unwrap(model).state_dict()
    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        kind = type(state[other]).__name__
        raise InputError(f"--weights: the model's state has a {kind} in {other!r}, expected nothing but tensors")
    return {name: value.detach().clone() for name, value in state.items()}


def key_of(text: str, known: Callable[[Key], bool]) -> Key:
    """The group that the text names: a string key if it is known, or else an integer one if it looks like it."""
    if not known(text) and re.fullmatch("-?[0-9]+", text):
        with contextlib.suppress(ValueError):  # thousands of digits, which no key has
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
    if not colon or not module or module.startswith(".") or not attribute:
        raise InputError(f"{argument}: got {name!r}, expected module:name")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(f"{argument}: cannot find {name!r}: {error}") from error
    return found() if callable(found) and not isinstance(found, nn.Module) else found
