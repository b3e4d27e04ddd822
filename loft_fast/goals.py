"""Trade-offs on the frontier: each is a loss in (a, b), where its optimum lies, and a lower bound from any angle.

Any angle phi gives the half-plane cos(phi) a - sin(phi) b <= h(phi) that no projector leaves; `bound` is the least
loss inside it. `residual` falls as phi grows, and the optimum is where it crosses zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

_ROUNDING = 1e-12  # what a sum of d terms may lose: a point on the limit must not count as outside


class Goal(Protocol):
    """A loss over the frontier that `search.optimum` can minimise."""

    def loss(self, a: float, b: float) -> float:
        """The loss of keeping shares a of the retain and b of the forget variance."""

    def bound(self, angle: float, support: float) -> float:
        """The least loss with cos(angle) a - sin(angle) b <= support."""

    def residual(self, angle: float, a: float, b: float) -> float:
        """Positive where the optimum lies at a larger angle than this one, whose extreme point is (a, b)."""

    @property
    def reach(self) -> bool:
        """Whether the optimum is certain to lie between angle and angle + residual."""


@dataclass(frozen=True)
class Distance:
    """(1 - a)^2 + weight * b^2; weight 1 is the paper's objective."""

    weight: float = 1.0

    def loss(self, a: float, b: float) -> float:
        return (1 - a) ** 2 + self.weight * b**2

    def bound(self, angle: float, support: float) -> float:
        cos, sin = math.cos(angle), math.sin(angle)
        return max(0.0, cos - support) ** 2 / (cos**2 + sin**2 / self.weight)

    def residual(self, angle: float, a: float, b: float) -> float:
        # The level line of the loss through (a, b) has the angle atan2(weight b, 1 - a); at the optimum it is phi.
        return math.atan2(self.weight * b, 1 - a) - angle

    @property
    def reach(self) -> bool:
        return True

    def __str__(self) -> str:
        return "(1 - a)^2 + b^2" if self.weight == 1 else f"(1 - a)^2 + {self.weight:g} b^2"


@dataclass(frozen=True)
class KeepRetain:
    """b, subject to a >= share."""

    share: float

    def loss(self, a: float, b: float) -> float:
        return b if a >= self.share - _ROUNDING else math.inf

    def bound(self, angle: float, support: float) -> float:
        missing = math.cos(angle) * self.share - support
        if math.sin(angle) < 1e-12:  # a <= support: either no limit on b, or no subspace at all
            return math.inf if missing > _ROUNDING else 0.0
        return max(0.0, missing / math.sin(angle))

    def residual(self, angle: float, a: float, b: float) -> float:
        # Positive wherever the loss is finite, so that a point on the limit is an inner end of the bracket.
        return a - self.share + _ROUNDING

    @property
    def reach(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"b with a >= {self.share:g}"


def linear_text(angle: float) -> str:
    """The loss that a fixed angle minimises: a fixed rate of exchange, cos(angle) (1 - a) + sin(angle) b."""
    return f"{math.cos(angle):.6g} (1 - a) + {math.sin(angle):.6g} b"
