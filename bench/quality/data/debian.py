"""Debian's package descriptions, as sentence embeddings of a frozen MiniLM; the class is the section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from bench.quality.data.data import Data, split
from bench.quality.data.packages import sample
from bench.quality.data.sentences import embed
from bench.quality.problem import Rows


def sections(cache: Path) -> Data:
    """32 sections; sub-groups are the maintainers, whose rows go across sections."""
    packages = sample()
    names = sorted({package.section for package in packages})
    people = sorted({package.maintainer for package in packages})
    number = {one: i for i, one in enumerate(people)}
    x = embed([package.text for package in packages], cache)
    x = x / x.std()  # entries of unit vectors are tiny
    y = torch.tensor([names.index(package.section) for package in packages])
    group = torch.tensor([number[package.maintainer] for package in packages])
    rows = np.arange(len(packages))
    fit, held = (np.sort(part) for part in train_test_split(rows, test_size=0.2, random_state=0, stratify=y))
    return split("debian-sections", Rows(x[fit], y[fit]), Rows(x[held], y[held]), tuple(names), group[fit], group[held])
