"""bench.quality's account of its runs, on made-up ones: means, order, verdicts, claims, files; and the file of runs."""

import json
import math

import pytest

from bench.quality import claims, page, store, tables
from bench.quality.methods import METHODS, RETRAIN, RETRAIN_AGAIN
from bench.quality.methods.method import Method
from bench.quality.summary import against_best, against_target, earlier, overview, plain, summarise


def run(method, task="one class", gap=0.0, original=0, seed=0, **more):
    """A run as bench.quality.run writes it, of accuracies that were never measured."""
    accuracies = {"retain_train": 100.0, "forget_train": gap, "retain_test": 98.0, "mia": 10 * gap}
    about = {"data": "mnist-5000", "model": "cnn", "task": task, "method": method, "original": original, "seed": seed}
    about["version"] = "1"
    costs = {"seconds": 2.0, "touched": 100, "bytes": 40960}
    others = {"mia_entropy": 1.0, "agreement": 90.0, "kl": gap / 10, "tug_of_war": 0.5}
    return {**about, "knobs": {}, **accuracies, **others, "gap": gap, **costs, **more}


def probes(*pairs):
    return [{"linear": linear, "neighbours": neighbours} for linear, neighbours in pairs]


def only(rows, method, task="one class"):
    (row,) = (row for row in rows if (row["method"], row["task"]) == (method, task))
    return row


@pytest.fixture
def runs():
    """Two originals; what is random ran twice on each; probes with the first seed."""
    made = []
    for original in (0, 1):
        some = {"original": original}
        left, found = probes((0.9, 0.9), (0.8, 0.7)), probes((0.6, 0.6), (0.75, 0.6 - 0.1 * original))
        made += [
            run(
                "scrub",
                gap=1.0 + original,
                forget_test=4.0,
                peak_mib=10.0,
                probes=left,
                **some,
            ),
            run("scrub", gap=3.0 + original, forget_test=6.0, peak_mib=20.0, seed=1, **some),
            run("ours", gap=0.6, probes=probes((0.7, 0.5), (0.5 + 0.2 * original, 0.9)), relearn=10, **some),
            run("retrain again", gap=0.1, seconds=31.0, **some),
            run("retrain", seconds=30.0 + 20 * original, probes=found, **some),
            run("original", gap=60.0, touched=0, **some),
            run("oracle matching", gap=0.2, **some),
            run("retrain", "random 10%", seconds=20.0, **some),
            run("ours", "random 10%", gap=0.1, **some),
            run("ours match", "random 10%", gap=0.7 + 0.4 * original, lira=50.0 + original, **some),
            run("ssd", "random 10%", gap=0.8 + 0.2 * original, **some),
        ]
    return made


def test_means_and_spread(runs):
    scrub = only(summarise(runs), "scrub")
    assert (scrub["originals"], scrub["runs"], scrub["kind"]) == (2, 4, "class")
    assert scrub["gap_mean"] == scrub["forget_train"] == 2.5
    assert scrub["gap_spread"] == pytest.approx(math.sqrt(1.25))
    assert (scrub["mia"], scrub["forget_test"], scrub["peak_mib"]) == (25.0, 5.0, 15.0)
    assert (scrub["seconds"], scrub["retrain_seconds"]) == (2.0, 40.0)
    assert (scrub["relearn"], scrub["lira"]) == (None, None)
    match = only(summarise(runs), "ours match", "random 10%")
    assert (match["kind"], match["lira"], match["forget_test"], match["probe_auc"]) == ("rows", 50.5, None, None)


def test_probes_are_of_the_last_block_and_their_excess_of_any(runs):
    rows = summarise(runs)
    ours = only(rows, "ours")
    assert ours["probe_auc"] == ours["probe_linear"] == pytest.approx(0.6)
    assert ours["probe_neighbours"] == pytest.approx(0.9)
    assert ours["probe_excess"] == pytest.approx((0.3 + 0.4) / 2)  # nearest neighbours at the last block
    assert only(rows, "scrub")["probe_excess"] == pytest.approx(0.3)
    assert only(rows, "retrain")["probe_excess"] == 0


def test_probes_are_compared_with_a_network_of_the_same_original(runs):
    alone = [one for one in runs if (one["method"], one["original"]) != ("retrain", 1)]
    assert only(summarise(alone), "ours")["probe_excess"] == pytest.approx(0.3)
    assert only(summarise([one for one in runs if one["method"] != "retrain"]), "ours")["probe_excess"] is None


