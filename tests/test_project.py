"""Every backend of ops.project against the reference in float64."""

import pytest
import torch
from conftest import normal

from loft_fast import InputError, Projection, backends
from loft_fast.ops import project, reference
from loft_fast.ops.arguments import native_rows

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Relative to the largest number in sight; a 16-bit result is off by half its last digit. Triton, and processors that
# can multiply bfloat16, multiply 16-bit numbers as they are, so that the basis and the scores are rounded as well.
ROUNDING = {F64: 1e-14, F32: 2e-6, F16: 1e-3, BF16: 8e-3}
CASES = [(b, t) for b in ("native", "triton", "torch") for t in ROUNDING if (b, t) != ("triton", F64)]
# Each size apart, about the tiles of 12, 24 and 48, their blocks of four, and the 256 products added in one register.
SHAPES = [(n, 40, 7) for n in (0, 1, 11, 12, 13, 24, 47, 48, 49, 97, 193, 600)]
SHAPES += [(50, d, min(d, 9)) for d in (1, 2, 12, 23, 24, 25, 48, 49, 257, 300)]
SHAPES += [(50, 300, s) for s in (1, 12, 24, 25, 48, 100, 257, 300)]


@pytest.fixture(params=CASES, ids=str)
def served(request, use):
    """A function that projects by one backend, however few rows there are; and the dtype of the rows."""
    backend, dtype = request.param
    device = use("project", backend, dtype)

    def run(*operands):
        return torch.ops.loft_fast.project(*(one.to(device) for one in operands)).cpu()

    run.coarser = 2 if (backend, dtype) == ("triton", BF16) else 1
    return run, dtype


def operands(n, d, s, dtype=F64):
    """Rows, an orthonormal basis and a center."""
    return normal(n, d, seed=n).to(dtype), torch.linalg.qr(normal(d, s, seed=d)).Q, normal(1, d, seed=s)[0]


def check(result, x, basis, center, coarser=1):
    """`result` is the projection of the rows x, and of their dtype."""
    want = reference.project(x.double(), basis.double(), center.double())
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    largest = max((float(one.abs().max()) for one in (x, center) if one.numel()), default=0.0)
    torch.testing.assert_close(result.double(), want, rtol=0, atol=coarser * ROUNDING[x.dtype] * largest)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(served, shape):
    run, dtype = served
    x, basis, center = operands(*shape, dtype)
    check(run(x, basis, center), x, basis, center, run.coarser)


@pytest.mark.parametrize(
    "layout",
    [
        lambda z: z.T.contiguous().T,
        lambda z: z[::2],
        lambda z: z.repeat(1, 2)[:, ::2],
        lambda z: z[:1].expand(60, 40),
        lambda z: torch.cat([z, z], 1)[:, 3:43],
    ],
    ids=["transposed", "every other row", "every other column", "expanded", "part of wider rows"],
)
def test_layouts(served, layout):
    run, dtype = served
    x, basis, center = operands(60, 40, 7, dtype)
    rows = layout(x)
    before = rows.clone()
    check(run(rows, basis, center), rows, basis, center, run.coarser)
    for strided in (center.repeat(2)[::2], center.float().repeat(2)[::2]):
        check(run(x, basis.T.contiguous().T, strided), x, basis, strided, run.coarser)
    assert torch.equal(rows, before)


def test_a_far_center_costs_no_digits(served):
    run, dtype = served
    x, basis, _ = operands(60, 40, 7)
    center = torch.full((40,), 4096.0, dtype=F64)
    rows = (x + center).to(dtype)
    check(run(rows, basis, center), rows, basis, center, run.coarser)
    if dtype == F32:  # the differences are worth more than the last digit of the rows
        step = run(rows, basis, center).double() - center
        torch.testing.assert_close(step, (rows.double() - center) @ basis @ basis.T, rtol=0, atol=3e-4)


def test_rows_longer_than_the_largest_half(served):
    run, dtype = served
    # The first direction alone: what all 40 features have in common is 6.3 times as long as any of them.
    _, basis, center = operands(60, 40, 7)
    basis[:, 0] = 40**-0.5
    basis = torch.linalg.qr(basis).Q
    x = (30000 * (1 + 0.1 * normal(60, 40))).to(dtype)
    x[::3] = normal(20, 40).to(dtype)
    result = run(x, basis, center)
    assert result.isfinite().all()
    check(result, x, basis, center, run.coarser)
    check(result[::3], x[::3], basis, center, run.coarser)


