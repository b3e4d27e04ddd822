import copy
import io

import pytest
import torch
from models import WRAPPED, ByKeyword, Maps, Mlp, Tokens, build, everything, random_projection
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.hooks import RemovableHandle

from loft_fast import FoldError, InputError, Projection, SiteError, attach, fetch_moments, fold

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def by_hand(model, projection, x=X):
    """What an Mlp returns with its fc's input projected."""
    return model.fc(projection(model.body(x)))


def output(model, x=X):
    with torch.no_grad():
        return model(x)


# ---- attach ----


@pytest.mark.parametrize("site", [None, "fc", "fc:input"])
def test_attach_projects_the_input(site):
    model, projection = build(Mlp).eval(), random_projection()
    want, original = by_hand(model, projection), output(model)
    assert not torch.allclose(want, original, atol=0.1)
    with attach(model, projection, site) as handle:
        assert torch.equal(output(model), want)
        assert str(handle.site) == "fc:input"
    assert torch.equal(output(model), original)


def test_attach_projects_the_output():
    model, projection = build(Mlp).eval(), random_projection(3)
    want = projection(output(model))
    with attach(model, projection, "fc:output"):
        assert torch.equal(output(model), want)


def test_attach_uses_the_site_of_the_projection():
    model = build(Mlp).eval()
    with attach(model, random_projection(site="body.0:output")) as handle:
        assert str(handle.site) == "body.0:output"
    with attach(model, random_projection(site="body.0:output"), "fc") as handle:
        assert str(handle.site) == "fc:input"


def test_attach_to_every_token():
    model, projection = build(Tokens), random_projection()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    hidden = projection(model.mix(model.embed(ids))).tanh()
    with attach(model, projection, "mix:output"):
        torch.testing.assert_close(model(ids).logits, model.fc(hidden.mean(1)))


@pytest.mark.parametrize("site", ["head:input", "conv:output", "act:output"])
def test_attach_to_every_position_of_a_map(site):
    model, projection = build(Maps), random_projection()
    x = torch.randn(2, 2, 4, 4)
    hidden = model.conv(x) if site == "conv:output" else model.conv(x).relu()
    hidden = projection(hidden.movedim(1, -1)).movedim(-1, 1)
    hidden = hidden.relu() if site == "conv:output" else hidden
    with attach(model, projection, site):
        torch.testing.assert_close(model(x), model.head(hidden).mean((2, 3)))


def test_attach_to_a_layer_called_by_keyword():
    model, projection = build(ByKeyword), random_projection()
    x = torch.randn(4, 5)
    want = model.fc(projection(x))
    with attach(model, projection):
        assert torch.equal(model(x), want)


