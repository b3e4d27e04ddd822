"""What bench.quality asks for, measures and keeps: tasks, measures, costs, networks on disk, tuning, runs."""

import copy
import itertools
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.quality import forecasts, measures, originals, run, store, tune
from bench.quality.data import DATA, load, packages
from bench.quality.data.data import Data, split
from bench.quality.data.images import STYLES, styles
from bench.quality.execute import Case, changed, execute, prepare
from bench.quality.measures import RELEARN_STEPS, Seen, Sets, gap, likeness, lira, probes, relearning
from bench.quality.methods import METHODS, RETRAIN, RETRAIN_AGAIN
from bench.quality.methods.method import Method
from bench.quality.networks import linear_map, mlp, with_map
from bench.quality.originals import SHADOWS, Trained, hardness, logits, shadows, trained
from bench.quality.problem import Rows
from bench.quality.setups import RECIPES
from bench.quality.tasks import GROUP_SHARE, KEPT, NOISE, ROUNDS, TASKS, TUNED_AS, make, sub_groups
from bench.quality.training import Recipe, train

CLASSES, WIDTH = 10, 12
CLASS_TASKS = ("one class", "several classes", "extreme", "continual")
ROW_TASKS = ("random 1%", "random 10%", "hardest", "mislabelled")


def rows_of(n, seed, classes=CLASSES):
    """Clouds of points; no two rows are the same."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    centers = 1.2 * torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(0))
    return Rows(centers[y] + torch.randn(n, WIDTH, generator=generator), y)


def small(classes):
    return mlp(classes, WIDTH, 32, 16)


def smaller(classes):
    return mlp(classes, WIDTH, 32, 8)


RECIPE = Recipe(small, 15, 32, 1e-2)


def test_packages_are_those_of_the_release_and_not_of_its_updates(monkeypatch):
    stanzas = [
        f"Package: p{i}\nSection: {'net' if i % 2 else 'contrib/web'}\nMaintainer: A <a@b>\nDescription: does {i}"
        for i in range(packages.FEWEST_STANZAS)
    ]
    files = {"/lists/main": "\n\n".join(stanzas), "/lists/more": stanzas[0] + "\n\n" + stanzas[1]}
    targets = "stable /lists/more\nstable-updates /lists/u\nstable-security /lists/s\nstable /lists/main\n"
    monkeypatch.setattr(packages, "_output", lambda *command: files.get(command[-1], targets))
    found = packages.available()
    assert len(found) == packages.FEWEST_STANZAS  # a description that comes twice counts once
    assert found[0] == packages.Package("net", "does 1", "A <a@b>")
    assert {package.section for package in found} == {"net", "web"}
    files["/lists/main"] = stanzas[0]
    with pytest.raises(RuntimeError, match=r"apt knows only 3 packages: run `apt-get update` first"):
        packages.available()


@pytest.fixture(scope="module")
def data():
    """Ten classes. Of the groups, 0 is class 0, 1 is nearly all of class 1, the others lie across the rest."""
    train_rows, test_rows = rows_of(1000, 1), rows_of(500, 2)
    groups = []
    for rows, seed in ((train_rows, 3), (test_rows, 4)):
        draw = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed))
        group = 2 + (30 * draw).long()
        group[(rows.y == 1) & (draw < 0.9)] = 1
        group[rows.y == 0] = 0
        groups.append(group)
    return split("tiny", train_rows, test_rows, tuple(map(str, range(CLASSES))), *groups)


def no_hardness():
    raise AssertionError("not asked for")


def some_hardness(data):
    return torch.rand(len(data.train), generator=torch.Generator().manual_seed(7))


def made(name, data):
    return make(name, data, lambda: some_hardness(data) if name == "hardest" else no_hardness())


# Tasks


@pytest.mark.parametrize("name", TASKS)
def test_masks(data, name):
    task = made(name, data)
    assert task.name == name
    assert len(task.rounds) == len(task.gone)
    assert all(rows.shape == (len(data.train),) and rows.dtype == torch.bool and rows.any() for rows in task.rounds)
    assert not task.train.all()
    assert int(task.train.sum()) == sum(int(rows.sum()) for rows in task.rounds)  # no row goes twice
    assert (task.test is None) == (name in ROW_TASKS)
    assert task.kind == ("class" if name in CLASS_TASKS else "rows")
    assert (task.labels is not None) == (name == "mislabelled")
    again = made(name, data)
    assert all(torch.equal(one, other) for one, other in zip(task.rounds, again.rounds, strict=True))


@pytest.mark.parametrize("name", CLASS_TASKS)
def test_classes_go_whole(data, name):
    task = made(name, data)
    labels = [label for gone in task.gone for label in gone]
    assert len(set(labels)) == len(labels)
    for rows, gone in zip(task.rounds, task.gone, strict=True):
        assert set(data.train.y[rows].tolist()) == set(gone)
        assert not set(data.train.y[~rows].tolist()) & set(gone)
    assert task.test.any()
    assert set(data.test.y[task.test].tolist()) == set(labels)
    assert not set(data.test.y[~task.test].tolist()) & set(labels)


def test_how_many_classes_go(data):
    assert [len(made(name, data).gone[0]) for name in ("one class", "several classes", "extreme")] == [1, 2, 8]
    assert round((1 - KEPT) * CLASSES) == 8
    gone = made("continual", data).gone
    assert {len(labels) for labels in gone} == {1}
    assert len(gone) == CLASSES - 2 < ROUNDS  # two are left to tell apart


@pytest.mark.parametrize(("name", "share"), [("random 1%", 0.01), ("random 10%", 0.1), ("mislabelled", NOISE)])
def test_share_of_the_rows(data, name, share):
    task = made(name, data)
    assert int(task.train.sum()) == round(share * len(data.train))
    assert len(data.train.y[task.train].unique()) > 5  # from everywhere


def test_hardest_rows(data):
    hard, task = some_hardness(data), made("hardest", data)
    assert int(task.train.sum()) == len(data.train) // 10
    assert hard[task.train].min() >= hard[~task.train].max()


def test_wrong_labels(data):
    task = made("mislabelled", data)
    assert torch.equal(task.labels != data.train.y, task.train)
    assert 0 <= int(task.labels.min()) <= int(task.labels.max()) < CLASSES


def shares(data):
    """(groups, classes): what a group is of a class."""
    of_class = torch.zeros(int(data.group.max()) + 1, CLASSES)
    of_class.index_put_((data.group, data.train.y), torch.ones(len(data.group)), accumulate=True)
    return of_class / torch.bincount(data.train.y, minlength=CLASSES)


def test_sub_groups(data):
    task = made("sub-group", data)
    chosen = data.group[task.train].unique()
    assert set(data.group[~task.train].tolist()).isdisjoint(chosen.tolist())
    assert torch.equal(task.test, torch.isin(data.group_test, chosen))
    assert shares(data)[:2].max(1).values.min() > 0.8  # there are some that would not do
    assert shares(data)[chosen].max() <= 0.8
    usable = torch.where(shares(data).max(1).values <= 0.8)[0]
    sizes = torch.bincount(data.group)
    rest = usable[~torch.isin(usable, chosen)]
    assert sizes[chosen].min() >= sizes[rest].max()
    needed = GROUP_SHARE * len(data.train)
    assert int(sizes[chosen].sum()) - int(sizes[chosen].min()) < needed <= int(sizes[chosen].sum())


def test_small_sub_groups_add_up(data):
    """Of groups of two or three rows several are needed."""
    small_groups = Data(**(vars(data) | {"group": torch.arange(len(data.train)) // 7, "group_test": data.group_test}))
    task = made("sub-group", small_groups)
    assert int(task.train.sum()) == 35
    assert len(small_groups.group[task.train].unique()) == 5


def test_other_sub_groups_come_after(data):
    sizes, first, second, third = torch.bincount(data.group), *(sub_groups(data, which) for which in range(3))
    assert torch.equal(first, sub_groups(data))
    assert len(set(torch.cat([first, second, third]).tolist())) == len(first) + len(second) + len(third)
    assert sizes[first].min() >= sizes[second].max() >= sizes[second].min() >= sizes[third].max()
    assert not sub_groups(data, 1000).numel()


# Data


def identity(rows):
    return {tuple(row) for row in rows.x.tolist()}


def test_a_fifth_of_the_test_rows_is_for_validation(data):
    assert (len(data.validation), len(data.test)) == (100, 400)
    assert not identity(data.validation) & identity(data.test)
    assert identity(data.validation) | identity(data.test) == identity(rows_of(500, 2))


def test_held_out_rows_are_training_rows(data):
    held = data.held_out()
    assert (len(held.train), len(held.test)) == (900, 100)
    assert not identity(held.train) & identity(held.test)
    assert identity(held.train) | identity(held.test) == identity(data.train)
    assert not identity(data.test) & (identity(held.train) | identity(held.test) | identity(held.validation))
    about = {tuple(x): (y, g) for x, y, g in zip(data.train.x.tolist(), data.train.y, data.group, strict=True)}
    for rows, groups in ((held.train, held.group), (held.test, held.group_test)):
        assert all(about[tuple(x)] == (y, g) for x, y, g in zip(rows.x.tolist(), rows.y, groups, strict=True))


def test_groups_go_along_with_the_test_rows(data):
    whole = rows_of(500, 2)
    numbered = split("tiny", data.train, whole, data.names, data.group, torch.arange(500))
    assert torch.equal(whole.x[numbered.group_test], numbered.test.x)


def test_styles_lie_inside_classes():
    train_rows, test_rows = rows_of(200, 1, classes=3), rows_of(50, 2, classes=3)
    for rows, groups in zip((train_rows, test_rows), styles(train_rows, test_rows), strict=True):
        assert torch.equal(groups // STYLES, rows.y)
    assert len(styles(train_rows, test_rows)[0].unique()) == 3 * STYLES


# Training, and what is kept of it


def same(one, other):
    old, new = one.state_dict(), other.state_dict()
    return list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)


def test_training_depends_on_its_seed_alone(data):
    recipe = Recipe(small, 1, 64, 1e-2)
    torch.manual_seed(1)
    one = train(recipe, data.train, CLASSES, 0)
    following = torch.rand(1)
    torch.manual_seed(2)
    assert same(one, train(recipe, data.train, CLASSES, 0))
    assert not same(one, train(recipe, data.train, CLASSES, 1))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), following)  # others draw as if nothing had been trained
    assert not any(part.training for part in one.modules())


def test_second_time_from_the_cache(data, tmp_path, monkeypatch):
    recipe = Recipe(small, 1, 64, 1e-2)
    first = trained(recipe, data.train, CLASSES, 0, tmp_path)
    monkeypatch.setattr(originals, "train", no_training)
    second = trained(recipe, data.train, CLASSES, 0, tmp_path)
    assert same(first.model, second.model)
    assert first.seconds == second.seconds
    assert not any(part.training for part in second.model.modules())
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def no_training(*_):
    raise AssertionError("it was there")


def test_a_damaged_network_is_trained_again(data, tmp_path):
    recipe = Recipe(small, 1, 64, 1e-2)
    first = trained(recipe, data.train, CLASSES, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert same(first.model, trained(recipe, data.train, CLASSES, 0, tmp_path).model)
    assert len(path.read_bytes()) == len(whole)


def test_anything_else_is_another_network(data, tmp_path):
    rows, base = data.train[torch.arange(100)], Recipe(small, 1, 64, 1e-2)
    relabelled = Rows(rows.x, rows.y.roll(1))
    moved = Rows(rows.x + torch.tensor([[1e-3]] + [[0.0]] * 99), rows.y)
    flipped = Rows(rows.x.flip(1), rows.y)  # of the same mean
    recipes = [Recipe(smaller, 1, 64, 1e-2), Recipe(small, 2, 64, 1e-2), Recipe(small, 1, 32, 1e-2)]
    ways = [
        (base, rows, CLASSES, 0),
        (base, rows, CLASSES, 1),
        (base, rows, CLASSES + 1, 0),
        (base, rows[torch.arange(99)], CLASSES, 0),
        (base, relabelled, CLASSES, 0),
        (base, moved, CLASSES, 0),
        (base, flipped, CLASSES, 0),
        *((recipe, rows, CLASSES, 0) for recipe in [*recipes, Recipe(small, 1, 64, 2e-2)]),
    ]
    for count, way in enumerate(ways, 1):
        trained(*way, tmp_path)
        assert len(list(tmp_path.iterdir())) == count, way


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Networks of RECIPE that several tests look at."""
    return tmp_path_factory.mktemp("cache")


