"""What a model would say of rows it never saw, and making it say so: memorised noise has to come loose."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from loft_fast import InputError, SiteError, match_retrained, unseen
from loft_fast.confidence import Held, flattened, joined, margins
from loft_fast.sites import find_site
from loft_fast.unseen import _foretell, _like_any, _vectors
from loft_fast.voters import WIDTH, Voters, _left_out, earliest, without

CLASSES, WIDTH_IN, NOISE = 4, 12, 0.25
BATCH = 100


def rows(n, seed):
    """Four clouds of points; a quarter of the labels are wrong, so that only memory gets them right."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    centers = 2.5 * torch.randn(CLASSES, WIDTH_IN, generator=torch.Generator().manual_seed(0))
    x = centers[y] + torch.randn(n, WIDTH_IN, generator=generator)
    wrong = torch.rand(n, generator=generator) < NOISE
    return x, torch.where(wrong, (y + 1) % CLASSES, y)


def batches(x, y):
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def network():
    return nn.Sequential(nn.Linear(WIDTH_IN, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def train(x, y, seed):
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(120):
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model, x, y):
    return 100 * float((model(x).argmax(1) == y).double().mean())


@pytest.fixture(scope="module")
def memorised():
    """A network that knows its 1000 rows by heart; the first 100 are to be forgotten."""
    x, y = rows(1000, seed=1)
    model = train(x, y, seed=0)
    assert accuracy(model, x, y) > 97
    loaders = [batches(x[100:], y[100:]), batches(x[:100], y[:100]), batches(*rows(400, seed=2))]
    return model, loaders, train(x[100:], y[100:], seed=1)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_foretells_what_the_retrained_network_says(memorised):
    model, loaders, retrained = memorised
    before = state(model)
    found = unseen(model, *loaders, progress=False)
    x, y = loaders[1][0]
    truth = accuracy(retrained, x, y)
    assert accuracy(model, x, y) - truth > 25  # else there would be nothing to foretell
    assert abs(found.accuracy - truth) < 12  # of 100 rows: two standard deviations
    assert found.validation == accuracy(model, *(torch.cat(column) for column in zip(*loaders[2], strict=True)))
    assert found.log_probabilities.shape == (100, CLASSES)
    torch.testing.assert_close(found.log_probabilities.exp().sum(1), torch.ones(100))
    expected, said = (margins(scores, y) for scores in (found.log_probabilities, retrained(x).detach()))
    ranks = torch.stack([one.argsort().argsort().double() for one in (expected, said)])
    assert torch.corrcoef(ranks)[0, 1] > 0.35
    assert (found.rows, found.batches) == (900, 9)
    assert same(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_random_sample_is_foretold_to_do_as_well_as_unseen_rows_of_its_ranks(memorised):
    """A hundred rows with by chance more or fewer wrong labels: discriminants notice some of that."""
    model, (retain, _, validation), _ = memorised
    expected, truth = [], []
    for seed in range(3, 11):
        x, y = rows(100, seed)
        found = unseen(model, retain, batches(x, y), validation, progress=False)
        assert abs(found.accuracy - found.validation) < 8
        expected.append(found.accuracy)
        truth.append(accuracy(model, x, y))
    assert torch.corrcoef(torch.tensor([expected, truth]))[0, 1] > 0.5


def with_others(n, seed):
    """As `rows`; the last eighth are of a kind of their own, of class 0 and about halfway to class 1."""
    x, y = rows(n, seed)
    others = torch.arange(n) >= n - n // 8
    centers = 2.5 * torch.randn(CLASSES, WIDTH_IN, generator=torch.Generator().manual_seed(0))
    x[others] += 0.55 * centers[0] + 0.45 * centers[1] - centers[y[others]]
    y[others] = 0
    return x, y, others


def test_rows_of_a_kind_that_is_not_retained_do_worse():
    x, y, others = with_others(1600, seed=11)
    model, retrained = train(x, y, seed=0), train(x[~others], y[~others], seed=1)
    fresh, labels, gone = with_others(400, seed=12)
    loaders = batches(x[~others], y[~others]), batches(x[others], y[others]), batches(fresh[~gone], labels[~gone])
    found = unseen(model, *loaders, progress=False)
    truth = accuracy(retrained, x[others], y[others])
    assert accuracy(model, x[others], y[others]) > 95
    assert truth < accuracy(retrained, fresh[~gone], labels[~gone]) - 5
    assert abs(found.accuracy - truth) < 0.4 * abs(found.validation - truth)
    assert [site for site, *_ in found.sites] == ["0:input"]


def test_samples_are_told_from_other_kinds():
    draws = [torch.rand(300, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert sum(not _like_any(ranks, 10_000) for ranks in draws) <= 6  # one in a hundred, give or take
    assert not any(_like_any(ranks**1.5, 10_000) for ranks in draws)
    assert _like_any(draws[0] ** 1.5, 20)  # of so few one cannot tell
    assert _like_any(torch.tensor([0.0]), 10_000)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([(90.0, 0.5), (99.0, 0.5), (97.0, 0.0)], [0, 1, 0]),  # too weak; as good as the model, and first; later
        ([(93.0, 6.0), (97.0, 0.0)], [0, 1]),  # it knows rows that the model saw
        ([(60.0, 1.0), (80.0, 0.5), (70.0, 0.0)], [0, 1, 0]),  # none is as good as the model: the best
        ([(94.3, 1.7), (99.5, 0.0)], [0.5, 0.5]),  # just as good as has to be, or too weak by a little
        ([(95.0, 1.0), (95.0, 1.0), (99.5, 0.0)], [0.5, 0.25, 0.25]),
        ([(96.0, -1.7), (60.0, 0.0)], [1, 0]),  # too weak by a little, and the best that there is
    ],
)
def test_the_earliest_place_that_does_as_well_as_the_model_by_chance(places, wanted):
    seen = Held([(functional.one_hot(torch.arange(200) // 195, 2), torch.zeros(200, dtype=torch.int64), {})])
    assert seen.right.sum() == 195
    left_out = torch.rand(1000, dtype=torch.float64)
    fitted = [
        SimpleNamespace(accuracy=a, contamination=c, cost=max(0, c) - a, left_out=left_out, sorted=left_out)
        for a, c in places
    ]
    for one in fitted:
        one.ranks = lambda found: found
    voters = earliest(fitted, seen.right)
    chances = [0.0] * len(places)
    for one, weight in zip(voters.parts, voters.weights.tolist(), strict=True):
        chances[next(i for i, other in enumerate(fitted) if other is one)] += weight
    assert chances == pytest.approx(wanted, abs=0.05)
    assert len(voters.parts) == sum(chance > 0 for chance in wanted)


def test_voters_count_by_their_weight():
    """Of two that take a row for different classes, the one that weighs three times as much counts three times."""

    def part(scores):
        known = torch.linspace(-1, 1, 101, dtype=torch.float64)
        return SimpleNamespace(
            place="here",
            left_out=known,
            sorted=known,
            ranks=lambda found: torch.searchsorted(known, found) / 101,
            scores=lambda features: torch.tensor(scores, dtype=torch.float64),
        )

    one, other = part([[0.0, 3.0, -30.0], [5.0, 0.0, 0.0]]), part([[0.0, -30.0, 3.0], [0.0, 0.5, 0.5]])
    labels = torch.zeros(2, dtype=torch.int64)
    ranks, others, right = Voters([one, other], [3.0, 1.0]).judge(labels, [{"here": None}])
    assert right == pytest.approx(0.75 / 2)  # the first of them gets one row of two right
    torch.testing.assert_close(others[0].exp(), torch.tensor([0, 0.75, 0.25], dtype=torch.float64))
    assert ranks[0] < ranks[1]
    alone, _, _ = Voters([one]).judge(labels, [{"here": None}])
    assert ranks[1] < alone[1]


class Said:
    """Discriminants that give these log-probabilities to the classes that are not a row's own."""

    def __init__(self, others):
        self.others = others

    def judge(self, labels, features):
        return torch.zeros(len(labels)), self.others, 0.0


def held(n, classes, spread, seed):
    """Rows of which about half are right; spread: of their logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator) + 1.5 * functional.one_hot(labels, classes)
    return Held([(spread * logits, labels, {})])


class Ranks(Said):
    """Discriminants that rank the rows like this."""

    def judge(self, labels, features):
        return self.others, None, 0.0


def test_a_sample_of_better_rows_by_chance_is_expected_to_do_better():
    """Ranks of rows that are right tend to be higher: better by as much as that tells, and no more."""
    rows = held(2000, 4, 3.0, seed=8)
    share = float(rows.right.double().mean())
    noise = torch.rand(2000, generator=torch.Generator().manual_seed(9))
    known = ((rows.right.double() / 2 + noise).argsort().argsort() + 0.5) / 2000
    even = (torch.arange(300) + 0.5) / 300
    assert rows.expected(Ranks(known), even) == pytest.approx(share, abs=1e-3)
    better = rows.expected(Ranks(known), even**0.8)
    told = torch.stack(
        [rows.right[(known >= low) & (known < low + 0.1)].double().mean() for low in torch.arange(10) / 10]
    )
    wanted = told[(even**0.8 * 10).long()].mean() - told[(even * 10).long()].mean() + share
    assert better == pytest.approx(float(wanted), abs=0.015)
    assert better > share + 0.03
    blind = rows.expected(Ranks(noise.double()), even**0.8)  # ranks that tell nothing say nothing
    assert blind == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("right", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_rows_are_less_sure_by_a_constant_where_fewer_are_to_be_right(right):
    rows = held(400, 20, 3.0, seed=5)
    ranks = torch.rand(1000, generator=torch.Generator().manual_seed(6))
    found = rows.margins_by(ranks, right)
    assert torch.equal(found.argsort(), ranks.argsort())
    lost = np.quantile(rows.margins, (np.arange(1000) + 0.5) / 1000, method="hazen") - found.sort().values.numpy()
    assert float(np.ptp(lost)) < 1e-9
    begin = np.quantile(rows.margins, 1 - rows.right.double().mean(), method="hazen")
    assert abs(int((found > min(begin, 0)).sum()) - 1000 * right) <= 1
    torch.testing.assert_close(rows.margins_by(ranks**3, right), found)  # only the order counts


def test_where_few_are_wrong_as_few_of_a_sample_are():
    """Between the last wrong and the first right margin is a gap: whoever falls into it above 0 would be right."""
    lead = torch.linspace(2, 9, 200)
    lead[[3, 50, 120, 170]] = torch.tensor([-0.1, -3.0, -1.0, -0.5])
    logits = torch.stack([lead, torch.zeros(200)], 1)
    rows = Held([(logits, torch.zeros(200, dtype=torch.long), {})])
    found = rows.margins_by(torch.rand(1000, generator=torch.Generator().manual_seed(10)), 0.98)
    assert int((found < 0).sum()) == 20


def test_a_closed_output_is_no_obstacle():
    """Rows of its class are wrong beyond doubt; without a bound their margins would make all others unknown."""
    labels = torch.arange(90) % 3
    logits = functional.one_hot(labels, 3) * torch.linspace(0.1, 3, 90).unsqueeze(1)
    logits[:, 2] = -torch.inf
    rows = Held([(logits, labels, {})])
    found = rows.margins_by(torch.rand(50, generator=torch.Generator().manual_seed(7)), 0.4)
    assert found.isfinite().all()
    assert float(found.min()) < -50


@pytest.mark.parametrize("sharpness", [1.0, 8.0, 30.0])
def test_how_evenly_the_model_spreads_over_wrong_classes(sharpness):
    """Discriminants that are right, but this many times too sure."""
    rows = held(400, 20, 2.0, seed=0)
    found = rows.temperature(Said((sharpness * rows.others).log_softmax(1)))
    assert found == pytest.approx(sharpness, rel=0.13)  # half a step


def test_as_many_unseen_rows_come_out_right_as_are():
    """Discriminants that know nothing: nearest in KL would be to spread evenly, and most rows would look right."""
    rows = held(400, 20, 4.0, seed=1)
    noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    others = without(30 * noise, rows.labels)
    share = rows.right.double().mean()

    def right(temperature):
        return (joined(rows.margins, flattened(others, temperature), rows.labels).argmax(1) == rows.labels).double()

    found = rows.temperature(Said(others))
    assert abs(right(found).mean() - share) < 0.01
    assert right(100.0).mean() > share + 0.1
    assert found > 1


def test_a_sample_comes_out_as_wrong_as_expected_where_discriminants_hardly_choose():
    """Twenty classes of which none is much likelier than another: too few rows would come out wrong."""
    rows = held(400, 20, 4.0, seed=1)
    labels = torch.arange(300) % 20
    noise = torch.randn(300, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    even = without(0.3 * noise, labels)

    class Even(Said):
        sorted = torch.rand(1000)

        def judge(self, labels, features):
            spread = self.others if len(labels) == 300 else without(torch.zeros(len(labels), 20).double(), labels)
            return torch.rand(len(labels), generator=torch.Generator().manual_seed(4)), spread, 0.0

    voters = Even(even)
    found, accuracy, used = _foretell(voters, voters, rows, [(torch.zeros(300, 20), labels, {})])
    expected = 100 * (int(rows.right.sum()) + 1) / 402
    assert abs(accuracy - expected) < 1
    assert accuracy == 100 * float((found.argmax(1) == labels).double().mean())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(300))
    assert used is voters


def test_two_classes_leave_nothing_to_spread():
    rows = held(50, 2, 1.0, seed=3)
    assert rows.temperature(Said(rows.others)) == 1
    assert torch.equal(flattened(rows.others, 7.0), rows.others)


def test_a_place_where_rows_are_known_by_heart_is_not_chosen(memorised):
    model, loaders, _ = memorised
    found = unseen(model, *loaders, progress=False)
    last = unseen(model, *loaders, sites=["4"], progress=False)
    assert {site for site, *_ in last.sites} == {"4:input"}
    assert last.sites[0][2] > found.sites[0][2] + 5
    assert {site for site, *_ in found.sites} == {"0:input"}


def test_matching_makes_the_rows_look_unseen_and_keeps_the_others(memorised):
    model, loaders, retrained = memorised
    model = copy.deepcopy(model).train()
    flags = [module.training for module in model.modules()]
    found = match_retrained(model, *loaders, epochs=30, rate=2e-3, progress=False)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    (x, y), kept = loaders[1][0], [torch.cat(column) for column in zip(*loaders[0], strict=True)]
    assert abs(accuracy(model, x, y) - found.accuracy) <= 5
    assert abs(accuracy(model, x, y) - accuracy(retrained, x, y)) < 15
    assert accuracy(model, *kept) > 92


@pytest.mark.parametrize("where", ["forecast", "distillation"])
def test_an_interruption_leaves_the_model_as_it_was(memorised, where):
    model, (retain, forget, validation), _ = memorised
    model = copy.deepcopy(model)
    before, passes = state(model), iter(range(100))

    class Interrupted:
        def __iter__(self):
            for index, batch in enumerate(retain):
                if index == 5 and next(passes) == (0 if where == "forecast" else 1):
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        match_retrained(model, Interrupted(), forget, validation, rate=0.01, progress=False)
    assert same(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_input(memorised):
    model, (retain, forget, validation), _ = memorised
    before = state(model)
    one = [(x[y == 0], y[y == 0]) for x, y in retain]
    outside = [(x, y + CLASSES) for x, y in forget]
    cases = [
        ((retain, [], validation), {}, "forget: it yielded no batches"),
        ((retain, forget, []), {}, "validation: it yielded no batches"),
        (([], forget, validation), {}, "retain: it yielded no rows"),
        ((one, forget, validation), {}, "retain: got rows of 1 classes"),
        ((retain, outside, validation), {}, "forget: got labels outside of the model's 4 outputs"),
        ((retain, [x for x, _ in forget], validation), {}, "forget: got labels NoneType and outputs"),
        ((iter(retain), forget, validation), {}, "retain: got a list_iterator, expected a loader that can be passed"),
        (([(x * math.nan, y) for x, y in retain], forget, validation), {}, "retain: the model's outputs hold NaN"),
        ((retain, [(x * math.nan, y) for x, y in forget], validation), {}, "forget: the model's outputs hold NaN"),
        ((retain, forget, [(x * math.nan, y) for x, y in validation]), {}, "validation: the model's outputs hold NaN"),
        ((retain, forget, validation), {"epochs": 0}, "epochs: got 0"),
        ((retain, forget, validation), {"epochs": True}, "epochs: got True"),
        ((retain, forget, validation), {"rate": math.nan}, "rate: got nan"),
    ]
    for loaders, options, message in cases:
        with pytest.raises(InputError, match=message):
            match_retrained(model, *loaders, progress=False, **({"rate": 1e-3} | options))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(InputError, match="model: got one without a parameter that requires a gradient"):
        match_retrained(frozen, retain, forget, validation, rate=1e-3, progress=False)
    with pytest.raises(SiteError, match="no module 'nowhere'"):
        unseen(model, retain, forget, validation, sites=["nowhere"], progress=False)
    with pytest.raises(InputError, match="sites: got None for a model without"):
        unseen(nn.Identity(), retain, forget, validation, progress=False)
    assert same(model, before)


class Tokens(nn.Module):
    """Dictionaries of padded tokens, and a layer that is never reached."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.never = nn.Linear(3, 3)
        self.mix = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        z = self.mix(self.embed(input_ids)) * attention_mask.unsqueeze(-1)
        return self.fc(z.sum(1) / attention_mask.sum(1, keepdim=True))


def test_padded_tokens_do_not_count():
    torch.manual_seed(0)
    model = Tokens()
    ids, y = torch.randint(50, (300, 7)), torch.randint(3, (300,))
    mask = (torch.arange(7) < torch.randint(2, 8, (300, 1))).long()

    def loaders(ids):
        whole = [{"input_ids": ids, "attention_mask": mask, "labels": y}]
        return whole, [{name: part[:20] for name, part in whole[0].items()}], whole

    found = unseen(model, *loaders(ids), progress=False)
    padded = unseen(model, *loaders(torch.where(mask.bool(), ids, 49)), progress=False)
    assert torch.equal(found.log_probabilities, padded.log_probabilities)
    assert {site for site, *_ in found.sites} <= {"mix:input", "fc:input"}


def test_large_maps_are_averaged_and_batch_norm_stays():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3)
    )
    x, y = torch.randn(120, 1, 60, 60), torch.randint(3, (120,))
    model(x[:2])
    model = model.train()
    statistics = model[1].running_mean.clone()
    loaders = [(x[20:], y[20:])], [(x[:20], y[:20])], [(x[:50], y[:50])]
    assert x[0].numel() > WIDTH
    assert _vectors(find_site(model, "0"), x, None).shape == (120, 45 * 45)  # the largest square within WIDTH
    found = match_retrained(model, *loaders, rate=1e-3, epochs=2, progress=False)
    assert found.log_probabilities.isfinite().all()
    assert torch.equal(model[1].running_mean, statistics)


def test_labels_of_a_class_that_retain_lacks_are_foretold_to_be_wrong(memorised):
    model, (retain, forget, validation), _ = memorised
    lacking = [(x[y != 0], y[y != 0]) for x, y in retain]
    x, y = forget[0]
    found = unseen(model, lacking, [(x[y == 0], y[y == 0])], validation, progress=False)
    assert found.accuracy == 0
    assert not found.log_probabilities.isnan().any()


def test_a_dead_layer_is_no_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].bias.data -= 100  # all zero behind it
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    loaders = [(x[20:], y[20:])], [(x[:20], y[:20])], [(x[:10], y[:10])]
    assert unseen(model, *loaders, sites=["2"], progress=False).log_probabilities.exp().sum(1).allclose(torch.ones(20))


def test_rows_left_out_are_spread_over_any_number_of_rows():
    out = _left_out(torch.arange(200_000))
    assert out[:10_000].sum() == 2000
    for start in (10_000, 20_000, 40_000, 80_000):
        chosen = torch.where(out[start : 2 * start])[0]
        assert len(chosen) == 500
        assert set(chosen.diff().tolist()) == {start // 500}


def test_a_sorted_loader_does_not_decide_on_its_first_class(memorised, monkeypatch):
    model, (retain, forget, validation), _ = memorised
    monkeypatch.setattr(sys.modules["loft_fast.unseen"], "_LOOK_AFTER", 100)
    x, y = (torch.cat(column) for column in zip(*retain, strict=True))
    order = y.argsort(stable=True)
    found = unseen(model, batches(x[order], y[order]), forget, validation, progress=False)
    assert {site for site, *_ in found.sites} == {"0:input"}
    assert found.rows == len(x)
