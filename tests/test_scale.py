"""The examples and benchmarks of docs/scale.md as a user runs them, with real engines: `make test-scale`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_rows import EXACT, moments_of

pytestmark = pytest.mark.scale
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "federated"


@pytest.fixture
def environment(tmp_path):
    yield {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    # `flwr run` leaves a SuperLink behind; it is told from others by its folder.
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={tmp_path / 'flwr'}".encode() in place.read_bytes():
                os.kill(int(place.parent.name), 15)
        except (OSError, ProcessLookupError):
            continue


def run(command, environment, **options):
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def moments_line(said):
    return re.search(r"(\d+) clients, (\d+) rows, digest (\w+)", said).groups()


def test_the_simulation_collects_once_and_forgets_in_a_later_run(tmp_path, environment):
    def simulate(**config):
        settings = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in config.items())
        federation = "num-supernodes=8 client-resources-num-cpus=1"
        command = ["flwr", "run", ".", "--stream", "--federation-config", federation, "--run-config", settings]
        return run(command, environment, cwd=EXAMPLE)

    first = simulate(folder=tmp_path / "server")
    assert "round 1: 8 new contributions accepted" in first
    clients, rows, digest = moments_line(first)
    assert clients == "8"
    second = simulate(folder=tmp_path / "server", forget_clients="3")
    assert "contributions accepted" not in second
    clients, fewer, other = moments_line(second)
    assert (clients, int(fewer) < int(rows), other != digest) == ("7", True, True)
    assert "not told: nobody" in second
    assert moments_line(simulate(folder=tmp_path / "server", forget_clients="3")) == ("7", fewer, other)


def test_64_simulated_clients_of_512_features_and_1_8_and_32_of_them_forgotten(tmp_path, environment):
    federation = "num-supernodes=64 client-resources-num-cpus=1"
    command = ["flwr", "run", ".", "--stream", "--federation-config", federation]
    said = run(
        [*command, "--run-config", f'folder="{tmp_path / "server"}"'],
        {**environment, "PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT / "tests" / "simulation",
    )
    assert "round 1: 64 new contributions accepted" in said
    found = re.findall(r"(\d+) clients, (\d+) rows, digest (\w+)", said)
    for first, line in zip((0, 1, 9, 41), found, strict=True):
        left = moments_of(range(first, 64), EXACT, dim=512)
        assert line == (str(64 - first), str(left.count), left.digest())


def test_processes_with_tls_and_keys(tmp_path, environment):
    said = run(
        [sys.executable, "deploy.py", "--forget-digits", "7", "--stranger", "--folder", tmp_path],
        environment,
        cwd=EXAMPLE,
    )
    assert "Connection attempt failed" in said  # of the node whose key is not registered
    assert "round 1: 2 new contributions accepted" in said
    assert moments_line(said)[0] == "2"
    assert "not told: nobody" in said


def test_the_benchmark_of_tables_finds_the_same_moments_on_ray(tmp_path, environment):
    command = [sys.executable, "-m", "bench.scale.table", "--rows", 1_000_000, "--repeats", 1]
    run([*command, "--folder", tmp_path / "table", "--json", tmp_path / "table.json"], environment, cwd=ROOT)
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["rows"] == 1_000_000
    assert 0 < found["peak_bytes"]["ray"] < 4 * 2**30