def test_wrong_labels_are_hard(data, tmp_path):
    """To a network that was trained on the other half of the rows; one that saw them would know them by heart."""
    rows = data.train[torch.arange(300)]
    wrong = torch.arange(300) % 10 == 0
    labels = torch.where(wrong, (rows.y + 1) % CLASSES, rows.y)
    some = Data(**(vars(data) | {"train": Rows(rows.x, labels)}))
    hard = hardness(Recipe(small, 60, 20, 1e-2), some, tmp_path)
    assert hard[wrong].median() > hard[~wrong].quantile(0.9)


# Measures


@pytest.fixture(scope="module")
def cases(data, cache):
    """By task: the case on original 0."""
    return {name: prepare(RECIPE, data, made(name, data), 0, cache) for name in ("one class", "random 10%")}


@pytest.mark.parametrize("name", ["one class", "random 10%"])
def test_sets_are_all_rows(data, cases, name):
    case = cases[name]
    sets = case.sets
    assert identity(sets.retain_train).isdisjoint(identity(sets.forget_train))
    assert identity(sets.retain_train) | identity(sets.forget_train) == identity(data.train)
    assert identity(sets.retain_test).isdisjoint(identity(sets.forget_test))
    assert identity(sets.retain_test) | identity(sets.forget_test) == identity(data.test)
    assert ("forget_test" in sets.present) == (name == "one class")


