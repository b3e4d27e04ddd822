"""LEACE (Belrose et al. 2023, arXiv 2306.03819) by its authors' package, as a module on features."""

from __future__ import annotations

from torch import Tensor, nn

from loft_fast.errors import MissingExtraError


class Leace(nn.Module):
    """The least-squares affine map after which no linear probe sees the concept, fitted to rows.

    Args:
        features: (n, d). concept: (n,) labels or (n, k) one-hot columns, as floats.
    """

    def __init__(self, features: Tensor, concept: Tensor) -> None:
        super().__init__()
        try:
            from concept_erasure import LeaceEraser
        except ImportError as error:
            raise MissingExtraError("LEACE needs concept-erasure: pip install 'loft-fast[demo]'") from error
        self.eraser = LeaceEraser.fit(features.double(), concept.double())

    def forward(self, z: Tensor) -> Tensor:
        return self.eraser(z.double()).to(z.dtype)
