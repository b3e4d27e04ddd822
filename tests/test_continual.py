"""Requests one after another end where one request for all of them ends, in any order."""

import os
import random

import pytest
import torch
from conftest import normal

import loft_fast as loft
from loft_fast import Continual, GroupedMoments, InputError
from loft_fast.demo.cache import trained
from loft_fast.demo.digits import batches, load_digits

ORDERS = 3


def same(one, other):
    return torch.equal(one.basis, other.basis) and torch.equal(one.center, other.center)


# ---- the demo's network and digits ----


class Demo:
    """The trained network, its features, and what belongs to which of five clients."""

    def __init__(self, folder):
        self.data = load_digits()
        before = torch.get_num_threads()
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        self.model = trained(self.data, (), 0, folder, print, progress=False).model
        torch.set_num_threads(before)
        with torch.no_grad():
            self.features = torch.cat(
                [self.model.features(x) for x, _ in batches(self.data.train_x, self.data.train_y)]
            )
        self.labels = self.data.train_y
        self.client = torch.arange(len(self.labels)) % 50

    def moments(self, exact=True):
        return loft.fetch_moments(
            self.model, batches(self.data.train_x, self.data.train_y), group="label", progress=False, exact=exact
        )

    def predictions(self, projection):
        with loft.attach(self.model, projection), torch.no_grad():
            return self.model(self.data.test_x).argmax(1)


@pytest.fixture(scope="module")
def demo(networks):
    return Demo(networks)


# Ten rounds: classes, clients' rows over all classes, and rows; which overlap.
ROUNDS = [("class", 3), ("client", 0), ("rows", (100, 130)), ("class", 7), ("client", 1), ("client", 2)]
ROUNDS += [("rows", (1000, 1005)), ("class", 0), ("client", 3), ("rows", (3990, 4000))]


class Requests:
    """A `Continual` that is asked as a user would, and never twice for the same row."""

    def __init__(self, demo, moments):
        self.demo, self.gone = demo, torch.zeros(len(demo.labels), dtype=torch.bool)
        self.continual = Continual(moments, head=demo.model.fc)

    def round(self, kind, what):
        if kind == "class":
            self.gone |= self.demo.labels == what
            return self.continual.forget([what])
        wanted = torch.zeros_like(self.gone)
        if kind == "client":
            wanted = self.demo.client == what
        else:
            wanted[slice(*what)] = True
        new = wanted & ~self.gone
        self.gone |= wanted
        return self.continual.forget_rows(self.demo.features[new], self.demo.labels[new])


def test_ten_rounds_in_three_orders(demo):
    moments = demo.moments()
    digest = moments.digest()
    ends = []
    for seed in range(ORDERS):
        requests = Requests(demo, moments)
        for kind, what in random.Random(seed).sample(ROUNDS, k=len(ROUNDS)):
            requests.round(kind, what)
        ends.append(requests)
    assert moments.digest() == digest
    gone = ends[0].gone
    assert all(torch.equal(end.gone, gone) for end in ends)

    # One request for all of them, from moments of the rows themselves.
    kept, forgotten = (
        GroupedMoments(moments.dim, exact=moments.exact).update(demo.features[rows], demo.labels[rows])
        for rows in (~gone, gone)
    )
    at_once = loft.solve(kept, forgotten, head=demo.model.fc)
    for end in ends:
        assert end.continual.retain.digest() == kept.digest()
        assert end.continual.forgotten.digest() == forgotten.digest()
        assert same(end.continual.projection, at_once)
        assert torch.equal(demo.predictions(end.continual.projection), demo.predictions(at_once))
    stays = ~torch.isin(demo.data.test_y, torch.tensor([0, 3, 7]))
    right = demo.predictions(at_once) == demo.data.test_y
    assert float(right[stays].double().mean()) > 0.97
    assert float(right[~stays].double().mean()) < 0.02


@pytest.mark.parametrize("forget", [[3], [1, 4, 7]])
def test_exact_moments_give_the_same_predictions_as_floats(demo, forget):
    floats, exact = demo.moments(exact=None), demo.moments()
    assert exact.clipped == 0
    predictions = []
    for moments in (floats, exact):
        projection = loft.solve(moments.without(forget), moments.select(forget), head=demo.model.fc)
        predictions.append(demo.predictions(projection))
    assert torch.equal(*predictions)


# ---- smaller ones ----


def groups(exact=8.0, n=600):
    return GroupedMoments(12, exact=exact).update(normal(n, 12, seed=2), torch.arange(n) % 6)


def test_a_forgotten_group_is_not_forgotten_again():
    continual = Continual(groups(), rank=4)
    first = continual.forget([2, 3])
    before = continual.retain.digest()
    assert continual.forget([3]) is first
    assert continual.forget([2, 3, 2]) is first
    assert continual.retain.digest() == before
    assert same(continual.forget([3, 4]), Continual(groups(), rank=4).forget([2, 3, 4]))


