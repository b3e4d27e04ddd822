"""Debian's package descriptions, as embeddings of a frozen MiniLM or for it to learn; the class is the section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from bench.quality.data.data import Data, split
from bench.quality.data.packages import Package, sample
from bench.quality.data.sentences import embed, hidden_states
from bench.quality.problem import Rows


def sections(cache: Path) -> Data:
    """32 sections as sentence embeddings; sub-groups are the maintainers, whose rows go across sections."""
    packages = sample()
    x = embed([package.text for package in packages], cache)
    return _labelled("debian-sections", packages, x / x.std())  # entries of unit vectors are tiny


def text(cache: Path) -> Data:
    """4000 descriptions from the ten largest sections, as what the lower layers of MiniLM make of their tokens."""
    packages = sample(10, 400)
    return _labelled("debian-text", packages, hidden_states([package.text for package in packages], cache))


def _labelled(name: str, packages: list[Package], x: torch.Tensor) -> Data:
    names = sorted({package.section for package in packages})
    people = sorted({package.maintainer for package in packages})
    number = {one: i for i, one in enumerate(people)}
    y = torch.tensor([names.index(package.section) for package in packages])
    group = torch.tensor([number[package.maintainer] for package in packages])
    rows = np.arange(len(packages))
    fit, held = (np.sort(part) for part in train_test_split(rows, test_size=0.2, random_state=0, stratify=y))
    return split(name, Rows(x[fit], y[fit]), Rows(x[held], y[held]), tuple(names), group[fit], group[held])
