"""Launchers of the CUDA kernels (csrc/cuda), which a library behind plain pointers holds."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.kernels.pieces import addresses_of, cut

_CHUNK = 16384  # rows split into bytes at a time
_PIECE = 4096  # rows that are worth a block of their own
_BLOCK = 64  # rows that the kernels take at a time
_MOST = 65535  # pieces along the second or third axis of a grid
_SHARED = 227 << 10  # bytes of shared memory that a block of a Hopper can have; an Ampere has 163 KiB
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/rows.h


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), ascending, and eigenvectors (B, d, d) of symmetric matrices (B, d, d) float32.

    Raises:
        RuntimeError: CUDA refused, or some problem did not converge.
    """
    many, d = matrix.shape[:2]
    matrix = matrix.contiguous()
    values, vectors = torch.empty(many, d).to(matrix), torch.empty_like(matrix)
    sweeps = torch.empty(many, dtype=torch.int32, device=matrix.device)
    fits = 4 * (d * d + max(d, 16)) <= _shared(matrix.device)
    workspace = None if fits else torch.empty_like(matrix)
    _call("loft_fast_jacobi", matrix.device, matrix, values, vectors, sweeps, many, d, workspace)
    lost = int((sweeps < 0).sum())
    if lost:
        raise RuntimeError(f"Jacobi rotations did not converge for {lost} of {many} matrices")
    return values, vectors


def quantized_update(
    x: Tensor,
    scale: float,
    count: Tensor,
    total: Tensor,
    clipped: Tensor,
    product: Sequence[Tensor],
    group: Tensor | None,
) -> None:
    """As `loft_fast.ops.quantized_update`."""
    d, groups = x.shape[1], len(product)
    addresses = addresses_of(product, x.device)
    names_of = group.split(_CHUNK) if group is not None else itertools.repeat(None)
    for rows, names in zip(x.split(_CHUNK), names_of, strict=False):
        length = min(_PIECE, -(-len(rows) // groups))
        length = -(-length // _BLOCK) * _BLOCK
        pieces = cut(len(rows), length, names, groups, x.device)
        for first in range(0, len(pieces), _MOST):
            start, end, owner = (one[first : first + _MOST] for one in (pieces.start, pieces.end, pieces.group))
            stride = len(start) * length
            high, low = (torch.empty(d, stride, dtype=torch.uint8, device=x.device) for _ in range(2))
            where = (start, end, owner, len(start), length, ctypes.c_longlong(stride))
            strides = (ctypes.c_longlong(one) for one in rows.stride())
            dtype = _DTYPES[x.dtype]
            _call(
                "loft_fast_limbs", x.device, rows, dtype, *strides, d, ctypes.c_double(1 / scale), pieces.order, *where,
                high, low, total, clipped,
            )  # fmt: skip
            _call("loft_fast_integer_gram", x.device, high, low, d, *where, addresses)
        count += pieces.sizes(0, len(pieces))


def _shared(device: torch.device) -> int:
    if device.type != "cuda":
        return _SHARED
    # Not every torch says; every device has 48 KiB.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)


def _call(name: str, device: torch.device, *arguments: object) -> None:
    """Call the library; tensors are passed by address, None as null, and the current stream last."""
    library = backends.cuda_library()
    assert library is not None
    plain = [
        ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_void_p() if one is None else one
        for one in arguments
    ]
    stream, there = 0, contextlib.nullcontext()
    if device.type == "cuda":  # tests run the kernels on the CPU
        stream, there = torch.cuda.current_stream(device).cuda_stream, torch.cuda.device(device)
    with there:
        error = getattr(library, name)(*plain, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")
