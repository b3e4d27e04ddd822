"""The upper layers of MiniLM, to be fine-tuned."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.quality.data.sentences import FROZEN, folder
from bench.quality.networks import Chain, Mean

WIDTH, HEADS, INNER, EPSILON = 384, 12, 1536, 1e-12
LAYERS = (FROZEN, FROZEN + 1)
NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Of the modules, ours and BERT's."""


def minilm(classes: int) -> Chain:
    """The last two of its six layers, the mean over the tokens and a new head, on the states (n, 16, 384) before."""
    *first, last = (_layer(index) for index in LAYERS)
    return Chain([*first, nn.Sequential(last, Mean())], WIDTH, classes)


def _layer(index: int) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, "gelu", EPSILON, batch_first=True)
    stored = {name.removeprefix(f"encoder.layer.{index}."): tensor for name, tensor in _weights().items()}
    own = {}
    for part in ("weight", "bias"):
        pieces = [stored[f"attention.self.{name}.{part}"] for name in ("query", "key", "value")]
        own[f"self_attn.in_proj_{part}"] = torch.cat(pieces)
        own |= {f"{ours}.{part}": stored[f"{theirs}.{part}"] for ours, theirs in NAMES.items()}
    layer.load_state_dict(own)
    return layer


@cache
def _weights() -> dict[str, Tensor]:
    return load_file(folder() / "model.safetensors")
