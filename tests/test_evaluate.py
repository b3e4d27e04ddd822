import copy
import sys

import pytest
import torch
from models import COMPILED, Classes, Maps, Mlp, Tokens, build, everything, rows_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loft_fast import InputError, MissingExtraError, Projection, SiteError, attach, fold, unlearn
from loft_fast.evaluate import SETS, evaluate, membership_inference, probe_auc

DATA = {
    "retain_train": rows_of([0, 1]),
    "forget_train": rows_of([2]),
    "retain_test": rows_of([0, 1], n=20, seed=1),
    "forget_test": rows_of([2], n=20, seed=1),
}


def some(*names):
    return {name: DATA[name] for name in names}


def quick(model, sets=DATA, **kwargs):
    """Without the measures that need scikit-learn."""
    return evaluate(model, sets, probe=False, membership=False, **kwargs)


def joined(*names):
    parts = [batch for name in names for batch in DATA[name]]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def erasing():
    """A projection of the features of a `Classes` model that moves class 2 to the mean of the two others."""
    rotation = build(Classes).body.weight.detach().double()
    center = rotation @ torch.tensor([4, 4, 0, 0, 0, 0, 0, 0]).double()
    away = rotation @ torch.tensor([-4, -4, 8, 0, 0, 0, 0, 0]).double()
    basis = torch.linalg.svd(away.unsqueeze(1)).U[:, 1:]
    return Projection(basis, center)


# ---- accuracies ----


def test_accuracies():
    model = build(Classes)
    with torch.no_grad():
        model.fc.bias[0] = 6  # some rows of the others now fall to class 0
    result = quick(model)
    for name in SETS:
        x, y = joined(name)
        want = 100 * (model(x).argmax(1) == y).double().mean().item()
        assert getattr(result, name) == result.accuracies[name] == pytest.approx(want)
    assert 0 < result.forget_train < 100


def test_only_what_was_given_is_reported():
    result = evaluate(build(Classes), some("retain_test"))
    assert result.accuracies == {"retain_train": None, "forget_train": None, "retain_test": 100.0, "forget_test": None}
    assert (result.mia, result.probe_auc, result.agreement, result.kl) == (None, None, None, None)


@pytest.mark.parametrize(
    "loader",
    [
        iter,
        lambda batches: [{"x": x, "label": y, "index": y} for x, y in batches],
        lambda batches: [(x, y.tolist()) for x, y in batches],
        lambda batches: [({"x": x}, y.int()) for x, y in batches],
        lambda batches: DataLoader(TensorDataset(*map(torch.cat, zip(*batches, strict=True))), 16, shuffle=True),
    ],
    ids=["iterator", "dictionaries", "lists of labels", "pairs of a dictionary", "DataLoader"],
)
def test_loaders_are_passed_over_once(loader):
    model, other = build(Classes), build(Classes)
    with torch.no_grad():
        other.fc.weight.mul_(0.1)
    want = evaluate(model, DATA, reference=other)
    got = evaluate(model, {name: loader(batches) for name, batches in DATA.items()}, reference=other)
    assert got.accuracies == want.accuracies
    assert (got.agreement, got.kl) == (want.agreement, pytest.approx(want.kl))
    assert got.probe_auc == pytest.approx(want.probe_auc)


@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
def test_compiled_models(wrap):
    sets = {name: [(x[:, :6], y) for x, y in batches] for name, batches in DATA.items()}
    want = evaluate(build(Mlp), sets, reference=build(Mlp))
    model = wrap(build(Mlp).eval())
    model(sets["retain_test"][0][0])
    got = evaluate(model, sets, reference=model)
    assert got.accuracies == want.accuracies
    assert (got.mia, got.probe_auc, got.agreement, got.kl) == (want.mia, want.probe_auc, 100.0, 0.0)


def test_models_without_a_linear():
    sets = {name: [(torch.randn(4, 2, 4, 4), torch.arange(4) % 3)] for name in SETS[:2]}
    assert quick(build(Maps), sets).accuracies.keys() == set(SETS)


# ---- membership ----


def test_members_are_told_by_their_confidence():
    sure, unsure = torch.linspace(0.9, 1, 50).double(), torch.linspace(0.3, 0.5, 50).double()
    assert membership_inference(sure, unsure, torch.full((10,), 0.95).double()) == 100
    assert membership_inference(sure, unsure, torch.full((10,), 0.4).double()) == 0
    mixed = torch.tensor([0.95, 0.4, 0.4, 0.4]).double()
    assert membership_inference(sure, unsure, mixed) == 25


def test_membership_is_the_published_attack():
    """RBF SVC, C=3, on as many members as non-members."""
    from sklearn.svm import SVC

    generator = torch.Generator().manual_seed(14)  # rows of which C = 1, 2, 4 and 10 make something else
    members, others, forgotten = (torch.rand(n, generator=generator).double() for n in (20, 20, 200))
    members = members.sqrt()
    attack = SVC(C=3, kernel="rbf", gamma="scale")
    attack.fit(torch.cat([members, others]).unsqueeze(1).numpy(), [1] * 20 + [0] * 20)
    want = 100 * attack.predict(forgotten.unsqueeze(1).numpy()).mean()
    assert membership_inference(members, others, forgotten) == pytest.approx(want, abs=1)


