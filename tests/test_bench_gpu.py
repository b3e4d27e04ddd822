"""The GPU benchmark without a GPU: every case runs, tiny, and says nothing about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from bench import gpu
from bench.report import commit

ROW = {"suite": "one", "case": "", "peer": "", "ratio": 1.0, "target": None}
ROOT = Path(__file__).parent.parent


def test_rehearsal_runs_every_case(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LOFT_FAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert found["trouble"] == []
    assert {row["suite"] for row in found["rows"]} == {"moments", "projector", "request", "project", "sizes"}
    assert {"device", "date", "commit", "versions", "rows"} <= set(found)
    for row in found["rows"]:
        keys = {"suite", "case", "peer", "peer_version", "ratio", "target", "ours_ms", "peer_ms", "error"}
        assert keys <= set(row)


def test_what_was_measured_is_kept_where_the_gpu_is_taken_away(monkeypatch, tmp_path):
    def taken_away(machine):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "CASES", (gpu.ceilings, lambda machine: iter([ROW]), taken_away))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--rehearse", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert found["rows"] == [ROW]
    assert "copy" in found["ceilings"]


def test_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""


def test_a_peer_that_fails_is_left_out(capsys):
    def out_of_shared_memory(x):
        raise triton.OutOfResources(300 << 10, 227 << 10, "shared memory")

    assert not gpu._agrees(out_of_shared_memory, torch.ones(3, 2))
    assert "left out for torch.float32: OutOfResources" in capsys.readouterr().err
    assert gpu._agrees(lambda x: x.T @ x, torch.ones(3, 2))


def test_the_script_is_one_that_a_shell_can_read():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=True)


def test_no_gpu_is_claimed_that_was_not_measured():
    # Rows of a GPU stand in bench/results, or nowhere.
    table = json.loads((ROOT / "kernels" / "blocks.json").read_text())
    if table["device"] is not None:
        assert (ROOT / "bench" / "results" / f"{table['device']}.json").exists()
    assert table["projector_from"] is None or table["device"] is not None
