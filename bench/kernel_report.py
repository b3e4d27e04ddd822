"""What compilers make of every Triton and CUDA kernel, without a GPU: registers, stack, shared memory.

python -m bench.kernel_report            # a table; exit code 1 where a kernel spills or needs more than there is
python -m bench.kernel_report --json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loft_fast import backends
from loft_fast.kernels import choice, moments_update, moments_update_project, project, symmetric_matmul

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a block can have
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COLUMNS = 1024  # a width that every tile divides, and the table treats as wide
POINTERS = {
    "order_ptr": "i64", "start_ptr": "i64", "end_ptr": "i64", "group_ptr": "i64", "begin_ptr": "i64", "stop_ptr": "i64",
    "first_ptr": "i64", "last_ptr": "i64", "count_ptr": "i64", "scatter_ptr": "i64", "far_ptr": "i32",
    "partial_ptr": "fp64", "rest_ptr": "fp64", "mean_ptr": "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kernel for one target."""

    kernel: str
    target: str
    sizes: str
    registers: int
    stack: int  # bytes; spilled registers and arrays live there
    shared: int  # bytes

    @property
    def fits(self) -> bool:
        """No spills, and no more shared memory than a block can have."""
        return self.stack == 0 and self.shared <= SHARED[int(self.target[3:5])]


def triton_rows(targets: tuple[int, ...] = (80, 90)) -> Iterator[Row]:
    """Every kernel with the sizes that the table has for it."""
    for target in targets:
        for dtype in NAMES:
            wide = dtype == torch.float32
            sizes = choice.lines_for("moments_update", dtype, COLUMNS, target)[0]
            common = {"TILE": sizes.tile, "ROWS": sizes.rows, "FLUSH": sizes.flush, "WIDE": wide, "EVEN": True}
            for center in (True,) if wide else (False, True):
                for gather in (False, True):
                    meta = {**common, "GATHER": gather, "CENTER": center, "PRECISION": "tf32x3"}
                    label = f"gram {NAMES[dtype]}{' centred' if center else ''}{' grouped' if gather else ''}"
                    yield _triton(label, moments_update.gram, target, dtype, meta, sizes)
            if not wide:
                sizes = moments_update.widened(sizes)
                meta |= {"ROWS": sizes.rows, "WIDE": True}
                yield _triton(f"gram {NAMES[dtype]} inexact grouped", moments_update.gram, target, dtype, meta, sizes)
            sizes = choice.lines_for("project", dtype, COLUMNS, target)[0]
            meta = {"TILE": sizes.tile, "BLOCK": sizes.rows, "BACK": True, "PRECISION": "tf32x3"}
            others = dict.fromkeys(("basis_ptr", "scores_ptr", "out_ptr"), NAMES[dtype])
            if dtype == torch.float16:
                others["scores_ptr"] = NAMES[torch.float32]
            yield _triton(f"project {NAMES[dtype]}", project.project, target, dtype, meta, sizes, others)
            thin = choice.lines_for("moments_update_project", dtype, COLUMNS, target)[0]
            meta = {"TILE": thin.tile, "ROWS": thin.rows, "FLUSH": 4096, "PRECISION": "tf32x3"}
            others = {"out_ptr": "fp64"}
            yield _triton(f"cross {NAMES[dtype]}", moments_update_project.cross, target, dtype, meta, thin, others)
        for tile in (64, 128):
            small = choice.Blocks(tile, 0)
            meta = {"TILE": tile, "STRIP": 16}
            yield _triton(f"merge, tiles of {tile}", moments_update.merge, target, torch.float32, meta, small)
        meta = {"COLUMNS": 64}
        yield _triton("means", moments_update.means, target, torch.float32, meta, small)
        meta = {"SAMPLE": 256, "COLUMNS": 64, "GATHER": True, "WIDE": False}
        yield _triton("sample bf16 grouped", moments_update.sample, target, torch.bfloat16, meta, small)
        sizes = choice.lines_for("symmetric_matmul", torch.float32, COLUMNS, target)[0]
        meta = {"TILE": sizes.tile, "DEPTH": sizes.rows, "EVEN": True, "PRECISION": "tf32x3"}
        yield _triton("symmetric_matmul fp32", symmetric_matmul.symmetric_matmul, target, torch.float32, meta, sizes)


def _triton(
    label: str,
    kernel: Any,
    target: int,
    dtype: torch.dtype,
    meta: dict[str, Any],
    sizes: choice.Blocks,
    others: dict[str, str] | None = None,
) -> Row:
    types = {"x_ptr": NAMES[dtype], **POINTERS, **(others or {})}
    meta = {"col_stride": 1, **meta}
    signature, aligned = {}, {}
    for k, name in enumerate(kernel.arg_names):
        if name in meta:
            signature[name] = "constexpr"
        else:
            signature[name] = "*" + types.get(name, "fp32") if name.endswith("_ptr") else "i32"
            if name.endswith("_ptr") or name in ("d", "row_stride", "rank"):
                aligned[(k,)] = [["tt.divisibility", 16]]
    constants = {(k,): meta[name] for k, name in enumerate(kernel.arg_names) if name in meta}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    text = f"{sizes.tile} x {sizes.rows}, {sizes.warps} warps, {sizes.stages} stages"
    return Row(label, f"sm_{target}", text, registers, stack, made.metadata.shared)


def cuda_rows() -> Iterator[Row]:
    """Every kernel in the library of CUDA kernels, if there is one; without what shared memory they ask for."""
    if backends.cuda_library() is None:
        return
    target = ""
    for line in _dumped(Path(backends.__file__).with_name("_cuda.so")).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            target = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = re.search(r"loft_fast\d+([a-z_]+?)(?:I(\w+?)E)?E?(?:P|v)", found[1])
            label = found[1] if name is None else f"{name[1]} {name[2] or ''}".strip()
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield Row(f"CUDA {label}", target, "", int(found[1]), int(found[2]), int(found[3]))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = _dumped(Path(file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def _dumped(file: Path) -> str:
    """What cuobjdump, which comes with Triton, says of the resources in a file."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [*triton_rows(), *cuda_rows()]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(f"{'kernel':30} {'target':7} {'sizes':32} registers  stack   shared")
        for row in rows:
            mark = "" if row.fits else "  DOES NOT FIT"
            print(f"{row.kernel:30} {row.target:7} {row.sizes:32} {row.registers:9} {row.stack:6} {row.shared:8}{mark}")
    sys.exit(not all(row.fits for row in rows))


if __name__ == "__main__":
    main()
