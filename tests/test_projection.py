import copy
import dataclasses
import io
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import make_problem
from safetensors.torch import load_file, save_file
from torch import nn

from loft_fast import Certificate, FileFormatError, InputError, Projection, close_outputs, files, fold, solve

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_projection(dim=12, rank=5, **options):
    return Projection(torch.linalg.qr(normal(dim, rank)).Q, normal(dim, seed=1), **options)


def expected(projection, z):
    """center + U U^T (z - center) in float64, one row at a time."""
    P, center = projection.basis @ projection.basis.T, projection.center
    rows = [center + P @ (row - center) for row in z.double().reshape(-1, projection.dim)]
    return torch.stack(rows).reshape(z.shape) if rows else z.double()


# ---- forward ----


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(12,), (1, 12), (7, 12), (0, 12), (2, 3, 12), (2, 1, 3, 12), (2, 0, 12)], ids=str)
def test_rows_are_projected_about_the_center(shape, dtype):
    projection, z = make_projection(), normal(*shape, seed=2).to(dtype)
    result = projection(z)
    assert result.dtype == dtype
    assert result.shape == z.shape
    torch.testing.assert_close(result.double(), expected(projection, z), rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize(
    "layout",
    [lambda z: z.T.contiguous().T, lambda z: z[::2], lambda z: z.repeat(1, 2)[:, ::2], lambda z: z[:1].expand(6, 12)],
    ids=["transposed", "every other row", "every other column", "expanded"],
)
def test_memory_layout_does_not_matter(layout):
    projection, z = make_projection(), layout(normal(6, 12, seed=2))
    torch.testing.assert_close(projection(z), expected(projection, z), rtol=0, atol=1e-13)
    stacked = normal(3, 12, 4, seed=2).transpose(1, 2)
    torch.testing.assert_close(projection(stacked), expected(projection, stacked), rtol=0, atol=1e-13)


@given(dim=st.integers(2, 20), data=st.data())
def test_projecting_twice_is_projecting_once(dim, data):
    rank = data.draw(st.integers(1, dim))
    projection = make_projection(dim, rank)
    once = projection(normal(4, dim, seed=data.draw(st.integers(0, 99))))
    torch.testing.assert_close(projection(once), once, rtol=0, atol=1e-12)
    torch.testing.assert_close(projection.matrix() @ projection.basis, projection.basis, rtol=0, atol=1e-12)
    assert (projection.dim, projection.rank) == (dim, rank)


def test_center_and_its_subspace_stay_where_they_are():
    projection = make_projection()
    inside = projection.center + normal(4, 5, seed=3) @ projection.basis.T
    torch.testing.assert_close(projection(projection.center), projection.center, rtol=0, atol=1e-14)
    torch.testing.assert_close(projection(inside), inside, rtol=0, atol=1e-13)


def test_far_center_costs_no_digits():
    projection = Projection(make_projection().basis, torch.full((12,), 1e8, dtype=torch.float64))
    z = projection.center + normal(5, 12, seed=3)
    step = projection(z) - projection.center
    torch.testing.assert_close(step, (z - projection.center) @ projection.matrix(), rtol=0, atol=1e-6)


# ---- trimming ----


def probabilities(head, projection, z):
    return head(projection(z)).log_softmax(1)


@torch.no_grad()
@pytest.mark.parametrize(("outputs", "rank"), [(3, 2), (5, 4), (9, 5)])
def test_trimmed_the_head_says_the_same(outputs, rank):
    projection, head = make_projection(), nn.Linear(12, outputs).double()
    trimmed = projection.trim(head)
    assert trimmed.rank == rank  # of 5
    inside = projection.matrix() @ trimmed.basis
    torch.testing.assert_close(inside, trimmed.basis)
    torch.testing.assert_close(trimmed.basis.T @ trimmed.basis, torch.eye(rank, dtype=torch.float64))
    z = normal(20, 12)
    torch.testing.assert_close(probabilities(head, trimmed, z), probabilities(head, projection, z))


@torch.no_grad()
def test_trimming_may_come_before_or_after_folding():
    model, projection = nn.Sequential(nn.Linear(12, 4).double()), make_projection()
    before = projection.trim(model[0])
    fold(model, projection, "0")
    torch.testing.assert_close(projection.trim(model[0]).matrix(), before.matrix(), atol=1e-9, rtol=0)


@torch.no_grad()
def test_closed_outputs_need_no_dimension():
    model, projection, z = nn.Sequential(nn.Linear(12, 5)), make_projection(), normal(20, 12).float()
    close_outputs(model, [1, 4])
    trimmed = projection.trim(model[0])
    assert trimmed.rank == 2
    said, wanted = (probabilities(model[0], one, z) for one in (trimmed, projection))
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=0)