@pytest.mark.parametrize("name", ["one class", "random 10%"])
def test_nothing_is_between_a_network_and_itself(cases, name):
    case = cases[name]
    retrained = Seen.of(case.retrained.model, case.sets)
    found = likeness(Seen.of(copy.deepcopy(case.retrained.model), case.sets), retrained)
    assert (found["gap"], found["agreement"], found["kl"], found["tug_of_war"]) == (0, 100, 0, 1)
    other = Seen.of(case.original.model, case.sets)
    found = likeness(other, retrained)
    assert found["gap"] == gap(other, retrained) > 0
    assert found["agreement"] < 100
    assert found["kl"] > 0
    assert found["tug_of_war"] < 1


def test_accuracy_entropy_and_gap_by_hand():
    """Two networks that say the same of every row: one class, and nothing."""
    rows = rows_of(40, 1)
    sure, unsure = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
    for model in (sure, unsure):
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
    sure.bias.data[3] = 20
    sets = Sets(rows, rows[rows.y == 3], rows, rows[rows.y == 3])
    seen, other = (Seen.of(model, sets) for model in (sure, unsure))
    share = 100 * float((rows.y == 3).double().mean())
    assert seen.values["retain_train"] == pytest.approx(share)
    assert seen.values["forget_train"] == 100
    assert other.values["forget_train"] == 0  # of equal logits the first one counts
    assert seen.confidence("forget_train").min() > 1 - 1e-6
    assert other.confidence("forget_train").tolist() == pytest.approx([0.1] * len(sets.forget_train))
    assert other.entropy("retain_test").tolist() == pytest.approx([2.302585] * 40)
    none = 100 * float((rows.y == 0).double().mean())
    wanted = [abs(share - none)] * 2 + [100] * 2 + [abs(seen.values["mia"] - other.values["mia"])]
    assert gap(seen, other) == pytest.approx(sum(wanted) / 5)


