"""The compiled part of the build; everything else is in pyproject.toml.

The C++ extension is optional: without a compiler the package installs without it, and falls back to torch.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
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
