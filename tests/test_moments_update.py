"""Every backend of ops.moments_update against outer products summed row by row."""

import functools
import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import normal

from loft_fast import InputError, backends
from loft_fast.ops import moments_update

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, BF16)
# Triton has no float64 kernel: torch serves that request, and has its own row.
CASES = [(b, t) for b in ("native", "triton", "torch") for t in DTYPES if (b, t) != ("triton", F64)]
# n and d act apart. Every n: no row, one, more than a chain of 256, more than one and two blocks of 512. Every d: tiles
# of 12, 24, 32 and 48 columns, one less, one more, several with a rest.
ROWS, COLUMNS = (0, 1, 2, 300, 513, 1025), (1, 3, 11, 12, 23, 24, 25, 31, 48, 64, 100)
SHAPES = [(n, 33) for n in ROWS] + [(513, d) for d in COLUMNS]
# Triton's interpreter is slow: all columns on two blocks of its 32 rows, and in one dtype, as x is only loaded in it.
SHAPES_OF = {"triton": [(n, 33) for n in ROWS] + [(33, d) for d in COLUMNS]}
FEW = [(1, 33), (65, 17)]
SHAPED_CASES = [
    (backend, dtype, n, d)
    for backend, dtype in CASES
    for n, d in (FEW if backend == "triton" and dtype != F32 else SHAPES_OF.get(backend, SHAPES))
]


each_backend = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)


@pytest.fixture
def use(use):
    """Ask for a backend; returns the device that it computes on."""
    return functools.partial(use, "moments_update")


SEEN = 7  # rows of the state that an update has to merge into


def old_rows(groups, d):
    """(groups, SEEN, d) float64: what the state of `old_state` stands for."""
    return normal(groups, SEEN, d, seed=5)


def old_state(groups, d, device="cpu"):
    """Count, mean and scatters that are not zero."""
    rows = old_rows(groups, d)
    mean = rows.mean(1)
    centered = rows - mean.unsqueeze(1)
    scatter = centered.mT @ centered
    scatter = (scatter + scatter.mT) / 2
    return torch.full((groups,), SEEN).to(device), mean.to(device), list(scatter.to(device))


def empty_state(groups, d, device="cpu"):
    """Count, mean and scatters of no rows."""
    zeros = [torch.zeros(d, d, dtype=F64, device=device) for _ in range(groups)]
    return (
        torch.zeros(groups, dtype=torch.int64, device=device),
        torch.zeros(groups, d, dtype=F64, device=device),
        zeros,
    )


def expected(rows):
    """Mean and scatter of float64 rows by definition, in extended precision, one row at a time."""
    rows = rows.cpu().numpy().astype(np.longdouble)
    mean = rows.mean(0)
    scatter = np.zeros((rows.shape[1], rows.shape[1]), dtype=np.longdouble)
    for row in rows - mean:
        scatter += np.outer(row, row)
    return mean, scatter


def check(x, groups=1, group=None, device="cpu", start=old_state):
    """Merge into a state and compare with `expected`; it must stay symmetric bit for bit."""
    d = x.shape[1]
    count, mean, scatter = start(groups, d, device)
    had = old_rows(groups, d) if start is old_state else torch.zeros(groups, 0, d, dtype=F64)
    moments_update(x.to(device), count, mean, scatter, None if group is None else group.to(device))
    for g in range(groups):
        new = x if group is None else x[group == g]
        rows = torch.cat([had[g], new.to("cpu", F64)])
        assert int(count[g]) == len(rows)
        got_mean, got = mean[g].cpu().numpy(), scatter[g].cpu().numpy()
        assert (got == got.T).all()
        if not len(rows):
            assert not got.any()
            assert not got_mean.any()
            continue
        true_mean, true = expected(rows)
        # At worst every addition rounds the same way: n of them in float64, 512 of products of float32 numbers. An
        # error in (i, j) is measured against the two variances, as an entry near zero has no digits of its own, and
        # differences from a mean are no better than the last digit of the mean.
        exact = (len(rows) + 3) * torch.finfo(F64).eps
        rounded = exact if x.dtype == F64 else (min(len(new), 512) + 3) * torch.finfo(F32).eps
        spread = np.sqrt(np.diagonal(true)) + torch.finfo(F64).eps * np.abs(true_mean) * len(rows)
        assert (np.abs(got - true) <= rounded * np.outer(spread, spread)).all()
        assert (np.abs(got_mean - true_mean) <= exact * (spread + np.abs(true_mean))).all()


