import logging
from contextlib import nullcontext

import pytest
import torch
from models import WRAPPED, ByKeyword, Maps, Mlp, Tokens, build, everything, random_projection
from torch import nn

from loft_fast import InputError, SiteError, attach, fetch_moments
from loft_fast.sites import Site, device_of, evaluating, find_site, last_linear, unwrap


@pytest.mark.parametrize(
    ("site", "name", "side"),
    [
        (None, "fc", "input"),
        ("fc", "fc", "input"),
        ("fc:input", "fc", "input"),
        ("fc:output", "fc", "output"),
        ("body.2:output", "body.2", "output"),
        (":output", "", "output"),
    ],
)
def test_forms(site, name, side):
    model = Mlp()
    place = find_site(model, site)
    assert (place.name, place.side, place.module) == (name, side, model.get_submodule(name))
    assert str(place) == f"{name}:{side}"


def test_default_is_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "loft_fast"):
        find_site(Tokens())
    assert "last linear layer, 'fc'" in caplog.text


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("fcc", r"no module 'fcc' in the model; nearest: 'fc'"),
        ("bodi.0", r"no module 'bodi.0' in the model; nearest: 'body.0'"),
        ("???", r"no module '\?\?\?' in the model; nearest: 'body.2', 'body.3', 'fc'"),
        ("fc:middle", "got 'fc:middle', expected 'name', 'name:input' or 'name:output'"),
        (3, "got int, expected the name of a module"),
        (nn.Linear(2, 2), "got Linear, expected the name of a module"),
    ],
)
def test_unknown_sites(site, message):
    with pytest.raises(SiteError, match=f"site: {message}"):
        find_site(Mlp(), site)


def test_no_default_without_a_linear():
    with pytest.raises(SiteError, match=r"site: the model has no nn.Linear to default to"):
        find_site(Maps())


@pytest.mark.parametrize("model", [None, torch.relu, "fc"])
def test_model_must_be_a_module(model):
    with pytest.raises(InputError, match=r"model: got \w+, expected a torch.nn.Module"):
        find_site(model, "fc")


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_do_not_change_names(wrap):
    model = Mlp()
    fc, first = model.fc, model.body[0]
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert find_site(wrapped).plain is fc
    assert find_site(wrapped, "fc:output").plain is fc
    assert find_site(wrapped, "body.0").plain is first
    assert last_linear(wrapped) == "fc"


