"""The data sets, by name. Each loads from packages that install without a hub."""

from collections.abc import Callable
from pathlib import Path

from bench.quality.data.data import Data
from bench.quality.data.debian import sections, text
from bench.quality.data.images import digits, fashion
from bench.quality.data.typefaces import typefaces

DATA: dict[str, Callable[[Path], Data]] = {
    "mnist-5000": digits,
    "fashion-mnist": fashion,
    "debian-sections": sections,
    "debian-text": text,
    "typefaces": typefaces,
}


def load(name: str, cache: Path) -> Data:
    """The data set; what it lacks ends the program in a line that says how to get it."""
    try:
        return DATA[name](cache)
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"{name}: {error}") from error
