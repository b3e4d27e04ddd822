import copy
import logging

import pytest
import torch
from models import WRAPPED, ByKeyword, Classes, Maps, Mlp, Output, build, everything, rows_of
from test_angle import Crowded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loft_fast as loft
from loft_fast import FoldError, GroupedMoments, InputError, Moments, SiteError
from loft_fast.sites import find_site
from loft_fast.watch import Watch

RETAIN, FORGET = rows_of([0, 1]), rows_of([2])


def unlearn(model, retain=RETAIN, forget=FORGET, **kwargs):
    return loft.unlearn(model, retain, forget, progress=False, **kwargs)


def moments_of(model, batches, site=None, group="label"):
    return loft.fetch_moments(model, batches, site, group, progress=False)


@torch.no_grad()
def predictions(model, batches):
    return torch.cat([model(x).argmax(1) for x, _ in batches])


def truth(batches):
    return torch.cat([y for _, y in batches])


# ---- what it does ----


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_class_is_forgotten_and_the_rest_kept(fold, rank):
    model = build(Classes)
    assert torch.equal(predictions(model, FORGET), truth(FORGET))
    unlearn(model, rank=rank, fold=fold)
    fresh = rows_of([0, 1], seed=1)
    assert torch.equal(predictions(model, fresh), truth(fresh))
    assert not (predictions(model, rows_of([2], seed=1)) == 2).any()


def test_fold_elsewhere_than_in_the_head_closes_nothing():
    model = build(Classes)
    head = everything(model.fc)
    assert unlearn(model, site="body:output", fold=True).site == "body:output"
    assert everything(model.fc) == head
    assert not (predictions(model, rows_of([2], seed=1)) == 2).any()


@pytest.mark.parametrize("fold", [False, True])
def test_the_angle_is_for_a_head_with_closed_outputs_where_they_are_closed(fold):
    problem = Crowded()
    model = nn.Sequential(problem.head)
    result = unlearn(model, problem.moments.without([3]), problem.moments.select([3]), fold=fold)
    assert ("outputs are closed" in result.projection.certificate.why) == fold
    bias = problem.head.bias.detach()
    others = torch.cat([bias[:3], bias[4:]])
    assert torch.isclose(bias[3], others.mean() - 20) == fold


def test_attached_result():
    model = build(Classes)
    before = everything(model)
    result = unlearn(model)
    assert result.site == result.projection.site == "fc:input"
    assert everything(model)[0] == before[0]
    assert everything(model)[2] != before[2]
    assert result.projection.certificate.relative_gap < 1e-6
    assert set(result.seconds) == {"moments", "solve", "attach"}
    assert (result.retain.keys(), result.retain.count) == ([0, 1], 80)
    assert (result.forget.keys(), result.forget.count) == ([2], 40)
    result.attached.remove()
    assert everything(model) == before


def test_folded_result():
    attached, folded = build(Classes), build(Classes)
    unlearn(attached)
    result = unlearn(folded, fold=True)
    assert result.attached is None
    assert set(result.seconds) == {"moments", "solve", "fold"}
    assert everything(folded)[2] == everything(build(Classes))[2]
    x = torch.randn(9, 8)
    torch.testing.assert_close(folded(x)[:, :2], attached(x)[:, :2])
    torch.testing.assert_close(folded(x)[:, 2], attached(x)[:, :2].mean(1) - 20)  # class 2 is gone


def test_outputs_of_classes_that_stay_are_not_closed():
    attached, folded = build(Classes), build(Classes)
    shared = [*RETAIN, *FORGET]
    unlearn(attached, retain=shared)
    unlearn(folded, retain=shared, fold=True)
    x = torch.randn(9, 8)
    torch.testing.assert_close(folded(x), attached(x))


def test_bytes_are_those_of_the_tensors():
    result = unlearn(build(Classes), rank=3)
    parts = [moments[key] for moments in (result.retain, result.forget) for key in moments]
    assert result.bytes["moments"] == sum(part.mean.nbytes + part.scatter.nbytes for part in parts)
    assert result.bytes["projection"] == result.projection.basis.nbytes + result.projection.center.nbytes


def test_kept_moments_answer_the_next_request():
    model = build(Classes)
    result = unlearn(model)
    result.attached.remove()
    both = result.retain + result.forget
    unlearn(model, both.without([0]), both.select([0]))
    assert not (predictions(model, rows_of([0])) == 0).any()
    assert torch.equal(predictions(model, rows_of([1, 2])), truth(rows_of([1, 2])))


