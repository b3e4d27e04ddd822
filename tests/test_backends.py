"""Which backend serves a call, and what happens where one is missing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from loft_fast import InputError, Moments, backends

OP = "moments_update"
F64, F32 = torch.float64, torch.float32


def have(*names):
    missing = [name for name in names if name not in backends.available()]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not available here")


def run_python(code, **environment):
    """A fresh interpreter, as what is imported and cached cannot be undone here. Returns (JSON it printed, log)."""
    clean = {name: value for name, value in os.environ.items() if name not in (backends.VARIABLE, "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


# ---- the choice ----


def test_torch_is_always_available():
    assert "torch" in backends.available()


@have("native")
@pytest.mark.parametrize("dtype", backends.FLOATS, ids=str)
def test_native_is_preferred_on_cpu(monkeypatch, dtype):
    # Also with Triton's interpreter switched on, which is for tests only.
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(OP, "cpu", dtype) == "native"


def test_device_without_a_kernel_gets_torch(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    assert backends.choose(OP, "meta", F32) == "torch"


@pytest.mark.parametrize("name", backends.available())
def test_variable_overrides(monkeypatch, name):
    device = "cuda" if name == "triton" and not backends.interpreting() else "cpu"
    monkeypatch.setenv(backends.VARIABLE, name)
    assert backends.choose(OP, device, F32) == name


def test_empty_variable_is_no_choice(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    default = backends.choose(OP, "cpu", F32)
    monkeypatch.setenv(backends.VARIABLE, "")
    assert backends.choose(OP, "cpu", F32) == default


@have("triton")
def test_triton_leaves_float64_to_torch(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    assert backends.choose(OP, "cpu", F64) == "torch"
    x = torch.randn(7, 3, dtype=F64)
    torch.testing.assert_close(Moments(3).update(x).covariance(), x.T.cov(), rtol=1e-12, atol=0)


@have("native")
def test_native_leaves_other_devices_to_torch(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "native")
    assert backends.choose(OP, "meta", F32) == "torch"


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "abacus")
    moments = Moments(3)
    with pytest.raises(InputError, match=r"LOFT_FAST_BACKEND: got 'abacus', expected one of .*torch"):
        moments.update(torch.ones(2, 3))
    assert moments.count == 0
    assert not moments.scatter.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_without_gpu_or_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(InputError, match="LOFT_FAST_BACKEND: got 'triton'"):
        backends.choose(OP, "cpu", F32)


def test_unknown_op_is_refused():
    with pytest.raises(InputError, match=r"op: got 'nothing' .* expected one of \['eigh', 'gram', 'inverse_form', 'm"):
        backends.choose("nothing", "cpu", F32)


# ---- the missing extension ----

WITHOUT_NATIVE = """
import json, os, sys
sys.modules["loft_fast._native"] = None  # as if it had not been built
import torch
import loft_fast
from loft_fast import InputError, Moments, backends

x = torch.arange(60, dtype=torch.float64).reshape(20, 3).sin()
moments = Moments(3)
for part in x.split(7):
    moments.update(part)
result = {"available": backends.available(), "chosen": backends.choose("moments_update", "cpu", x.dtype)}
result |= {"mean": moments.mean.tolist(), "scatter": moments.scatter.tolist()}
os.environ["LOFT_FAST_BACKEND"] = "native"
try:
    moments.update(x)
except InputError as error:
    result["refused"] = str(error)
print(json.dumps(result))
"""


def test_without_the_extension_torch_serves_and_says_so_once():
    result, log = run_python(WITHOUT_NATIVE)
    assert "native" not in result["available"]
    assert result["chosen"] == "torch"
    assert log.count("The compiled extension is not available") == 1
    assert result["refused"].startswith("LOFT_FAST_BACKEND: got 'native', expected one of")
    here = Moments(3).update(torch.arange(60, dtype=F64).reshape(20, 3).sin())
    torch.testing.assert_close(torch.tensor(result["mean"], dtype=F64), here.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.tensor(result["scatter"], dtype=F64), here.scatter, rtol=0, atol=1e-13)


IMPORT_ONLY = """
import json, sys
import loft_fast
print(json.dumps([name for name in ("triton", "loft_fast._native") if name in sys.modules]))
"""


def test_import_loads_no_backend():
    # A user of one backend does not pay for the others, nor hear of them.
    loaded, log = run_python(IMPORT_ONLY)
    assert loaded == []
    assert "compiled extension" not in log
