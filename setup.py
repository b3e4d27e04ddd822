"""The compiled parts of the build; everything else is in pyproject.toml.

Both are optional. Without a C++ compiler the package installs without its extension, and falls back to torch; without
nvcc it installs without CUDA kernels. LOFT_FAST_NVCC names another nvcc, or none ("").
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

TARGETS = ("80", "90a")  # A100, and H100 or H200


class BuildBoth(build_ext):
    """The C++ extension, and next to it a shared library of CUDA kernels with plain pointers."""

    def run(self):
        """As setuptools calls it."""
        super().run()
        nvcc = os.environ.get("LOFT_FAST_NVCC", shutil.which("nvcc") or "")
        in_place = self.inplace or self.editable_mode  # setuptools itself carries only extensions to an editable source
        library = (Path() if in_place else Path(self.build_lib)) / "loft_fast" / "_cuda.so"
        sources = sorted(Path("csrc/cuda").glob("*.cu"))
        newest = max(path.stat().st_mtime for path in Path("csrc/cuda").iterdir())
        if not nvcc or sys.platform != "linux" or (library.exists() and library.stat().st_mtime > newest):
            return
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in TARGETS]
        command = [nvcc, "-O3", "-std=c++17", *targets, "-shared", "-Xcompiler", "-fPIC", *sources, "-o", library]
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(list(map(str, command)), check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"WARNING: the CUDA kernels were not built ({error}); loft_fast works without them.")


setup(
    cmdclass={"build_ext": BuildBoth},
    ext_modules=[
        Pybind11Extension(
            "loft_fast._native",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            cxx_std=17,
            libraries=["dl"] if sys.platform == "linux" else [],
            # -ffast-math would break NaN handling; fused multiply-add alone is all the kernels ask for.
            extra_compile_args=["-O3", "-ffp-contract=fast"] if sys.platform != "win32" else ["/O2"],
            optional=True,
        )
    ],
)