@pytest.mark.parametrize("rank", [None, 2])
def test_moments_and_loaders_give_the_same(rank):
    model = build(Classes)
    retain, forget = moments_of(model, RETAIN), moments_of(model, FORGET)
    want = unlearn(build(Classes), rank=rank).projection
    for pair in [(retain, forget), (RETAIN, forget), (retain, FORGET)]:
        got = unlearn(build(Classes), *pair, rank=rank)
        assert torch.equal(got.projection.basis, want.basis)
        assert torch.equal(got.projection.center, want.center)
    assert got.retain is retain


@pytest.mark.parametrize(
    "loader",
    [
        lambda batches: (batch for batch in batches),
        lambda batches: [{"x": x, "labels": y, "index": y} for x, y in batches],
        lambda batches: DataLoader(TensorDataset(*map(torch.cat, zip(*batches, strict=True))), batch_size=16),
    ],
    ids=["generator", "dictionaries", "DataLoader"],
)
def test_loaders(loader):
    want = unlearn(build(Classes)).projection
    assert torch.equal(unlearn(build(Classes), loader(RETAIN), loader(FORGET)).projection.basis, want.basis)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("fold", [False, True])
def test_wrapped_models(wrap, fold):
    plain = build(Mlp).eval()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    retain, forget = [x[:20]], [x[20:] + 1]
    original = plain(x)
    unlearn(plain, retain, forget, rank=2, fold=fold)
    model = wrap(build(Mlp).eval())
    model(x)
    unlearn(model, retain, forget, rank=2, fold=fold)
    torch.testing.assert_close(model(x), plain(x))
    assert not torch.allclose(model(x), original, atol=1e-3)


def test_layer_called_by_keyword():
    model = build(ByKeyword)
    x = torch.randn(30, 5)
    assert unlearn(model, [x], [x[:5] + 3], rank=2).site == "fc:input"


class LanguageModel(nn.Module):
    """input_ids (n, t) -> .logits (n, t, 11): as many possible groups as there are words."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.lm_head = nn.Linear(5, 11)

    def forward(self, input_ids):
        return Output(self.lm_head(self.embed(input_ids)))


@pytest.mark.parametrize("labelled", [False, True])
def test_language_model_keeps_one_matrix_a_set(labelled):
    ids = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, **({"labels": ids} if labelled else {})}
    result = unlearn(build(LanguageModel), [batch], [{"input_ids": ids[:2]}])
    assert result.site == "lm_head:input"
    assert isinstance(result.retain, Moments)
    assert result.retain.count == 48
    assert not result.projection.certificate.predicted


# ---- where the rank comes from ----


def test_rows_within_classes_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING, "loft_fast"):
        unlearn(build(Classes))
        assert not caplog.records
        unlearn(build(Classes), forget=rows_of([1, 2], seed=1))
    assert "forget: 1 of its classes have rows to retain, too: see match_retrained" in caplog.text


def test_last_layer_predicts(caplog):
    with caplog.at_level(logging.INFO, "loft_fast"):
        predicted = unlearn(build(Classes)).projection.certificate.predicted
    assert predicted["retain accuracy"] > 99
    assert predicted["forget accuracy"] < 1
    assert "does not score" not in caplog.text


class Doubled(Classes):
    """Its fc is registered first and is not what scores the classes: the next layer is."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(super().forward(x))


def ungrouped(batches):
    return moments_of(build(Classes), batches, group=None)


def by_name(batches):
    return moments_of(build(Classes), batches, group=lambda batch: [f"class {int(y)}" for y in batch[1]])


@pytest.mark.parametrize(
    ("kind", "site", "data"),
    [
        (Classes, "body", lambda batches: batches),
        (Classes, "fc:output", lambda batches: batches),
        (Classes, "fc", ungrouped),
        (Classes, "fc", by_name),
        (Classes, "fc", lambda batches: [(x, y + 2) for x, y in batches]),
        (Doubled, "fc", lambda batches: batches),
    ],
    ids=["hidden layer", "output", "no groups", "names", "keys beyond the outputs", "followed by another"],
)
def test_other_layers_do_not_predict(kind, site, data, caplog):
    with caplog.at_level(logging.INFO, "loft_fast"):
        certificate = unlearn(build(kind), data(RETAIN), data(FORGET), site=site).projection.certificate
    assert "default" in certificate.why
    assert not certificate.predicted
    assert "does not score the groups" in caplog.text