def test_a_trimmed_projection_says_so():
    problem = make_problem("power law", 12)
    projection = solve(*problem.moments, rank=6)
    projection.site = "fc"
    trimmed = projection.trim(nn.Linear(12, 3))
    assert trimmed.site == "fc"
    assert trimmed.certificate.why == f"{projection.certificate.why}; what no output reads is dropped"
    assert make_projection().trim(nn.Linear(12, 3)).certificate is None


def test_one_dimension_stays_where_the_outputs_read_none():
    constant = nn.Linear(12, 3)
    with torch.no_grad():
        constant.weight.copy_(torch.ones(3, 1) @ constant.weight[:1])
    assert make_projection().trim(constant).rank == 1


@pytest.mark.parametrize("head", [nn.Linear(11, 3), nn.ReLU()])
def test_other_heads_are_refused(head):
    with pytest.raises(InputError, match="expected a linear head reading 12 features"):
        make_projection().trim(head)


# ---- arithmetic ----


def test_input_is_not_changed_and_gradients_flow():
    projection, z = make_projection(), normal(4, 12, seed=2).requires_grad_()
    before = z.detach().clone()
    projection(z).square().sum().backward()
    assert torch.equal(z.detach(), before)
    expected_gradient = 2 * expected(projection, before) @ projection.matrix()
    torch.testing.assert_close(z.grad, expected_gradient, rtol=0, atol=1e-12)
    assert not list(projection.parameters())


@pytest.mark.parametrize(
    ("z", "got"),
    [
        (torch.ones(3, 11), r"torch.float32 of shape \(3, 11\)"),
        (torch.ones(12, 3), r"torch.float32 of shape \(12, 3\)"),
        (torch.tensor(1.0), r"torch.float32 of shape \(\)"),
        (torch.ones(3, 12, dtype=torch.int64), r"torch.int64 of shape \(3, 12\)"),
        (torch.ones(3, 12, dtype=torch.bool), r"torch.bool of shape \(3, 12\)"),
        (torch.ones(3, 12, dtype=torch.complex64), r"torch.complex64 of shape \(3, 12\)"),
    ],
)
def test_other_input_is_refused(z, got):
    with pytest.raises(InputError, match=rf"z: got {got}, expected floats of shape \(\.\.\., 12\)"):
        make_projection()(z)


@pytest.mark.parametrize(
    ("basis", "center", "message"),
    [
        (torch.eye(4)[:, :2], torch.zeros(5), r"basis: got shapes \(4, 2\) and \(5,\), expected \(d, s\)"),
        (torch.eye(4)[:, :2], torch.zeros(4, 1), r"basis: got shapes \(4, 2\) and \(4, 1\)"),
        (torch.ones(4), torch.zeros(4), r"basis: got shapes \(4,\)"),
        (torch.eye(4)[:, :0], torch.zeros(4), r"basis: got shapes \(4, 0\) .* 1 <= s <= d"),
        (torch.eye(4)[:2], torch.zeros(2), r"basis: got shapes \(2, 4\)"),
        (torch.eye(4, dtype=torch.int64), torch.zeros(4), r"got torch.int64 basis"),
        (torch.eye(4), torch.tensor([0, math.nan, 0, 0]), r"center: .* expected finite floats"),
        (torch.eye(4), torch.tensor([0, math.inf, 0, 0]), r"center: .* expected finite floats"),
        (2 * torch.eye(4), torch.zeros(4), r"basis: U\^T U is 3.0e\+00 away from the identity"),
        (torch.ones(4, 2) / 2, torch.zeros(4), r"basis: U\^T U is 1.0e\+00 away from the identity"),
        (torch.eye(4) * math.nan, torch.zeros(4), r"basis: U\^T U is nan away from the identity"),
        (torch.eye(4).double() * (1 + 1e-7), torch.zeros(4), r"basis: U\^T U is 2.0e-07 away"),
    ],
)
def test_a_basis_that_is_none_is_refused(basis, center, message):
    with pytest.raises(InputError, match=message):
        Projection(basis, center)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_basis_may_be_as_rough_as_its_dtype(dtype):
    rough = Projection(make_projection(64, 20).basis.to(dtype), torch.zeros(64, dtype=dtype))
    assert rough.rank == 20


