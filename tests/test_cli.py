"""The command, as a user types it; networks are trained for one epoch only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_angle import Crowded

from loft_fast import GroupedMoments, Projection, cli
from loft_fast.demo import cache, digits, run

MINE = """
import torch
torch.manual_seed(0)
_net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
def net():
    return _net
def loader():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(200) % 4
    return [(torch.randn(200, 6, generator=generator) + y.unsqueeze(1), y)]
number = 3
"""


def few_digits():
    data = digits.load_digits()
    return digits.Digits(data.train_x[:800], data.train_y[:800], data.test_x[:300], data.test_y[:300])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with mine.py, as the current one."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, arguments) of one finished demo, on a fifth of the digits."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--forget", "1", "4", "--rank", "16", "--cache", str(folder / "cache")]
    arguments += ["--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "EPOCHS", 1)
        patch.setattr(run, "load_digits", few_digits)
        assert cli.main([*arguments, "--quiet"]) == 0
        yield folder, arguments


def test_demo_writes_a_page_that_needs_no_other_file(demo):
    out = demo[0] / "out"
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "digits 1 and 4" in page
    for picture in ("predictions", "accuracies", "spectra", "frontier"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_demo_reuses_the_networks_and_says_so_beside_the_json(demo, capsys):
    assert cli.main([*demo[1], "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("reusing") == 2
    result = json.loads(shown.out)
    assert [row["method"] for row in result["rows"]] == ["original", "retrain", "paper", "leace", "ours", "ours erase"]
    for row in result["rows"]:
        assert 0 <= row["retain_test"] <= 100
        assert row["seconds"] == pytest.approx(sum(row["stages"].values()))
    loss, bound = result["frontier"]["loss"], result["frontier"]["lower_bound"]
    assert bound <= loss < min(run["loss"] for run in result["frontier"]["descents"])
    assert loss - bound <= 1e-6 * loss


def test_a_damaged_network_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    said = []
    for _ in range(2):
        cache.trained(few_digits(), (), 0, tmp_path, said.append, progress=False)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:1000])
    assert ["training again" in line for line in said] == [False, True, False]


def test_report_draws_an_old_result_again(demo, tmp_path, capsys):
    assert cli.main(["report", str(demo[0] / "out"), "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "report.html").read_text() == (demo[0] / "out" / "report.html").read_text()
    assert str(tmp_path / "new") in capsys.readouterr().out


def test_fetch_then_forget(mine, capsys):
    assert cli.main(["fetch", "mine:net", "mine:loader", "--out", "m.safetensors", "--quiet", "--json"]) == 0
    fetched = json.loads(capsys.readouterr().out)
    assert fetched == {
        "file": "m.safetensors",
        "site": "2:input",
        "dim": 12,
        "count": 200,
        "groups": {"0": 50, "1": 50, "2": 50, "3": 50},
    }
    command = [
        "forget",
        "m.safetensors",
        "3",
        "--model",
        "mine:net",
        "--out",
        "p.safetensors",
        "--weights",
        "w.safetensors",
    ]
    assert cli.main([*command, "--json"]) == 0
    forgotten = json.loads(capsys.readouterr().out)
    assert forgotten["certificate"]["predicted"]["forget accuracy"] < 1

    projection = Projection.load("p.safetensors")
    assert projection.site == "2:input"
    moments = GroupedMoments.load("m.safetensors")
    assert moments.keys() == [0, 1, 2, 3]
    # What was written is the model with the projection in its head, and the output of 3 closed.
    import mine as module

    x = module.loader()[0][0]
    written = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    written.load_state_dict(load_file("w.safetensors"))
    torch.testing.assert_close(written(x), module.net()(x))
    torch.testing.assert_close(written(x)[:, 3], written(x)[:, :3].mean(1) - 20)
    assert forgotten["closed"] == [3]


@pytest.mark.parametrize("weights", [[], ["--weights", "w.safetensors"]], ids=["projection", "weights"])
def test_the_angle_is_for_closed_outputs_where_weights_are_written(mine, capsys, weights):
    Crowded().moments.save("m.safetensors")
    Path("crowded.py").write_text(
        "import torch, test_angle\ndef net():\n    return torch.nn.Sequential(test_angle.Crowded().head)\n"
    )
    command = ["forget", "m.safetensors", "3", "--model", "crowded:net", "--out", "p.safetensors", *weights, "--json"]
    assert cli.main(command) == 0
    assert ("outputs are closed" in json.loads(capsys.readouterr().out)["certificate"]["why"]) == bool(weights)


def test_forget_without_a_model_uses_what_it_is_told(mine, capsys):
    cli.main(["fetch", "mine:net", "mine:loader", "--out", "m.safetensors", "--quiet"])
    assert cli.main(["forget", "m.safetensors", "1", "2", "--rank", "5", "--out", "p.safetensors"]) == 0
    assert Projection.load("p.safetensors").rank == 5
    assert "no projector below" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("demo --forget 11", "forget: got [11], expected"),
        ("demo --forget 0 1 2 3 4 5 6 7 8", "expected one to eight"),
        ("demo --rank 0", "rank: got 0, expected 1 to 511"),
        ("demo --rank 512", "rank: got 512"),
        ("demo --threads 0", "threads: got 0"),
        ("demo --seed 9999999999999999999999", "seed: got 9999999999999999999999, expected"),
        ("demo --out mine.py/under", "out: cannot write to 'mine.py/under'"),
        ("report nothing-here", "cannot read 'nothing-here'"),
        ("report mine.py", "cannot read 'mine.py' as a demo's result"),
        ("fetch mine:nett mine:loader --out m", "MODEL: cannot find 'mine:nett'"),
        ("fetch nowhere:net mine:loader --out m", "MODEL: cannot find 'nowhere:net'"),
        ("fetch mine mine:loader --out m", "expected module:name"),
        ("fetch .mine:net mine:loader --out m", "MODEL: got '.mine:net', expected module:name"),
        ("fetch broken:net mine:loader --out m", "MODEL: cannot find 'broken:net': invalid syntax"),
        ("fetch mine:loader mine:loader --out m", "MODEL: 'mine:loader' is a list"),
        ("fetch mine:net mine:number --out m", "loader: got int, expected an iterable"),
        ("fetch mine:net mine:loader --site conv9 --out m", "no module 'conv9'"),
        ("fetch mine:net mine:loader --device abacus --out m", "device: got 'abacus'"),
        ("fetch mine:net mine:loader --out mine.py/m", "--out: cannot write to 'mine.py'"),
        ("forget missing.safetensors 3 --out p", "cannot read 'missing.safetensors'"),
        ("forget mine.py 3 --out p", "cannot read 'mine.py'"),
        ("forget good.safetensors 7 --out p", "keys: no group 7; there are 0, 1, 2, 3"),
        ("forget good.safetensors ² --out p", "keys: no group '²'; there are 0, 1, 2, 3"),
        ("forget good.safetensors --out p -- --5", "keys: no group '--5'; there are 0, 1, 2, 3"),
        (f"forget good.safetensors {'5' * 5000} --out p", "keys: no group '5555"),
        ("forget good.safetensors 0 1 2 3 --out p", "retain: the set is empty"),
        ("forget good.safetensors 3 --rank 12 --out p", "rank: got 12, expected an integer in [1, 11]"),
        ("forget good.safetensors 3 --erase --out p", "--erase: got it without --model"),
        ("forget good.safetensors 3 --weights w --out p", "--weights: got it without --model"),
        ("forget good.safetensors 3 --out mine.py/p", "--out: cannot write to 'mine.py'"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(mine, capsys, command, message):
    if "good" in command:
        assert cli.main(["fetch", "mine:net", "mine:loader", "--out", "good.safetensors", "--quiet"]) == 0
        capsys.readouterr()
    Path("broken.py").write_text("def net(:")
    before = sorted(Path().iterdir())
    assert cli.main([*command.split(), "--quiet"] if command.startswith(("demo", "fetch")) else command.split()) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert [path for path in sorted(Path().iterdir()) if path.name not in ("demo-out", "__pycache__")] == before


def test_a_result_that_lacks_something_is_refused(demo, tmp_path, capsys):
    result = json.loads((demo[0] / "out" / "result.json").read_text())
    for name in result.keys() - {"rank", "threads"}:  # which are for the reader alone
        rest = {key: value for key, value in result.items() if key != name}
        (tmp_path / "result.json").write_text(json.dumps(rest))
        assert cli.main(["report", str(tmp_path)]) == 1
        assert f"as a demo's result: KeyError({name!r})" in capsys.readouterr().err


def test_without_a_home_only_the_demo_needs_a_cache(mine, monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cli.main(["fetch", "mine:net", "mine:loader", "--out", "m.safetensors", "--quiet"]) == 0
    assert cli.main(["demo", "--quiet"]) == 1
    assert "loft-fast: cache: got no folder, expected one" in capsys.readouterr().err


def test_keys_that_look_alike_are_told_apart(mine, capsys):
    Path("alike.py").write_text(
        "import mine\ndef loader():\n    return [(mine.loader()[0][0][:4], [1, '1', '2', 1])]\n"
    )
    assert cli.main(["fetch", "mine:net", "alike:loader", "--out", "m.safetensors", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == {"1": 2, '"1"': 1, "2": 1}


@pytest.mark.parametrize(
    ("reader", "status", "said"), [("closed", 141, ""), ("full", 1, "stdout: the work is done, but cannot be shown")]
)
def test_output_that_nobody_takes(mine, reader, status, said):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full" if reader == "full" else write, "w") as out:
        found = command(["fetch", "mine:net", "mine:loader", "--out", "m.safetensors", "--quiet"], stdout=out)
    assert found.returncode == status
    assert said in found.stderr
    assert found.stderr.count("\n") == bool(said)
    assert GroupedMoments.load("m.safetensors").count == 200


def test_names_that_the_terminal_cannot_show(mine):
    found = command(
        ["fetch", "mine:net", "mine:loader", "--out", "größe", "--quiet"],
        stdout=subprocess.PIPE,
        PYTHONIOENCODING="ascii",
    )
    assert found.returncode == 0
    assert r"gr\xf6\xdfe" in found.stdout


def command(arguments, stdout, **more):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **more}
    line = [sys.executable, "-m", "loft_fast.cli", *arguments]
    return subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False)


def test_interrupt_leaves_no_half_network(tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train", interrupted)
    folders = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert cli.main(["demo", *folders]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())
    assert not list((tmp_path / "out").iterdir())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "fetch", "forget", "report"))
