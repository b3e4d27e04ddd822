"""Every backend of ops.moments_update against outer products summed row by row."""

import importlib.util
import shutil

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
# n and d act apart. Every n: no row, one, more than one and two blocks of 512. Every d: tiles of 16 and of 32 columns,
# one less, one more, several with a rest.
ROWS, COLUMNS = (0, 1, 2, 513, 1025), (1, 3, 16, 17, 31, 64, 100)
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
def use(monkeypatch):
    """Ask for a backend; returns the device that it computes on."""

    def ask(backend, dtype):
        if backend not in backends.available():
            pytest.skip(f"{backend} is not available here")
        device = "cuda" if backend == "triton" and not backends.interpreting() else "cpu"
        monkeypatch.setenv(backends.VARIABLE, backend)
        assert backends.choose("moments_update", device, dtype) == backend
        return device

    return ask


def expected(x, shift, group=None):
    """The definition, one row at a time in float64. Returns NumPy arrays: totals (G, d), scatters (G, d, d)."""
    rows, shift = x.to("cpu", F64).numpy(), shift.cpu().numpy()
    groups, d = shift.shape
    total, scatter = np.zeros((groups, d)), np.zeros((groups, d, d))
    for row, g in zip(rows, [0] * len(rows) if group is None else group.tolist(), strict=True):
        z = row - shift[g]
        total[g] += z
        scatter[g] += np.outer(z, z)
    return total, scatter


def old_state(groups, d, device="cpu"):
    """A total and symmetric scatters that are not zero: an update must add to them."""
    total = normal(groups, d, seed=5)
    scatter = normal(groups, d, d, seed=6)
    return total.to(device), list((scatter + scatter.mT).to(device))


def check(x, shift, group=None, device="cpu"):
    """Run the op on a state that is not zero and compare with `expected`; it must stay symmetric bit for bit."""
    n = len(x)
    total, scatter = old_state(len(shift), x.shape[1])
    old_total, old_scatter = total.numpy().copy(), np.stack([matrix.numpy() for matrix in scatter])
    new_total, new_scatter = expected(x, shift, group)
    total, scatter = total.to(device), [matrix.to(device) for matrix in scatter]
    moments_update(x.to(device), shift.to(device), total, scatter, None if group is None else group.to(device))
    got = np.stack([matrix.cpu().numpy() for matrix in scatter])
    assert (got == got.transpose(0, 2, 1)).all()
    # At worst every addition rounds the same way: n of them in float64, 512 of products of float32 numbers. An error
    # in (i, j) is measured against the two variances, as an entry near zero has no digits of its own.
    variance = np.diagonal(new_scatter, axis1=1, axis2=2)
    scale = np.sqrt(variance[:, :, None] * variance[:, None, :])
    exact = (n + 3) * torch.finfo(F64).eps
    rounded = exact if x.dtype == F64 else (min(n, 512) + 3) * torch.finfo(F32).eps
    assert (np.abs(got - old_scatter - new_scatter) <= rounded * scale + exact * np.abs(old_scatter).max()).all()
    # Sums are kept in float64 whatever the dtype of x.
    spread = np.sqrt(n * variance) + np.abs(old_total)
    assert (np.abs(total.cpu().numpy() - old_total - new_total) <= exact * spread).all()


# ---- values ----


@pytest.mark.parametrize(("backend", "dtype", "n", "d"), SHAPED_CASES, ids=str)
def test_matches_outer_products(use, backend, dtype, n, d):
    check(normal(n, d, dtype=dtype), normal(1, d, seed=1), device=use(backend, dtype))


# Of 6 groups two are empty, one has a single row and one more than a block; the ids come in no order.
@each_backend
def test_groups_stay_apart(use, backend, dtype):
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([5] * 600 + [0] * 199 + [3] * 100 + [1])[order]
    check(normal(900, 17, dtype=dtype), normal(6, 17, seed=1), group, use(backend, dtype))


