import copy

import pytest
import torch
from torch import nn

from loft_fast import FoldError, InputError, Projection, close_outputs, fold


def classifier(bias=True, dtype=torch.float32, conv=False):
    torch.manual_seed(0)
    head = nn.Conv2d(8, 6, 1, bias=bias) if conv else nn.Linear(8, 6, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 8, 1) if conv else nn.Linear(3, 8), nn.ReLU(), head).to(dtype)


def rows(dtype=torch.float32, conv=False):
    x = 30 * torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    return (x[..., None, None] if conv else x).to(dtype)


@pytest.mark.parametrize("shift", [0.0, -1e3, 1e3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_closed_outputs_are_never_chosen_and_the_others_are_as_they_were(bias, conv, shift):
    model, x = classifier(bias, conv=conv), rows(conv=conv)
    if bias:
        model[-1].bias.data += shift
    before = model(x).flatten(1)
    closed = before.argmax(1).unique()[-2:].flip(0).tolist()
    assert len(closed) == 2
    close_outputs(model, [*closed, closed[0]], "2")
    after = model(x).flatten(1)
    stay = [one for one in range(6) if one not in closed]
    assert torch.equal(after[:, stay], before[:, stay])
    below = after[:, stay].double().mean(1, keepdim=True) - after[:, closed].double()
    assert below.sub(20).abs().max() < 1e-3
    assert after.softmax(1)[:, closed].max() < 3e-9


def test_nothing_is_left_of_what_they_stood_for():
    one, other = classifier(), classifier()
    other[-1].weight.data[2], other[-1].bias.data[2] = torch.randn(8), 7.0
    for model in (one, other):
        close_outputs(model, [2])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, x = classifier(dtype=dtype), rows(dtype)
    close_outputs(model, {3})
    assert model[-1].weight.dtype == model[-1].bias.dtype == dtype
    assert (model(x).argmax(1) != 3).all()


def test_nothing_to_close_and_twice():
    model = classifier(bias=False)
    before = copy.deepcopy(model.state_dict())
    close_outputs(model, [])
    assert model.state_dict().keys() == before.keys()
    close_outputs(model, [1])
    once = copy.deepcopy(model.state_dict())
    close_outputs(model, [1], "2")
    assert all(torch.equal(once[name], model.state_dict()[name]) for name in once)


@pytest.mark.parametrize(
    ("outputs", "site", "error", "message"),
    [
        ([6], None, InputError, "outputs: got 6, expected indices from 0 to 5"),
        ([-1], None, InputError, "outputs: got -1"),
        ([1.5], None, InputError, "outputs: got 1.5"),
        (range(6), None, InputError, "outputs: got all 6, expected at least one to stay"),
        ([1], "2:output", InputError, "site: got '2:output', expected the input"),
        ([1], "1", FoldError, "it is a ReLU"),
    ],
)
def test_refusals_leave_the_model_as_it_was(outputs, site, error, message):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        close_outputs(model, outputs, site)
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_one_after_another_is_as_all_at_once(bias, dtype):
    once, twice = classifier(bias, dtype), classifier(bias, dtype)
    close_outputs(once, [1, 4, 5])
    for one in ([4], [1, 5]):
        close_outputs(twice, one)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(once[-1], name), getattr(twice[-1], name))


def test_a_projection_in_between_does_not_open_them():
    model = classifier()
    close_outputs(model, [4])
    fold(model, Projection(torch.linalg.qr(torch.randn(8, 5))[0], torch.randn(8)))
    close_outputs(model, [1])
    weight = model[-1].weight
    assert torch.allclose(weight[4], weight[[0, 2, 3, 5]].mean(0), atol=1e-6)


@pytest.mark.parametrize("low", [-25.0, -1e3])
def test_an_output_that_is_only_unlikely_stays_open(low):
    model = classifier()
    model[-1].bias.data[3] = low
    before = model[-1].weight[3].clone()
    close_outputs(model, [1])
    assert torch.equal(model[-1].weight[3], before)


def test_the_last_ones_cannot_be_closed_later_either():
    model = classifier()
    close_outputs(model, [0, 1, 2])
    with pytest.raises(InputError, match="outputs: got all 6"):
        close_outputs(model, [3, 4, 5])


@pytest.mark.parametrize("outputs", [None, "1", [3, "a"], [[3]], [True], 6, torch.tensor([1])])
def test_what_is_no_list_of_indices_is_refused(outputs):
    with pytest.raises(InputError, match="outputs: got"):
        close_outputs(classifier(), outputs)