def test_shadows_hold_every_row_in_half_of_them(data, cache):
    rows = Rows(data.train.x[:80], torch.randint(CLASSES, (80,), generator=torch.Generator().manual_seed(5)))
    inside, models = shadows(Recipe(small, 60, 20, 1e-2), rows, CLASSES, cache)
    assert inside.shape == (SHADOWS, 80)
    assert (inside.sum(0) == SHADOWS // 2).all()
    assert len(models) == SHADOWS
    # Labels that only memory gets right: which rows a network has seen shows, and so does that it has not.
    for network in range(3):
        seen, unseen = (
            lira(models, inside, rows, part, models[network]) for part in (inside[network], ~inside[network])
        )
        assert seen > 90
        assert unseen < 30
    right = (logits(models[0], rows.x).argmax(1) == rows.y).double()
    assert right[inside[0]].mean() > 0.9 > right[~inside[0]].mean()


def test_relearning(cases):
    case = cases["one class"]
    level = 0.9 * Seen.of(case.original.model, case.sets).values["forget_train"]
    assert level > 80
    assert relearning(case.original.model, case.sets, 1e-3, level) == 0
    before = copy.deepcopy(case.retrained.model)
    steps = relearning(case.retrained.model, case.sets, 1e-2, level)
    assert 0 < steps < RELEARN_STEPS
    assert same(before, case.retrained.model)
    assert relearning(case.retrained.model, case.sets, 1e-9, level) == RELEARN_STEPS


def test_probes(cases):
    """They find the class in every block of the original, and after LEACE not in the last one."""
    case = cases["one class"]
    found = probes(case.original.model, case.sets)
    assert len(found) == len(case.original.model.blocks)
    assert all(block["linear"] > 0.9 and block["neighbours"] > 0.9 for block in found)
    erased = probes(execute(METHODS["leace"], case, 0, {"concepts": "classes"}).model, case.sets)
    assert erased[0] == found[0]
    assert erased[-1]["linear"] < 0.7


# Costs


def size(*tensors):
    return sum(4 * tensor.numel() for tensor in tensors)


def test_bytes_of_what_changed():
    torch.manual_seed(0)
    original = small(CLASSES).eval()
    assert changed(original, copy.deepcopy(original)) == 0
    model = copy.deepcopy(original)
    model.fc.bias.data += 1
    assert changed(original, model) == size(model.fc.bias)
    model.fc.weight.data += 1
    assert changed(original, model) == size(model.fc.bias, model.fc.weight)
    model.blocks[0][0].weight.data += 1
    assert changed(original, model) == size(model.fc.bias, model.fc.weight, model.blocks[0][0].weight)


def test_a_map_folds_into_the_head():
    """It is larger than the head, which is what has to be sent; and it renames what it is put behind."""
    torch.manual_seed(0)
    original = small(CLASSES).eval()
    model = with_map(copy.deepcopy(original), linear_map(torch.rand(16, 16), torch.rand(16)))
    assert list(model.state_dict()) != list(original.state_dict())
    assert size(*model.blocks[-1][1].parameters()) > size(*original.fc.parameters())
    assert changed(original, model) == size(*original.fc.parameters())
    closed = copy.deepcopy(model)
    closed.fc.bias.data += 1  # a head that has changed as well is sent once
    assert changed(original, closed) == size(*original.fc.parameters())
    # One further down does not, and has to be sent as it is.
    early = linear_map(torch.rand(32, 32), torch.rand(32))
    model.blocks[0] = nn.Sequential(model.blocks[0], early)
    assert changed(original, model) == size(*early.parameters(), *model.blocks[-1][1].parameters())


def remembering(cumulative):
    """A method that keeps its problems and adds one to the bias of the head."""
    asked = []

    def answer(problem):
        asked.append(problem)
        list(problem.batches("forget"))
        model = problem.copy()
        with torch.no_grad():
            model.fc.bias += 1
        return model

    return asked, Method(answer, "here", cumulative=cumulative)


@pytest.mark.parametrize("cumulative", [False, True])
def test_requests_one_after_another(data, cumulative):
    task = made("continual", data)
    network = Trained(small(CLASSES).eval(), 0.0)
    case = Case(RECIPE, data, task, network, network)
    asked, method = remembering(cumulative)
    result = execute(method, case, 5, {})
    assert len(asked) == len(task.rounds)
    before = torch.zeros_like(task.train)
    labels, touched = (), 0
    for number, (problem, rows, gone) in enumerate(zip(asked, task.rounds, task.gone, strict=True)):
        labels += gone
        both = before | rows
        now = both if cumulative else rows
        assert torch.equal(problem.forget.x, data.train.x[now])
        assert torch.equal(problem.retain.x, data.train.x[~both])
        assert problem.gone == (labels if cumulative else gone)
        answered = 0 if cumulative else number
        assert torch.allclose(problem.original.fc.bias, network.model.fc.bias + answered)
        assert (problem.seed, problem.rate, problem.batch) == (5, RECIPE.rate, RECIPE.batch)
        before, touched = both, touched + int(now.sum())
    assert result.costs["touched"] == touched
    assert result.costs["bytes"] == size(network.model.fc.bias)
    assert torch.allclose(result.model.fc.bias, network.model.fc.bias + (1 if cumulative else len(asked)))


def test_wrong_labels_reach_the_method(data, cache):
    case = prepare(RECIPE, data, made("mislabelled", data), 0, cache)
    asked, method = remembering(False)
    execute(method, case, 0, {})
    assert torch.equal(asked[0].forget.y, case.task.labels[case.task.train])
    assert not (asked[0].forget.y == data.train.y[case.task.train]).any()
    assert torch.equal(asked[0].retain.y, data.train.y[~case.task.train])


def test_methods_draw_by_the_seed_of_the_run(data):
    """And leave the draws of everyone else as they were."""
    task = made("one class", data)
    network = Trained(small(CLASSES).eval(), 0.0)
    drawn = []

    def answer(problem):
        drawn.append(float(torch.rand(1)))
        return problem.copy()

    torch.manual_seed(9)
    following = torch.rand(2)
    torch.manual_seed(9)
    torch.rand(1)
    for seed in (0, 0, 1):
        execute(Method(answer, "here"), Case(RECIPE, data, task, network, network), seed, {})
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(1), following[1:])


