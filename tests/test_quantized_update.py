"""Every backend of ops.quantized_update against Python's own integers, bit for bit."""

import random

import numpy as np
import pytest
import torch
from conftest import normal
from hypothesis import given
from hypothesis import strategies as st

from loft_fast import InputError, backends
from loft_fast.ops import quantized_update
from loft_fast.ops.quantized_update import MOST_ROWS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CASES = [(backend, dtype) for backend in ("native", "torch") for dtype in DTYPES]
SCALE = 2.0**-12  # numbers up to 8
# n and d apart: no row, one, more than one and two blocks of 512; tiles of 6, 12 and 24 columns and their neighbours.
SHAPES = [(n, 33) for n in (0, 1, 2, 63, 65, 511, 513, 1025)] + [(70, d) for d in (1, 5, 6, 7, 11, 12, 13, 24, 25, 100)]


def empty(groups, d):
    """Count, total, clipped and products of no rows."""
    counts = [torch.zeros(groups, dtype=torch.int64) for _ in range(2)]
    products = [torch.zeros(d, d, dtype=torch.int64) for _ in range(groups)]
    return counts[0], torch.zeros(groups, d, dtype=torch.int64), counts[1], products


def add(state, x, group=None, scale=SCALE):
    count, total, clipped, product = state
    quantized_update(x, scale, count, total, clipped, product, group)
    return state


def bits(state):
    count, total, clipped, product = state
    return torch.cat([count, total.flatten(), clipped, *(matrix.flatten() for matrix in product)])


def truth(x, group=None, groups=1, scale=SCALE):
    """The state of these rows from integers that cannot overflow."""
    scaled = x.double().numpy() / scale
    rows = np.rint(np.clip(scaled, -32767, 32767)).astype(object)
    clipped = (np.abs(scaled) > 32767).sum(1)
    index = np.zeros(len(x), int) if group is None else group.numpy()
    state = empty(groups, x.shape[1])
    for g in range(groups):
        mine = [int(value) for value in np.flatnonzero(index == g)]
        state[0][g], state[2][g] = len(mine), int(clipped[mine].sum())
        if mine:
            part = rows[mine].astype(int).astype(object)
            state[1][g] = torch.tensor([int(value) for value in part.sum(0)])
            state[3][g].copy_(torch.tensor([[int(value) for value in row] for row in part.T @ part]))
    return state


@pytest.fixture(params=CASES, ids=str)
def dtype(request, monkeypatch):
    """A dtype, with a backend that serves it."""
    backend, dtype = request.param
    if backend not in backends.available():
        pytest.skip(f"{backend} is not available here")
    monkeypatch.setenv(backends.VARIABLE, backend)
    assert backends.choose("quantized_update", "cpu", dtype) == backend
    return dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    x = normal(*shape, std=3.0).to(dtype)
    state = add(empty(1, shape[1]), x)
    assert torch.equal(bits(state), bits(truth(x)))


def test_groups_and_a_state_that_is_not_empty(dtype):
    x, y = normal(700, 20).to(dtype), normal(300, 20, seed=1).to(dtype)
    first, second = torch.arange(700) % 3, torch.full((300,), 2)
    second[::50] = 4
    state = add(add(empty(5, 20), x, first), y, second)
    assert torch.equal(bits(state), bits(truth(torch.cat([x, y]), torch.cat([first, second]), 5)))


def test_rounding_and_clipping(dtype):
    top = 32767 * SCALE
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.25, -0.75]).double() * SCALE
    large = torch.tensor([top, -top, 2 * top, -1e4, 1e4, 6e4, -6e4]).double()
    x = torch.stack([values, large]).to(dtype)
    state = add(empty(1, 7), x)
    assert torch.equal(bits(state), bits(truth(x)))
    assert int(state[2]) == int((x[1].double().abs() > top).sum())


@pytest.mark.parametrize(
    "layout",
    [lambda z: z.T.contiguous().T, lambda z: z[::2], lambda z: z.repeat(1, 2)[:, ::2], lambda z: z[:1].expand(60, 40)],
    ids=["transposed", "every other row", "every other column", "expanded"],
)
def test_layouts(layout, dtype):
    x = layout(normal(60, 40).to(dtype))
    assert torch.equal(bits(add(empty(1, 40), x)), bits(truth(x)))


def test_the_largest_products_are_exact(dtype):
    x = torch.full((1500, 13), 1e4).to(dtype)
    x[::2] = -1e4
    state = add(empty(1, 13), x)
    assert int(state[3][0][0, 12]) == 1500 * 32767**2
    assert int(state[1].abs().sum()) == 0


# Integers whose high or low byte is as large as can be, with either sign; all of them float64 and float32 can hold.
EXTREMES = [32767, 32640, 32639, 32512, 255, 128, 127, 1, 0]


