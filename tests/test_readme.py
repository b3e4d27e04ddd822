"""Everything that the README shows is run here, as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import few_digits

import loft_fast
from loft_fast import cli
from loft_fast.demo import digits, run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands():
    lines = (re.sub(r"\s+#.*", "", line) for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line]


def rows(seed, n=240):
    """(x, y) batches of eight classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 8
    x = torch.randn(n, 20, generator=generator) + 3 * torch.eye(8, 20)[y]
    return list(zip(x.split(60), y.split(60), strict=True))


class Net(torch.nn.Module):
    """A classifier with a head called fc."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(20, 24), torch.nn.ReLU(), torch.nn.Linear(24, 24), torch.nn.ReLU()
        )
        self.fc = torch.nn.Linear(24, 8)

    def forward(self, x):
        return self.fc(self.body(x))


def test_snippets_run_in_order_and_do_what_their_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    everything = [batch for seed in (0, 1) for batch in rows(seed)]
    parts = {
        f"{kind}_{split}": [(x[(y == 3) == gone], y[(y == 3) == gone]) for x, y in rows(seed)]
        for split, seed in (("train", 0), ("test", 1))
        for kind, gone in (("retain", False), ("forget", True))
    }
    names = {"model": Net(), "loader": everything, "retrained_model": Net()}
    names |= {"unit_rows": torch.nn.functional.normalize(torch.randn(500, 64))}
    names |= {"retain_loader": parts["retain_train"], "forget_loader": parts["forget_train"]}
    names["validation_loader"] = rows(2)
    for block in blocks("python"):
        # The one placeholder of the README: four loaders of the reader's own.
        source = re.sub(r'"(\w+)": \.\.\.', r'"\1": parts["\1"]', block)
        exec(source, names | {"parts": parts}, names)
    shown = capsys.readouterr().out
    assert "no projector below" in shown
    assert "probe_auc=" in shown
    assert "% of the forgotten rows will be right, by discriminants at " in shown
    assert names["moments"].keys() == [0, 1, 2, 4, 5, 6, 7]
    assert names["store"].verify(names["receipt"])["groups"] == 7
    at_once = loft_fast.solve(
        names["exact"].without([1, 3, 5]), names["exact"].select([1, 3, 5]), head=names["model"].fc
    )
    assert torch.equal(names["projection"].basis, at_once.basis)


def test_earlier_layers_can_be_checked_as_the_limits_say():
    assert 'site="an.earlier.layer"' in TEXT
    sets = {name: rows(i) for i, name in enumerate(("retain_train", "forget_train", "retain_test", "forget_test"))}
    assert loft_fast.evaluate(Net(), sets, site="body.0").probe_auc is not None


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_make_targets_exist(line):
    done = subprocess.run(["make", "--dry-run", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_loft_fast_commands_run_in_order(tmp_path, monkeypatch):
    lines = [line.removeprefix(".venv/bin/") for line in commands() if "loft-fast " in line]
    assert len(lines) == 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(run, "load_digits", few_digits)
    source = "from test_readme import Net as net, rows\ndef loader(): return rows(0)\n"
    Path("mine.py").write_text(source)
    sys.path.insert(0, str(Path(__file__).parent))
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    made = {"moments", "projection", "net", "exact", "forgotten"}
    assert {f"{name}.safetensors" for name in made} | {"receipt.json"} <= {path.name for path in Path().iterdir()}


def test_pip_lines_name_extras_that_exist():
    """That the wheel installs is shown by test_packaging."""
    lines = [line for line in commands() if line.startswith("pip ")]
    assert len(lines) == 5
    extras = set(re.findall(r"\[(\w+)\]", " ".join(lines)))
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / path).is_file(), path