class Norm2d(nn.LayerNorm):
    """As in ConvNeXt: normalises the channels of feature maps."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.Linear(3, 2), (4, 3), 1),
        (nn.Linear(3, 2), (4, 7, 3), 2),
        (nn.Linear(3, 2), (4, 5, 6, 3), 3),
        (nn.Embedding(3, 2), (4, 5, 6, 2), 3),
        (nn.LayerNorm(3), (4, 5, 6, 3), 3),
        (nn.RMSNorm(3), (4, 5, 6, 3), 3),
        (nn.LayerNorm([3, 5, 6]), (4, 3, 5, 6), 1),
        (Norm2d(3), (4, 3, 5, 6), 1),
        (nn.Conv1d(3, 2, 1), (4, 3, 7), 1),
        (nn.Conv2d(3, 2, 1), (4, 3, 5, 6), 1),
        (nn.Conv3d(3, 2, 1), (4, 3, 5, 6, 7), 1),
        (nn.ConvTranspose1d(3, 2, 1), (4, 3, 7), 1),
        (nn.BatchNorm1d(3), (4, 3), 1),
        (nn.BatchNorm1d(3), (4, 3, 7), 1),
        (nn.GroupNorm(1, 3), (4, 3, 7), 1),
        (nn.AdaptiveAvgPool1d(1), (4, 3, 7), 1),
        (nn.MaxPool1d(2), (4, 3, 7), 1),
        (nn.ReLU(), (4, 3), 1),
        (nn.ReLU(), (4, 7, 3), 2),
        (nn.ReLU(), (4, 3, 5, 6), 1),
        (nn.Flatten(), (4, 3, 1, 1), 1),
    ],
)
def test_channel_dim(module, shape, dim):
    site = Site("it", "input", module)
    features = torch.zeros(shape)
    assert site.channel_dim(features) == dim
    rest = [size for i, size in enumerate(shape) if i != dim]
    assert site.channels_last(features).shape == (*rest, shape[dim])


@pytest.mark.parametrize(
    ("features", "got"),
    [
        ((torch.zeros(2, 3), None), "a tuple"),
        (None, "a NoneType"),
        (torch.zeros(2, 3, dtype=torch.int64), r"a torch.int64 tensor of shape \(2, 3\)"),
        (torch.zeros(3), r"a torch.float32 tensor of shape \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"a torch.complex64 tensor of shape \(2, 3\)"),
    ],
)
def test_check_refuses(features, got):
    with pytest.raises(SiteError, match=f"site: 'fc:output' carries {got}, expected a float tensor"):
        Site("fc", "output", nn.Linear(3, 2)).check(features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "over"), [((4, 5), None), ((4, 700, 5), 1), ((4, 5, 26, 27), (2, 3))])
def test_pooled_features_are_means_over_positions(dtype, shape, over):
    """Seven hundred positions are more than 16 bits can count."""
    features = (100 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = Site("", "output", nn.Identity()).pooled(features)
    wanted = features.double() if over is None else features.double().mean(over)
    assert found.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_pooled_tokens_are_those_that_count():
    features, mask = torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    found = Site("", "output", nn.Identity()).pooled(features, mask)
    torch.testing.assert_close(found[0], features[0, :2].mean(0))
    torch.testing.assert_close(found[1], features[1, 1:].mean(0))
    assert not found[2].any()


@pytest.mark.parametrize(("model", "name"), [(nn.Sequential(nn.Linear(5, 3)), "0"), (ByKeyword(), "fc")])
@pytest.mark.parametrize("side", ["input", "output"])
def test_hook_sees_and_replaces(model, name, side):
    place = find_site(model, f"{name}:{side}")
    x = torch.randn(4, 5)
    seen = []
    want = x if side == "input" else model(x)
    hook = place.hook(seen.append)
    unchanged = model(x)
    hook.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], want)
    hook = place.hook(torch.zeros_like)
    replaced = model(x)
    hook.remove()
    assert torch.equal(model(x), unchanged)
    bias = place.plain.bias.expand(4, 3)
    assert torch.equal(replaced, bias if side == "input" else torch.zeros(4, 3))


def test_hook_leaves_other_arguments_alone():
    class Scale(nn.Module):
        def forward(self, hidden, factor, shift=0.0):
            return hidden * factor + shift

    model = Scale()
    with_hook = find_site(model, ":input").hook(torch.ones_like)
    x = torch.zeros(2, 3)
    assert torch.equal(model(x, 2.0, shift=1.0), torch.full((2, 3), 3.0))
    assert torch.equal(model(shift=1.0, factor=2.0, hidden=x), torch.full((2, 3), 3.0))
    with_hook.remove()


def test_hook_without_a_first_argument():
    class Takes(nn.Module):
        def forward(self, hidden=None, other=None):
            return other

    model = Takes()
    find_site(model, ":input").hook(torch.ones_like)
    with pytest.raises(SiteError, match="is called without its first argument"):
        model(other=torch.zeros(2, 3))


def mixed_modes():
    model = build(Mlp)
    model.body[1].eval()
    return model


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_evaluating_restores_every_mode(error):
    model = mixed_modes()
    before = everything(model)
    with pytest.raises(error) if error else nullcontext(), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        if error:
            raise error
    assert everything(model) == before
    assert torch.is_grad_enabled()


def test_evaluating_restores_modes_when_eval_fails_half_way():
    class Broken(nn.Module):
        def train(self, mode=True):
            if not mode:
                raise RuntimeError("broken")
            return super().train(mode)

    model = nn.Sequential(nn.Dropout(), Broken())
    with pytest.raises(RuntimeError, match="broken"), evaluating(model):
        pass
    assert [module.training for module in model.modules()] == [True, True, True]


def test_evaluating_undoes_what_eval_mode_does():
    class Merging(nn.Linear):
        """As low-rank adapters do: eval mode merges a term into the weight, training mode takes it out."""

        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = Merging(3, 3)
    with evaluating(model):
        assert model.merged
    assert not model.merged


def test_evaluating_runs_no_compiled_code():
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    model = torch.compile(build(Mlp).eval(), backend=backend)
    x = torch.randn(2, 6)
    with evaluating(model):
        model(x)
    assert not runs
    model(x)
    assert runs


def test_device_of():
    assert device_of(Mlp()) == torch.device("cpu")
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")) == torch.device("meta")
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert device_of(spread) == torch.device("cpu")
    with pytest.raises(InputError, match="device: the model is spread over cpu, meta, expected device=None"):
        device_of(spread, alone=True)


# ---- models that do unusual things ----


class Remembers(nn.Module):
    """Makes a tensor in its first forward pass and keeps it."""

    scale = None

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 5), nn.LazyLinear(3)

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.arange(5.0).cos()
        return self.fc(self.body(x) * self.scale)


def test_what_a_model_keeps_of_its_first_pass_can_be_trained_with():
    model, x = Remembers(), torch.randn(9, 6)
    fetch_moments(model, [x], "body:output", progress=False)
    model(x).square().mean().backward()
    assert model.body.weight.grad.abs().max() > 0


@pytest.mark.parametrize("site", ["layers.0:output", "layers.1.linear2:output", "layers.1.norm1"])
def test_layers_of_a_transformer_with_padding(site):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = encoder.layers

        def forward(self, x, attention_mask):
            return encoder(x, src_key_padding_mask=attention_mask == 0)[:, 0]

    mask = (torch.arange(7) < torch.tensor([[7], [3], [5]])).long()
    x = torch.randn(3, 7, 8)
    model, was = Padded(), torch.backends.mha.get_fastpath_enabled()
    found = fetch_moments(model, [{"x": x, "attention_mask": mask}], site, progress=False)
    assert found.count == 15
    assert torch.backends.mha.get_fastpath_enabled() == was
    with attach(model, random_projection(8), site), torch.no_grad(), pytest.raises(SiteError, match="a nested tensor"):
        model(x, mask)


def test_scripted_models_are_refused():
    model = build(Mlp)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    for call in (find_site, unwrap):
        with pytest.raises(
            InputError, match=r"model: got RecursiveScriptModule, expected a torch\.nn\.Module that was not"
        ):
            call(scripted)
    model.body = scripted
    assert str(find_site(model)) == "fc:input"
    with pytest.raises(SiteError, match="'body' is a RecursiveScriptModule that no forward pass goes through"):
        find_site(model, "body")
    assert fetch_moments(nn.Sequential(scripted, nn.Linear(3, 2)), [torch.randn(4, 6)], progress=False).count == 4


def test_modules_that_are_never_called_are_refused():
    exported = torch.export.export(build(Mlp).eval(), (torch.randn(2, 6),)).module()
    with pytest.raises(SiteError, match="'fc' is a Module that no forward pass goes through"):
        find_site(exported, "fc")
    with pytest.raises(SiteError, match="'0' is a ModuleList that no forward pass goes through"):
        find_site(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), "0")
