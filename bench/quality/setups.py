"""Which network is trained how on which data."""

from __future__ import annotations

from bench.quality.minilm import minilm
from bench.quality.networks import cnn, mlp, resnet, vit
from bench.quality.training import Recipe

RECIPES: dict[str, dict[str, Recipe]] = {
    "mnist-5000": {"cnn": Recipe(cnn, 10, 64, 3e-3)},
    "debian-sections": {"minilm-mlp": Recipe(mlp, 11, 256, 2e-3)},
    "debian-text": {"minilm": Recipe(minilm, 4, 64, 1e-3)},
    "fashion-mnist": {"resnet": Recipe(resnet, 6, 128, 5e-3), "vit": Recipe(vit, 15, 128, 2e-3)},
    "typefaces": {"resnet": Recipe(resnet, 10, 128, 5e-3)},
}
SETUPS = tuple((data, network) for data, networks in RECIPES.items() for network in networks)
