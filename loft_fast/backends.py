"""Which backends exist here and which one serves a call: the only place that decides.

An op registers its implementations with `implements`, best first; `implementation` picks one per call. The plain torch
implementation serves every device and dtype, so a pick never comes back empty.

The environment variable LOFT_FAST_BACKEND names the backend to use wherever it can serve the call; where it cannot
(Triton and float64, say), torch does.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from loft_fast.errors import InputError

VARIABLE = "LOFT_FAST_BACKEND"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NAMES = ("native", "cuda", "triton", "torch")
_log = logging.getLogger("loft_fast")
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Entry:
    backend: str
    function: Callable[..., Any]
    devices: tuple[str, ...]  # device types served; empty: all
    dtypes: tuple[torch.dtype, ...]
    by_request: bool


_ENTRIES: dict[str, list[_Entry]] = {}


def implements(
    op: str,
    backend: str,
    devices: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    by_request: bool = False,
) -> Callable[[_Function], _Function]:
    """Register the decorated function as `op` of `backend`; register the preferred one first.

    Args:
        devices: device types served, () for all.
        dtypes: input dtypes served.
        by_request: serve only where LOFT_FAST_BACKEND names the backend: for what was never measured on hardware.
    """

    def register(function: _Function) -> _Function:
        _ENTRIES.setdefault(op, []).append(_Entry(backend, function, devices, dtypes, by_request))
        return function

    return register


def available() -> tuple[str, ...]:
    """Names of the backends that can run here, out of "native", "cuda", "triton" and "torch"; "torch" always can."""
    return tuple(name for name in _NAMES if _exists(name))


def choose(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the backend that serves `op` for input of this dtype on this device.

    Raises:
        InputError: LOFT_FAST_BACKEND names a backend that is unknown or not available here.
    """
    return _pick(op, device, dtype).backend


def implementation(op: str, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function behind `choose`."""
    return _pick(op, device, dtype).function


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native_module() -> ModuleType:
    """The compiled extension.

    Raises:
        ImportError: it was not built.
    """
    return importlib.import_module("loft_fast._native")


@cache
def cuda_library() -> ctypes.CDLL | None:
    """The CUDA kernels behind plain pointers; None where there are none. Loading them needs no driver."""
    path = Path(__file__).with_name("_cuda.so")
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _log.warning("The CUDA kernels cannot be loaded (%s); loft_fast works without them.", error)
        return None


def _pick(op: str, device: torch.device | str, dtype: torch.dtype) -> _Entry:
    device_type = torch.device(device).type
    entries = [
        entry
        for entry in _ENTRIES.get(op, [])
        if _exists(entry.backend)
        and dtype in entry.dtypes
        and (not entry.devices or device_type in entry.devices or _interprets(entry, device_type))
    ]
    asked = _asked()
    for entry in entries:
        unasked = asked is None and not entry.by_request and not _interprets(entry, device_type)
        if entry.backend == asked or unasked:
            return entry
    for entry in entries:
        if entry.backend == "torch":
            return entry
    raise InputError(f"op: got {op!r} for {dtype} on {device_type}, expected one of {sorted(_ENTRIES)}")


def _interprets(entry: _Entry, device_type: str) -> bool:
    # The interpreter is for tests: it serves CPU tensors, but only when asked for by name.
    return entry.backend == "triton" and device_type == "cpu" and interpreting()


def _asked() -> str | None:
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in available():
        raise InputError(f"{VARIABLE}: got {name!r}, expected one of those available here: {', '.join(available())}")
    return name


def _exists(name: str) -> bool:
    if name == "native":
        return _native_exists()
    if name == "cuda":
        return torch.cuda.is_available() and cuda_library() is not None
    if name == "triton":
        return _triton_exists() and (interpreting() or torch.cuda.is_available())
    return name == "torch"


@cache
def _native_exists() -> bool:
    try:
        native_module()
    except ImportError as error:
        _log.warning("The compiled extension is not available (%s); loft_fast works, with torch code instead.", error)
        return False
    return True


@cache
def _triton_exists() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "loft_fast.kernels"))
