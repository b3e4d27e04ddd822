"""Earlier layers lose what the rows to keep can spare, and no more."""

import logging

import pytest
import torch
import tqdm.auto
from models import Classes, Maps, Mlp, Tokens, build, everything, rows_of
from torch import nn

import loft_fast as loft
from loft_fast import FoldError, InputError, SiteError

RETAIN, FORGET = rows_of([0, 1]), rows_of([2])


def erase(model, sites, retain=RETAIN, forget=FORGET, **kwargs):
    return loft.erase_layers(model, retain, forget, sites, progress=False, **kwargs)


class Deep(nn.Module):
    """Two linear layers more in front of Classes, all of them rotations."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(8, 8, bias=False), Classes()
        with torch.no_grad():
            turn = torch.linalg.qr(torch.randn(8, 8))[0]
            self.first.weight.copy_(turn)
            self.rest.body.weight.copy_(self.rest.body.weight @ turn.T)

    def forward(self, x):
        return self.rest(self.first(x))


class Idle(nn.Module):
    """Classes, beside a layer that nothing comes of."""

    def __init__(self):
        super().__init__()
        self.idle, self.classes = nn.Linear(8, 8), Classes()

    def forward(self, x):
        return self.classes(x) + 0 * self.idle(x).sum()


class Crowd(nn.Module):
    """x (n, 2) is told apart along its first axis, on which the rows to forget lie far out."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Identity(), nn.Linear(2, 3)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
            self.fc.bias.copy_(torch.tensor([0.0, 0.0, -50.0]))

    def forward(self, x):
        return self.fc(self.body(x))


def crowd(scale=30):
    """Retain and forget batches for it; with little beside what the head needs, mild projections drop nothing."""
    x, y = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    x = torch.stack([(2 * y - 1) * (0.1 + x[:, 0].abs()), scale * x[:, 1]], 1)
    return [(x, y)], [(x + torch.tensor([1000.0, 0.0]), torch.full_like(y, 2))]


@torch.no_grad()
def accuracy(model, rows):
    return 100 * float(torch.cat([model(x).argmax(1) == y for x, y in rows]).double().mean())


def auc(model, site):
    fresh = {"retain_test": rows_of([0, 1], seed=1), "forget_test": rows_of([2], seed=1)}
    sets = {"retain_train": RETAIN, "forget_train": FORGET, **fresh}
    return loft.evaluate(model, sets, site=site, membership=False).probe_auc


def test_every_layer_forgets_and_the_rest_is_kept():
    model, sites = build(Deep), ["rest.body", "rest.body:output"]
    assert min(auc(model, site) for site in sites) > 0.99
    done = erase(model, sites)
    assert [one.site for one in done] == ["rest.body:input", "rest.body:output"]
    assert [one.projection.site for one in done] == [one.site for one in done]
    assert max(auc(model, site) for site in sites) < 0.7
    assert accuracy(model, rows_of([0, 1], seed=1)) == 100


def test_what_was_attached_can_be_taken_out_again():
    model = build(Deep)
    before = everything(model)
    for one in erase(model, ["first:output", "rest.body:output"]):
        one.attached.remove()
    assert everything(model) == before


@torch.no_grad()
def test_folded_it_does_the_same():
    attached, folded = build(Deep), build(Deep)
    sites = ["first:output", "rest.body:output"]
    first, second = erase(attached, sites), erase(folded, sites, fold=True)
    assert [one.attached for one in second] == [None, None]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
    assert [one.projection.rank for one in first] == [one.projection.rank for one in second]
    x = torch.cat([x for x, _ in [*RETAIN, *FORGET]])
    assert torch.allclose(attached(x), folded(x), atol=1e-4)


@pytest.mark.parametrize("cost", [0.0, 2.0, 20.0])
def test_it_costs_no_more_than_it_may(cost):
    model, retain, forget = build(Classes), rows_of([0, 1, 2]), rows_of([2], seed=1)
    before = accuracy(model, retain)
    (done,) = erase(model, ["body:output"], retain, forget, cost=cost)
    assert before - accuracy(model, retain) == pytest.approx(done.cost)
    assert done.cost <= cost


def test_it_goes_as_far_as_it_may():
    angles = []
    for cost in (0.0, 2.0, 20.0, 100.0):
        (done,) = erase(build(Classes), ["body:output"], rows_of([0, 1, 2]), rows_of([2], seed=1), cost=cost)
        angles.append(done.projection.certificate.angle)
    assert angles == sorted(angles)
    assert angles[0] < angles[-1] == pytest.approx(0.05 * 1.25**15)


def test_a_site_that_costs_nothing_goes_further_than_one_that_does():
    retain, forget = rows_of([0, 1, 2]), rows_of([2], seed=1)
    idle, other = erase(build(Idle), ["idle:output", "classes.body:output"], retain, forget, cost=20)
    (alone,) = erase(build(Idle), ["classes.body:output"], retain, forget, cost=20)
    assert idle.projection.certificate.angle == pytest.approx(0.05 * 1.25**15)
    assert other.projection.certificate.angle == alone.projection.certificate.angle < 1