@each_backend
def test_empty_groups_keep_their_bits(use, backend, dtype):
    device = use(backend, dtype)
    total, scatter = old_state(3, 4, device)
    before = total.clone(), [matrix.clone() for matrix in scatter]
    group = torch.ones(20, dtype=torch.int64, device=device)
    moments_update(
        normal(20, 4, dtype=dtype).to(device), torch.zeros(3, 4, dtype=F64, device=device), total, scatter, group
    )
    assert [torch.equal(new, old) for new, old in zip(total, before[0], strict=True)] == [True, False, True]
    assert [torch.equal(new, old) for new, old in zip(scatter, before[1], strict=True)] == [True, False, True]


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
    check(x, normal(1, 20, seed=1), device=use(backend, dtype))


@each_backend
def test_strided_shift_and_group(use, backend, dtype):
    shift = normal(9, 4, seed=1).T
    group = torch.arange(1200)[::2] % 4
    check(normal(600, 9, dtype=dtype), shift, group, use(backend, dtype))


# The spread is that of the dtype's own rounding at that mean, or 1.
@each_backend
def test_mean_far_from_zero_costs_no_digits(use, backend, dtype):
    mean = 1e6 if dtype in (F32, F64) else 1e3
    x = normal(600, 20, mean=mean, dtype=dtype)
    check(x, x.to(F64).mean(0, keepdim=True), device=use(backend, dtype))


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
    check(x, normal(1, 3, seed=1))


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from NumPy, in Triton's interpreter
def test_bad_value_stays_in_its_row_and_column(use, backend, dtype, value):
    device = use(backend, dtype)
    x = normal(600, 20, dtype=dtype)
    x[100, 7] = value
    total, scatter = old_state(2, 20, device)
    group = torch.arange(600, device=device) % 2
    moments_update(x.to(device), torch.zeros(2, 20, dtype=F64, device=device), total, scatter, group)
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[7] = touched[:, 7] = True
    assert torch.equal(~torch.isfinite(scatter[0].cpu()), touched)
    assert torch.equal(~torch.isfinite(total.cpu()).all(0), touched.diagonal())
    assert torch.isfinite(scatter[1]).all()


# ---- memory ----


@each_backend
@pytest.mark.parametrize("d", [1, 17, 31, 33])
def test_writes_nothing_beyond_the_outputs(use, backend, dtype, d):
    device = use(backend, dtype)
    margin = 600  # more than a tile of 16 columns, and than 32 rows of 17

    def inside(*shape):
        size = int(np.prod(shape))
        store = torch.full((size + 2 * margin,), float("nan"), dtype=F64, device=device)
        store[margin : margin + size] = 0.0
        return store, store[margin : margin + size].view(shape)

    (total_store, total), (scatter_store, scatter) = inside(1, d), inside(d, d)
    moments_update(normal(40, d, dtype=dtype).to(device), torch.zeros(1, d, dtype=F64, device=device), total, [scatter])
    for store, output in ((total_store, total), (scatter_store, scatter)):
        assert torch.isfinite(output).all()
        assert int(torch.isnan(store).sum()) == 2 * margin


@each_backend
def test_reads_nothing_beyond_x(use, backend, dtype):
    device = use(backend, dtype)
    store = torch.full((130, 60), float("nan"), dtype=dtype)
    store[50:90, 9:42] = normal(40, 33, dtype=dtype)
    check(store.to(device)[50:90, 9:42], normal(1, 33, seed=1), device=device)


@each_backend
def test_inputs_keep_their_bits(use, backend, dtype):
    device = use(backend, dtype)
    x, shift, group = (
        normal(60, 5, dtype=dtype).to(device),
        normal(2, 5).to(device),
        torch.arange(60, device=device) % 2,
    )
    before = x.clone(), shift.clone(), group.clone()
    moments_update(x, shift, *old_state(2, 5, device), group)
    assert all(torch.equal(new, old) for new, old in zip((x, shift, group), before, strict=True))


