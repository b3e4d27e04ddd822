"""Triton kernels beyond what their ops show: many tiles and pieces, the table of sizes, what compilers make of them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import normal
from test_moments_update import empty_state, expected, old_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loft_fast import InputError, backends

pytest.importorskip("triton")
if "triton" not in backends.available():
    pytest.skip("Triton is not available here", allow_module_level=True)

from loft_fast.kernels import choice, moments_update, moments_update_project, project, symmetric_matmul
from loft_fast.kernels.choice import Blocks
from loft_fast.kernels.pieces import addresses_of, cut

ROOT = Path(__file__).parent.parent
DEVICE = "cpu" if backends.interpreting() else "cuda"
SMALL = Blocks(tile=16, rows=16, flush=32, piece=48)  # several tiles, pieces and flushes of a small problem
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def run(x, groups=1, group=None, start=empty_state, **options):
    count, mean, scatter = start(groups, x.shape[1], DEVICE)
    moments_update.launch(x.to(DEVICE), count, mean, scatter, None if group is None else group.to(DEVICE), **options)
    return count.cpu(), mean.cpu(), [matrix.cpu() for matrix in scatter]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_many_tiles_pieces_and_flushes(dtype, grouped, offset):
    x = normal(333, 50, mean=offset).to(dtype)
    group = torch.arange(333) % 4 // 2 * 2 if grouped else None  # 0 and 2 of three groups
    count, mean, scatter = run(x, 3 if grouped else 1, group, blocks=SMALL)
    for g, matrix in enumerate(scatter):
        rows = (x if group is None else x[group == g]).double()
        assert int(count[g]) == len(rows)
        assert torch.equal(matrix, matrix.T)
        if len(rows):
            true_mean, true = expected(rows)
            assert abs(mean[g].numpy() - true_mean).max() <= 1e-12 * (1 + offset)
            assert abs(matrix.numpy() - true).max() <= 2e-6 * abs(true).max()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("rare", "precision"), [(0.3, "tf32x3"), (0.0021, "tf32x3"), (1000.3, "tf32x3"), (0.3, "bf16")]
)
def test_rows_that_16_bits_do_not_hold_less_the_mean(dtype, rare, precision):
    # Most lie at one, and their mean far from zero; a few do not, and less the mean have more digits than there are.
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(600, 20, generator=generator) < 0.004, rare, 1.0).to(dtype)
    group = torch.arange(600) % 3
    x[group == 2] -= 1  # and a group about zero
    _, _, scatter = run(x, 3, group, precision=precision, blocks=SMALL)
    for g, matrix in enumerate(scatter):
        _, true = expected(x[group == g].double())
        assert torch.equal(matrix, matrix.T)
        assert abs(matrix.numpy() - true).max() <= 2e-6 * abs(true).max()


def test_a_workspace_for_some_pieces_at_a_time_changes_only_rounding(monkeypatch):
    x, group = normal(400, 20, dtype=F32), torch.arange(400) * 7 % 5
    whole = run(x, 5, group, old_state, blocks=SMALL)
    monkeypatch.setattr(moments_update, "_WORKSPACE", 3 * 3 * 16 * 16 * 8)  # three pieces
    parts = run(x, 5, group, old_state, blocks=SMALL)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-12, atol=1e-12)


def test_the_same_bits_every_time():
    x, group = normal(300, 20, dtype=F32), torch.arange(300) % 3
    first, second = run(x, 3, group, blocks=SMALL), run(x, 3, group, blocks=SMALL)
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2], strict=True))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("precision", "rounding"), [("ieee", 1e-6), ("tf32x3", 3e-6), ("bf16", 1e-2)])
def test_precisions(precision, rounding):
    x = normal(200, 30, mean=3.0, dtype=F32)
    _, _, (scatter,) = run(x, precision=precision)
    _, true = expected(x.double())
    assert abs(scatter.numpy() - true).max() <= rounding * abs(true).max()
    if precision == "bf16":
        assert abs(scatter.numpy() - true).max() > 1e-6 * abs(true).max()


def test_the_precision_is_asked_for_by_argument_or_environment(monkeypatch):
    x = normal(200, 30, mean=3.0, dtype=F32)
    coarse = run(x, precision="bf16")
    assert choice.precision_for(None) == "tf32x3"
    monkeypatch.setenv(choice.VARIABLE, "bf16")
    assert torch.equal(run(x)[2][0], coarse[2][0])
    monkeypatch.setenv(choice.VARIABLE, "fp8")
    with pytest.raises(InputError, match="LOFT_FAST_PRECISION: got 'fp8', expected one of ieee, tf32x3, bf16"):
        run(x)
    with pytest.raises(InputError, match="precision: got 'half'"):
        run(x, precision="half")


def test_pieces_are_all_rows_once():
    for n, groups in ((1, 1), (100, 3), (1000, 7)):
        group = torch.randint(0, groups, (n,), generator=torch.Generator().manual_seed(n), device="cpu").to(DEVICE)
        pieces = cut(n, SMALL.piece, group, groups, torch.device(DEVICE))
        seen = torch.zeros(n, dtype=torch.int64)
        for start, end, g in zip(pieces.start.tolist(), pieces.end.tolist(), pieces.group.tolist(), strict=True):
            rows = pieces.order[start:end]
            assert len(rows) <= SMALL.piece
            assert bool((group[rows] == g).all())
            seen[rows.cpu()] += 1
        assert bool((seen == 1).all())


# ---- where they run ----


class Launched:
    """In place of a kernel: notes for which tensors its device has been chosen."""

    def __init__(self, chosen, log):
        self.chosen, self.log = chosen, log

    def __getitem__(self, grid):
        return lambda *args, **options: self.log.append(self.chosen[-1])


def test_every_kernel_is_launched_on_the_device_of_the_rows(monkeypatch):
    chosen, log = [None], []

    @contextlib.contextmanager
    def device_of(x):
        chosen.append(x)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, names in (
        (moments_update, ("sample", "gram", "merge", "means")),
        (moments_update_project, ("cross",)),
        (project, ("project",)),
        (symmetric_matmul, ("symmetric_matmul",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launched(chosen, log))
    x, basis, square = normal(50, 20, dtype=F32), normal(20, 3, dtype=F32), normal(2, 20, 20, dtype=F32)
    for launch, *arguments in (
        (moments_update.launch, x, *empty_state(1, 20), None),
        (moments_update.launch, x, *empty_state(3, 20), torch.arange(50) % 3),
        (moments_update_project.launch, x, *empty_state(1, 20), basis, x[0], torch.zeros(20, 3, dtype=F64)),
        (project.launch, x, basis, x[0]),
        (symmetric_matmul.launch, square, square, torch.ones(2, 3)),
    ):
        log.clear()
        launch(*arguments)
        assert log
        assert all(one is arguments[0] for one in log)


class Waits(TorchDispatchMode):
    """Refuses copies to another device for which the processor waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            assert kwargs.get("non_blocking")
        return out


