"""Build: the Cython extensions, and the C kernels as one static library per ISA with that ISA's flags.

In: cconv/cpu.  Out: cconv.cpu's compiled modules, of which _team alone has OpenMP. Everything else about the package
is in pyproject.toml.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

KERNELS = "cconv/cpu/kernels"

#: ISA -> its compiler flags. GNU C gives vector extensions and contraction of a*b + c into fused multiply-adds.
ISAS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mprfchw"]
    ISAS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprfchw", "-mprefer-vector-width=512",
    ]  # fmt: skip

#: Sanitizers multiply the code: at -O3 the kernels would take many minutes to compile (tests/sanitizers.sh). The second
#: flag keeps contraction, which the error bounds of the fused instruction sets count on.
SANITIZED = "-fsanitize" in os.environ.get("CFLAGS", "")
OPTIMIZE = ["-O1", "-fexpensive-optimizations"] if SANITIZED else ["-O3"]
#: Python's own flags ask for debugging information: a quarter of the time and most of the size.
DEBUG = [] if SANITIZED else ["-g0"]
#: Neither flag changes a result: nobody reads errno or the floating-point exception flags here.
C_FLAGS = [
    "-std=gnu11", *OPTIMIZE, *DEBUG, "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-fno-tree-slp-vectorize", "-Wall", "-Wextra",
]  # fmt: skip
OPENMP = ["-fopenmp"]
#: Everything that the sources include.
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inc", "*.inc.c") for path in Path(KERNELS).glob(pattern))


def library(name: str, source: str, flags: list[str]):
    sources = [f"{KERNELS}/{source}"]
    return name, {"sources": sources, "cflags": C_FLAGS + flags, "obj_deps": {sources[0]: HEADERS}}


def extension(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"cconv.cpu.{name}",
        [f"cconv/cpu/{name}.pyx"],
        include_dirs=["cconv/cpu", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        depends=[*HEADERS, *(f"cconv/cpu/{room}.pxd" for room in ("_core", "_pool", "_team", "kernels"))],
        extra_compile_args=["-O2", *DEBUG, "-fvisibility=hidden", *flags],
        extra_link_args=flags,
    )


class Libraries(build_clib):
    """The libraries side by side: the kernels of one ISA take a minute."""

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda one: super(Libraries, self).build_libraries([one]), libraries))


setup(
    cmdclass={"build_clib": Libraries},
    # The order is the linker's: who needs a symbol stands before who has it.
    libraries=[
        library("cconv_dispatch", "dispatch.c", []),
        *(library(f"cconv_{isa}", f"isa_{isa}.c", flags) for isa, flags in ISAS.items()),
    ],
    ext_modules=cythonize(
        [
            extension(name, OPENMP if name == "_team" else [])
            for name in ("_core", "_pool", "_team", "_conv", "_depthwise", "_winograd", "_maps", "_tensors", "_program")
        ],
        language_level=3,
    ),
)