# ---- as a module ----


def copies():
    def reloaded(projection):
        fresh = make_projection()
        fresh.basis.zero_()
        fresh.load_state_dict(projection.state_dict())
        return fresh

    def pickled(projection):
        return pickle.loads(pickle.dumps(projection))

    def through_torch_save(projection):
        buffer = io.BytesIO()
        torch.save(projection, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": through_torch_save, "state_dict": reloaded}


@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_copies_do_the_same_and_are_independent(copied):
    projection, z = make_projection(), normal(4, 12, seed=2)
    result = projection(z)
    twin = copied(projection)
    projection.basis.zero_()
    assert torch.equal(twin(z), result)


def test_a_change_of_the_basis_counts_at_once():
    projection, z = make_projection(), normal(4, 12, seed=2).float()
    before = projection(z)
    assert torch.equal(projection(z), before)
    projection.center.zero_()
    assert not torch.equal(projection(z), before)
    projection.basis = torch.eye(12, 5, dtype=torch.float64)
    torch.testing.assert_close(projection(z)[:, :5], z[:, :5])
    assert projection(z)[:, 5:].abs().max() == 0
    assert projection(z.double()).dtype == torch.float64


def test_what_is_kept_for_speed_is_not_stored():
    projection = make_projection()
    stored = len(pickle.dumps(projection))
    projection(normal(4, 12).float())
    assert len(pickle.dumps(projection)) == stored
    assert copy.deepcopy(projection)._kept is None


def test_copies_keep_the_certificate_and_site():
    projection = solve(*make_problem("power law", 12).moments, rank=4)
    projection.site = "fc:input"
    for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        assert twin.certificate == projection.certificate
        assert twin.site == "fc:input"


def test_state_is_what_moves_with_the_module():
    projection = make_projection()
    assert set(projection.state_dict()) == {"basis", "center"}
    moved = nn.Sequential(projection).to("meta")[0]
    assert moved.basis.device.type == moved.center.device.type == "meta"
    assert repr(make_projection()) == "Projection(dim=12, rank=5)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_is_one_graph_and_the_same(dtype):
    model = nn.Sequential(make_projection(), nn.Linear(12, 3, dtype=dtype))
    z = normal(2, 5, 12, seed=2).to(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), model(z), rtol=0, atol=ROUNDING[dtype])


def test_autocast_keeps_the_dtype_of_the_input():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_projection()(normal(4, 12).float()).dtype == torch.float32


# ---- files ----


@pytest.fixture
def saved(tmp_path):
    """A solved projection and the file that it was saved to."""
    projection = solve(*make_problem("power law", 12).moments, rank=4)
    projection.site = "layer4:output"
    projection.save(tmp_path / "p.safetensors")
    return projection, tmp_path / "p.safetensors"


def test_a_file_brings_everything_back(saved):
    projection, path = saved
    loaded = Projection.load(path)
    assert torch.equal(loaded.basis, projection.basis)
    assert torch.equal(loaded.center, projection.center)
    assert loaded.basis.dtype == torch.float64
    assert loaded.certificate == projection.certificate
    assert str(loaded.certificate) == str(projection.certificate)
    assert loaded.site == "layer4:output"


