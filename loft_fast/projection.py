"""The result: a projection that plugs into a model, and the certificate of how good it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loft_fast import files
from loft_fast.errors import FileFormatError, InputError
from loft_fast.heads import linear_head, read_directions
from loft_fast.ops.project import project
from loft_fast.state import lasting


@dataclass(frozen=True)
class Certificate:
    """What was minimised, how close to the global optimum the result is proven to be, and what it cost.

    Attributes:
        goal: the minimised loss in words, with a = retain_kept and b = forget_kept.
        why: how rank and angle came about.
        loss: the loss reached.
        lower_bound: no projector can reach a smaller loss than this.
        relative_gap: (loss - lower_bound) / loss; 0 means proven optimal. Losses below 1e-9 count as 1e-9.
        retain_kept: share of the retain variance kept, tr(UU^T A): without what an oblique projection puts back.
        forget_kept: share of the forget variance kept, tr(UU^T B), likewise.
        rank: dimension of the optimal subspace; that of a projection that was trimmed is smaller.
        angle: the optimum is extreme for cos(angle) a - sin(angle) b; radians. 0 if it is of no such trade-off.
        eigen_solves: full symmetric eigendecompositions spent, or projectors by matrix products in their stead.
        seconds: wall time of `solve`.
        predicted: accuracies (percent) expected from moments and head, where the angle was chosen with them.
    """

    goal: str
    why: str
    loss: float
    lower_bound: float
    relative_gap: float
    retain_kept: float
    forget_kept: float
    rank: int
    angle: float
    eigen_solves: int
    seconds: float
    predicted: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"minimised     {self.goal}",
            f"loss          {self.loss:.8g}   (no projector below {self.lower_bound:.8g}; gap {self.relative_gap:.1e})",
            f"retain kept   {100 * self.retain_kept:.3f} % of its variance",
            f"forget kept   {100 * self.forget_kept:.3f} % of its variance",
            f"rank          {self.rank}   {f'at angle {self.angle:.4f}: ' if self.angle else ''}{self.why}",
            f"cost          {self.eigen_solves} eigen-solves, {self.seconds:.3f} s",
        ]
        if self.predicted:
            lines.append("predicted     " + ", ".join(f"{k} {v:.2f}" for k, v in self.predicted.items()))
        return "\n".join(lines)


_PARTS = ("basis", "center", "lift")


def _skew(basis: Tensor, other: Tensor) -> float:
    """How far U^T R is from the identity, at most."""
    product = basis.double().T @ other.double()
    return float((product - torch.eye(len(product)).to(product)).abs().max())


class Projection(nn.Module):
    """z -> center + U U^T (z - center), a drop-in module for features.

    Args:
        basis: U, (d, s), orthonormal columns.
        center: (d,), the point that stays where it is.
        certificate: how it came about; None if you made the basis yourself.
        site: where in a model it belongs.
        lift: R, (d, s) with U^T R = I, in place of the first U: an oblique projection. It drops the same, and puts
            what it keeps elsewhere.
        check: look whether the columns are orthonormal; not needed for a basis that was made so.

    All tensors are float64 buffers, so `.to(device)` moves them; the arithmetic is done in the dtype of the input
    (of 16-bit input on a CPU, in float32).
    """

    basis: Tensor
    center: Tensor
    lift: Tensor | None
    _kept: tuple[list[Tensor], list[Any], list[Tensor]] | None = None

    def __init__(
        self,
        basis: Tensor,
        center: Tensor,
        certificate: Certificate | None = None,
        site: str | None = None,
        *,
        lift: Tensor | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0] or center.shape != basis.shape[:1]:
            raise InputError(
                f"basis: got shapes {tuple(basis.shape)} and {tuple(center.shape)}, "
                "expected (d, s) with 1 <= s <= d and center (d,)"
            )
        if not (basis.is_floating_point() and center.is_floating_point() and bool(torch.isfinite(center).all())):
            raise InputError(f"center: got {basis.dtype} basis and {center.dtype} center, expected finite floats")
        if lift is not None and (lift.shape != basis.shape or lift.dtype != basis.dtype):
            got = f"{lift.dtype} {tuple(lift.shape)}"
            raise InputError(f"lift: got {got}, expected {basis.dtype} {tuple(basis.shape)} as the basis")
        for name, part, words in (("basis", basis, "U^T U"), ("lift", lift, "U^T R")) if check else ():
            skew = 0.0 if part is None else _skew(basis, part)
            if not skew <= torch.finfo(basis.dtype).eps ** 0.5:  # NaN is not, either
                raise InputError(f"{name}: {words} is {skew:.1e} away from the identity, expected orthonormal columns")
        self.register_buffer("basis", basis)
        self.register_buffer("center", center)
        self.register_buffer("lift", lift)
        self.certificate = certificate
        self.site = site

    @property
    def dim(self) -> int:
        """Number of features d."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Dimension s of the kept subspace."""
        return self.basis.shape[1]

    def extra_repr(self) -> str:
        """What print(projection) shows."""
        return f"dim={self.dim}, rank={self.rank}"

    @property
    def back(self) -> Tensor:
        """R, (d, s): the directions that coordinates are put back along. U itself unless there is a lift."""
        return self.basis if self.lift is None else self.lift

    def matrix(self) -> Tensor:
        """P = R U^T, (d, d), in the dtype of the basis."""
        return self.back @ self.basis.T

    @lasting
    def trim(self, head: nn.Module) -> Projection:
        """The smallest projection after which `head` says the same: what no output reads goes, too.

        That leaves fewer dimensions than there are outputs, closed ones not counted, and one at least. The certificate
        remains that of the larger subspace.

        Args:
            head: the linear classifier that reads the features, before or after `fold` and `close_outputs`.

        Raises:
            InputError: it is not linear, or reads another dimension.
        """
        weight, _ = linear_head(head, self.dim, self.basis.device)
        read = read_directions(weight @ self.back.double())
        basis, back = ((part.double() @ read).to(part.dtype) for part in (self.basis, self.back))
        known = self.certificate
        if known is not None:
            known = replace(known, why=f"{known.why}; what no output reads is dropped")
        lift = None if self.lift is None else back
        return Projection(basis, self.center, known, self.site, lift=lift, check=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d), any float dtype; returns the same shape and dtype."""
        dim = self.dim
        if not z.is_floating_point() or z.shape[-1:] != (dim,):
            raise InputError(f"z: got {z.dtype} of shape {tuple(z.shape)}, expected floats of shape (..., {dim})")
        rows = z.reshape(-1, dim)
        basis, center, *lift = self._operands(z)
        if lift:
            rows = rows.to(basis.dtype)
            return (((rows - center) @ basis) @ lift[0].T + center).to(z.dtype).reshape(z.shape)
        return project(rows, basis, center).reshape(z.shape)

    def _operands(self, z: Tensor) -> list[Tensor]:
        """The buffers where and as z needs them; kept until they change: for few rows, that is half the work."""
        basis, center, lift = self.basis, self.center, self.lift
        parts = [basis, center] if lift is None else [basis, center, lift]
        dtype = torch.float32 if z.element_size() == 2 and z.device.type == "cpu" else z.dtype
        now: list[Any] = [dtype, z.device]
        steady = not torch.compiler.is_compiling()
        for one in parts:
            steady = steady and not (one.is_inference() or one.requires_grad)
            now += [id(one), one._version] if steady else []
        if not steady:
            return [one.to(z.device, dtype) for one in parts]
        kept = self._kept
        if kept is None or kept[1] != now:  # those kept are alive: no other has the id of one
            with torch.inference_mode(False):  # what is made there could not be trained through later
                kept = self._kept = parts, now, [one.to(z.device, dtype) for one in parts]
        return kept[2]

    def _tensors(self) -> dict[str, Tensor]:
        """By name, those that are there."""
        return {name: part for name in _PARTS if (part := getattr(self, name)) is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the certificate in its header, whole or not at all."""
        files.write_bytes(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes, for a message or a database."""
        return files.to_bytes("projection", *self._content())

    def digest(self) -> str:
        """SHA-256 of basis, center, certificate and site, in hexadecimal."""
        return files.content_digest("projection", *self._content())

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        header = {"site": self.site or ""} | ({} if self.lift is None else {"oblique": "yes"})
        if self.certificate is not None:
            header["certificate"] = json.dumps(asdict(self.certificate))
        return self._tensors(), header

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projection:
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is missing, truncated, foreign or inconsistent.
        """
        return cls._read(path)

    @classmethod
    def from_bytes(cls, data: bytes) -> Projection:
        """Read what `to_bytes` made.

        Raises:
            FileFormatError: the data are truncated, damaged, foreign or inconsistent.
        """
        return cls._read(files.bytes_of(data))

    @classmethod
    def _read(cls, source: str | os.PathLike[str] | bytes) -> Projection:
        tensors, header = files.read_tensors(
            source, "projection", lambda header: _PARTS[: 3 if "oblique" in header else 2]
        )
        try:
            text = header.get("certificate")
            certificate = Certificate(**json.loads(text)) if text else None
            str(certificate)  # a field of the wrong type fails here, not in the user's print
            basis, center, *lift = tensors.values()
            return cls(basis, center, certificate, header.get("site") or None, lift=lift[0] if lift else None)
        except (AttributeError, InputError, RecursionError, TypeError, ValueError) as error:
            name = files.name_of(source)
            raise FileFormatError(f"{name} holds a projection that contradicts itself: {error}") from error
