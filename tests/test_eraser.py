"""The eraser of the offset between two means, and the oblique projection that it is."""

import pytest
import torch
from conftest import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bench.peers.leace import Leace
from loft_fast import Certificate, InputError, Moments, Projection, attach, fold, solve
from loft_fast.eraser import least_change, lifted
from loft_fast.nested import seen_through, solve_within

F64 = torch.float64


def covariance(d, seed=0):
    """Of trace one, graded over two decades."""
    root = torch.logspace(0, -1, d, dtype=F64).unsqueeze(1) * normal(d, 4 * d, seed=seed)
    matrix = root @ root.T
    return matrix / matrix.trace()


def moved(matrix, spread):
    """Share of the variance by which rows move."""
    change = torch.eye(len(matrix), dtype=F64) - matrix
    return float((change @ spread @ change.T).trace())


def oblique(d=12, rank=5, seed=0):
    """Some projection with a lift."""
    basis = torch.linalg.qr(normal(d, rank, seed=seed)).Q
    lift = lifted(basis, covariance(d, seed=seed + 1))
    return Projection(basis, normal(d, seed=seed + 2), Certificate("", "", *[0.5] * 5, 5, 0.5, 1, 0.1), "fc", lift=lift)


# ---- the eraser ----


@given(d=st.integers(2, 30), seed=st.integers(0, 1000))
def test_the_offset_is_lost_and_what_is_kept_is_kept(d, seed):
    offset = normal(d, seed=seed)
    found = least_change(covariance(d, seed=seed), offset.unsqueeze(1))
    eye = torch.eye(d - 1, dtype=F64)
    assert found.basis.shape == found.lift.shape == (d, d - 1)
    assert torch.allclose(found.basis.T @ found.basis, eye, atol=1e-12)
    assert torch.allclose(found.basis.T @ found.lift, eye, atol=1e-10)
    assert (found.lift @ (found.basis.T @ offset)).norm() < 1e-12 * offset.norm() * found.lift.norm()
    assert 0 <= found.least <= found.change <= 1
    assert found.change == pytest.approx(moved(found.lift @ found.basis.T, covariance(d, seed=seed)), abs=1e-12)


def test_no_map_that_loses_the_offset_moves_rows_less():
    spread, offset = covariance(8), normal(8, seed=3)
    found = least_change(spread, offset.unsqueeze(1))
    assert found.change == pytest.approx(found.least, rel=0.05)
    direction = offset / offset.norm()
    for seed in range(200):  # I - direction w^T with w^T direction = 1: all that lose the offset and little else
        w = found.basis @ normal(7, seed=seed) * 10 ** -(seed % 4) + direction
        assert moved(torch.eye(8, dtype=F64) - torch.outer(direction, w), spread) >= found.least - 1e-12


def test_where_all_rows_count_it_is_leace():
    rows, gone = normal(4000, 10) @ torch.diag(torch.logspace(0, -1, 10, dtype=F64)), torch.arange(4000) < 800
    rows[gone] += normal(10, seed=5) / 3
    moments = Moments(10).update(rows)
    offset = rows[gone].mean(0) - rows[~gone].mean(0)
    found = least_change(moments.covariance(0) / moments.covariance(0).trace(), offset.unsqueeze(1))
    ours = Projection(found.basis, moments.mean, lift=found.lift)
    theirs = Leace(rows, gone.unsqueeze(1))
    assert (ours(rows) - theirs(rows)).norm() < 0.02 * (rows - theirs(rows)).norm()


@pytest.mark.parametrize("inside", [False, True])
def test_an_offset_that_no_retain_row_has_costs_nothing(inside):
    spread = torch.zeros(6, 6, dtype=F64)
    spread[:3, :3] = covariance(3)
    within = torch.eye(6, dtype=F64)[:, [0, 1, 2, 5]] if inside else None
    found = least_change(spread, torch.tensor([[0.0, 0, 0, 0, 0, 2]], dtype=F64).T, within)
    assert found.change < 1e-12
    assert found.least < 1e-9
    rows = normal(5, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=F64)
    assert torch.allclose(Projection(found.basis, torch.zeros(6, dtype=F64), lift=found.lift)(rows), rows)


def test_equal_means_and_no_variance():
    found = least_change(covariance(5), torch.zeros(5, 1, dtype=F64))
    assert found.basis.shape == (5, 5)
    assert (found.change, found.least) == pytest.approx((0, 0), abs=1e-12)
    assert torch.isfinite(least_change(torch.zeros(5, 5, dtype=F64), normal(5, 1)).lift).all()