def test_a_file_brings_predictions_back(tmp_path):
    plain = solve(*make_problem("power law", 12).moments, rank=4)
    plain.certificate = dataclasses.replace(plain.certificate, predicted={"retain accuracy": 99.5})
    plain.save(tmp_path / "p")
    assert Projection.load(tmp_path / "p").certificate == plain.certificate
    assert "retain accuracy 99.50" in str(plain.certificate)


def test_certificate_and_site_may_be_missing(tmp_path):
    make_projection().save(tmp_path / "p")
    loaded = Projection.load(tmp_path / "p")
    assert loaded.certificate is None
    assert loaded.site is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    path = saved[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FileFormatError, match=r"path: cannot read .*p\.safetensors"):
        Projection.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a projection at all", "cannot read"),
        (pickle.dumps({"basis": [[1.0]]}), "cannot read"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        Projection.load(tmp_path / "p")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileFormatError, match="path: cannot read"):
            Projection.load(path)


def test_files_of_another_kind_are_refused(tmp_path):
    make_problem("power law", 12).moments[0].save(tmp_path / "moments")
    save_file({"basis": torch.eye(3)}, tmp_path / "foreign")
    for name in ("moments", "foreign"):
        with pytest.raises(FileFormatError, match=r"expected loft_fast\.projection"):
            Projection.load(tmp_path / name)


def certificate_text(**changes):
    fields = dict.fromkeys(("loss", "lower_bound", "relative_gap", "retain_kept", "forget_kept", "seconds"), 0.5)
    fields |= {"goal": "g", "why": "w", "angle": 0.1, "rank": 4, "eigen_solves": 3}
    return json.dumps(fields | changes)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"center": None}, {}, "lacks center"),
        ({}, {"schema": "0"}, "schema '0', this version reads '2'"),
        ({"center": torch.zeros(5)}, {}, "contradicts itself: basis: got shapes"),
        ({"basis": torch.zeros(12, 4)}, {}, "contradicts itself: basis: .* away from the identity"),
        ({"basis": torch.full((12, 4), math.nan)}, {}, "contradicts itself: basis: U.T U is nan away"),
        ({"basis": torch.eye(12)[:, :4].bool()}, {}, "contradicts itself: .*torch.bool"),
        ({"center": torch.full((12,), math.nan)}, {}, "contradicts itself: center"),
        ({}, {"certificate": "{"}, "contradicts itself"),
        ({}, {"certificate": "[" * 100_000}, "contradicts itself"),
        ({}, {"certificate": "[1, 2]"}, "contradicts itself"),
        ({}, {"certificate": '{"loss": 1}'}, "contradicts itself"),
        ({}, {"certificate": certificate_text(surprise=1)}, "contradicts itself"),
        ({}, {"certificate": certificate_text(loss="low")}, "contradicts itself"),
        ({}, {"certificate": certificate_text(predicted=[1])}, "contradicts itself"),
        ({}, {"certificate": certificate_text(predicted={"probe AUC": None})}, "contradicts itself"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(saved, tmp_path, tensors, header, message):
    content = {name: t.contiguous() for name, t in (load_file(saved[1]) | tensors).items() if t is not None}
    files.write_tensors(tmp_path / "odd", "projection", content, header)
    with pytest.raises(FileFormatError, match=message):
        Projection.load(tmp_path / "odd")


def test_a_certificate_as_written_by_hand_is_read(saved, tmp_path):
    files.write_tensors(tmp_path / "p", "projection", load_file(saved[1]), {"certificate": certificate_text()})
    assert isinstance(Projection.load(tmp_path / "p").certificate, Certificate)


def test_saving_where_nothing_can_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="path: cannot write"):
        make_projection().save(tmp_path / "no folder" / "p")


def test_saving_replaces_the_file_whole(saved):
    _, path = saved
    make_projection().save(path)
    assert Projection.load(path).rank == 5
    assert [file.name for file in path.parent.iterdir()] == [path.name]
