"""The wheel, away from the checkout: with and without compilers for C++ and CUDA."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

USE = """
import sys
from pathlib import Path
# The checkout may be installed as editable here: it must not lend what the wheel lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch
import loft_fast as loft
from loft_fast import backends

assert Path(loft.__file__).is_relative_to(sys.argv[1]), loft.__file__
assert ("native" in backends.available()) == (sys.argv[2] == "native"), backends.available()
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
rows = [(torch.randn(60, 8), torch.randint(0, 3, (60,)))]
moments = loft.fetch_moments(model, rows, group="label", progress=False)
projection = loft.solve(moments.without([2]), moments.select([2]), rank=5)
loft.fold(model, projection)
print(projection.certificate)
import loft_fast.peers.riemannian_adam, loft_fast.kernels, loft_fast.cli, loft_fast.demo.run
"""


@pytest.fixture(scope="module", params=["native", "torch"])
def wheel(request, tmp_path_factory):
    """(name of the expected backend, path of a wheel built for it)."""
    if request.param == "native" and COMPILER is None:
        pytest.skip("no C++ compiler")
    # Built from a copy: the checkout's build folder would lend the compiled extension to the build without a compiler.
    source = tmp_path_factory.mktemp("source") / "loft_fast"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "demo-out", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    environment = dict(os.environ)
    if request.param == "torch":
        environment |= {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "LOFT_FAST_NVCC": "/nonexistent/nvcc"}
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, env=environment, check=True)
    return request.param, next(out.glob("*.whl"))


@pytest.mark.packaging
def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    backend, path = wheel
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", USE, tmp_path / "installed", backend],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/nonexistent"},  # nor nvcc
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no projector below" in done.stdout
    assert done.stderr.count("works, with torch code instead") == (backend == "torch")


@pytest.mark.packaging
def test_wheel_holds_sources_types_and_template(wheel):
    names = zipfile.ZipFile(wheel[1]).namelist()
    sources = ("csrc/moments_update.cpp", "csrc/moments_update.h", "csrc/cuda/jacobi.cu", "csrc/cuda/device.h")
    for part in ("py.typed", "kernels/moments_update.py", "kernels/blocks.json", *sources):
        assert f"loft_fast/{part}" in names
    assert "loft_fast/report.html.jinja" in names
    assert any(name.startswith("loft_fast/_native") for name in names) == (wheel[0] == "native")
    assert ("loft_fast/_cuda.so" in names) == (wheel[0] == "native" and shutil.which("nvcc") is not None)