# ---- threads and availability ----


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_native_result_does_not_depend_on_threads(use, dtype, grouped):
    use("native", dtype)
    # 700 * 140 * 140 multiply-adds are worth 7 threads; 140 columns make 9 tile rows.
    x, shift = normal(700, 140, dtype=dtype), normal(3 if grouped else 1, 140, seed=1)
    group = torch.arange(700) % 3 if grouped else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            total, scatter = old_state(len(shift), 140)
            moments_update(x, shift, total, scatter, group)
            results.append(torch.cat([total.flatten(), *(matrix.flatten() for matrix in scatter)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_native_is_built_where_a_compiler_is():
    assert "native" in backends.available() or not (shutil.which("c++") or shutil.which("g++"))


def test_triton_is_tested_where_it_is_installed():
    assert "triton" in backends.available() or importlib.util.find_spec("triton") is None


# ---- torch's own tools ----


def operands(dtype=F32, groups=2):
    total, scatter = old_state(groups, 6)
    group = torch.tensor([1, 0, 1, 1, 0]) if groups > 1 else None
    return normal(5, 6, dtype=dtype), torch.zeros(groups, 6, dtype=F64), total, scatter, group


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, groups):
    torch.library.opcheck(torch.ops.loft_fast.moments_update.default, operands(dtype, groups))


# aot_eager traces with fake tensors, as the default backend does, and compiles nothing.
@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_into_one_graph(groups):
    def step(x, shift, total, scatter, group):
        moments_update(x * 2, shift, total, scatter, group)
        return total.sum()

    x, shift, total, scatter, group = operands(groups=groups)
    other_total, other_scatter = total.clone(), [matrix.clone() for matrix in scatter]
    want = step(x, shift, total, scatter, group)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, shift, other_total, other_scatter, group)
    assert torch.equal(got, want)
    assert torch.equal(other_total, total)
    assert all(torch.equal(a, b) for a, b in zip(other_scatter, scatter, strict=True))


def test_takes_features_that_require_grad():
    x, shift, total, scatter, group = operands()
    moments_update(x.requires_grad_(), shift, total, scatter, group)
    assert not total.requires_grad
    assert x.grad is None


def test_meta_tensors_pass_through():
    x, shift, total, scatter, group = operands()
    moments_update(x.to("meta"), shift.to("meta"), total.to("meta"), [m.to("meta") for m in scatter], group.to("meta"))


# ---- wrong arguments: name of the argument, what to put in its place ----

WRONG = {
    "x: got list": {"x": [[1.0]]},
    "x: got shape (6,)": {"x": torch.zeros(6)},
    "x: got shape (2, 5, 6)": {"x": torch.zeros(2, 5, 6)},
    "x: got torch.int64": {"x": torch.zeros(5, 6, dtype=torch.int64)},
    "x: got torch.complex64": {"x": torch.zeros(5, 6, dtype=torch.complex64)},
    "shift: got NoneType": {"shift": None},
    "shift: got shape (2, 5)": {"shift": torch.zeros(2, 5, dtype=F64)},
    "shift: got shape (6,)": {"shift": torch.zeros(6, dtype=F64)},
    "shift: got torch.float32": {"shift": torch.zeros(2, 6)},
    "shift: got a tensor on meta": {"shift": torch.zeros(2, 6, dtype=F64, device="meta")},
    "total: got float": {"total": 0.0},
    "total: got shape (3, 6)": {"total": torch.zeros(3, 6, dtype=F64)},
    "total: got torch.float32": {"total": torch.zeros(2, 6)},
    "total: got a tensor on meta": {"total": torch.zeros(2, 6, dtype=F64, device="meta")},
    "total: got strides (1, 2)": {"total": torch.zeros(6, 2, dtype=F64).T},
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
    arguments = dict(zip(("x", "shift", "total", "scatter", "group"), operands(), strict=True))
    total, scatter = arguments["total"], list(arguments["scatter"])
    before = total.clone(), [matrix.clone() for matrix in scatter]
    with pytest.raises(InputError) as caught:
        moments_update(**{**arguments, **WRONG[message]})
    assert str(caught.value).startswith(message)
    assert torch.equal(total, before[0])
    assert all(torch.equal(new, old) for new, old in zip(scatter, before[1], strict=True))