def test_addresses_reach_a_device_that_is_not_waited_for(monkeypatch):
    tensor, pinned = torch.tensor, []

    def recorded(*args, pin_memory=False, **options):
        pinned.append(pin_memory)
        return tensor(*args, **options)

    monkeypatch.setattr(torch, "tensor", recorded)
    tensors = [torch.empty(3), torch.empty(3)]
    with FakeTensorMode(), Waits():
        at = addresses_of(tensors, torch.device("cuda", 0))
    assert (at.dtype, at.device, pinned) == (torch.int64, torch.device("cuda", 0), [True])
    assert addresses_of(tensors, torch.device("cpu")).tolist() == [one.data_ptr() for one in tensors]


def test_the_table_has_sizes_for_every_kernel_dtype_and_device():
    for op in ("moments_update", "symmetric_matmul", "project", "moments_update_project"):
        dtypes = (F32,) if op == "symmetric_matmul" else (F32, F16, BF16)
        for dtype in dtypes:
            for d in (1, 64, 65, 512, 4096):
                for capability in (0, 80, 90):
                    assert choice.lines_for(op, dtype, d, capability)


def test_the_table_claims_no_measurement_without_a_device():
    table = choice.table()
    assert (table["device"] is None) == (table["date"] is None)


def test_no_kernel_spills_for_an_a100_or_an_h200():
    # In a process of its own: Triton decides when it is imported whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.kernel_report", "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} >= {"sm_80", "sm_90"}
    assert done.returncode == 0, [row for row in rows if row["stack"]]


SUMS = """
import json, re, triton
from bench import kernel_report

compile, made = triton.compile, []
triton.compile = lambda *args, **options: made.append(compile(*args, **options)) or made[-1]
print(json.dumps({row.kernel: len(re.findall(r"add(\\.rn)?\\.f32", made[-1].asm["ptx"]))
                  for row in kernel_report.triton_rows((90,)) if row.kernel.startswith("gram")}))
"""


def test_long_sums_are_not_left_to_matrix_units():
    # These cut digits off: of 16-bit rows that are not centred, a covariance would be wrong in its fifth digit.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SUMS], env=environment, cwd=ROOT, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    additions = json.loads(done.stdout)
    for kernel in ("gram bf16", "gram bf16 grouped", "gram fp16", "gram fp32 centred", "gram bf16 inexact grouped"):
        assert additions[kernel] >= 128 * 128 // 256  # for each number that a thread has of a tile