def test_block_excess_is_the_worst_of_means(runs):
    """Of two originals each has another worst block; the worst of the means is less."""
    made = []
    for original, found in enumerate([(0.9, 0.5), (0.5, 0.8)]):
        for method, values in (("ours blocks", found), ("retrain", (0.5, 0.5)), ("original", (0.9, 0.9))):
            seen = probes(*((value, 0.5) for value in values))
            made.append(run(method, original=original, probes=seen, retain_test=80.0 + original))
    rows = summarise(made)
    blocks = only(rows, "ours blocks")
    assert blocks["probe_excess"] == pytest.approx((0.4 + 0.3) / 2)
    assert blocks["block_excess"] == pytest.approx(0.2)
    titles, cells = tables.blocks_table(earlier(rows))
    line = dict(zip(titles, cells[0], strict=True))
    assert [line.pop(key) for key in ("data", "model", "task")] == ["mnist-5000", "cnn", "one class"]
    assert line == {
        "original": "+0.400",
        "ours": "-",
        "ours blocks": "+0.200",
        "retrain again": "-",
        "retain test: ours blocks": "80.50",
        "retrained": "80.50",
    }
    assert tables.blocks_table(earlier(summarise(runs)))[1] == []  # it was not run


def test_order(runs):
    rows = summarise(runs)
    assert [row["method"] for row in rows if row["task"] == "one class"] == [
        "retrain",
        "retrain again",
        "oracle matching",
        "ours",
        "scrub",
        "original",
    ]
    assert [row["task"] for row in rows] == ["one class"] * 6 + ["random 10%"] * 4


def test_overview_names_ours_the_noise_floor_and_the_best_other(runs):
    classes, rows = overview(summarise(runs))
    assert (classes["ours"]["method"], classes["noise"]["gap_mean"], classes["best"]["method"]) == (
        "ours",
        0.1,
        "scrub",
    )
    assert (against_target(classes), against_best(classes)) == ("missed by 0.1", "ahead by 1.9")
    assert (rows["ours"]["method"], rows["noise"], rows["best"]["method"]) == ("ours match", None, "ssd")
    assert (against_target(rows), against_best(rows)) == ("met", "tied")


@pytest.mark.parametrize(
    ("ours", "other", "target", "best"),
    [
        (0.5, 0.4, "met", "behind by 0.1"),
        (0.3, 0.4, "met", "ahead by 0.1"),
        (0.4, 0.4, "met", "tied"),
        (20.0, 0.5, "missed by 20", "behind by 20"),
        (math.nan, 0.5, "missed by nan", "behind by nan"),
    ],
)
def test_verdicts(ours, other, target, best):
    (line,) = overview(summarise([run("ours", gap=ours), run("scrub", gap=other)]))
    assert (against_target(line), against_best(line)) == (target, best)


def test_verdicts_without_ours_or_others():
    (line,) = overview(summarise([run("original", gap=60.0)]))
    assert (against_target(line), against_best(line)) == ("not run", "not run")


def test_task_table_leaves_out_what_was_not_measured(runs):
    rows = [row for row in summarise(runs) if row["task"] == "random 10%"]
    titles, cells = tables.task_table(rows)
    assert "LiRA" in titles
    assert not {"relearn", "erased: probe AUC", "probe excess"} & set(titles)
    line = dict(zip(titles, next(line for line in cells if line[0] == "ours match"), strict=True))
    assert (line["like retrained: gap"], line["times faster than retraining"]) == ("0.90 ± 0.20", "10")
    assert (line["bytes"], line["LiRA"], line["retain / forget train"]) == ("41 kB", "50.5", "100.00 / 0.90")


