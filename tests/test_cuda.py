"""The CUDA kernels without a GPU: their very source runs on the CPU, a thread of the system for each thread of a block.

What that cannot show is speed, and whether a real compiler and device do what csrc/cuda/emulate.h does.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_fast import backends
from loft_fast.ops import reference

kernels = pytest.importorskip("loft_fast.kernels.cuda")
SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
F64, F32 = torch.float64, torch.float32


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library, for CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cuda")
    source, library = folder / "all.cpp", folder / "all.so"
    source.write_text("".join(f'#include "{path}"\n' for path in sorted(SOURCES.glob("*.cu"))))
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-DLOFT_EMULATE"]
    done = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True)
    if "-std=c++20" in done.stderr:
        pytest.skip("needs a compiler of C++20")
    assert done.returncode == 0, done.stderr
    patch = pytest.MonkeyPatch()
    loaded = ctypes.CDLL(str(library))
    patch.setattr(backends, "cuda_library", lambda: loaded)
    yield loaded
    patch.undo()


def symmetric(many, d, seed=0, scale=1.0):
    matrix = normal(many, d, d, seed=seed)
    return (scale * (matrix + matrix.mT) / 2).float()


def check_eigh(matrix, tolerance=2e-6):
    values, vectors = kernels.eigh(matrix)
    wide = matrix.double()
    true = torch.linalg.eigvalsh(wide)
    size = float(torch.linalg.matrix_norm(wide).amax()) or 1.0
    d = matrix.shape[1]
    assert bool((values[:, 1:] >= values[:, :-1]).all())
    torch.testing.assert_close(values.double(), true, rtol=0, atol=tolerance * size)
    residual = wide @ vectors.double() - vectors.double() * values.double().unsqueeze(1)
    assert float(residual.abs().max()) <= 20 * tolerance * size
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(d).expand_as(vectors), rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 16, 33])
def test_eigh(emulated, d):
    check_eigh(symmetric(2, d, seed=d))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_eigh_of_any_size_of_numbers(emulated, scale):
    check_eigh(symmetric(1, 6, scale=scale))


def test_eigh_of_special_matrices(emulated):
    ones = torch.ones(5, 5)
    check_eigh(torch.stack([torch.zeros(5, 5), torch.eye(5), ones, -ones, torch.diag(torch.arange(5.0))]))


def test_eigh_with_matrices_outside_of_shared_memory(emulated, monkeypatch):
    monkeypatch.setattr(kernels, "_SHARED", 64)
    check_eigh(symmetric(2, 9))


def test_shared_memory_where_torch_does_not_say_how_much_there_is(monkeypatch):
    # torch 2.6 does not.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    assert kernels._shared(torch.device("cuda", 0)) == 48 << 10


def test_eigh_of_no_problems(emulated):
    values, vectors = kernels.eigh(torch.empty(0, 4, 4))
    assert (values.shape, vectors.shape) == ((0, 4), (0, 4, 4))


def empty(groups, d):
    return (
        torch.zeros(groups, dtype=torch.int64),
        torch.zeros(groups, d, dtype=torch.int64),
        torch.zeros(groups, dtype=torch.int64),
        [torch.zeros(d, d, dtype=torch.int64) for _ in range(groups)],
    )


def check_quantized(x, scale=0.25, group=None, groups=1):
    d = x.shape[1]
    ours, theirs = empty(groups, d), empty(groups, d)
    for state in (ours, theirs):
        for matrix in state[3]:
            matrix += torch.arange(d) + torch.arange(d).unsqueeze(1)
    kernels.quantized_update(x, scale, *ours, group)
    reference.quantized_update(x, scale, *theirs, group)
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], theirs[:3], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(ours[3], theirs[3], strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (63, 3), (64, 64), (65, 65), (130, 70)])
def test_integers_are_those_of_the_reference(emulated, dtype, n, d):
    check_quantized((1000 * normal(n, d, seed=n)).to(dtype))


def test_integers_at_every_edge(emulated):
    edges = torch.tensor(
        [0, 1, -1, 127, 128, 129, 255, 256, -127, -128, -129, -256, 32639, 32640, 32767, -32767, 32768]
    )
    edges = torch.cat([edges.double(), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e300, -1e300])])
    check_quantized(torch.cartesian_prod(edges, edges), scale=1.0)


def test_integers_of_groups(emulated):
    group = torch.tensor([3] * 70 + [0] * 20 + [1])[torch.randperm(91, generator=torch.Generator().manual_seed(0))]
    check_quantized(100 * normal(91, 5), group=group, groups=5)


def test_integers_of_any_strides(emulated):
    x = 100 * normal(40, 40)
    for rows in (x.T, x[::3], x[:, 1::2], x[:1].expand(9, 40)):
        check_quantized(rows)


def test_integers_of_many_chunks(emulated, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 70)
    check_quantized(100 * normal(200, 4), group=torch.arange(200) % 2, groups=2)


def test_integers_of_more_groups_than_a_grid_has_room_for(emulated, monkeypatch):
    call, pieces = kernels._call, []

    def recorded(name, device, *arguments):
        pieces.extend([one for one in arguments if isinstance(one, int)][-2:-1])  # and then their length
        return call(name, device, *arguments)

    monkeypatch.setattr(kernels, "_MOST", 3)
    monkeypatch.setattr(kernels, "_call", recorded)
    check_quantized(100 * normal(90, 4), group=torch.arange(90) % 5, groups=5)
    assert pieces == [3, 3, 3, 3, 1, 1]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(1, 6), st.integers(1, 3))
def test_any_integers(emulated, seed, n, d, groups):
    x = 40000 * (2 * torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1)
    group = torch.arange(n) % groups if groups > 1 else None
    check_quantized(x, 1.0, group, groups)


def test_bad_lengths_are_refused(emulated):
    null = ctypes.c_void_p()
    for length in (65, 1 << 15):
        arguments = (null, null, 4, null, null, null, 1, length, ctypes.c_longlong(length), null, null)
        assert emulated.loft_fast_integer_gram(*arguments) == 1


# ---- the op and the build ----


def test_what_was_never_measured_is_not_chosen():
    entries = [one for op in ("eigh", "quantized_update") for one in backends._ENTRIES[op] if one.backend == "cuda"]
    assert len(entries) == 2
    assert all(entry.by_request for entry in entries)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_library_is_built_where_nvcc_is_and_loads_without_a_driver():
    code = (
        "from loft_fast import backends; library = backends.cuda_library(); library.loft_fast_jacobi; print('loaded')"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "loaded\n", done.stderr