# Tuning


@pytest.mark.parametrize("name", METHODS)
def test_candidates(name):
    search = METHODS[name].search
    found = list(tune.candidates(METHODS[name]))
    assert found[0] == {knob: values[0] for knob, values in search.items()}
    assert all(found[i] not in found[:i] for i in range(len(found)))
    grid = 1
    for values in search.values():
        grid *= len(values)
    assert len(found) == min(grid, tune.TRIALS)
    assert all(set(one) == set(search) and all(one[knob] in search[knob] for knob in one) for one in found)
    assert found == list(tune.candidates(METHODS[name]))


def test_knobs_are_those_of_the_task_that_was_tuned():
    method = METHODS["fine-tune"]
    found = {"tiny/mlp/random 10%/fine-tune": {"knobs": {"epochs": 7, "rate": 9.0}}}
    tuned = {task for task in TASKS if tune.knobs(found, "tiny", "mlp", task, "fine-tune", method)["epochs"] == 7}
    assert tuned == {"random 1%", "random 10%", "hardest", "mislabelled"}
    assert tune.knobs({}, "tiny", "mlp", "hardest", "fine-tune", method) == {"epochs": 2, "rate": 0.1}
    assert set(TUNED_AS.values()) <= set(TASKS)


@pytest.fixture(scope="module")
def tiny(data, cache):
    """The data set and its network under the names that the commands take; (module, arguments) starts one."""

    def start(module, *arguments):
        patch.setattr(sys, "argv", ["it", "--data", "tiny", "--cache", str(cache), *map(str, arguments)])
        module.main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA, "tiny", lambda _: data)
        patch.setitem(RECIPES, "tiny", {"mlp": Recipe(small, 2, 64, 1e-2)})
        patch.setattr(measures, "PROBE_ROWS", 60)  # most of the time goes into probes
        yield start