def test_a_regression_head_does_not_predict():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    assert not unlearn(model, [x], [x[:5] + 3]).projection.certificate.predicted


def test_rank():
    certificate = unlearn(build(Classes), rank=3).projection.certificate
    assert certificate.rank == 3
    assert not certificate.predicted


def test_about():
    assert torch.count_nonzero(unlearn(build(Classes), rank=3, about="own").projection.center) == 0
    assert torch.count_nonzero(unlearn(build(Classes), rank=3, about="retain").projection.center) == 8


def test_erase(caplog):
    assert "probe" in unlearn(build(Classes), erase=True).projection.certificate.why
    assert not caplog.records


@pytest.mark.parametrize("kwargs", [{"rank": 3}, {"site": "body"}])
def test_erase_without_a_head_is_refused(kwargs):
    model = build(Classes)
    with pytest.raises(InputError, match="erase: got"):
        unlearn(model, erase=True, **kwargs)


def test_site_of_given_moments_is_the_default():
    model = build(Classes)
    retain, forget = (moments_of(model, batches, "body:output") for batches in (RETAIN, FORGET))
    assert unlearn(model, retain, FORGET, rank=2).site == "body:output"
    assert unlearn(model, RETAIN, forget, rank=2).site == "body:output"
    assert unlearn(model, retain, forget, rank=2, site="fc").site == "fc:input"


# ---- refusals ----


class Untouched:
    """A loader that nobody may start."""

    def __iter__(self):
        raise AssertionError("the pass over the data has begun")


@pytest.mark.parametrize(
    ("kind", "kwargs", "error", "message"),
    [
        (Classes, {"rank": 0}, InputError, r"rank: got 0, expected an integer in \[1, 7\]"),
        (Classes, {"rank": 8}, InputError, r"rank: got 8, expected an integer in \[1, 7\]"),
        (Classes, {"rank": 2.0}, InputError, r"rank: got 2.0, expected an integer in \[1, 7\]"),
        (Classes, {"site": "gone"}, SiteError, "site: no module 'gone'"),
        (Maps, {}, SiteError, r"site: the model has no nn.Linear to default to"),
        (Mlp, {"site": "body.1", "fold": True}, FoldError, "cannot fold into 'body.1:input': it is a BatchNorm1d"),
        (Maps, {"site": "conv", "fold": True}, FoldError, "site: cannot fold into 'conv:input': it is a convolution"),
        (Classes, {"retain": Moments(5)}, InputError, "retain: got moments of dim 5, expected 8 at 'fc:input'"),
        (Classes, {"forget": GroupedMoments(5)}, InputError, "forget: got moments of dim 5, expected 8 at 'fc:input'"),
    ],
)
def test_refused_before_the_pass_over_the_data(kind, kwargs, error, message):
    model = build(kind)
    before = everything(model)
    with pytest.raises(error, match=message):
        unlearn(model, **{"retain": Untouched(), "forget": Untouched(), **kwargs})
    assert everything(model) == before


def nan_in_second(batches):
    return [batches[0], (batches[1][0].clone().index_fill_(0, torch.tensor([0, 3]), torch.nan), batches[1][1])]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"retain": []}, "retain: loader: it yielded no batches"),
        ({"forget": []}, "forget: loader: it yielded no batches"),
        ({"forget": None}, "forget: loader: got NoneType, expected an iterable of batches"),
        ({"forget": Moments(8)}, "forget: the set is empty"),
        ({"retain": GroupedMoments(8)}, "retain: the set is empty"),
        ({"forget": [(torch.zeros(0, 8), torch.zeros(0).long())]}, "forget: the set is empty"),
        ({"retain": [(torch.ones(4, 8), torch.zeros(4).long())]}, "retain: 4 rows of zero variance"),
        ({"retain": nan_in_second(RETAIN)}, "retain: batch 1: x: 2 of 16 rows contain NaN or Inf"),
        ({"forget": nan_in_second(FORGET)}, "forget: batch 1: x: 2 of 16 rows contain NaN or Inf"),
        ({"about": "both"}, "about: got 'both', expected 'retain' or 'own'"),
    ],
)
def test_refusals_leave_the_model_alone(kwargs, message, fold):
    model = build(Classes)
    before = everything(model)
    with pytest.raises(InputError, match=message):
        unlearn(model, fold=fold, **kwargs)
    assert everything(model) == before


