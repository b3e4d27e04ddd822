"""What several kernels share: where they run, the order of the tiles of a triangle, and one product of two blocks."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from loft_fast.backends import interpreting

MOST = 65535  # programs along the second axis of a grid; numbered along one axis alone, two kernels spill
_INTERPRETED = tl.constexpr(interpreting())
_Launch = TypeVar("_Launch", bound=Callable[..., Any])


def there(launch: _Launch) -> _Launch:
    """Launch on the device of the first argument: Triton takes the current one, whatever the tensors are on."""

    @wraps(launch)
    def launch_there(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *arguments, **options)

    return launch_there  # type: ignore[return-value]


@triton.jit
def triangle_tile(t):
    """Row and column, i <= j, of tile t of an upper triangle, column by column."""
    j = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)  # the root is rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """total + a b, in float32; 32-bit blocks by PRECISION, one of `choice.PRECISIONS`.

    Matrix units cut off the digits for which a sum has no room (Fasi, Higham, Mikaitis and Pranesh, 2021), so that a
    long sum of numbers of one sign drifts. APART, they sum a b alone, and adding it to `total` rounds to nearest, as it
    does in "tf32x3" anyway.
    """
    if a.dtype == tl.float32 and PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if _INTERPRETED:  # it multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee" if _INTERPRETED else PRECISION)
    if APART:  # without the last argument, which means nothing else here, the compiler would put both sums into one
        return total + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    return tl.dot(a, b, total)