def test_a_client_whose_rows_went_with_a_class():
    client = GroupedMoments(12, exact=8.0).update(normal(600, 12, seed=2)[:90], torch.arange(90) % 6)
    one, other = Continual(groups(), rank=4), Continual(groups(), rank=4)
    one.forget([2])
    one.forget_moments(client)
    other.forget_moments(client)
    other.forget([2])
    assert same(one.projection, other.projection)
    assert one.retain.digest() == other.retain.digest()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda c: c.forget([9]), r"^keys: no group 9; there are 0, 1"),
        (lambda c: c.forget("2"), r"^keys: got '2', expected a list of keys"),
        (lambda c: c.forget([2.5]), r"^keys: got the key 2.5, expected integers or strings"),
        (lambda c: c.forget([[1]]), r"^keys: got the key \[1\]"),
        (lambda c: c.forget([]), r"^forget: the set is empty"),
        (lambda c: c.forget(range(6)), r"^retain: the set is empty"),
        (lambda c: c.forget_rows(normal(3, 11), [0, 0, 0]), r"^x: got shape"),
        (lambda c: c.forget_rows(5 * normal(3, 12, seed=9), [0, 0, 0]), r"never added"),
        (lambda c: c.forget_rows(normal(3, 12), [0, 0, 9]), r"no group 9"),
        (lambda c: c.forget_moments(groups(exact=16.0)), r"exact="),
        (lambda c: c.forget_moments([3]), r"^other: got list, expected GroupedMoments"),
    ],
)
def test_refusals_change_nothing(request_, message):
    continual = Continual(groups(), rank=4)
    before = continual.retain.digest()
    with pytest.raises(InputError, match=message):
        request_(continual)
    assert continual.projection is None
    assert continual.retain.digest() == before
    assert continual.forgotten.count == 0


def test_one_dimension_stands_and_says_so():
    continual = Continual(groups(), keep_forgotten=False, rank=1)
    first = continual.forget([0])
    for key in (1, 2):
        later = continual.forget([key])
        assert same(later, first)
        assert later.certificate.why.startswith("one dimension cannot be narrowed: the last projection stands")
        assert later.certificate.loss == first.certificate.loss
    assert "stands" not in first.certificate.why
    before = continual.retain.digest()
    with pytest.raises(InputError, match=r"^retain: the set is empty"):
        continual.forget([3, 4, 5])
    assert continual.retain.digest() == before


def test_options_that_solve_refuses():
    with pytest.raises(InputError, match=r"^rank: got 12"):
        Continual(groups(), rank=12).forget([1])
    with pytest.raises(InputError, match=r"^moments: got Moments"):
        Continual(groups().total())


def test_near_names_come_first():
    names = [f"client {name}" for name in ("ada", "alan", "barbara", "claude", "donald", "edsger", "grace", "john")]
    moments = GroupedMoments(3).update(normal(8, 3), names)
    with pytest.raises(InputError, match="no group 'client allan'; there are 'client alan', "):
        moments.select(["client allan"])


# ---- warm start ----


def test_a_warm_start_ends_at_the_same_optimum():
    cold, warm = Continual(groups(), rank=4), Continual(groups(), rank=4, warm_start=True)
    for key in (2, 0, 5):
        mine, theirs = warm.forget([key]).certificate, cold.forget([key]).certificate
        assert mine.relative_gap <= 1e-6
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-6)


@pytest.mark.parametrize("options", [{"rank": 60}, {"forget_weight": 2.0}, {"min_retain_kept": 0.9}])
def test_starting_at_the_optimum_costs_no_more(options):
    moments = GroupedMoments(192).update(normal(4000, 192, seed=4), torch.arange(4000) % 8)
    pair = moments.without([1]), moments.select([1])
    first = loft.solve(*pair, **options)
    again = loft.solve(*pair, **options, start=first)
    assert again.certificate.relative_gap <= 1e-6
    assert again.certificate.loss == pytest.approx(first.certificate.loss, rel=2e-6, abs=1e-9)
    assert again.certificate.eigen_solves <= first.certificate.eigen_solves


def test_what_is_no_start():
    moments = groups()
    with pytest.raises(InputError, match=r"^start: got float, expected a Projection"):
        loft.solve(moments.without([1]), moments.select([1]), 4, start=0.5)
    plain = loft.Projection(torch.eye(12)[:, :4], torch.zeros(12))
    assert loft.solve(moments.without([1]), moments.select([1]), 4, start=plain).rank == 4


def test_an_oblique_projection_that_stands_is_the_same():
    moments = groups()
    head = torch.nn.Linear(moments.dim, 6)
    continual = Continual(moments, keep_forgotten=False, head=head, erase=True, close=True)
    first = continual.forget([0, 1, 2, 3])
    assert first.rank == 1
    later, z = continual.forget([4]), normal(5, moments.dim)
    assert "stands" in later.certificate.why
    assert torch.equal(later.lift, first.lift)
    assert torch.equal(later(z), first(z))
