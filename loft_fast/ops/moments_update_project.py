"""One read of a block of rows for two uses: the moments, and the image of a subspace under the second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_state, check_tensor

_OP = "moments_update_project"


def moments_update_project(
    x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], basis: Tensor, center: Tensor, image: Tensor
) -> None:
    """Merge rows into running moments, as `moments_update` does, and into the image of a subspace U.

    Afterwards image = sum (x_i - c)(x_i - c)^T U over all rows so far. About the mean m of n rows it is
    image - n (m - c)(m - c)^T U: a step of the power method, ready at any time of the stream. With no scatter, no d x d
    matrix is ever made, however large d is.

    Args:
        x: (n, d) float16, bfloat16, float32 or float64; any strides; n >= 0.
        count: (1,) contiguous int64; mean: (1, d) contiguous float64; both updated in place.
        scatter: [] or one symmetric contiguous (d, d) float64, updated in place.
        basis: U, (d, s) contiguous float32, s >= 1.
        center: c, (d,) contiguous float32, the same in every call; near the rows, for the sake of digits.
        image: (d, s) contiguous float64, updated in place.

    Raises:
        InputError: an argument has a wrong type, shape, dtype, device or layout; the state is unchanged.
    """
    check_tensor("x", x, (None, None), backends.FLOATS, x)
    d = x.shape[1]
    check_state("count", count, (1,), torch.int64, x)
    check_state("mean", mean, (1, d), torch.float64, x)
    if not isinstance(scatter, list) or len(scatter) > 1:
        raise InputError(f"scatter: got {scatter!r}, expected [] or a list of one ({d}, {d}) tensor")
    for matrix in scatter:
        check_state("scatter[0]", matrix, (d, d), torch.float64, x)
    check_tensor("basis", basis, (d, None), (torch.float32,), x)
    if basis.shape[1] == 0:
        raise InputError(f"basis: got shape {tuple(basis.shape)}, expected (d, s) with s >= 1")
    check_state("basis", basis, tuple(basis.shape), torch.float32, x)
    check_state("center", center, (d,), torch.float32, x)
    check_state("image", image, tuple(basis.shape), torch.float64, x)
    torch.ops.loft_fast.moments_update_project(x.detach(), count, mean, scatter, basis, center, image)


@torch.library.custom_op(
    "loft_fast::moments_update_project",
    mutates_args=("count", "mean", "scatter", "image"),
    schema="(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!)[] scatter, Tensor basis, Tensor center, "
    "Tensor(d!) image) -> ()",
)
def _op(
    x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], basis: Tensor, center: Tensor, image: Tensor
) -> None:
    if x.shape[0]:
        backends.implementation(_OP, x.device, x.dtype)(x, count, mean, scatter, basis, center, image)


@_op.register_fake
def _fake(*_: object) -> None:
    return None


@backends.implements(_OP, "triton", devices=("cuda",), dtypes=(torch.float16, torch.bfloat16, torch.float32))
def _triton(
    x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], basis: Tensor, center: Tensor, image: Tensor
) -> None:
    from loft_fast.kernels import moments_update_project as kernel

    kernel.launch(x, count, mean, scatter, basis, center, image)


backends.implements(_OP, "torch")(reference.moments_update_project)
