"""The data sets, by name. Each loads from packages that install without a hub."""

from collections.abc import Callable
from pathlib import Path

from bench.quality.data.data import Data
from bench.quality.data.debian import sections
from bench.quality.data.images import digits, fashion
from bench.quality.data.typefaces import typefaces

DATA: dict[str, Callable[[Path], Data]] = {
    "mnist-5000": digits,
    "fashion-mnist": fashion,
    "debian-sections": sections,
    "typefaces": typefaces,
}