def test_several_offsets_at_once():
    spread, offsets = covariance(9), normal(9, 2, seed=8)
    found = least_change(spread, torch.cat([offsets, offsets.sum(1, keepdim=True)], dim=1))
    assert found.basis.shape == (9, 7)
    assert (found.basis.T @ offsets).abs().max() < 1e-12
    assert max(least_change(spread, offsets[:, [i]]).least for i in (0, 1)) < found.least <= found.change
    assert found.change == pytest.approx(found.least, rel=0.1)


def test_a_lift_puts_back_what_a_regression_says():
    spread, basis = covariance(9), torch.linalg.qr(normal(9, 4)).Q
    regression = spread @ basis @ torch.linalg.inv(basis.T @ spread @ basis)  # of rows on their coordinates
    assert (lifted(basis, spread) - regression).norm() < 0.02 * regression.norm()
    assert moved(lifted(basis, spread) @ basis.T, spread) < moved(basis @ basis.T, spread)


# ---- the projection ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_projected_obliquely(dtype):
    projection, z = oblique(), normal(2, 7, 12, seed=9).to(dtype)
    want = projection.center + (z.double() - projection.center) @ projection.matrix().T
    got = projection(z)
    assert (got.dtype, got.shape) == (dtype, z.shape)
    assert torch.allclose(got.double(), want, atol={F64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.1))
    assert torch.allclose(projection.matrix() @ projection.matrix(), projection.matrix(), atol=1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
def test_fold_does_what_attach_does(side):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).double(), normal(20, 6)
    site = "2" if side == "input" else "0:output"
    with attach(model, oblique(), site):
        want = model(x)
    fold(model, oblique(), site)
    assert torch.allclose(model(x), want, atol=1e-12)


def test_trimmed_the_head_says_the_same():
    head, z = nn.Linear(12, 4).double(), normal(30, 12)
    projection = oblique()
    small = projection.trim(head)
    assert small.rank == 3
    assert torch.allclose(small.basis.T @ small.lift, torch.eye(3, dtype=F64), atol=1e-10)
    assert torch.allclose(head(small(z)).log_softmax(1), head(projection(z)).log_softmax(1), atol=1e-10)


def test_file_and_state_keep_the_lift(tmp_path):
    projection, z = oblique(), normal(3, 12)
    projection.save(tmp_path / "p.st")
    for again in (Projection.load(tmp_path / "p.st"), Projection.from_bytes(projection.to_bytes())):
        assert torch.equal(again.lift, projection.lift)
        assert again.digest() == projection.digest()
        assert torch.allclose(again(z), projection(z), atol=1e-13)
    plain = Projection(projection.basis, projection.center, projection.certificate, "fc")
    assert plain.digest() != projection.digest()
    assert set(projection.state_dict()) == {"basis", "center", "lift"}
    assert not torch.allclose(plain(z), projection(z))


@pytest.mark.parametrize(
    "lift", [normal(12, 5), torch.eye(12, 4, dtype=F64), torch.eye(12, 5), normal(12, 5) * torch.nan], ids=str
)
def test_a_lift_that_is_none_is_refused(lift):
    with pytest.raises(InputError, match="lift: "):
        Projection(torch.linalg.qr(normal(12, 5)).Q, normal(12), lift=lift)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_another_projection_inside_does_what_both_would(dtype):
    outer, z = oblique(rank=7), normal(20, 12, seed=4)
    if dtype == torch.float32:
        outer = outer.float()
    retain, forget = (Moments(12).update(normal(300, 12, seed=seed) + seed) for seed in (6, 7))
    both = solve_within(outer, retain, forget, 4)
    assert torch.allclose(both.basis.T @ both.lift, torch.eye(4, dtype=F64), atol=1e-5 if dtype != F64 else 1e-10)
    coordinates = (z - outer.center.double()) @ outer.basis.double()
    inner = solve_inside(outer, retain, forget)
    want = outer.center.double() + inner(coordinates) @ outer.lift.double().T
    assert torch.allclose(both(z), want, atol=1e-5 if dtype != F64 else 1e-9)


def solve_inside(outer, retain, forget):
    """The projection of the coordinates."""
    return solve(*(seen_through(outer, name, part) for name, part in (("retain", retain), ("forget", forget))), 4)