def test_claims_hold_fail_or_were_not_run(runs):
    def claiming(holds, *kinds):
        return Method(lambda problem: None, "made up", claim="it does", holds=holds, claimed_for=kinds or ("class",))

    found = claims.check(
        summarise(runs),
        {
            "scrub": claiming(lambda rows: rows["scrub"]["gap"] > rows["ours"]["gap"]),
            "ours": claiming(lambda rows: rows["ours"]["gap"] < 0.5, "class", "rows"),
            "ssd": claiming(lambda rows: rows["ssd"]["gap"] < rows["salun"]["gap"], "rows"),
            "ours match": claiming(lambda rows: rows["ours match"]["probe_linear"] < 1, "rows"),
            "salun": claiming(lambda rows: True),
            "original": Method(lambda problem: None, "claims nothing"),
        },
    )
    once, rows = ("mnist-5000", "cnn", "one class"), ("mnist-5000", "cnn", "random 10%")
    assert [(claim.method, claim.held, claim.failed) for claim in found] == [
        ("scrub", [once], []),
        ("ours", [rows], [once]),
        ("ssd", [], []),
        ("ours match", [], []),
        ("salun", [], []),
    ]
    _, cells = claims.table(found)
    assert [line[2:] for line in cells[:3]] == [
        ["1 of 1: mnist-5000 cnn (one class)", "-"],
        ["1 of 2: mnist-5000 cnn (random 10%)", "1 of 2: mnist-5000 cnn (one class)"],
        ["not run", "not run"],
    ]


def test_claims_ask_for_what_is_measured():
    """A mistyped name would look like a claim that was never run."""
    names = (*METHODS, RETRAIN, RETRAIN_AGAIN)
    lines = [run(name, "random 10%", lira=50.0) for name in names]
    lines += [run(name, forget_test=0.0, relearn=1, probes=probes((0.5, 0.5))) for name in names]
    claimed = claims.check(summarise(lines))
    assert len(claimed) >= 20
    assert [claim.method for claim in claimed if not claim.held and not claim.failed] == []


def test_numbers_for_scripts():
    assert plain({"a": 1.23456789, "b": math.inf, "c": None, "d": 7}) == {"a": 1.2346, "b": None, "c": None, "d": 7}


def test_command(runs, tmp_path, capsys):
    file, results = tmp_path / "runs.jsonl", tmp_path / "new" / "results.json"
    for one in runs:
        store.add_run(one, file)
    assert page.main([f"--runs={file}", f"--out={tmp_path}", f"--json={results}"]) == 0
    printed = capsys.readouterr().out
    assert "missed by 0.1" in printed
    assert "0.60 ± 0.00 (ours)" in printed
    rows = json.loads(results.read_text())["rows"]
    assert rows == [plain(row) for row in summarise(runs)]
    assert sorted(path.name for path in results.parent.iterdir()) == ["results.json"]
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["quality-mnist-5000-cnn-gaps.png", "quality-mnist-5000-cnn-seconds.png"]
    written, html = ((tmp_path / name).read_text() for name in (page.MARKDOWN, page.PAGE))
    assert all(f"pictures/{path.name}" in written for path in pictures)
    assert "### mnist-5000, cnn: random 10%" in written
    assert html.count("data:image/png;base64,") == 2


@pytest.mark.parametrize("content", [None, "", '{"data": "mnist-5000", "mod'])
def test_command_without_runs_says_so(content, tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    if content is not None:
        file.write_text(content)
    assert page.main([f"--runs={file}", f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'results.json'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("no runs: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_of_two_versions_of_a_data_set_are_not_put_together(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    for original, version in enumerate(("1", "2")):
        store.add_run(run("ours", original=original, version=version), file)
    assert page.main([f"--runs={file}", f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'results.json'}"]) == 1
    assert "got 2 versions of mnist-5000, expected one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cut_off_last_line_is_left_out_and_run_again(tmp_path):
    file = tmp_path / "runs.jsonl"
    first, second = run("ours", gap=0.5), run("scrub", gap=1.5)
    store.add_run(first, file)
    store.add_run(second, file)
    whole = file.read_bytes()
    for end in (-1, -2, -40):  # the first takes only the end of the line: the run is whole
        file.write_bytes(whole[:end])
        known = store.read_runs(file)
        assert known == ([first, second] if end == -1 else [first])
        store.add_run(second, file)
        assert store.read_runs(file) == [first, second]


def test_of_two_same_runs_the_later_counts(tmp_path):
    file = tmp_path / "runs.jsonl"
    for gap in (1.0, 2.0):
        store.add_run(run("ours", gap=gap), file)
    store.add_run(run("ours", gap=3.0, seed=1), file)
    assert [one["gap"] for one in store.read_runs(file)] == [2.0, 3.0]
