import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from torch import nn

from loft_fast import GroupedMoments, InputError, Moments, close_outputs, solve
from loft_fast.angle import DEFAULT_ANGLE, _Forecast
from loft_fast.gaussians import Gaussians
from loft_fast.heads import linear_head

DIM, CLASSES = 24, 6


def linear(weight, bias=None):
    """An nn.Linear with these parameters."""
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=torch.float64)
    head.weight.data = weight.clone()
    if bias is not None:
        head.bias.data = bias.clone()
    return head


class Classes:
    """Gaussian classes as a trained network leaves them: means far apart, one covariance, a discriminant as head."""

    def __init__(self, classes=CLASSES, dim=DIM, distance=5.0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.means = distance * torch.linalg.qr(normal(dim, classes)).Q.T + normal(dim)
        self.mixing = 0.5 * normal(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim)
        self.fit_head()

    def fit_head(self):
        centred = self.means - self.means.mean(0)
        weight = torch.linalg.solve(self.mixing @ self.mixing.T, centred.T).T
        self.head = linear(weight, -(weight * (self.means + self.means.mean(0))).sum(1) / 2)

    def draw(self, per_class, seed=1):
        """Rows and their labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(len(self.means)).repeat_interleave(per_class)
        noise = torch.randn(len(labels), self.mixing.shape[0], generator=generator, dtype=torch.float64)
        return self.means[labels] + noise @ self.mixing.T, labels

    @functools.cached_property
    def moments(self):
        return GroupedMoments(self.mixing.shape[0]).update(*self.draw(400))


def accuracy(head, rows, labels, chosen):
    """Percent of the rows labelled `chosen` that the head gets right."""
    right = head(rows).argmax(1) == labels
    return 100 * float(right[torch.isin(labels, torch.tensor(chosen))].double().mean())


def solved(problem, forgotten, **options):
    """The projection for forgetting classes, and (retain, forget) accuracy on fresh rows before and after."""
    projection = solve(
        problem.moments.without(forgotten), problem.moments.select(forgotten), head=problem.head, **options
    )
    rows, labels = problem.draw(2000, seed=2)
    sets = [key for key in problem.moments if key not in forgotten], forgotten
    before, after = (
        [accuracy(problem.head, z, labels, chosen) for chosen in sets] for z in (rows, projection(rows).detach())
    )
    return projection, before, after


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("forgotten", [[2], [0, 4], [1, 2, 3, 5]])
def test_classes_are_forgotten_and_the_others_are_not(forgotten, seed):
    projection, before, after = solved(Classes(seed=seed), forgotten)
    assert before[1] > 99
    assert after[1] < 1
    assert after[0] > before[0] - 0.5
    assert projection.certificate.predicted["forget target"] == 0
    assert "mildest angle predicted to forget" in projection.certificate.why


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("forgotten", [[2], [0, 4], [1, 2, 3, 5]])
def test_accuracies_are_predicted_where_classes_overlap(forgotten, erase):
    projection, before, after = solved(Classes(distance=1.5), forgotten, erase=erase)
    predicted = projection.certificate.predicted
    assert before[0] < 97
    assert predicted["retain accuracy"] == pytest.approx(after[0], abs=2)
    assert predicted["forget accuracy"] == pytest.approx(after[1], abs=2)
    assert after[1] < 10  # erasing is never milder than forgetting


def test_accuracies_are_predicted_where_classes_are_many():
    """Features are drawn then, not the logits of each head."""
    problem = Classes(classes=60, dim=70, distance=2.0)
    assert Gaussians(problem.moments, 60).features is not None
    projection, before, after = solved(problem, [2, 7])
    predicted = projection.certificate.predicted
    assert before[0] < 95
    assert predicted["retain accuracy"] == pytest.approx(after[0], abs=2)
    assert predicted["forget accuracy"] == pytest.approx(after[1], abs=2)


def probe_auc(projection, problem, forgotten):
    """AUC on fresh rows of a linear probe trained to tell forgotten rows from the others after the projection."""
    (train, train_labels), (test, test_labels) = problem.draw(400), problem.draw(2000, seed=3)
    is_gone = [np.isin(labels.numpy(), forgotten) for labels in (train_labels, test_labels)]
    probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-4).fit(projection(train).numpy(), is_gone[0])
    return roc_auc_score(is_gone[1], probe.decision_function(projection(test).numpy()))


@pytest.mark.parametrize("forgotten", [[2], [0, 4]])
def test_erasing_blinds_a_linear_probe(forgotten):
    problem = Classes()
    erased, before, after = solved(problem, forgotten, erase=True)
    mild, _, _ = solved(problem, forgotten)
    assert probe_auc(mild, problem, forgotten) > 0.75
    assert 0.4 < probe_auc(erased, problem, forgotten) < 0.6
    assert after[1] < 1
    assert after[0] > before[0] - 1
    assert "probe" in erased.certificate.why
    means = [part.total().mean for part in (problem.moments.select(forgotten), problem.moments.without(forgotten))]
    assert torch.allclose(*map(erased, means), atol=1e-9)


def test_the_certificate_of_an_eraser():
    problem = Classes()
    erased, _, _ = solved(problem, [2], erase=True, close=True)
    known = erased.certificate
    assert "share of the retain variance by which retain rows move" in known.goal
    assert 0 < known.lower_bound <= known.loss < 0.1
    assert known.relative_gap < 0.05  # by how much the regression is shrunk
    assert known.rank == len(problem.moments.total().mean) - 1
    assert known.retain_kept > 0.9 > known.forget_kept


@torch.no_grad()
@pytest.mark.parametrize("close", [False, True])
def test_erasing_leaves_what_the_outputs_read(close):
    problem = Classes()
    erased, _, _ = solved(problem, [0, 4], erase=True, close=close)
    outputs = len(problem.head.weight)
    assert erased.rank == outputs - 1 - 2 * close
    assert erased.certificate.rank > erased.rank
    assert "what no output reads is dropped" in erased.certificate.why
    if not close:
        assert erased.trim(problem.head).rank == erased.rank


def test_erasing_with_one_output_left_keeps_one_dimension():
    erased, _, _ = solved(Classes(classes=2), [0], erase=True, close=True)
    assert erased.rank == 1


@pytest.mark.parametrize("erase", [False, True])
def test_predicted_auc_is_that_of_a_probe(erase):
    problem = Classes()
    projection, _, _ = solved(problem, [2], erase=erase)
    expected = probe_auc(projection, problem, [2])
    assert projection.certificate.predicted["probe AUC"] == pytest.approx(expected, abs=0.1 if erase else 0.06)


def test_a_head_that_does_not_forget_by_an_eraser_forgets_by_an_angle():
    problem = Classes(distance=1.5, seed=3)
    erased, _, after = solved(problem, [0, 4], erase=True)
    assert erased.certificate.why.startswith("within the mildest angle predicted to forget")
    assert after[1] < 5
    closed, _, _ = solved(problem, [0, 4], erase=True, close=True)
    assert closed.certificate.why.startswith("no linear probe finds the forget rows")
    assert closed.certificate.loss < erased.certificate.loss


class Crowded(Classes):
    """More classes than dimensions: none can be projected away at no cost to the others."""

    def __init__(self):
        super().__init__(classes=20, dim=20)
        rows = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.means, self.mixing = 4 * nn.functional.normalize(rows), torch.eye(8, dtype=torch.float64)
        self.fit_head()

    @functools.cached_property
    def moments(self):
        return GroupedMoments(8).update(*self.draw(400))


def close(problem, gone):
    """A copy of the problem's head with these outputs closed."""
    head = linear(problem.head.weight.data, problem.head.bias.data)
    close_outputs(nn.Sequential(head), gone)
    return head


@pytest.mark.parametrize("gone", [[3], [0, 5, 9]])
def test_where_outputs_are_closed_the_others_pay_next_to_nothing(gone):
    problem = Crowded()
    forgetting, before, after = solved(problem, gone)
    projection, _, _ = solved(problem, gone, close=True)
    assert after[0] < before[0] - 2
    rows, labels = problem.draw(2000, seed=2)
    kept = [key for key in problem.moments if key not in gone]
    head = close(problem, gone)
    alone, with_projection = (accuracy(head, z, labels, kept) for z in (rows, projection(rows)))
    assert with_projection > alone - 1
    assert accuracy(head, projection(rows), labels, gone) == 0
    certificate = projection.certificate
    assert certificate.angle < forgetting.certificate.angle
    assert "cost the retain set at most a tenth of a point" in certificate.why
    assert certificate.predicted["retain accuracy"] == pytest.approx(with_projection, abs=1)
    assert certificate.predicted["forget accuracy"] == 0
    erased, _, _ = solved(problem, gone, close=True, erase=True)  # at whatever cost, and it says at which
    expected = erased.certificate.predicted["retain accuracy"]
    assert accuracy(head, erased(rows), labels, kept) == pytest.approx(expected, abs=2)


def test_closing_changes_nothing_where_forgetting_is_free():
    problem = Classes()
    assert torch.equal(solved(problem, [2])[0].basis, solved(problem, [2], close=True)[0].basis)


def test_classes_with_rows_that_stay_are_forgotten_as_if_nothing_were_closed():
    """Closed outputs do not forget the rest of what was asked for."""
    problem = Crowded()
    shared = problem.moments.select([3, 4])
    part = GroupedMoments(8).update(*problem.draw(50, seed=9)).select([4]) + shared.select([3])
    kept = problem.moments.without([3])
    basis = [solve(kept, part, head=problem.head, close=choice).basis for choice in (False, True)]
    assert torch.equal(*basis)


@pytest.mark.parametrize("name", ["erase", "close"])
@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "without a head"), ({"rank": 3}, "together with rank"), ({"angle": 0.3}, "together with angle")],
)
def test_erasing_and_closing_need_the_head_alone(name, options, message):
    problem = Classes()
    head = problem.head if options else None
    with pytest.raises(InputError, match=f"{name}: got True {message}, expected a head"):
        solve(problem.moments.without([2]), problem.moments.select([2]), head=head, **{name: True}, **options)


