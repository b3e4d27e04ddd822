"""One pass over a block of rows: shift, sum and symmetric rank-n update, per group."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_group, check_indices, check_state, check_tensor, native_rows

_OP = "moments_update"


def moments_update(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None = None) -> None:
    """Merge rows into running moments in float64, per group.

    Afterwards count[g], mean[g] and scatter[g] = sum (x_i - mean[g])(x_i - mean[g])^T are those of all rows that
    group g has seen (Chan, Golub and LeVeque 1979).

    Every backend keeps the scatter exactly symmetric, given that it was. Rows of 32 bits or fewer are multiplied in
    float32, as differences from a mean near them, in blocks that are added up in float64.

    Args:
        x: (n, d) float16, bfloat16, float32 or float64; any strides; n >= 0. NaN or Inf flow into the state.
        count: (G,) contiguous int64, updated in place; rows seen so far, at least 0.
        mean: (G, d) contiguous float64, updated in place; zeros while count is 0.
        scatter: G symmetric contiguous tensors (d, d) float64, updated in place; zeros while count is 0. The native
            backend does not read them then, and writes all of those whose group has rows.
        group: (n,) int64, the group of each row in [0, G), or None where G = 1.

    Raises:
        InputError: an argument has a wrong type, shape, dtype, device, layout or value; the state is unchanged.
    """
    _check(x, count, mean, scatter, group)
    torch.ops.loft_fast.moments_update(x.detach(), count, mean, list(scatter), group)


@torch.library.custom_op(
    "loft_fast::moments_update",
    mutates_args=("count", "mean", "scatter"),
    schema="(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!)[] scatter, Tensor? group) -> ()",
)
def _op(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None) -> None:
    # Values of `group` are checked here, not in the wrapper: a graph being traced has none.
    check_indices(group, len(scatter))
    if x.shape[0] == 0:
        return
    backends.implementation(_OP, x.device, x.dtype)(x, count, mean, scatter, group)


@_op.register_fake
def _fake(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None) -> None:
    return None


@backends.implements(_OP, "native", devices=("cpu",))
def _native(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None) -> None:
    group = None if group is None else group.contiguous()
    backends.native_module().moments_update(
        *native_rows(x),
        0 if group is None else group.data_ptr(),
        count.data_ptr(),
        mean.data_ptr(),
        [matrix.data_ptr() for matrix in scatter],
        torch.get_num_threads(),
    )


@backends.implements(_OP, "triton", devices=("cuda",), dtypes=(torch.float16, torch.bfloat16, torch.float32))
def _triton(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None) -> None:
    from loft_fast.kernels import moments_update as kernel

    kernel.launch(x, count, mean, scatter, group)


backends.implements(_OP, "torch")(reference.moments_update)


def _check(x: Tensor, count: Tensor, mean: Tensor, scatter: list[Tensor], group: Tensor | None) -> None:
    """Everything that shapes and types can tell; raises InputError."""
    check_tensor("x", x, (None, None), backends.FLOATS, x)
    n, d = x.shape
    if not isinstance(scatter, list | tuple) or not scatter:
        raise InputError(f"scatter: got {scatter!r}, expected a list of one ({d}, {d}) tensor per group")
    groups = len(scatter)
    check_state("count", count, (groups,), torch.int64, x)
    check_state("mean", mean, (groups, d), torch.float64, x)
    for g, matrix in enumerate(scatter):
        check_state(f"scatter[{g}]", matrix, (d, d), torch.float64, x)
    check_group(group, n, groups, x)