def test_attach_takes_any_module():
    model = build(Mlp).eval()
    with attach(model, nn.Threshold(1.0, 0.0), "fc"):
        assert torch.equal(output(model), by_hand(model, nn.Threshold(1.0, 0.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attach_keeps_the_dtype(dtype):
    model, projection = build(Mlp).to(dtype).eval(), random_projection()
    want = by_hand(model, projection, X.to(dtype))
    with attach(model, projection):
        got = output(model, X.to(dtype))
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_attach_under_autocast():
    model, projection = build(Mlp).eval(), random_projection()
    want = by_hand(model, projection)
    with attach(model, projection), torch.autocast("cpu", torch.bfloat16):
        got = output(model)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_attach_follows_the_model_and_leaves_the_projection_where_it_is():
    model, projection = nn.Sequential(nn.Linear(5, 3, device="meta", dtype=torch.float64)), random_projection()
    x = torch.zeros(2, 5, device="meta", dtype=torch.float64)
    with attach(model, projection):
        with torch.inference_mode():  # whose tensors could not be used in training
            assert model(x).shape == (2, 3)
        model(x.requires_grad_()).sum().backward()
    assert x.grad.shape == (2, 5)
    assert projection.basis.device == torch.device("cpu")


def test_attached_model_trains():
    model, projection = build(Mlp), random_projection()
    with torch.inference_mode():  # where a user may be evaluating
        attached = attach(model, projection)
        model(X)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not projection.basis.requires_grad
    attached.remove()


def test_remove_twice():
    model = build(Mlp)
    before = everything(model)
    handle = attach(model, random_projection())
    assert everything(model) != before
    handle.remove()
    handle.remove()
    assert everything(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_removed_after_an_error(error):
    model = build(Mlp)
    before = everything(model)
    with pytest.raises(error), attach(model, random_projection()):
        raise error
    assert everything(model) == before


def test_attached_projections_stack():
    model = build(Mlp).eval()
    first, second = random_projection(seed=1), random_projection(seed=2)
    none, both, last = (by_hand(model, nn.Sequential(*parts)) for parts in ([], [first, second], [second]))
    with attach(model, first) as outer, attach(model, second):
        assert torch.equal(output(model), both)
        outer.remove()
        assert torch.equal(output(model), last)
    assert torch.equal(output(model), none)


# ---- fold ----

FOLDABLE = {
    "Linear": (nn.Linear(5, 3), (7, 5)),
    "Linear of tokens": (nn.Linear(5, 3), (7, 4, 5)),
    "Conv1d": (nn.Conv1d(5, 3, 1), (7, 5, 4)),
    "Conv2d": (nn.Conv2d(5, 3, 1), (7, 5, 4, 4)),
    "Conv3d": (nn.Conv3d(5, 3, 1), (7, 5, 4, 4, 4)),
    "strided": (nn.Conv2d(5, 3, 1, stride=2), (7, 5, 4, 4)),
    "same": (nn.Conv2d(5, 3, 1, padding="same"), (7, 5, 4, 4)),
    "valid": (nn.Conv2d(5, 3, 1, padding="valid"), (7, 5, 4, 4)),
    "Linear without bias": (nn.Linear(5, 3, bias=False), (7, 5)),
    "Conv2d without bias": (nn.Conv2d(5, 3, 1, bias=False), (7, 5, 4, 4)),
}
FOLDABLE_OUTPUTS = {
    **FOLDABLE,
    "3x3": (nn.Conv2d(5, 3, 3), (7, 5, 4, 4)),
    "padded": (nn.Conv2d(5, 3, 3, padding=1, padding_mode="reflect"), (7, 5, 4, 4)),
    "padded without bias": (nn.Conv1d(5, 3, 3, padding=1, bias=False), (7, 5, 4)),
}
CASES = [(name, "input") for name in FOLDABLE] + [(name, "output") for name in FOLDABLE_OUTPUTS]
# float64: a few roundings; the others: one rounding of the weights and one of the attached features
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.06, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_fold_is_attach(name, side, dtype):
    layer, shape = FOLDABLE_OUTPUTS[name]
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    projection = random_projection(5 if side == "input" else 3, site=f"0:{side}")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with attach(model, projection):
        want = output(model, x)
    fold(model, projection)
    got = output(model, x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    again = copy.deepcopy(model.state_dict())
    fold(model, projection)  # a projection: twice is once
    torch.testing.assert_close(model.state_dict(), again, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_fold_without_centre_adds_no_bias():
    model = build(Mlp, bias=False)
    fold(model, Projection(random_projection().basis, torch.zeros(5, dtype=torch.float64)))
    assert model.fc.bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_fold_keeps_parameters_as_they_are(bias, trained):
    model = build(Mlp, bias=bias).requires_grad_(trained)
    known = list(model.parameters())
    with torch.inference_mode():  # where a user may be evaluating
        fold(model, random_projection())
    parameters = list(model.parameters())
    assert all(any(old is new for new in parameters) for old in known)
    assert len(parameters) == len(known) + (not bias)
    assert {p.requires_grad for p in parameters} == {trained}
    assert not any(p.is_inference() for p in parameters)


class OwnForward(nn.Linear):
    """As low-rank adapters do: there is more to its output than weight and bias."""

    def forward(self, x):
        return super().forward(x) + x[..., :3]


class Computed(nn.Linear):
    def __init__(self, *names):
        super().__init__(5, 3)
        for name in names:
            prune.l1_unstructured(self, name, 0.5)


def tied():
    model = nn.Sequential(nn.Embedding(3, 5), nn.Linear(5, 3))
    model[1].weight = model[0].weight
    return model


def tied_bias():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(5, 3))
    model[0].bias = model[1].bias
    return model


REFUSED = {
    "3x3": (lambda: nn.Conv2d(5, 3, 3), "input", r"kernel \(3, 3\) and padding \(0, 0\), expected 1x1"),
    "padded": (lambda: nn.Conv2d(5, 3, 1, padding=1), "input", r"kernel \(1, 1\) and padding \(1, 1\), expected 1x1"),
    "grouped": (lambda: nn.Conv2d(10, 5, 1, groups=5), "output", "it is a convolution with 5 groups, expected 1"),
    "transposed": (lambda: nn.ConvTranspose2d(5, 3, 1), "input", "it is a ConvTranspose2d, expected a Linear"),
    "norm": (lambda: nn.BatchNorm1d(5), "input", "it is a BatchNorm1d, expected a Linear"),
    "bilinear": (lambda: nn.Bilinear(5, 5, 3), "input", "it is a Bilinear, expected a Linear"),
    "forward": (lambda: OwnForward(5, 3), "input", "its class OwnForward has a forward of its own"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 3)), "input", "its weight or bias is computed"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(5, 3, 1)), "output", "its weight or bias"),
    "pruned weight": (lambda: Computed("weight"), "input", "its weight or bias is computed from others"),
    "pruned bias": (lambda: Computed("bias"), "input", "its weight or bias is computed from others"),
    "lazy": (lambda: nn.LazyLinear(3), "input", "its weight is not initialised yet"),
    "meta": (lambda: nn.Linear(5, 3, device="meta"), "input", "its weight is torch.float32 on meta"),
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex64), "input", "its weight is torch.complex64 on cpu"),
    "tied": (tied, "input", "it shares its weight or bias with '0'"),
    "tied bias": (tied_bias, "input", "it shares its weight or bias with '0'"),
}