def test_rows_of_a_group_that_stays_are_forgotten_only_as_far_as_generalising_goes():
    problem = Classes()
    gone = GroupedMoments(DIM).update(*problem.draw(20, seed=7))
    projection = solve(problem.moments, gone, head=problem.head)
    predicted = projection.certificate.predicted
    # The classes stay known, and forgotten rows of them are like the others: a refitted head gets them right.
    assert predicted["forget target"] > 80
    assert predicted["forget accuracy"] > 80
    rows, labels = problem.draw(2000, seed=2)
    assert accuracy(problem.head, projection(rows), labels, list(range(CLASSES))) > 80


def test_angle_follows_from_the_positive_part_of_a_ladder():
    problem = Classes()
    projection, _, _ = solved(problem, [2])
    certificate = projection.certificate
    assert 0.05 <= certificate.angle <= 1.3
    fixed = solve(problem.moments.without([2]), problem.moments.select([2]), angle=certificate.angle)
    assert fixed.rank == projection.rank
    torch.testing.assert_close(fixed.matrix(), projection.matrix(), rtol=0, atol=1e-9)
    assert certificate.eigen_solves <= 9


@pytest.mark.parametrize("slope", [1.0, 30.0])
@pytest.mark.parametrize(("start", "end"), itertools.combinations_with_replacement(range(9), 2))
def test_the_search_ends_where_the_cost_is_least(start, end, slope):
    """At the first rung of the plateau, wherever it lies on the ladder, or the one after it as a margin."""
    forecast = object.__new__(_Forecast)
    forecast.at = lambda index: SimpleNamespace(cost=slope * max(start - index, index - end, 0))
    assert forecast.first() == start + (end > start)


