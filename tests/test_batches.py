from collections import namedtuple

import numpy as np
import pytest
import torch
from models import Output
from torch import nn

from loft_fast import InputError, batches

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
Pair = namedtuple("Pair", "x y")


class Echo(nn.Module):
    """Returns what it was called with."""

    def forward(self, x, scale=1):
        return {"x": x, "scale": scale}


class EchoAll(nn.Module):
    def forward(self, **inputs):
        return inputs


class Listing:
    """A batch class of another library."""

    device = "cpu"

    def to(self, device):
        moved = Listing()
        moved.device = str(device)
        return moved


def test_to_device_reaches_every_tensor():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    batch = {"x": X, "more": [(X, "text"), Pair(X, 3)], "own": Listing(), "packed": packed}
    moved = batches.to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["more"][0][0].is_meta
    assert moved["more"][0][1] == "text"
    assert moved["more"][1].x.is_meta
    assert moved["more"][1].y == 3
    assert moved["own"].device == "meta"
    assert isinstance(moved["packed"], nn.utils.rnn.PackedSequence)
    assert moved["packed"].data.is_meta
    assert batch["x"] is X


@pytest.mark.parametrize(
    ("batch", "scale"),
    [
        (X, 1),
        ([X, Y], 1),
        ((X, Y, "text"), 1),
        ({"x": X}, 1),
        ({"x": X, "scale": 2, "labels": Y}, 2),
        ({"x": X, "label": Y, "author": ["a", "b", "c", "d"]}, 1),
        (({"x": X, "scale": 3}, Y), 3),
    ],
)
def test_call_passes_what_forward_takes(batch, scale):
    got = batches.call(Echo(), batch)
    assert got["x"] is X
    assert got["scale"] == scale


def test_call_passes_all_but_labels_and_group_to_a_forward_that_takes_anything():
    batch = {"x": X, "labels": Y, "author": ["a", "b", "c", "d"], "more": 1}
    assert set(batches.call(EchoAll(), batch, group="author")) == {"x", "more"}


@pytest.mark.parametrize("batch", [(X, Y), [X, Y, 0], {"labels": Y}, {"label": Y, "x": X}, ({"x": X}, Y)])
def test_labels(batch):
    assert batches.labels(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}, "text"])
def test_no_labels(batch):
    assert batches.labels(batch) is None


def test_attention_mask():
    mask = torch.ones(4, 7)
    assert batches.attention_mask({"attention_mask": mask}) is mask
    assert batches.attention_mask(({"attention_mask": mask}, Y)) is mask
    assert batches.attention_mask({"attention_mask": None}) is None
    assert batches.attention_mask((X, Y)) is None


@pytest.mark.parametrize("output", [(X,), X[0], {"logits": X}, Output(None)])
def test_logits_refuse_other_outputs(output):
    with pytest.raises(InputError, match=f"model: its output is {type(output).__name__}, expected logits"):
        batches.logits(output)


SCORES = torch.eye(3)[Y]
TOKEN_SCORES = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])]  # (n, t, classes)
MAP_SCORES = TOKEN_SCORES.permute(0, 2, 1).unsqueeze(3)  # (n, classes, h, w)


@pytest.mark.parametrize(
    ("batch", "output", "group", "want"),
    [
        ((X, Y), None, "label", Y),
        ((X, ["a", "b", "a", "c"]), None, "label", ["a", "b", "a", "c"]),
        (X, SCORES, "prediction", Y),
        (X, Output(SCORES), "prediction", Y),
        (X, TOKEN_SCORES, "prediction", torch.tensor([[0, 1], [2, 2]])),
        (X, MAP_SCORES, "prediction", torch.tensor([[[0], [1]], [[2], [2]]])),
        ((X, Y), SCORES.flip(0), "auto", Y),
        (X, SCORES, "auto", Y),
        ((X, torch.randn(4)), Output(SCORES), "auto", None),
        ((X, torch.eye(4)), SCORES, "auto", None),
        ((X, SCORES.flip(0).argmax(1).tolist()), SCORES, "auto", Y.flip(0)),
        ((X, np.array([2, 1, 0, 2])), SCORES, "auto", torch.tensor([2, 1, 0, 2])),
        ((X, Y.unsqueeze(1).to(torch.uint8)), SCORES, "auto", Y),
        ((X, {"id": 7}), SCORES, "auto", Y),
        (X, TOKEN_SCORES, "auto", None),
        (X, (X, X), "auto", None),
        ((X, None, Y), None, 2, Y),
        ({"author": ["a", "b"]}, None, "author", ["a", "b"]),
        ({"author": np.array([3, 4])}, None, "author", torch.tensor([3, 4])),
        ((X, Y), None, lambda batch: batch[1] % 2, Y % 2),
        ((X, Y), None, lambda batch: (str(int(y)) for y in batch[1]), ["0", "1", "2", "1"]),
    ],
)
def test_keys(batch, output, group, want):
    got = batches.keys(batch, output, group)
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


@pytest.mark.parametrize(
    ("batch", "group", "message"),
    [
        (X, "label", "group: got 'label', but the batches carry no class labels"),
        ((X, torch.randn(4)), "label", "group: got 'label', but the batches carry no class labels"),
        ({"x": X}, "author", "group: got 'author', which is not in the batches"),
        ((X, Y), "author", "group: got 'author', which is not in the batches"),
        ((X, Y), 2, "group: got 2, which is not in the batches"),
        (X, 1, "group: got 1, which is not in the batches"),
        (X, lambda batch: 5, "group: got int, expected a tensor or a list with one key per row"),
        (X, lambda batch: "abcd", "group: got str, expected a tensor or a list with one key per row"),
        (X, lambda batch: [["a"], ["b"]], "group: got list, expected a tensor or a list with one key per row"),
    ],
)
def test_keys_refuse(batch, group, message):
    with pytest.raises(InputError, match=message):
        batches.keys(batch, None, group)
