"""Every backend of ops.moments_update_project against the definition in float64."""

import pytest
import torch
from conftest import normal

from loft_fast import InputError
from loft_fast.ops import moments_update_project, reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CASES = [(b, t) for b in ("triton", "torch") for t in (F64, F32, F16, BF16) if (b, t) != ("triton", F64)]
each_backend = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
OP = "moments_update_project"


def blank(d, s, with_scatter, device="cpu"):
    """State of no rows; basis and center."""
    zeros = {"dtype": F64, "device": device}
    scatter = [torch.zeros(d, d, **zeros)] if with_scatter else []
    basis = torch.linalg.qr(normal(d, s, seed=d)).Q.float().contiguous().to(device)
    center = normal(1, d, seed=s)[0].float().to(device)
    return (
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, d, **zeros),
        scatter,
        basis,
        center,
        torch.zeros(d, s, **zeros),
    )


def check(x, s, device, with_scatter, pieces=2):
    d = x.shape[1]
    count, mean, scatter, basis, center, image = blank(d, s, with_scatter, device)
    for rows in x.tensor_split(pieces):
        moments_update_project(rows.to(device), count, mean, scatter, basis, center, image)
    wide = x.double()
    z = wide - center.cpu().double()
    want = z.T @ (z @ basis.cpu().double())
    assert count.tolist() == [len(x)]
    if not len(x):
        assert not image.any()
        assert not mean.any()
        return
    torch.testing.assert_close(mean[0].cpu(), wide.mean(0), rtol=1e-13, atol=1e-13)
    size = float(z.norm() ** 2)
    torch.testing.assert_close(image.cpu(), want, rtol=0, atol=(1e-15 if x.dtype == F64 else 1e-6) * size)
    for matrix in scatter:
        centered = wide - wide.mean(0)
        torch.testing.assert_close(matrix.cpu(), centered.T @ centered, rtol=0, atol=1e-6 * size)
        assert torch.equal(matrix, matrix.T)


@each_backend
@pytest.mark.parametrize("with_scatter", [True, False])
@pytest.mark.parametrize(("n", "d", "s"), [(0, 5, 2), (1, 5, 2), (70, 33, 4), (300, 20, 20), (33, 65, 33), (40, 1, 1)])
def test_is_its_definition(use, backend, dtype, n, d, s, with_scatter):
    device = use(OP, backend, dtype)
    check(normal(n, d).to(dtype), s, device, with_scatter)


@each_backend
def test_layouts(use, backend, dtype):
    device = use(OP, backend, dtype)
    x = normal(60, 24, dtype=dtype)
    for rows in (x[::2], x[:, 1::3], x[:24].T, x[:1].expand(9, 24)):
        check(rows, 3, device, True)


@each_backend
def test_inputs_keep_their_bits(use, backend, dtype):
    device = use(OP, backend, dtype)
    x = normal(20, 6, dtype=dtype).to(device)
    count, mean, scatter, basis, center, image = blank(6, 2, True, device)
    before = [one.clone() for one in (x, basis, center)]
    moments_update_project(x, count, mean, scatter, basis, center, image)
    assert all(torch.equal(old, new) for old, new in zip(before, (x, basis, center), strict=True))


def test_power_method_on_a_stream_finds_the_top_subspace():
    scale = torch.tensor([5.0, 4.0, 3.0] + [1.0] * 9)
    rotation = torch.linalg.qr(normal(12, 12)).Q.float()
    basis = torch.linalg.qr(normal(12, 3, seed=1)).Q.float().contiguous()
    for step in range(20):
        count, mean, _, _, center, image = blank(12, 3, False)
        x = (normal(400, 12, seed=step).float() * scale) @ rotation.T + 2
        moments_update_project(x, count, mean, [], basis, center, image)
        offset = mean[0] - center
        image -= count * torch.outer(offset, offset @ basis.double())
        basis = torch.linalg.qr(image).Q.float().contiguous()
    left = rotation.T @ basis
    assert float(left[3:].norm()) < 0.5 * float(left[:3].norm())


@pytest.mark.parametrize("with_scatter", [True, False])
def test_opcheck(with_scatter):
    count, mean, scatter, basis, center, image = blank(6, 2, with_scatter)
    operands = (normal(5, 6, dtype=F32), count, mean, scatter, basis, center, image)
    torch.library.opcheck(torch.ops.loft_fast.moments_update_project.default, operands)


def test_reference_takes_blocks(monkeypatch):
    monkeypatch.setattr(reference, "_ROWS", 7)
    check(normal(50, 4), 2, "cpu", False)


WRONG = {
    "x: got list": ("x", [[1.0]]),
    "x: got shape (6,)": ("x", torch.zeros(6)),
    "count: got shape (2,)": ("count", torch.zeros(2, dtype=torch.int64)),
    "mean: got torch.float32": ("mean", torch.zeros(1, 6)),
    "scatter: got None": ("scatter", None),
    "scatter[0]: got shape (5, 5)": ("scatter", [torch.zeros(5, 5, dtype=F64)]),
    "basis: got shape (5, 2)": ("basis", torch.zeros(5, 2)),
    "basis: got shape (6, 0)": ("basis", torch.zeros(6, 0)),
    "basis: got torch.float64": ("basis", torch.zeros(6, 2, dtype=F64)),
    "basis: got strides (1, 6)": ("basis", torch.zeros(2, 6).T),
    "center: got torch.float64": ("center", torch.zeros(6, dtype=F64)),
    "image: got shape (6, 3)": ("image", torch.zeros(6, 3, dtype=F64)),
    "image: got torch.float32": ("image", torch.zeros(6, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_is_named_and_nothing_changes(message):
    names = ("count", "mean", "scatter", "basis", "center", "image")
    arguments = {"x": normal(5, 6, dtype=F32), **dict(zip(names, blank(6, 2, True), strict=True))}
    count, mean, image = arguments["count"], arguments["mean"], arguments["image"]
    name, value = WRONG[message]
    with pytest.raises(InputError) as caught:
        moments_update_project(**{**arguments, name: value})
    assert str(caught.value).startswith(message)
    assert not any(bool(one.any()) for one in (count, mean, image))