def test_prediction_is_the_same_every_time():
    problem = Classes()
    first, second = (solved(problem, [2])[0].certificate for _ in range(2))
    assert first.predicted == second.predicted
    assert first.angle == second.angle


def test_more_groups_than_are_drawn_from():
    problem = Classes(classes=56, dim=64)
    projection, before, after = solved(problem, list(range(6, 56)))  # every other one of these 50 is drawn from
    assert before[1] > 95
    assert after[1] < 5
    assert after[0] > 95
    assert projection.certificate.predicted["forget accuracy"] == pytest.approx(after[1], abs=3)
    assert projection.certificate.predicted["retain accuracy"] == pytest.approx(after[0], abs=3)


def test_groups_without_rows_do_not_count():
    problem = Classes()
    empty = problem.moments - problem.moments.select([5])
    assert 5 in empty
    assert empty[5].count == 0
    kept = empty.without([2])
    projection = solve(kept, problem.moments.select([2]), head=problem.head)
    assert projection.certificate.predicted["forget accuracy"] < 2


def test_without_a_head_the_angle_is_the_documented_one():
    problem = Classes()
    for moments in (problem.moments, problem.moments.select([0, 1])):
        certificate = solve(moments.without([0]), moments.select([0]), head=None).certificate
        assert certificate.angle == DEFAULT_ANGLE == 0.3
        assert certificate.predicted == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retain": Moments(DIM)}, "retain: the set is empty"),
        ({"retain": "ungrouped"}, "retain: got ungrouped Moments, expected GroupedMoments by class"),
        ({"forget": "ungrouped"}, "forget: got ungrouped Moments, expected GroupedMoments by class"),
        ({"forget": "named"}, "forget: got the group 'cat', expected output indices of the head, 0 to 5"),
        ({"retain": "beyond"}, "retain: got the group 6, expected output indices of the head, 0 to 5"),
        ({"forget": "negative"}, "forget: got the group -1, expected output indices of the head, 0 to 5"),
        (
            {"head": nn.Linear(DIM + 1, CLASSES)},
            r"head: got Linear with weight \(6, 25\), expected .* reading 24 features",
        ),
        ({"head": nn.Conv2d(DIM, CLASSES, 3)}, r"head: got Conv2d with weight .*, expected .* reading 24 features"),
        ({"head": nn.LayerNorm(DIM)}, r"head: got LayerNorm with weight \(24,\), expected .* reading 24 features"),
        ({"head": nn.ReLU()}, "head: got ReLU, expected a linear head reading 24 features"),
        ({"head": lambda z: z}, "head: got function, expected a linear head reading 24 features"),
    ],
)
def test_refusals_name_the_argument(changes, message):
    problem = Classes()
    rows, labels = problem.draw(20)
    parts = {
        "ungrouped": Moments(DIM).update(rows),
        "named": GroupedMoments(DIM).update(rows, ["cat"] * len(rows)),
        "beyond": GroupedMoments(DIM).update(rows, labels + 1),
        "negative": GroupedMoments(DIM).update(rows, labels - 1),
    }
    call = {"retain": problem.moments.without([2]), "forget": problem.moments.select([2]), "head": problem.head}
    call |= {name: parts[part] if isinstance(part, str) else part for name, part in changes.items()}
    with pytest.raises(InputError, match=message):
        solve(**call)


