"""Letters and digits of hundreds of typefaces, rendered from Debian's fonts: 62 classes; a typeface is an identity."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bench.quality.data.data import Data, split
from bench.quality.problem import Rows

PACKAGES = (
    "fonts-adf-* fonts-aenigma fonts-dustin fonts-gfs-* fonts-lato fonts-open-sans fonts-texgyre fonts-urw-base35"
)
GLYPHS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIDE, SIZE, TYPEFACES = 28, 20, 300
SUFFIXES = {".ttf", ".otf", ".t1", ".pfb"}


def typefaces(cache: Path) -> Data:
    """The same 300 typefaces in training and test: of every one, a fifth of the glyphs is for testing."""
    images, labels, faces = _rendered(Path("/usr/share/fonts"))
    test = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.2
    train, held = Rows(images[~test], labels[~test]), Rows(images[test], labels[test])
    return split("typefaces", train, held, tuple(GLYPHS), faces[~test], faces[test])


def _rendered(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images: list[np.ndarray] = []
    files = sorted((path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES), key=lambda path: path.name)
    for path in tqdm(files, desc="rendering", leave=False):
        face = _glyphs(path)
        if face is not None and not any(np.array_equal(face, seen) for seen in images):
            images.append(face)
    if len(images) < TYPEFACES:
        raise RuntimeError(f"{len(images)} typefaces found, expected {TYPEFACES}: apt-get install {PACKAGES}")
    # Spread over the names, so that families of many cuts do not crowd out the rest.
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, TYPEFACES).round().astype(int)]
    x = torch.from_numpy(np.concatenate(chosen)).float().div_(255).unsqueeze(1)
    count = len(GLYPHS)
    return x, torch.arange(count).repeat(TYPEFACES), torch.arange(TYPEFACES).repeat_interleave(count)


def _glyphs(path: Path) -> np.ndarray | None:
    """(62, 28, 28) uint8; None for a font without letters: two glyphs alike, or one that is empty."""
    try:
        font = ImageFont.truetype(str(path), SIZE)
        drawn = [_draw(font, glyph) for glyph in GLYPHS]
    except (OSError, ValueError):
        return None
    if any(image.max() < 128 for image in drawn) or len({image.tobytes() for image in drawn}) < 60:
        return None  # small capitals instead of small letters: the same image with two labels
    return np.stack(drawn)


def _draw(font: ImageFont.FreeTypeFont, glyph: str) -> np.ndarray:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), glyph, fill=255, font=font, anchor="mm")
    return np.asarray(image)
