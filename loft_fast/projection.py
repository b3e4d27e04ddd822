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
from loft_fast.heads import linear_head, only_read
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
        retain_kept: share of the retain variance kept, tr(PA).
        forget_kept: share of the forget variance kept, tr(PB).
        rank: dimension of the optimal subspace; that of a projection that was trimmed is smaller.
        angle: the optimum is extreme for cos(angle) a - sin(angle) b; radians.
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
            f"rank          {self.rank}   at angle {self.angle:.4f}: {self.why}",
            f"cost          {self.eigen_solves} eigen-solves, {self.seconds:.3f} s",
        ]
        if self.predicted:
            lines.append("predicted     " + ", ".join(f"{k} {v:.2f}" for k, v in self.predicted.items()))
        return "\n".join(lines)


class Projection(nn.Module):
    """z -> center + U U^T (z - center), a drop-in module for features.

    Args:
        basis: U, (d, s), orthonormal columns.
        center: (d,), the point that stays where it is.
        certificate: how it came about; None if you made the basis yourself.
        site: where in a model it belongs.
        check: look whether the columns are orthonormal; not needed for a basis that was made so.

    Both tensors are float64 buffers, so `.to(device)` moves them; the arithmetic is done in the dtype of the input
    (of 16-bit input on a CPU, in float32).
    """

    basis: Tensor
    center: Tensor
    _kept: tuple[Tensor, Tensor, tuple[Any, ...], tuple[Tensor, Tensor]] | None = None

    def __init__(
        self,
        basis: Tensor,
        center: Tensor,
        certificate: Certificate | None = None,
        site: str | None = None,
        *,
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
        if check:
            columns = basis.double()
            skew = float((columns.T @ columns - torch.eye(basis.shape[1]).to(columns)).abs().max())
            if not skew <= torch.finfo(basis.dtype).eps ** 0.5:  # NaN is not, either
                raise InputError(f"basis: U^T U is {skew:.1e} away from the identity, expected orthonormal columns")
        self.register_buffer("basis", basis)
        self.register_buffer("center", center)
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

    def matrix(self) -> Tensor:
        """P = U U^T, (d, d), in the dtype of the basis."""
        return self.basis @ self.basis.T

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
        basis = only_read(self.basis.double(), weight).to(self.basis.dtype)
        known = self.certificate
        if known is not None:
            known = replace(known, why=f"{known.why}; what no output reads is dropped")
        return Projection(basis, self.center, known, self.site, check=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d), any float dtype; returns the same shape and dtype."""
        if not z.is_floating_point() or z.shape[-1:] != (self.dim,):
            raise InputError(f"z: got {z.dtype} of shape {tuple(z.shape)}, expected floats of shape (..., {self.dim})")
        return project(z.reshape(-1, self.dim), *self._operands(z)).reshape(z.shape)

    def _operands(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Basis and center where and as z needs them; kept until they change: for few rows, that is half the work."""
        basis, center = self.basis, self.center
        dtype = torch.float32 if z.element_size() == 2 and z.device.type == "cpu" else z.dtype
        if torch.compiler.is_compiling() or any(one.is_inference() or one.requires_grad for one in (basis, center)):
            return basis.to(z.device, dtype), center.to(z.device, dtype)
        kept, now = self._kept, (basis._version, center._version, dtype, z.device)
        if kept is None or kept[0] is not basis or kept[1] is not center or kept[2] != now:
            with torch.inference_mode(False):  # what is made there could not be trained through later
                kept = self._kept = basis, center, now, (basis.to(z.device, dtype), center.to(z.device, dtype))
        return kept[3]

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
        header = {"site": self.site or ""}
        if self.certificate is not None:
            header["certificate"] = json.dumps(asdict(self.certificate))
        return {"basis": self.basis, "center": self.center}, header

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
        tensors, header = files.read_tensors(source, "projection", ("basis", "center"))
        try:
            text = header.get("certificate")
            certificate = Certificate(**json.loads(text)) if text else None
            str(certificate)  # a field of the wrong type fails here, not in the user's print
            return cls(tensors["basis"], tensors["center"], certificate, header.get("site") or None)
        except (AttributeError, InputError, RecursionError, TypeError, ValueError) as error:
            name = files.name_of(source)
            raise FileFormatError(f"{name} holds a projection that contradicts itself: {error}") from error
