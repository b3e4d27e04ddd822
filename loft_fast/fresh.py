"""Fresh tensors, without values: where they are large, on pages that do not cost more to touch than to fill."""

from __future__ import annotations

from torch import Tensor

from loft_fast import backends

_LARGE = 1 << 22  # bytes: two huge pages


def empty(like: Tensor, *shape: int) -> Tensor:
    """Not initialised, of the dtype and on the device of `like`."""
    tensor = like.new_empty(shape)
    if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE and "native" in backends.available():
        backends.native_module().use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
