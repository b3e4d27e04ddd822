"""The compiled part of the build; everything else is in pyproject.toml.

The C++ extension is optional: without a compiler the package installs without it, and falls back to torch.
"""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "loft_fast._native",
            ["csrc/bindings.cpp", "csrc/moments_update.cpp", "csrc/parallel.cpp"],
            depends=["csrc/moments_update.h", "csrc/aligned.h", "csrc/half.h", "csrc/parallel.h"],
            cxx_std=17,
            libraries=["dl"] if sys.platform == "linux" else [],
            # -ffast-math would break NaN handling; fused multiply-add alone is all the kernels ask for.
            extra_compile_args=["-O3", "-ffp-contract=fast"] if sys.platform != "win32" else ["/O2"],
            optional=True,
        )
    ],
)