def test_tuning_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    """What has no settings, or is not meant for the task, is not searched; what was searched is not searched again."""
    file = tmp_path / "tuned.json"
    methods = ["--methods", "original", "leace", "ours match", "gradient ascent"]
    tiny(tune, "--tasks", "several classes", *methods[:4], "--file", file)
    assert set(tune.read(file)) == {"tiny/mlp/several classes/leace"}
    (found,) = tune.read(file).values()
    assert [one["knobs"] for one in found["tried"]] == list(tune.candidates(METHODS["leace"]))
    assert found["gap"] == min(one["gap"] for one in found["tried"])
    assert {"knobs": found["knobs"], "gap": found["gap"]} in found["tried"]
    first = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tune, "search", no_training)
        tiny(tune, "--tasks", "several classes", *methods[:4], "--file", file)
    assert file.read_bytes() == first
    tiny(tune, "--tasks", "several classes", *methods, "--file", file)
    assert tune.read(file)["tiny/mlp/several classes/leace"] == found
    assert set(tune.read(file)) == {f"tiny/mlp/several classes/{name}" for name in ("leace", "gradient ascent")}


# Runs


def test_what_is_not_random_runs_once():
    names = [RETRAIN, RETRAIN_AGAIN, "original", "fine-tune", "ours"]
    assert METHODS["fine-tune"].random
    assert not METHODS["ours"].random
    found = list(run.wanted(names, [0, 4], [3, 1]))
    assert found == [
        (original, name, seed)
        for original in (0, 4)
        for name in names
        for seed in ([3, 1] if name == "fine-tune" else [3])
    ]