@pytest.mark.parametrize(("make", "side", "why"), REFUSED.values(), ids=REFUSED)
def test_fold_refuses(make, side, why):
    made = make()
    model = made if isinstance(made, nn.Sequential) else nn.Sequential(nn.Identity(), made)
    before = everything(model)
    with pytest.raises(FoldError, match=rf"site: cannot fold into '1:{side}': .*{why}.*; use attach instead"):
        fold(model, random_projection(), f"1:{side}")
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_fold_refuses_weights_that_a_hook_computes(norm):
    model = build(Mlp)
    norm(model.fc)
    before = everything(model)
    with pytest.raises(FoldError, match="its weight or bias is computed from others"):
        fold(model, random_projection())
    assert everything(model) == before


# ---- compiled and wrapped ----


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_attach_to_a_wrapped_model_that_has_run(wrap):
    plain, projection = build(Mlp).eval(), random_projection()
    want, original = by_hand(plain, projection), output(plain)
    model = wrap(build(Mlp).eval())
    output(model)
    with attach(model, projection):
        torch.testing.assert_close(output(model), want)
    torch.testing.assert_close(output(model), original)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_fold_of_a_wrapped_model_that_has_run(wrap, bias):
    plain, projection = build(Mlp, bias=bias).eval(), random_projection()
    want = by_hand(plain, projection)
    model = wrap(build(Mlp, bias=bias).eval())
    output(model)
    fold(model, projection)
    torch.testing.assert_close(output(model), want)


@pytest.mark.parametrize("change", [attach, fold])
def test_function_compiled_around_the_model(change):
    model, projection = build(Mlp).eval(), random_projection()
    want, original = by_hand(model, projection), output(model)
    step = torch.compile(lambda x: model(x), backend="eager")
    output(step)
    handle = change(model, projection)
    torch.testing.assert_close(output(step), want)
    if handle is not None:
        handle.remove()
        torch.testing.assert_close(output(step), original)


def test_attached_model_compiles_as_one_graph_with_gradients():
    model, projection = build(Mlp).eval(), random_projection()
    attach(model, projection)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(X)
    torch.testing.assert_close(got, model(X))
    (gradient,) = torch.autograd.grad(got.sum(), model.body[0].weight)
    (want,) = torch.autograd.grad(model(X).sum(), model.body[0].weight)
    torch.testing.assert_close(gradient, want)


# ---- copies and files ----


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [saved_and_loaded, copy.deepcopy])
@pytest.mark.parametrize("site", ["fc:input", "body.3:output"])
def test_attached_model_is_copied_with_its_projection(again, site):
    model, projection = build(Mlp).eval(), random_projection()
    original, want = output(model), by_hand(model, projection)
    handle = attach(model, projection, site)
    other = again(model)
    handle.remove()
    assert torch.equal(output(other), want)
    assert torch.equal(output(model), original)


@pytest.mark.parametrize("site", ["fc:input", "body.3:output"])
def test_hooks_after_loading_do_not_take_the_place_of_the_projection(site, monkeypatch):
    model, projection = build(Mlp).eval(), random_projection()
    want = by_hand(model, projection)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    attach(model, projection, site)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    loaded = torch.load(file, weights_only=False)
    fetch_moments(loaded, [X], site, progress=False)
    assert torch.equal(output(loaded), want)