def test_heads_are_read_alike_whatever_their_kind():
    weight, bias = torch.randn(CLASSES, DIM), torch.randn(CLASSES)
    head = linear(weight.double(), bias.double()).float()
    convolution = nn.Conv2d(DIM, CLASSES, 1)
    convolution.weight.data, convolution.bias.data = weight.view(CLASSES, DIM, 1, 1), bias
    for module in (head, convolution):
        got_weight, got_bias = linear_head(module, DIM, torch.device("cpu"))
        torch.testing.assert_close(got_weight, weight.double())
        torch.testing.assert_close(got_bias, bias.double())
        assert not got_weight.requires_grad
    assert not linear_head(linear(weight), DIM, torch.device("cpu"))[1].any()


def test_solving_leaves_the_head_and_the_global_random_state_alone():
    problem = Classes()
    before, state = [p.clone() for p in problem.head.parameters()], torch.get_rng_state()
    solved_state = solve(problem.moments.without([2]), problem.moments.select([2]), head=problem.head)
    assert math.isfinite(solved_state.certificate.loss)
    assert all(torch.equal(old, new) for old, new in zip(before, problem.head.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_erasing_part_of_a_class_leaves_the_rest_of_it():
    problem = Classes()
    rows, labels = problem.draw(400)
    part = (labels == 2) & (rows[:, 0] > rows[labels == 2][:, 0].quantile(0.7))
    retain, forget = (GroupedMoments(DIM).update(rows[chosen], labels[chosen]) for chosen in (~part, part))
    erased = solve(retain, forget, head=problem.head, erase=True)
    assert torch.allclose(erased(retain[2].mean), erased(forget[2].mean), atol=1e-9)
    fresh, truth = problem.draw(2000, seed=2)
    for key in range(CLASSES):
        before, after = (accuracy(problem.head, z, truth, [key]) for z in (fresh, erased(fresh)))
        assert after > before - 2