# ---- values ----


@pytest.mark.parametrize("start", [old_state, empty_state])
@pytest.mark.parametrize(("backend", "dtype", "n", "d"), SHAPED_CASES, ids=str)
def test_matches_outer_products(use, backend, dtype, n, d, start):
    check(normal(n, d, dtype=dtype), device=use(backend, dtype), start=start)


# Of 6 groups two are empty, one has a single row and one more than a block; the ids come in no order.
@pytest.mark.parametrize("start", [old_state, empty_state])
@each_backend
def test_groups_stay_apart(use, backend, dtype, start):
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([5] * 600 + [0] * 199 + [3] * 100 + [1])[order]
    check(normal(900, 17, dtype=dtype), 6, group, use(backend, dtype), start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 49), (1300, 100)], ids=str)
def test_native_writes_fresh_states_unread(use, dtype, n, d, threads):
    use("native", dtype)
    x, group = normal(n, d, mean=0.5, dtype=dtype), torch.arange(n) % 2
    clean, dirty = empty_state(2, d), empty_state(2, d)
    for matrix in dirty[2]:
        matrix.fill_(float("nan"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for state in (clean, dirty):
            moments_update(x, *state, group)
    finally:
        torch.set_num_threads(before)
    for g in range(min(n, 2)):
        assert torch.equal(clean[1][g], dirty[1][g])
        assert torch.equal(clean[2][g], dirty[2][g])


@each_backend
def test_empty_groups_keep_their_bits(use, backend, dtype):
    device = use(backend, dtype)
    count, mean, scatter = old_state(3, 4, device)
    before = count.tolist(), mean.clone(), [matrix.clone() for matrix in scatter]
    group = torch.ones(20, dtype=torch.int64, device=device)
    moments_update(normal(20, 4, dtype=dtype).to(device), count, mean, scatter, group)
    assert count.tolist() == [SEEN, SEEN + 20, SEEN]
    assert [torch.equal(new, old) for new, old in zip(mean, before[1], strict=True)] == [True, False, True]
    assert [torch.equal(new, old) for new, old in zip(scatter, before[2], strict=True)] == [True, False, True]


LAYOUTS = {
    "transposed": lambda dtype: normal(20, 600, dtype=dtype).T,
    "every third row": lambda dtype: normal(1800, 20, dtype=dtype)[::3],
    "every other column": lambda dtype: normal(600, 40, dtype=dtype)[:, 1::2],
    "inner block": lambda dtype: normal(700, 50, dtype=dtype)[50:650, 7:27],
    "one row repeated": lambda dtype: normal(1, 20, dtype=dtype).expand(600, 20),
    "one column repeated": lambda dtype: normal(600, 1, dtype=dtype).expand(600, 20),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_any_strides(use, backend, dtype, layout):
    x = LAYOUTS[layout](dtype)
    assert not x.is_contiguous()
    check(x, device=use(backend, dtype))


@each_backend
def test_strided_group(use, backend, dtype):
    check(normal(600, 9, dtype=dtype), 4, torch.arange(1200)[::2] % 4, use(backend, dtype))


# The spread is that of the dtype's own rounding at that mean, or 1.
@pytest.mark.parametrize("start", [old_state, empty_state])
@each_backend
def test_mean_far_from_zero_costs_no_digits(use, backend, dtype, start):
    mean = 1e6 if dtype in (F32, F64) else 1e3
    check(normal(600, 20, mean=mean, dtype=dtype), device=use(backend, dtype), start=start)


@each_backend
def test_rows_unlike_the_first_ones_cost_no_digits(use, backend, dtype):
    # Sorted data: the first block says nothing about the second.
    far = 1e5 if dtype in (F32, F64) else 1e3
    x = torch.cat([normal(600, 20, dtype=dtype), normal(600, 20, mean=far, seed=1, dtype=dtype)])
    check(x, 2, torch.arange(1200) // 600, use(backend, dtype), empty_state)
    check(x, device=use(backend, dtype), start=empty_state)


@pytest.mark.parametrize("backend", ["native", "triton", "torch"])
def test_far_elements_of_a_large_tensor(use, backend, tmp_path):
    # Element offsets beyond 2^31, in a sparse file: only the pages that are touched exist.
    dtype = F16
    device = use(backend, dtype)
    if device != "cpu":
        pytest.skip("the file is mapped into the CPU's memory")
    stride = 2**30 + 512
    file = tmp_path / "sparse"
    with file.open("wb") as handle:
        handle.truncate(2 * stride * dtype.itemsize + 4096)
    everything = torch.from_file(str(file), shared=True, size=2 * stride + 20, dtype=dtype)
    x = everything.as_strided((20, 3), (1, stride))
    x.copy_(normal(20, 3, dtype=dtype))
    check(x)


# A row by itself is its own mean: normal and subnormal numbers of either sign, all of them.
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_native_reads_16_bits_as_torch_does(use, dtype):
    use("native", dtype)
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 64)
    for row in x[torch.isfinite(x).all(1)]:
        count, mean, scatter = empty_state(1, 64)
        moments_update(row.unsqueeze(0), count, mean, scatter)
        assert torch.equal(mean[0], row.to(F64))


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from NumPy, in Triton's interpreter
def test_bad_value_stays_in_its_row_and_column(use, backend, dtype, value):
    device = use(backend, dtype)
    x = normal(600, 20, dtype=dtype)
    x[100, 7] = value
    count, mean, scatter = old_state(2, 20, device)
    group = torch.arange(600, device=device) % 2
    moments_update(x.to(device), count, mean, scatter, group)
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[7] = touched[:, 7] = True
    assert torch.equal(~torch.isfinite(scatter[0].cpu()), touched)
    assert torch.equal(~torch.isfinite(mean.cpu()).all(0), touched.diagonal())
    assert torch.isfinite(scatter[1]).all()


# ---- memory ----


@each_backend
@pytest.mark.parametrize("d", [1, 17, 31, 33])
def test_writes_nothing_beyond_the_outputs(use, backend, dtype, d):
    device = use(backend, dtype)
    margin = 600  # more than a tile of 24 columns, and than 32 rows of 17

    def inside(*shape):
        size = int(np.prod(shape))
        store = torch.full((size + 2 * margin,), float("nan"), dtype=F64, device=device)
        store[margin : margin + size] = 0.0
        return store, store[margin : margin + size].view(shape)

    (mean_store, mean), (scatter_store, scatter) = inside(1, d), inside(d, d)
    counts = torch.full((3,), -1, device=device)
    counts[1] = 0
    moments_update(normal(40, d, dtype=dtype).to(device), counts[1:2], mean, [scatter])
    assert counts.tolist() == [-1, 40, -1]
    for store, output in ((mean_store, mean), (scatter_store, scatter)):
        assert torch.isfinite(output).all()
        assert int(torch.isnan(store).sum()) == 2 * margin


@each_backend
def test_reads_nothing_beyond_x(use, backend, dtype):
    device = use(backend, dtype)
    store = torch.full((130, 60), float("nan"), dtype=dtype)
    store[50:90, 9:42] = normal(40, 33, dtype=dtype)
    check(store.to(device)[50:90, 9:42], device=device)


@each_backend
def test_inputs_keep_their_bits(use, backend, dtype):
    device = use(backend, dtype)
    x, group = normal(60, 5, dtype=dtype).to(device), torch.arange(60, device=device) % 2
    before = x.clone(), group.clone()
    moments_update(x, *old_state(2, 5, device), group)
    assert all(torch.equal(new, old) for new, old in zip((x, group), before, strict=True))


# ---- threads and availability ----


# One group, few, and so many that every thread has groups of its own.
@pytest.mark.parametrize("groups", [1, 3, 60])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_native_result_does_not_depend_on_threads(use, dtype, groups):
    use("native", dtype)
    # 700 * 140 * 140 multiply-adds are worth 7 threads; 140 columns make 6 or 12 tile rows.
    x = normal(700, 140, dtype=dtype)
    group = torch.arange(700) % groups if groups > 1 else None
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            count, mean, scatter = old_state(groups, 140)
            moments_update(x, count, mean, scatter, group)
            results.append(torch.cat([count, mean.flatten(), *(matrix.flatten() for matrix in scatter)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_native_is_built_where_a_compiler_is():
    assert "native" in backends.available() or not (shutil.which("c++") or shutil.which("g++"))


def test_triton_is_tested_where_it_is_installed():
    assert "triton" in backends.available() or importlib.util.find_spec("triton") is None


# ---- torch's own tools ----


def operands(dtype=F32, groups=2):
    group = torch.tensor([1, 0, 1, 1, 0]) if groups > 1 else None
    return normal(5, 6, dtype=dtype), *old_state(groups, 6), group


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, groups):
    torch.library.opcheck(torch.ops.loft_fast.moments_update.default, operands(dtype, groups))


# aot_eager traces with fake tensors, as the default backend does, and compiles nothing.
@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_into_one_graph(groups):
    def step(x, count, mean, scatter, group):
        moments_update(x * 2, count, mean, scatter, group)
        return mean.sum()

    x, *state, group = operands(groups=groups)
    count, mean, scatter = old_state(groups, 6)
    want = step(x, *state, group)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, count, mean, scatter, group)
    assert torch.equal(got, want)
    assert torch.equal(count, state[0])
    assert torch.equal(mean, state[1])
    assert all(torch.equal(a, b) for a, b in zip(scatter, state[2], strict=True))


def test_takes_features_that_require_grad():
    x, count, mean, scatter, group = operands()
    moments_update(x.requires_grad_(), count, mean, scatter, group)
    assert not mean.requires_grad
    assert x.grad is None


def test_meta_tensors_pass_through():
    x, count, mean, scatter, group = (
        value.to("meta") if isinstance(value, torch.Tensor) else [matrix.to("meta") for matrix in value]
        for value in operands()
    )
    moments_update(x, count, mean, scatter, group)


# ---- wrong arguments: name of the argument, what to put in its place ----

WRONG = {
    "x: got list": {"x": [[1.0]]},
    "x: got shape (6,)": {"x": torch.zeros(6)},
    "x: got shape (2, 5, 6)": {"x": torch.zeros(2, 5, 6)},
    "x: got torch.int64": {"x": torch.zeros(5, 6, dtype=torch.int64)},
    "x: got torch.complex64": {"x": torch.zeros(5, 6, dtype=torch.complex64)},
    "count: got int": {"count": 3},
    "count: got shape (3,)": {"count": torch.zeros(3, dtype=torch.int64)},
    "count: got torch.float64": {"count": torch.zeros(2, dtype=F64)},
    "count: got a tensor on meta": {"count": torch.zeros(2, dtype=torch.int64, device="meta")},
    "count: got strides (2,)": {"count": torch.zeros(4, dtype=torch.int64)[::2]},
    "mean: got float": {"mean": 0.0},
    "mean: got shape (3, 6)": {"mean": torch.zeros(3, 6, dtype=F64)},
    "mean: got shape (6,)": {"mean": torch.zeros(6, dtype=F64)},
    "mean: got torch.float32": {"mean": torch.zeros(2, 6)},
    "mean: got a tensor on meta": {"mean": torch.zeros(2, 6, dtype=F64, device="meta")},
    "mean: got strides (1, 2)": {"mean": torch.zeros(6, 2, dtype=F64).T},
    "scatter: got None": {"scatter": None},
    "scatter: got []": {"scatter": []},
    "scatter: got tensor": {"scatter": torch.zeros(2, 6, 6, dtype=F64)},
    "scatter[1]: got int": {"scatter": [torch.zeros(6, 6, dtype=F64), 1]},
    "scatter[1]: got shape (6, 5)": {"scatter": [torch.zeros(6, 6, dtype=F64), torch.zeros(6, 5, dtype=F64)]},
    "scatter[0]: got torch.float32": {"scatter": [torch.zeros(6, 6), torch.zeros(6, 6, dtype=F64)]},
    "scatter[0]: got a tensor on meta": {"scatter": [torch.zeros(6, 6, dtype=F64, device="meta")] * 2},
    "scatter[0]: got strides (1, 6)": {"scatter": [torch.zeros(6, 6, dtype=F64).T] * 2},
    "group: got None with 2": {"group": None},
    "group: got list": {"group": [0, 1, 0, 1, 0]},
    "group: got shape (4,)": {"group": torch.zeros(4, dtype=torch.int64)},
    "group: got shape (5, 1)": {"group": torch.zeros(5, 1, dtype=torch.int64)},
    "group: got torch.int32": {"group": torch.zeros(5, dtype=torch.int32)},
    "group: got torch.float32": {"group": torch.zeros(5)},
    "group: got a tensor on meta": {"group": torch.zeros(5, dtype=torch.int64, device="meta")},
    "group: got indices from 0 to 2, expected 0 to 1": {"group": torch.tensor([0, 1, 2, 1, 0])},
    "group: got indices from -1 to 1": {"group": torch.tensor([0, 1, -1, 1, 0])},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_is_named_and_nothing_changes(message):
    arguments = dict(zip(("x", "count", "mean", "scatter", "group"), operands(), strict=True))
    count, mean, scatter = arguments["count"], arguments["mean"], list(arguments["scatter"])
    before = count.clone(), mean.clone(), [matrix.clone() for matrix in scatter]
    with pytest.raises(InputError) as caught:
        moments_update(**{**arguments, **WRONG[message]})
    assert str(caught.value).startswith(message)
    assert torch.equal(count, before[0])
    assert torch.equal(mean, before[1])
    assert all(torch.equal(new, old) for new, old in zip(scatter, before[2], strict=True))


@pytest.mark.skipif("native" not in backends.available(), reason="needs the compiled extension")
def test_native_brings_its_own_threads_where_torch_is_not():
    code = """
import sys, importlib.util, numpy as np
spec = importlib.util.spec_from_file_location("loft_fast._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
x = np.random.default_rng(0).normal(size=(3000, 100))
count, mean, scatter = np.zeros(1, np.int64), np.zeros(100), np.zeros((100, 100))
address = lambda array: array.__array_interface__["data"][0]
native.moments_update(address(x), 0, *x.shape, 100, 1, 0, address(count), address(mean), [address(scatter)], 4)
assert count[0] == 3000
assert np.allclose(scatter, 2999 * np.cov(x.T), rtol=1e-11, atol=1e-9)
"""
    path = backends.native_module().__file__
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


MEMORY = r"""
import re, torch
from pathlib import Path
from loft_fast import Moments
torch.set_num_threads({threads})
rows = torch.zeros({n}, {d}, dtype=torch.{dtype}).normal_()
Moments(8).update(rows[:600, :8])  # whatever a first call needs once
# The peak of this process; that of getrusage is inherited from its parent.
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
moments = Moments({d}).update(rows)
print(1024 * (peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.skipif("native" not in backends.available(), reason="native is not available here")
@pytest.mark.parametrize(("n", "d", "dtype"), [(65536, 768, "float32"), (16384, 1024, "bfloat16")])
def test_memory_is_bounded(n, d, dtype):
    for threads in (1, 2):
        script = MEMORY.format(threads=threads, n=n, d=d, dtype=dtype)
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        accumulator = 8 * d * d
        # A page or two is left over from every earlier step; the state itself is the first accumulator.
        assert accumulator / 2 < int(output) <= 2 * accumulator + threads * (8 << 20)
