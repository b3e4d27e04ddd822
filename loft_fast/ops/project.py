"""Projection of rows onto an affine subspace: centre, two thin products, add back, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loft_fast import backends
from loft_fast.errors import InputError
from loft_fast.ops import reference
from loft_fast.ops.arguments import check_tensor, native_rows

_OP = "project"
_WORTHWHILE = 1024  # rows from which on one pass saves more than packing the basis for it costs


def project(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    """center + (x - center) U U^T, row by row.

    Differentiable to any order. On a CPU, bfloat16 rows less the center, the basis and the coordinates are rounded to
    bfloat16 and multiplied as such where the processor can (AVX-512-BF16, AMX); other 16-bit rows are multiplied in
    float32.

    Args:
        x: (n, d) float16, bfloat16, float32 or float64; any strides; n >= 0.
        basis: U, (d, s) of any float dtype, 1 <= s.
        center: (d,) of any float dtype.

    Returns:
        (n, d) of x's dtype.

    Raises:
        InputError: an argument has a wrong type, shape, dtype or device.
    """
    check_tensor("x", x, (None, None), backends.FLOATS, x)
    check_tensor("basis", basis, (x.shape[1], None), backends.FLOATS, x)
    check_tensor("center", center, (x.shape[1],), backends.FLOATS, x)
    if basis.shape[1] == 0:
        raise InputError(f"basis: got shape {tuple(basis.shape)}, expected (d, s) with s >= 1")
    if torch.compiler.is_compiling() or _differentiates(x, basis, center) or not _pays(x):
        return _plain(x, basis, center)
    return torch.ops.loft_fast.project(x, basis, center)


def _differentiates(*tensors: Tensor) -> bool:
    backward = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    return backward or any(forward_ad.unpack_dual(one).tangent is not None for one in tensors)


def _pays(x: Tensor) -> bool:
    if len(x) < _WORTHWHILE and x.element_size() > 2:  # 16-bit products are slow on most processors
        return False
    return backends.choose(_OP, x.device, x.dtype) != "torch"


def _plain(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    wide = _wide(x)
    return reference.project(x.to(wide), basis.to(wide), center.to(wide)).to(x.dtype)  # autocast changes it


def _wide(x: Tensor) -> torch.dtype:
    """What to multiply in.

    On a CPU, torch's 16-bit products with an odd number of terms read on into the next row where the processor
    multiplies pairs (AMX): a row that is not finite would spoil the one before it.
    """
    return torch.float32 if x.device.type == "cpu" and x.element_size() == 2 else x.dtype


@torch.library.custom_op("loft_fast::project", mutates_args=())
def _op(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    return backends.implementation(_OP, x.device, x.dtype)(x, basis, center)


@_op.register_fake
def _fake(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, basis: Tensor, center: Tensor) -> tuple[Tensor, int]:
    dtype, wide = x.dtype, _wide(x)
    x, basis, center = (
        one.to(wide).movedim(dim, 0) if dim is not None else one.to(wide).unsqueeze(0)
        for one, dim in zip((x, basis, center), dims, strict=True)
    )
    center = center.unsqueeze(1)
    return (center + (x - center) @ basis @ basis.mT).to(dtype), 0


_op.register_vmap(_vmap)


@backends.implements(_OP, "native", devices=("cpu",))
def _native(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    wide = x.dtype if x.element_size() > 2 else torch.float32
    basis, center = basis.to(wide).contiguous(), center.to(wide).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    backends.native_module().project(
        *native_rows(x),
        basis.data_ptr(),
        center.data_ptr(),
        basis.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@backends.implements(_OP, "triton", devices=("cuda",), dtypes=(torch.float16, torch.bfloat16, torch.float32))
def _triton(x: Tensor, basis: Tensor, center: Tensor) -> Tensor:
    from loft_fast.kernels import project as kernel

    return kernel.launch(x, basis, center)


backends.implements(_OP, "torch")(_plain)
