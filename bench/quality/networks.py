"""The networks that are made to forget. Each is a chain of blocks and a linear head `fc` on a feature vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Chain(nn.Module):
    """`blocks`, one after the other; the last one makes the features (n, d) that `fc` reads."""

    def __init__(self, blocks: list[nn.Module], features: int, classes: int):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits (n, classes)."""
        return self.fc(self.blocks(x))

    def block_features(self, x: Tensor) -> list[Tensor]:
        """(n, d_i) after every block: maps (n, c, h, w) and tokens (n, t, c) are averaged over their positions."""
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x if x.ndim == 2 else x.mean((2, 3)) if x.ndim == 4 else x.mean(1))
        return found


def cnn(classes: int, widths: tuple[int, int] = (16, 32), features: int = 256) -> Chain:
    """Two convolutions and a hidden layer for 28 x 28 images: the demo's network at half its widths."""
    pool = [nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [
        nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1), *pool),
        nn.Sequential(nn.Conv2d(*widths, 3, padding=1), *pool),
        nn.Sequential(nn.Flatten(), nn.Linear(49 * widths[1], features), nn.ReLU()),
    ]
    return Chain(blocks, features, classes)


def mlp(classes: int, width: int = 384, hidden: int = 512, features: int = 256) -> Chain:
    """Two hidden layers on sentence embeddings."""
    blocks = [nn.Sequential(nn.Linear(width, hidden), nn.ReLU()), nn.Sequential(nn.Linear(hidden, features), nn.ReLU())]
    return Chain(blocks, features, classes)


class Residual(nn.Module):
    """A pre-2016 residual block: two 3x3 convolutions with batch norm, and a 1x1 one where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inner, h, w) to (n, outer, h / stride, w / stride)."""
        made = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(made)) + self.shortcut(x))


class Mean(nn.Module):
    """The mean over positions: of maps (n, c, h, w) or tokens (n, t, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """To (n, c)."""
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)


def resnet(classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> Chain:
    """A small ResNet for 28 x 28 images: a stem and one residual block a width."""
    first = widths[0]
    stem = nn.Sequential(nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
    blocks: list[nn.Module] = [stem]
    for inner, outer in zip((first, *widths), widths, strict=False):
        blocks.append(Residual(inner, outer, 1 if inner == outer else 2))
    blocks[-1] = nn.Sequential(blocks[-1], Mean())
    return Chain(blocks, widths[-1], classes)


class Patches(nn.Module):
    """Images to tokens: 7 x 7 patches, projected, with learned positions."""

    def __init__(self, dim: int, side: int = 7, tokens: int = 16):
        super().__init__()
        self.project = nn.Conv2d(1, dim, side, side)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 28, 28) to (n, 16, dim)."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


def vit(classes: int, dim: int = 64, depth: int = 2, heads: int = 4) -> Chain:
    """A small vision transformer, pre-norm, mean over the tokens at the end."""
    blocks: list[nn.Module] = [Patches(dim)]
    for _ in range(depth):
        blocks.append(nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, batch_first=True, norm_first=True))
    blocks[-1] = nn.Sequential(blocks[-1], nn.LayerNorm(dim), Mean())
    return Chain(blocks, dim, classes)


def with_map(model: Chain, change: nn.Module) -> Chain:
    """The network with a map of the features before the head, counted to the last block: probes look behind it."""
    model.blocks[-1] = nn.Sequential(model.blocks[-1], change)
    return model.eval()


def linear_map(matrix: Tensor, offset: Tensor) -> nn.Linear:
    """z -> matrix z + offset as a module."""
    layer = nn.Linear(*matrix.T.shape)
    layer.weight.data, layer.bias.data = matrix.float(), offset.float()
    return layer


@torch.inference_mode()
def features(model: Chain, x: Tensor) -> Tensor:
    """What the head reads, (n, d)."""
    return torch.cat([model.blocks(part) for part in x.split(250)])