def test_a_row_without_numbers_spoils_no_other(served):
    run, dtype = served
    x, basis, center = operands(60, 40, 7, dtype)
    clean = run(x, basis, center)
    x[17, 3], x[40, 0] = float("nan"), float("inf")
    spoiled = run(x, basis, center)
    others = [i for i in range(60) if i not in (17, 40)]
    assert torch.equal(spoiled[others], clean[others])
    assert not spoiled[[17, 40]].isfinite().any()


@pytest.mark.skipif("native" not in backends.available(), reason="native is not available here")
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_native_rounds_to_sixteen_bits_as_torch_does(dtype):
    # Columns that the basis drops become the center: floats of all sizes, ties, subnormal halves, overflow.
    exact = torch.arange(0, 1 << 16, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    between = exact[:-1] / 2 + exact[1:] / 2
    sizes = torch.randn(4000) * 10.0 ** torch.randint(-9, 6, (4000,))
    limits = torch.tensor([65504.0, 65519.9, 65520.0, -65520.0, 3e38, 5.9e-8, 2.9e-8, 2.98e-8, 0.0, 6.09e-5])
    center = torch.cat([exact, between, sizes, limits])
    basis = torch.zeros(len(center), 1)
    result = torch.ops.loft_fast.project(torch.zeros(1, len(center), dtype=dtype), basis, center)
    assert torch.equal(result[0].view(torch.int16), center.to(dtype).view(torch.int16))


@pytest.mark.skipif("native" not in backends.available(), reason="native is not available here")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    x, basis, center = operands(600, 80, 30, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.loft_fast.project(x, basis, center))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif("native" not in backends.available(), reason="native is not available here")
def test_native_writes_all_of_the_result_and_nothing_else():
    x, basis, center = operands(53, 37, 5, F32)
    basis, center = basis.float().contiguous(), center.float()
    guarded = torch.full((55, 37), float("nan"))
    addresses = basis.data_ptr(), center.data_ptr(), 5, guarded[1:].data_ptr(), 2
    backends.native_module().project(*native_rows(x), *addresses)
    check(guarded[1:-1], x, basis, center)
    assert guarded[[0, -1]].isnan().all()


# ---- derivatives and transforms: no backend changes them ----


@pytest.fixture
def many():
    """A projection, and rows enough for any backend to serve them."""
    _, basis, center = operands(1, 12, 5)
    return Projection(basis, center), normal(1200, 12, seed=3)


def test_gradients_of_first_and_second_order(many):
    projection, x = many
    x.requires_grad_()
    assert torch.autograd.gradcheck(projection, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: projection(x).pow(2), (x,), fast_mode=True)
    with torch.no_grad():
        assert not projection(x).requires_grad


def test_gradients_of_basis_and_center(many):
    projection, x = many
    basis, center = projection.basis.clone().requires_grad_(), projection.center.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda u, c: project(x, u, c), (basis, center), fast_mode=True)


def test_functional_transforms(many):
    projection, x = many
    step = x @ projection.matrix()
    torch.testing.assert_close(torch.func.jvp(projection, (x,), (x,))[1], step)
    torch.testing.assert_close(torch.func.vjp(projection, x)[1](x)[0], step)
    stacked = x.reshape(2, 600, 12).repeat(2, 2, 1)
    torch.testing.assert_close(torch.func.vmap(projection)(stacked), projection(stacked))
    basis, center = projection.basis, projection.center
    over_centers = torch.func.vmap(project, in_dims=(None, None, 0))(x, basis, torch.stack([center, 0 * center]))
    torch.testing.assert_close(over_centers, torch.stack([projection(x), step]))


def test_opcheck(many):
    projection, x = many
    torch.library.opcheck(torch.ops.loft_fast.project.default, (x, projection.basis, projection.center))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x: got list, expected a torch.Tensor"),
        ({"x": torch.ones(4)}, r"x: got shape \(4,\), expected \(n, d\)"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, "x: got torch.int64, expected torch.float16 or"),
        ({"basis": torch.ones(3, 2)}, r"basis: got shape \(3, 2\)"),
        ({"basis": torch.ones(4, 0)}, r"basis: got shape \(4, 0\), expected \(d, s\) with s >= 1"),
        ({"center": torch.ones(3)}, r"center: got shape \(3,\), expected \(4,\)"),
        ({"center": torch.ones(4, device="meta")}, "center: got a tensor on meta, expected cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change, message):
    with pytest.raises(InputError, match=message):
        project(**({"x": torch.ones(2, 4), "basis": torch.ones(4, 2), "center": torch.ones(4)} | change))