ARGUMENTS = [
    *("--tasks", "one class", "random 10%", "mislabelled"),
    *("--methods", RETRAIN, RETRAIN_AGAIN, "original", "fine-tune", "leace", "svd"),
    *("--originals", 0, 1, "--seeds", 0, 1),
]
FEW = [*("--tasks", "random 10%", "--methods", RETRAIN, "original", "fine-tune"), *ARGUMENTS[-6:]]
COSTS = ("seconds", "request_seconds", "peak_mib")


def without_costs(records):
    """By key: what does not depend on the clock or on what else the process holds."""
    return {store.key(one): {name: part for name, part in one.items() if name not in COSTS} for one in records}


def test_forecasts_stand_beside_retrained_networks(tiny, capsys):
    tiny(forecasts, "--count", 2)
    title, *lines, last = capsys.readouterr().out.splitlines()
    assert title.split() == ["tiny,", "mlp", "rows", "expected", "retrained", "error"]
    assert [line.split()[:2] for line in lines] == [[name, str(i)] for name in ("sub-group", "sample") for i in (1, 2)]
    for line in lines:
        *_, rows, expected, retrained, error = line.split()
        assert 30 <= int(rows) <= 100
        assert abs(float(expected) - float(retrained)) <= float(error) + 0.2  # each of them is rounded
        assert float(error) < 25  # of at least 30 rows
    assert last.startswith("mean error: sub-groups ")


@pytest.fixture(scope="module")
def once(tiny, tmp_path_factory):
    """A file of all runs, not to be written to."""
    file = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    tiny(run, *ARGUMENTS, "--file", file)
    return file