def test_membership_balances_the_two_sides(monkeypatch):
    from sklearn.svm import SVC

    seen = []

    def fit(self, x, y):
        seen.append(list(y))
        return original(self, x, y)

    original = SVC.fit
    monkeypatch.setattr(SVC, "fit", fit)
    membership_inference(*(torch.rand(n).double() for n in (90, 30, 10)))
    assert (seen[0].count(1), seen[0].count(0)) == (30, 30)


def test_mia_uses_the_confidence_in_the_true_class():
    model = build(Classes)
    confidence = []
    for name in ("retain_train", "retain_test", "forget_train"):
        x, y = joined(name)
        confidence.append(model(x).double().softmax(1)[torch.arange(len(y)), y].detach())
    result = evaluate(model, some("retain_train", "retain_test", "forget_train"))
    assert result.mia == membership_inference(*confidence)
    assert result.probe_auc is None


# ---- probe ----


def test_probe_finds_what_is_apart_and_not_what_is_alike():
    generator = torch.Generator().manual_seed(0)
    alike = [torch.randn(n, 4, generator=generator).double() for n in (400, 100, 400, 400)]
    assert 0.4 < probe_auc(*alike) < 0.6
    apart = [part + (5 if i % 2 else 0) for i, part in enumerate(alike)]
    assert probe_auc(*apart) > 0.999


def test_probe_sees_the_features_after_the_projection():
    model, projection = build(Classes), erasing()
    before = everything(model)
    assert evaluate(model, DATA).probe_auc > 0.99
    result = evaluate(model, DATA, projection=projection)
    assert 0.35 < result.probe_auc < 0.65
    with attach(model, projection):
        assert evaluate(model, DATA).probe_auc == result.probe_auc
    assert everything(model) == before


def test_probe_of_a_folded_model_needs_the_projection():
    model, projection = build(Classes), erasing()
    want = evaluate(model, DATA, projection=projection)
    fold(model, projection)
    assert evaluate(model, DATA).probe_auc > 0.99
    got = evaluate(model, DATA, projection=projection)
    assert (got.accuracies, got.probe_auc) == (want.accuracies, pytest.approx(want.probe_auc))


def test_probe_of_an_erased_class_is_blind():
    model = build(Classes)
    result = unlearn(model, DATA["retain_train"], DATA["forget_train"], erase=True, progress=False)
    measured = evaluate(model, DATA)
    assert measured.retain_test == 100
    assert measured.forget_test == 0
    assert measured.probe_auc < 0.75
    result.attached.remove()
    assert evaluate(model, DATA).probe_auc > 0.99


def test_probe_takes_the_mean_over_real_tokens():
    model = build(Tokens).double()
    generator = torch.Generator().manual_seed(0)

    def texts(length, low, high):
        mask = (torch.arange(length) < torch.randint(1, length + 1, (20, 1), generator=generator)).long()
        ids = torch.randint(low, high, (20, length), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(20) % 3}

    sets = {name: [texts(n, 5 * (i % 2), 5 + 6 * (i % 2)) for n in (3, 6)] for i, name in enumerate(SETS)}
    rows = []
    for batches in sets.values():
        rows.append([])
        for batch in batches:
            hidden = model.mix(model.embed(batch["input_ids"])).detach()
            real = batch["attention_mask"].bool()
            rows[-1] += [row[keep].mean(0) for row, keep in zip(hidden, real, strict=True)]
    want = probe_auc(*(torch.stack(part) for part in rows))
    assert evaluate(model, sets, site="mix:output").probe_auc == pytest.approx(want)


def test_measures_can_be_left_out():
    result = quick(build(Classes))
    assert (result.mia, result.probe_auc) == (None, None)
    assert evaluate(build(Classes), DATA, probe=False).mia is not None


# ---- distance to a reference ----


def test_agreement_and_kl_by_hand():
    model, other = build(Classes), build(Classes)
    with torch.no_grad():
        other.fc.weight.mul_(0.2)
        other.fc.bias[1] = 1.5
    x, _ = joined("retain_test", "forget_test")
    p, q = (part(x).detach().double().softmax(1) for part in (other, model))
    agreement = 100 * (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert 0 < agreement < 100
    result = quick(model, reference=other)
    assert result.agreement == pytest.approx(agreement)
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))


def test_a_model_agrees_with_itself():
    model = build(Classes)
    for reference in (model, copy.deepcopy(model)):
        result = quick(model, reference=reference)
        assert (result.agreement, result.kl) == (100, 0)


def test_reference_is_not_projected_along():
    model, projection = build(Classes), erasing()
    result = quick(model, projection=projection, reference=model)
    apart = quick(model, projection=projection, reference=copy.deepcopy(model))
    assert result.agreement == apart.agreement < 100
    assert result.kl == apart.kl > 0