def test_model_must_be_a_module():
    with pytest.raises(InputError, match=r"model: got function, expected a torch.nn.Module"):
        unlearn(lambda x: x, Untouched(), Untouched())


# ---- what makes the outputs ----


class Ahead(Classes):
    """Its head is registered first: the last linear layer is another one, as wide as the head or wider."""

    def __init__(self, width=3, returns="head"):
        super().__init__()
        self.other, self.returns = nn.Linear(8, width), returns

    def forward(self, x):
        features = self.body(x)
        other, scores = self.other(features), self.fc(features)
        return {"head": scores, "hidden": self.fc(features + 0 * other.mean(1, keepdim=True))}[self.returns]


@pytest.mark.parametrize(("width", "returns"), [(3, "head"), (8, "hidden")], ids=["auxiliary", "hidden"])
def test_outputs_of_a_layer_that_is_no_head_are_not_closed(width, returns, caplog):
    model = build(Ahead, width, returns)
    other = model.other
    folded, before = torch.randn(5, 8), copy.deepcopy(other)
    result = unlearn(model, fold=True)
    assert result.site == "other:input"
    assert "other does not make the model's outputs" in caplog.text
    assert not result.projection.certificate.predicted
    assert torch.allclose(other(folded), before(result.projection(folded)), atol=1e-5)  # folded, and no more


@pytest.mark.parametrize(
    "last", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()], ids=lambda layer: type(layer).__name__
)
def test_what_keeps_the_order_may_follow_the_head(last):
    model = nn.Sequential(build(Classes), last)
    result = unlearn(model, fold=True)
    assert result.projection.certificate.predicted
    assert (model(FORGET[0][0]).argmin(1) == 2).all()


@pytest.mark.parametrize(
    "targets",
    [lambda y: torch.eye(3)[y], lambda y: y.float(), lambda y: None],
    ids=["several labels", "numbers", "none"],
)
def test_without_class_labels_nothing_is_closed(targets):
    retain, forget = ([(x, targets(y)) for x, y in part] for part in (RETAIN, FORGET))
    model = build(Classes)
    bias, result = model.fc.bias[2].item(), unlearn(model, retain, forget, fold=True)
    assert "outputs are closed" not in result.projection.certificate.why
    assert abs(model.fc.bias[2].item() - bias) < 10


@pytest.mark.parametrize(
    "form",
    [torch.Tensor.tolist, torch.Tensor.numpy, lambda y: y.unsqueeze(1), lambda y: y.to(torch.uint8)],
    ids=["list", "array", "column", "bytes"],
)
def test_labels_of_any_form_are_the_same(form):
    want, model = build(Classes), build(Classes)
    unlearn(want, fold=True)
    unlearn(model, *([(x, form(y)) for x, y in part] for part in (RETAIN, FORGET)), fold=True)
    assert everything(model) == everything(want)


def test_a_loader_of_a_length_keeps_it():
    class Counted(list):
        asked = 0

        def __len__(self):
            Counted.asked += 1
            return super().__len__()

    unlearn(build(Classes), Counted(RETAIN))
    assert Counted.asked


def test_a_model_may_return_what_holds_itself():
    class Nested(Classes):
        def forward(self, x):
            found = Output(super().forward(x))
            found.model, found.itself = self, found
            return found

    model = build(Nested)
    unlearn(model, fold=True)
    assert not (model(FORGET[0][0]).logits.argmax(1) == 2).any()


def test_few_rows_tell_whether_a_layer_is_the_head():
    watch = Watch(model := build(Classes), find_site(model, "fc"))
    for batch in watch.over(20 * RETAIN):
        model(batch[0])
    assert 256 <= watch.rows < 256 + len(RETAIN[0][0])
    assert watch.is_head
    assert not model.fc._forward_hooks
    elsewhere = Watch(model, find_site(model, "body:output"))
    for batch in elsewhere.over(RETAIN):
        model(batch[0])
    assert elsewhere.rows == 0  # nothing is sorted there