def test_runs(once):
    """Every method where it is meant for the task, random ones with both seeds; deeper measures with the first."""
    records = store.read_runs(once)
    assert len(records) == len(once.read_text().splitlines())
    each = {RETRAIN: [0], RETRAIN_AGAIN: [0], "original": [0], "fine-tune": [0, 1], "leace": [0]}
    wanted = {
        ("tiny", "mlp", task, method, original, seed)
        for task, more in (("one class", {"svd": [0, 1]}), ("random 10%", {}), ("mislabelled", {}))
        for method, seeds in (each | more).items()
        for original, seed in itertools.product((0, 1), seeds)
    }
    assert {store.key(one) for one in records} == wanted
    for one in records:
        first = one["seed"] == 0
        assert ("probes" in one) == ("relearn" in one) == (first and one["task"] == "one class")
        assert ("lira" in one) == (first and one["task"] == "random 10%")
        assert ("forget_test" in one) == (one["task"] == "one class")
        if one["method"] == RETRAIN:
            assert (one["gap"], one["agreement"], one["kl"]) == (0, 100, 0)
        if one["method"] == "original":
            assert (one["touched"], one["bytes"]) == (0, 0)


def test_a_second_start_adds_nothing(once, tiny, tmp_path):
    file = shutil.copy(once, tmp_path / "runs.jsonl")
    tiny(run, *ARGUMENTS, "--file", file)
    assert file.read_bytes() == once.read_bytes()


def test_what_ran_on_another_version_of_the_data_runs_again(few, tiny):
    for one in store.read_runs(few):
        store.add_run({**one, "version": "of before", "gap": -1.0}, few)
    tiny(run, *FEW, "--file", few)
    again = store.read_runs(few)
    assert len(again) == 8
    assert min(one["gap"] for one in again) >= 0
    assert not store.versions(again)


@pytest.fixture
def few(once, tmp_path):
    """Those of them that FEW asks for, in a file of their own."""
    file = tmp_path / "few.jsonl"
    for one in store.read_runs(once):
        if one["task"] == "random 10%" and one["method"] in (RETRAIN, "original", "fine-tune"):
            store.add_run(one, file)
    assert len(store.read_runs(file)) == 8
    return file


@pytest.mark.parametrize("stop", [0, 5])
def test_stopped_runs_go_on(few, tiny, tmp_path, monkeypatch, stop):
    """After some runs the next one is cut off in the middle of its line: in the end all are there, once, the same."""
    file, count = tmp_path / "stopped.jsonl", itertools.count()

    def add(record, path):
        if next(count) == stop:
            with open(path, "a") as cut:
                cut.write('{"data": "tiny", "model": "m')
            raise KeyboardInterrupt
        store.add_run(record, path)

    with monkeypatch.context() as patch:
        patch.setattr(run, "store", SimpleNamespace(**(vars(store) | {"add_run": add})))
        with pytest.raises(KeyboardInterrupt):
            tiny(run, *FEW, "--file", file)
    assert len(store.read_runs(file)) == stop
    tiny(run, *FEW, "--file", file)
    assert len(file.read_text().splitlines()) == 8 + 1  # the one that was cut off
    assert without_costs(store.read_runs(file)) == without_costs(store.read_runs(few))


def test_again_runs_all_anew(few, tiny):
    records = store.read_runs(few)
    tiny(run, *FEW, "--file", few, "--again")
    assert len(few.read_text().splitlines()) == 2 * 8
    assert without_costs(store.read_runs(few)) == without_costs(records)


def test_mistyped_names_are_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny(run, "--methods", "our", "--file", tmp_path / "runs.jsonl")
    assert "invalid choice: 'our'" in capsys.readouterr().err


def test_data_that_is_not_installed_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.quality.data.images.FASHION", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"^fashion-mnist: .*nowhere is not there: .*apt-get install"):
        load("fashion-mnist", tmp_path)