def test_state_dict_of_an_attached_model_is_the_original_one():
    model = build(Mlp)
    before = everything(model)[0]
    with attach(model, random_projection()):
        assert everything(model)[0] == before


def test_folded_state_dict_loads_into_a_fresh_model():
    model, projection = build(Mlp).eval(), random_projection()
    want = by_hand(model, projection)
    fold(model, projection)
    fresh = Mlp().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(fresh), want)
    assert torch.equal(output(saved_and_loaded(model)), output(fresh))


# ---- refusals ----


@pytest.mark.parametrize("change", [attach, fold])
@pytest.mark.parametrize(
    ("kind", "site", "projection", "error", "message"),
    [
        (Mlp, "fc", random_projection(4), InputError, "projection: got dim 4, expected 5 at 'fc:input'"),
        (Mlp, "fc:output", random_projection(5), InputError, "projection: got dim 5, expected 3 at 'fc:output'"),
        (Maps, "head", random_projection(3), InputError, "projection: got dim 3, expected 5 at 'head:input'"),
        (Maps, "conv:output", random_projection(2), InputError, "projection: got dim 2, expected 5 at 'conv:output'"),
        (Mlp, "fd", random_projection(), SiteError, "site: no module 'fd'"),
        (Mlp, None, random_projection(site="gone:input"), SiteError, "site: no module 'gone'"),
        (Mlp, "fc", torch.eye(5), InputError, r"projection: got Tensor, expected a Projection"),
        (lambda: torch.relu, "fc", random_projection(), InputError, r"model: got \w+, expected a torch.nn.Module"),
    ],
)
def test_refusals(change, kind, site, projection, error, message):
    model = kind()
    before = everything(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        change(model, projection, site)
    assert before is None or everything(model) == before


def test_fold_refuses_modules_other_than_projections():
    with pytest.raises(InputError, match="projection: got Identity, expected a Projection"):
        fold(Mlp(), nn.Identity())


@pytest.mark.parametrize("site", ["body.2:output", "body.1:input", "body:output"])
def test_wrong_dim_where_the_module_does_not_tell_fails_at_the_first_pass(site):
    model = build(Mlp).eval()
    with (
        attach(model, random_projection(4), site),
        pytest.raises(InputError, match=f"projection: got dim 4, expected 5 at '{site}'"),
    ):
        model(X)
    assert output(model).shape == (7, 3)


def test_site_without_features_fails_at_the_first_pass():
    model = build(Tokens)
    with attach(model, random_projection(), "embed:input"), pytest.raises(SiteError, match=r"carries a torch.int64"):
        model(torch.zeros(2, 3, dtype=torch.int64))


def test_attach_to_a_lazy_layer_checks_at_the_first_pass():
    model = nn.Sequential(nn.LazyLinear(3))
    with attach(model, random_projection()):
        assert model(torch.zeros(2, 5)).shape == (2, 3)


@pytest.mark.parametrize("tie", ["storage", "slice", "bias"])
def test_fold_refuses_weights_that_overlap_in_memory(tie):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(12, 5), nn.Linear(5, 12)
            if tie == "storage":
                self.fc.weight.data = self.table.weight.data
            elif tie == "slice":
                self.fc.weight = nn.Parameter(torch.cat([self.table.weight.data, torch.zeros(4, 5)])[4:])
                self.table.weight = nn.Parameter(self.fc.weight.data[:12].view(12, 5))
            else:
                self.table.weight.data = self.fc.bias.data[:10].view(2, 5)

    model = Tied()
    before = everything(model)
    with pytest.raises(FoldError, match="shares its weight or bias with 'table'"):
        fold(model, random_projection(), "fc")
    assert everything(model) == before


def test_neighbours_in_memory_are_not_shared():
    model = build(Mlp).eval()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        end = start + parameter.numel()
        parameter.data = flat[start:end].view_as(parameter)
        start = end
    projection = random_projection()
    want = by_hand(model, projection)
    fold(model, projection, "fc")
    assert torch.allclose(output(model), want, atol=1e-5)


def test_fold_refuses_an_output_that_a_hook_may_change():
    model, projection = build(Mlp), random_projection(3)
    with attach(model, projection, "fc:output"), pytest.raises(FoldError, match="a hook changes or sees what it"):
        fold(model, projection, "fc:output")
    fold(model, projection, "fc:output")


def test_attach_refuses_a_layer_that_is_never_called():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(SiteError, match=r"is read by nn\.MultiheadAttention without being called; use fold"):
        attach(layer, random_projection(8), "self_attn.out_proj")
