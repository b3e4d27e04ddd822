"""bench.report on made-up measurements: the table, the file, the plots, and what counts as a regression."""

import json

import pytest

from bench import report

KEYS = {"suite", "case", "peer", "peer_version", "ratio", "target", "ours_ms", "peer_ms", "error"}


def measured(path, **ratios):
    """A file as pytest-benchmark writes it, with the parts that are read."""
    row = {"case": "a case", "peer": "rival", "peer_version": "1.0", "target": 1.5, "ours_ms": 2.0, "error": 0.0}
    runs = [
        {
            "fullname": f"bench/bench_{suite}.py::test",
            "extra_info": {"rows": [row | {"ratio": ratio, "peer_ms": 2 * ratio}]},
        }
        for suite, ratio in ratios.items()
    ]
    runs.append({"fullname": "bench/bench_moments.py::test_unpaired", "extra_info": {}})
    path.write_text(json.dumps({"benchmarks": runs}))
    return str(path)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "machine", lambda: "a-machine")
    folder = tmp_path / "results"
    assert report.main([measured(tmp_path / "first", moments=2.0, solve=20.0), "--save", f"--results={folder}"]) == 0
    return folder


def test_save_writes_ratios_and_a_plot_per_suite(results):
    assert sorted(path.name for path in results.iterdir()) == [
        "a-machine-moments.png",
        "a-machine-solve.png",
        "a-machine.json",
    ]
    stored = json.loads((results / "a-machine.json").read_text())
    assert (stored["device"], len(stored["date"]), set(stored["versions"])) == (
        "a-machine",
        10,
        {"python", "torch", "numpy", "loft_fast"},
    )
    assert [(row["suite"], row["ratio"]) for row in stored["rows"]] == [("moments", 2.0), ("solve", 20.0)]
    assert all(set(row) == KEYS for row in stored["rows"])


@pytest.mark.parametrize(
    ("moments", "code", "says"),
    [(2.0, 0, "no regression"), (1.65, 0, "no regression"), (1.5, 1, "rival takes 1.50 times as long, was 2.00")],
)
def test_check_fails_on_more_than_a_fifth(results, tmp_path, capsys, moments, code, says):
    file = measured(tmp_path / "second", moments=moments, solve=25.0)
    assert report.main([file, "--check", f"--results={results}"]) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "2.00" in captured.out  # the stored ratio, next to the new one


def test_check_misses_what_is_no_longer_measured(results, tmp_path, capsys):
    assert report.main([measured(tmp_path / "second", moments=2.0), "--check", f"--results={results}"]) == 1
    assert "solve: a case: no longer measured against rival" in capsys.readouterr().err


def test_check_on_another_machine_says_what_to_do(tmp_path, capsys):
    file = measured(tmp_path / "first", moments=2.0)
    assert report.main([file, "--check", f"--results={tmp_path / 'none'}"]) == 2
    assert "make bench writes them" in capsys.readouterr().err


def test_machine_has_a_name_fit_for_a_file():
    assert set(report.machine()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