@pytest.mark.parametrize("scale", [1, 30])
def test_a_layer_that_can_spare_nothing_is_left_out(scale, caplog):
    model = Crowd()
    before = everything(model)
    with caplog.at_level(logging.INFO, logger="loft_fast"):
        assert erase(model, ["body:output"], *crowd(scale)) == []
    assert "body:output is left as it is" in caplog.text
    assert everything(model) == before


def test_only_classes_that_are_kept_count_as_answers():
    model, (retain, forget) = Crowd(), crowd()
    with torch.no_grad():
        model.fc.bias[2] += 10_000  # whatever a row is, the model says what is to go
    assert accuracy(model, retain) == 0
    assert erase(model, ["body:output"], retain, forget) == []  # and still needs what it told the others apart by


def test_other_rows_may_tell_the_cost():
    passes = []

    class Rows(list):
        def __iter__(self):
            passes.append(True)
            return super().__iter__()

    check = Rows(rows_of([0, 1], n=5, seed=3))
    (done,) = erase(build(Classes), ["body:output"], check=check, cost=0)
    assert len(passes) in (5, 6)
    assert done.cost == 0
    passes.clear()
    erase(build(Deep), ["first:output", "rest.body:output"], check=check, cost=0)
    assert len(passes) <= 10  # from the angle for all on, little is left to try for each


def test_maps_and_tokens():
    images = [(torch.randn(12, 2, 4, 4) + 3 * (y == 2).view(-1, 1, 1, 1), y) for y in [torch.arange(12) % 3] * 2]
    parts = [[(x[(y == 2) == gone], y[(y == 2) == gone]) for x, y in images] for gone in (False, True)]
    done = erase(build(Maps), ["act:output"], *parts, cost=100)
    assert [one.projection.dim for one in done] == [5]

    def text(labels):
        words = torch.randint(0, 11, (len(labels), 4))
        return [{"input_ids": words, "attention_mask": torch.ones_like(words), "labels": torch.tensor(labels)}]

    done = erase(build(Tokens), ["mix:output"], text([0, 1, 0, 1]), text([2, 2]), cost=100)
    assert [one.projection.dim for one in done] == [5]