def test_a_class_that_the_reference_rules_out():
    model, other = build(Classes), build(Classes)
    with torch.no_grad():
        other.fc.bias[2] = -torch.inf
    x, _ = joined("retain_test", "forget_test")
    p, q = (part(x).detach().double().softmax(1)[:, :2] for part in (other, model))
    assert quick(model, reference=other).kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert quick(other, reference=model).kl == torch.inf


def test_reference_of_another_architecture():
    class Other(nn.Module):
        def forward(self, x):
            return x[:, :3]

    assert quick(build(Classes), site="body", reference=Other()).agreement > 99


# ---- nothing changes ----


class Broken(Classes):
    def forward(self, x):
        raise RuntimeError("broken")


@pytest.mark.parametrize("error", [None, "model", "reference"])
def test_models_are_left_alone(error):
    model = build(Broken if error == "model" else Classes)
    reference = build(Broken if error == "reference" else Classes)
    model.body.eval()
    before = everything(model), everything(reference)
    if error is None:
        evaluate(model, DATA, reference=reference, projection=erasing())
    else:
        with pytest.raises(RuntimeError, match="broken"):
            evaluate(model, DATA, reference=reference, projection=erasing())
    assert (everything(model), everything(reference)) == before


# ---- refusals ----

X, Y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "sets: got none, expected some of retain_train, forget_train, retain_test, forget_test"),
        ({"retain": [(X, Y)]}, r"sets: got \['retain'\], expected some of retain_train"),
        ({"retain_test": 5}, "retain_test: got int, expected an iterable of batches"),
        ({"retain_test": []}, "retain_test: the set is empty, expected at least one row"),
        ({"retain_test": [(X[:0], Y[:0])]}, "retain_test: the set is empty, expected at least one row"),
        ({"retain_test": [X]}, r"retain_test: got labels NoneType and outputs \(4, 3\), expected \(n,\) class indices"),
        ({"retain_test": [(X, X[:, 0])]}, r"retain_test: got labels torch.float32 \(4,\) and outputs \(4, 3\)"),
        ({"retain_test": [(X, Y[:3])]}, r"retain_test: got labels torch.int64 \(3,\) and outputs \(4, 3\)"),
        ({"retain_test": [(X, Y + 3)]}, "retain_test: got labels outside of the model's 3 outputs"),
        ({"retain_test": [(X, Y - 1)]}, "retain_test: got labels outside of the model's 3 outputs"),
        ({"retain_test": [(X, ["a"] * 4)]}, r"retain_test: got labels list and outputs \(4, 3\)"),
        (
            {"retain_test": [(X.unsqueeze(1), Y.unsqueeze(1))]},
            r"got labels torch.int64 \(4, 1\) and outputs \(4, 1, 3\)",
        ),
    ],
)
def test_sets_refused(sets, message):
    with pytest.raises(InputError, match=message):
        evaluate(build(Classes), sets)


def test_single_output_refused():
    with pytest.raises(InputError, match=r"outputs \(4, 1\), expected \(n,\) class indices and \(n, classes\)"):
        evaluate(nn.Linear(8, 1), {"retain_test": [(X, Y)]})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"site": "gone"}, SiteError, "site: no module 'gone'"),
        ({"projection": Projection(torch.eye(5), torch.zeros(5))}, InputError, "projection: got dim 5, expected 8"),
        ({"projection": torch.eye(8)}, InputError, "projection: got Tensor, expected a Projection"),
        ({"reference": torch.relu}, InputError, r"reference: got \w+, expected a torch.nn.Module"),
    ],
)
@pytest.mark.parametrize("probe", [False, True])
def test_arguments_refused(kwargs, error, message, probe):
    model = build(Classes)
    before = everything(model)
    with pytest.raises(error, match=message):
        evaluate(model, DATA, probe=probe, membership=False, **kwargs)
    assert everything(model) == before


def test_model_must_be_a_module():
    with pytest.raises(InputError, match=r"model: got \w+, expected a torch.nn.Module"):
        quick(torch.relu)


def test_probe_at_a_site_that_is_not_reached():
    class Unused(Classes):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

    with pytest.raises(SiteError, match="site: 'unused:input' is not reached in the forward pass"):
        evaluate(build(Unused), DATA)


@pytest.mark.parametrize("measure", ["probe", "membership"])
def test_without_scikit_learn(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    options = {"probe": False, "membership": False}
    assert evaluate(build(Classes), DATA, **options).retain_test == 100
    model = build(Broken)  # refused before the pass over the data
    with pytest.raises(MissingExtraError, match=r"evaluate needs scikit-learn: pip install 'loft-fast\[demo\]'"):
        evaluate(model, DATA, **{**options, measure: True})


@pytest.mark.parametrize(("function", "arguments"), [(membership_inference, 3), (probe_auc, 4)])
def test_functions_without_scikit_learn(function, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loft-fast\[demo\]'"):
        function(*[torch.zeros(4)] * arguments)
