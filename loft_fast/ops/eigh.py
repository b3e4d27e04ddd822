"""Eigenvectors of many symmetric matrices of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast import backends
from loft_fast.ops.arguments import check_square

_OP = "eigh"
_DTYPES = (torch.float32, torch.float64)
_LARGEST = 256  # features up to which one block of threads is enough for a matrix


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, in columns, of each matrix of a batch.

    Args:
        matrix: (B, d, d) float32 or float64, symmetric and finite.

    Returns:
        (B, d) and (B, d, d), of matrix's dtype.

    Raises:
        InputError: an argument has a wrong type, shape or dtype.
    """
    check_square("matrix", matrix, _DTYPES)
    values, vectors = torch.ops.loft_fast.eigh(matrix)
    return values, vectors


@torch.library.custom_op("loft_fast::eigh", mutates_args=())
def _op(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return backends.implementation(_OP, matrix.device, matrix.dtype)(matrix)


@_op.register_fake
def _fake(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:2]), torch.empty_like(matrix, memory_format=torch.contiguous_format)


@backends.implements(_OP, "cuda", devices=("cuda",), dtypes=(torch.float32,), by_request=True)
def _cuda(matrix: Tensor) -> tuple[Tensor, Tensor]:
    from loft_fast.kernels import cuda

    return cuda.eigh(matrix) if matrix.shape[1] <= _LARGEST else _plain(matrix)


@backends.implements(_OP, "native", devices=("cpu",), dtypes=(torch.float32,))
def _native(matrix: Tensor) -> tuple[Tensor, Tensor]:
    matrix = matrix.contiguous()
    values, vectors = _fake(matrix)
    run, threads = backends.native_module().eigh, torch.get_num_threads()
    if run(matrix.data_ptr(), *matrix.shape[:2], values.data_ptr(), vectors.data_ptr(), threads):
        return values, vectors
    return _plain(matrix)  # which says why not


@backends.implements(_OP, "torch", dtypes=_DTYPES)
def _plain(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer may not converge in float32 on more threads than one, be the matrix ever so plain:
        # it did not where half of the features never vary.
        if matrix.dtype == torch.float64:
            raise
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
    return values, vectors.contiguous()