class Twice(nn.Module):
    """Classes on the mean of two copies of the input."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.classes = nn.Identity(), nn.Identity(), Classes()

    def forward(self, x):
        return self.classes((self.left(x) + self.right(x)) / 2)


def test_sites_share_the_cost_and_what_one_angle_leaves_of_it_goes_to_the_last_first():
    retain, forget = rows_of([0, 1, 2]), rows_of([2], seed=1)
    differ = []
    for cost in range(0, 32, 4):
        model = build(Twice)
        before = accuracy(model, retain)
        first, last = erase(model, ["left:output", "right:output"], retain, forget, cost=cost)
        assert first.cost == last.cost == pytest.approx(before - accuracy(model, retain))
        assert first.cost <= cost
        differ.append(last.projection.certificate.angle - first.projection.certificate.angle)
    assert min(differ) == 0 < max(differ)


def test_one_that_can_spare_nothing_leaves_the_others_alone(caplog):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.crowd = nn.Linear(2, 2), Crowd()

        def forward(self, x):
            return self.crowd(x) + 0 * self.idle(x).sum()

    model = Beside()
    with caplog.at_level(logging.INFO, logger="loft_fast"):
        done = erase(model, ["idle:output", "crowd.body:output"], *crowd(1))
    assert [one.site for one in done] == ["idle:output"]
    assert "crowd.body:output is left as it is" in caplog.text


def test_rows_count_by_their_mean_over_positions():
    model = build(Maps)
    x, y = torch.randn(60, 2, 4, 4), torch.arange(60) % 3
    parts = [[(x[y < 2], y[y < 2])], [(x[y == 2] + 1, y[y == 2])]]
    retain, forget = (loft.fetch_moments(model, part, "act:output", progress=False, pool=True) for part in parts)
    (done,) = erase(model, ["act:output"], *parts, cost=30)
    wanted = loft.solve(retain, forget, angle=done.projection.certificate.angle)
    assert torch.equal(done.projection.basis, wanted.basis)


@torch.no_grad()
def test_what_is_dropped_is_put_back_as_far_as_the_rest_tells_it_at_single_positions():
    model = build(Maps)
    x, y = torch.randn(200, 2, 4, 4), torch.arange(200) % 3
    retain, forget = [(x[y < 2], y[y < 2])], [(x[y == 2] + 1, y[y == 2])]
    seen = model.act(model.conv(x[y < 2])).movedim(1, -1).reshape(-1, 5).double()
    (done,) = erase(model, ["act:output"], retain, forget, cost=30)
    basis, center = done.projection.basis, seen.mean(0)
    assert torch.allclose(done.projection.center, center)
    coordinates, dropped = (seen - center) @ basis, (seen - center) - (seen - center) @ basis @ basis.T
    least = dropped - coordinates @ torch.linalg.lstsq(coordinates, dropped).solution
    moved = done.projection(seen) - seen
    assert float(moved.square().sum()) < 1.001 * float(least.square().sum()) < 0.99 * float(dropped.square().sum())
    assert torch.allclose(done.projection(seen) @ basis, seen @ basis)  # it tells what an orthogonal one would


@pytest.mark.parametrize("right", range(982, 1000))
def test_rounding_of_percents_refuses_no_projection(right, monkeypatch):
    rights = iter([right])  # then one row of a thousand is lost, which is what may be
    monkeypatch.setattr(loft.layers, "_accuracy", lambda *_: 100 * (next(rights, right - 1) / 1000))
    (done,) = erase(build(Classes), ["body:output"], cost=0.1)
    assert done.projection.certificate.angle == pytest.approx(0.05 * 1.25**15)
    assert 0.1 - 1e-9 < done.cost <= 0.1


def test_projections_made_in_inference_mode_can_be_trained_through_and_loaded_into():
    model = build(Deep).double()
    retain, forget = ([(x.double(), y) for x, y in rows] for rows in (RETAIN, FORGET))
    with torch.inference_mode():
        (done,) = erase(model, ["rest.body"], retain, forget)
    model(retain[0][0]).sum().backward()
    assert model.first.weight.grad is not None
    done.projection.load_state_dict(done.projection.state_dict())


def test_the_certificate_is_of_what_stays():
    (done,) = erase(build(Classes), ["body:output"])
    retain = loft.fetch_moments(build(Classes), RETAIN, "body:output", progress=False)
    covariance, basis = retain.covariance(ddof=0), done.projection.basis
    known = done.projection.certificate
    assert known.retain_kept == pytest.approx(float((basis.T @ covariance @ basis).trace() / covariance.trace()))
    assert "without what is put back" in str(known)
    again = loft.Projection.from_bytes(done.projection.to_bytes())
    assert torch.equal(again.lift, done.projection.lift)
    assert again.certificate == known


# ---- what it refuses ----


class Interrupted:
    """Batches that end in Ctrl-C, in the pass after so many."""

    def __init__(self, batches, passes):
        self.batches, self.passes = batches, passes

    def __iter__(self):
        yield from self.batches
        self.passes -= 1
        if self.passes < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("passes", [0, 1, 7])
def test_after_ctrl_c_the_model_is_as_it_was(fold, passes):
    model = build(Deep)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        erase(model, ["first:output", "rest.body:output"], Interrupted(RETAIN, passes), fold=fold)
    assert everything(model) == before


def test_after_ctrl_c_no_progress_bar_is_left():
    with pytest.raises(KeyboardInterrupt) as caught:
        loft.erase_layers(build(Deep), Interrupted(RETAIN, 1), FORGET, ["first", "rest.body"])
    assert caught.traceback  # it holds the frames, as an interactive session does
    assert not tqdm.auto.tqdm._instances


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"sites": "first"}, InputError, "sites: got 'first', expected a list"),
        ({"sites": []}, InputError, r"sites: got \[\], expected a list"),
        ({"sites": 5}, InputError, "sites: got 5, expected a list"),
        ({"sites": iter([])}, InputError, "sites: got <.*>, expected a list"),
        ({"sites": ["first", "rest.body", "first:input"]}, InputError, "sites: got 'first:input' twice"),
        ({"sites": ["first", "secnod"]}, SiteError, "no module 'secnod'"),
        ({"cost": -1.0}, InputError, "cost: got -1.0"),
        ({"cost": "much"}, InputError, "cost: got 'much'"),
        ({"fold": True, "sites": ["first:output", "rest:output"]}, FoldError, "it is a Classes"),
        ({"retain": []}, InputError, "check: the set is empty"),
        ({"forget": []}, InputError, "forget: loader: it yielded no batches"),
        ({"retain": 5}, InputError, "check: got int, expected an iterable of batches"),
        ({"retain": [(torch.ones(4, 8), torch.arange(4) % 2)]}, InputError, "'first:output': retain: 4 rows of"),
        ({"retain": [torch.ones(4, 8)]}, InputError, "check: got labels"),
        ({"retain": iter(RETAIN), "check": RETAIN, "sites": ["first", "rest.body"]}, InputError, "retain: loader"),
    ],
)
def test_refusals_leave_the_model_as_it_was(kwargs, error, message):
    model = build(Deep)
    before = everything(model)
    with pytest.raises(error, match=message):
        erase(model, **{"sites": ["first:output"], **kwargs})
    assert everything(model) == before


def test_a_site_that_is_never_reached():
    model = build(Mlp)
    model.spare = nn.Linear(6, 6)
    before = everything(model)
    rows = [(torch.randn(9, 6), torch.arange(9) % 3)]
    with pytest.raises(SiteError, match="not reached"):
        erase(model, ["body.0", "spare"], rows, rows, cost=100)
    assert everything(model) == before
