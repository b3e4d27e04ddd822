"""Fresh matrices, without values: where they are large, on pages that do not cost more to touch than to fill."""

from __future__ import annotations

from torch import Tensor

from loft_fast import backends

_LARGE = 1 << 22  # bytes: two huge pages


def square(dim: int, like: Tensor) -> Tensor:
    """(dim, dim), not initialised, of the dtype and on the device of `like`."""
    matrix = like.new_empty(dim, dim)
    if matrix.device.type == "cpu" and matrix.nbytes >= _LARGE and "native" in backends.available():
        backends.native_module().use_huge_pages(matrix.data_ptr(), matrix.nbytes)
    return matrix