@pytest.mark.parametrize("dtype", [case for case in CASES if case[1].itemsize > 2], indirect=True, ids=str)
@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1025])
def test_whole_blocks_of_the_largest_parts(n, dtype):
    values = torch.tensor(EXTREMES + [-value for value in EXTREMES] + [32767] * 9).double() * SCALE
    signs = torch.tensor([[1.0]] * n)
    signs[n // 2 :: 3] = -1.0
    for x in (values.repeat(n, 1), signs * values):  # sums of one sign, and of both
        x = x.to(dtype)
        state = add(empty(1, len(values)), x)
        assert torch.equal(bits(state), bits(truth(x)))
    assert int(state[3][0][0, 0]) == n * 32767**2


@given(data=st.data())
def test_order_pieces_threads_and_backends_do_not_matter(data):
    n, d, groups = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from(DTYPES))
    x = normal(n, d, std=4.0, seed=data.draw(st.integers(0, 99))).to(kind)
    group = torch.arange(n) % groups
    want = bits(truth(x, group, groups))
    order = list(range(n))
    random.Random(data.draw(st.integers(0, 99))).shuffle(order)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    threads = torch.get_num_threads()
    for backend in [name for name in ("native", "torch") if name in backends.available()]:
        state = empty(groups, d)
        try:
            torch.set_num_threads(data.draw(st.integers(1, 3)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(backends.VARIABLE, backend)
                for start, end in zip([0, *cuts], [*cuts, n], strict=True):
                    add(state, x[order[start:end]], group[order[start:end]])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(bits(state), want)


def test_a_low_precision_row_counts_as_what_it_holds():
    x = normal(50, 9).bfloat16()
    states = [bits(add(empty(1, 9), x.to(kind))) for kind in (torch.bfloat16, torch.float32, torch.float64)]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_opcheck_and_one_graph():
    count, total, clipped, product = empty(2, 6)
    operands = (normal(5, 6), SCALE, count, total, clipped, product, torch.tensor([0, 1, 1, 0, 1]))
    torch.library.opcheck(torch.ops.loft_fast.quantized_update.default, operands)
    state = empty(1, 6)
    step = torch.compile(lambda x: add(state, x * 2)[1].sum(), fullgraph=True, backend="aot_eager")
    assert int(step(normal(5, 6))) == int(truth(normal(5, 6) * 2)[1].sum())


# ---- what is refused, and that nothing changes ----


def full(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x: got list"),
        ({"x": torch.zeros(6)}, r"x: got shape \(6,\), expected \(n, d\)"),
        ({"x": torch.zeros(5, 6, dtype=torch.int32)}, "x: got torch.int32"),
        ({"x": torch.zeros(5, 0)}, r"x: got shape \(5, 0\), expected \(n, d\) with d >= 1"),
        ({"x": torch.tensor([[0.0] * 6, [float("nan")] * 6])}, "x: 1 of 2 rows contain NaN or Inf"),
        ({"x": torch.tensor([[0.0] * 6, [-float("inf")] * 6])}, "x: 1 of 2 rows contain NaN or Inf"),
        ({"scale": 1}, "scale: got 1, expected a power of two"),
        ({"scale": 0.3}, "scale: got 0.3, expected a power of two"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"scale": -0.5}, "scale: got -0.5"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"scale": 2.0**501}, "scale: got 6.5"),
        ({"count": full(2)}, r"count: got shape \(2,\), expected \(1,\)"),
        ({"count": full(1, dtype=torch.int32)}, "count: got torch.int32"),
        ({"count": full(1, fill=MOST_ROWS - 1)}, f"x: got 2 rows, expected at most {MOST_ROWS} of a group in all"),
        ({"total": full(6)}, r"total: got shape \(6,\), expected \(1, 6\)"),
        ({"total": full(1, 12)[:, ::2]}, r"total: got strides \(12, 2\), expected a contiguous tensor"),
        ({"clipped": full(1, dtype=torch.float64)}, "clipped: got torch.float64"),
        ({"product": []}, r"product: got \[\], expected a list"),
        ({"product": [full(6, 5)]}, r"product\[0\]: got shape \(6, 5\)"),
        ({"product": [full(6, 6), full(6, 6)]}, r"count: got shape \(1,\), expected \(2,\)"),
        ({"group": full(3)}, r"group: got shape \(3,\), expected \(2,\)"),
        ({"group": torch.zeros(2)}, "group: got torch.float32"),
        ({"group": torch.tensor([0, 1])}, "group: got indices from 0 to 1, expected 0 to 0"),
        ({"group": torch.tensor([0, -1])}, "group: got indices from -1 to 0"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    count, total, clipped, product = empty(1, 6)
    arguments = {"x": torch.ones(2, 6), "scale": SCALE, "count": count, "total": total, "clipped": clipped}
    arguments |= {"product": product, "group": None} | change
    before = bits((count, total, clipped, product))
    with pytest.raises(InputError, match=message):
        quantized_update(**arguments)
    assert torch.equal(bits((count, total, clipped, product)), before)
