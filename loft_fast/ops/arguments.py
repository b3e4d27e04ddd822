"""Arguments of the operations: checked, and in the form the compiled extension takes."""

from __future__ import annotations

import torch
from torch import Tensor

from loft_fast.errors import InputError

# loft_fast::DType in csrc/rows.h
_NATIVE_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def native_rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """loft_fast::Rows: address, dtype, n, d and both strides of x, (n, d)."""
    return x.data_ptr(), _NATIVE_DTYPES[x.dtype], *x.shape, *x.stride()


def check_tensor(
    name: str, tensor: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    """Refuse a tensor that is not of this shape (None: any size), one of these dtypes, and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    # `in` would compare symbolic sizes, which torch.compile puts here, by identity.
    if tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = "(n, d)" if None in shape else str(tuple(shape))
        raise InputError(f"{name}: got shape {tuple(tensor.shape)}, expected {wanted}")
    if tensor.dtype not in dtypes:
        raise InputError(f"{name}: got {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if tensor.device != like.device:
        raise InputError(f"{name}: got a tensor on {tensor.device}, expected {like.device}, as x")


def check_square(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], least: int = 0) -> tuple[int, int]:
    """(B, d) of a stack of square matrices (B, d, d) with d >= least; refuse anything else."""
    check_tensor(name, tensor, (None, None, None), dtypes, tensor)  # type: ignore[arg-type] # it is looked at first
    assert isinstance(tensor, Tensor)
    many, d, columns = tensor.shape
    if d != columns or d < least:
        wanted = "(B, d, d)" + (f" with d >= {least}" if least else "")
        raise InputError(f"{name}: got shape {tuple(tensor.shape)}, expected {wanted}")
    return many, d


def check_state(name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Refuse what is no contiguous tensor of this shape and dtype on the device of `like`."""
    check_tensor(name, tensor, shape, (dtype,), like)
    assert isinstance(tensor, Tensor)
    if not tensor.is_contiguous():
        raise InputError(f"{name}: got strides {tuple(tensor.stride())}, expected a contiguous tensor")


def check_group(group: Tensor | None, n: int, groups: int, like: Tensor) -> None:
    """Refuse what cannot be the group of each of n rows."""
    if group is not None:
        check_tensor("group", group, (n,), (torch.int64,), like)
    elif groups != 1:
        raise InputError(f"group: got None with {groups} groups, expected a group index for each row")


def check_indices(group: Tensor | None, groups: int) -> None:
    """Refuse indices out of range."""
    if group is not None and len(group):
        low, high = (int(bound) for bound in torch.aminmax(group))
        if low < 0 or high >= groups:
            raise InputError(f"group: got indices from {low} to {high}, expected 0 to {groups - 1}")


def largest_magnitude(x: Tensor) -> float:
    """Of the numbers in x, (n, d) with n >= 1; refuses NaN and Inf."""
    largest = max(abs(float(bound)) for bound in torch.aminmax(x))
    if not largest < float("inf"):
        bad = int((~torch.isfinite(x)).any(1).sum())
        raise InputError(f"x: {bad} of {len(x)} rows contain NaN or Inf, expected finite features")
    return largest


def check_positive(name: str, value: float) -> None:
    """Refuse an argument `name` that is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name}: got {value!r}, expected a number above 0")


def check_number(name: str, value: float | None, low: float, high: float, whole: bool = False) -> None:
    """Refuse an argument that is neither None nor a (whole) number in [low, high]."""
    if value is None:
        return
    kind = int if whole else (int, float)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, kind) or not low <= value <= high:
        wanted = "an integer" if whole else "a number"
        raise InputError(f"{name}: got {value!r}, expected {wanted} in [{low:g}, {high:g}]")


def check_integer(name: str, value: object, least: int = 1) -> None:
    """Refuse an argument that is no integer of at least this."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: got {value!r}, expected an integer >= {least}")
