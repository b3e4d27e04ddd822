"""Inputs of the benchmarks: features with the power-law spectra that trained networks have."""

import torch
from torch import Tensor


def features(n: int, dim: int, seed: int, power: float = 1.0) -> Tensor:
    """(n, dim) float32 rows; covariance eigenvalues i^-power in random directions, mean of the size of the spread."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scale = torch.arange(1, dim + 1) ** (-power / 2)
    return torch.randn(n, dim, generator=generator) * scale @ basis.T + torch.randn(dim, generator=generator) / dim**0.5
