"""Host: a device that is none: programs of cconv.gpu run their own kernels here, compiled by g++ behind shim/shim.h.

In: what a Program asks of a device (cconv/gpu/device.py).  Out: NumPy arrays, computed by the kernels' own sources.
tests/gpu/conftest.py hands this module to the tests, which cannot import each other.
"""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cconv.gpu import compile
from cconv.planning import Machine

SHIM = Path(__file__).with_name("shim") / "shim.h"
#: Contraction of a*b + c as on a device, where the processor can; the least optimisation that keeps the grid short.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-march=native", "-ffp-contract=fast")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


class HostDevice:
    """A device of so many multiprocessors, for the plans; `folder` is where libraries are kept from run to run."""

    def __init__(self, folder: Path, multiprocessors: int = 4, sanitize: bool = False):
        self.arch = "host"
        self.machine = Machine("sm_90", 16, 1, 1, (1,), multiprocessors, 50 << 20, device="cuda")
        self.seed = 0
        self.launches = 0
        self._folder, self._flags = folder, FLAGS + (SANITIZE if sanitize else ())
        self._functions: dict[tuple, object] = {}

    def check(self) -> None:
        """Never refuses."""

    def asarray(self, array):
        return np.asarray(array)

    def contiguous(self, array):
        return np.require(array, requirements="CA")

    def to_numpy(self, array) -> np.ndarray:
        return array

    def empty(self, shape: tuple[int, ...], dtype: str):
        """NaN everywhere, so that what no kernel writes is seen."""
        return np.full(shape, np.nan, dtype)

    def upload(self, table: np.ndarray):
        return np.ascontiguousarray(table).view(np.uint8)

    def pointer(self, array) -> int:
        return 0 if array is None else array.ctypes.data

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def kernel(self, name: str, entry: str, macros: Mapping[str, object]):
        """f(blocks, threads, parameters), every launch in another order of blocks and threads."""
        key = name, entry, tuple(sorted(macros.items()))
        library = self._functions.get(key)
        if library is None:
            library = self._functions[key] = self._compiled(name, entry, macros)

        def launch(blocks: int, threads: int, parameters: np.ndarray) -> None:
            assert parameters.dtype.itemsize == library.size(), f"the struct of {entry} is not what Python reads"
            self.launches += 1
            error = library.run(parameters.ctypes.data, blocks, threads, self.seed + self.launches)
            assert error is None, f"{name}: {entry}: {error.decode()}"

        return launch

    def _compiled(self, name: str, entry: str, macros: Mapping[str, object]):
        return library(compile.text(name, macros), entry, self._folder, self._flags)


def library(text: str, entry: str, folder: Path, flags=FLAGS):
    """A kernel of a source as a library of the host."""
    taken = re.search(rf"\b{entry}\(const (\w+) p\)", text)[1]
    header = compile.source(compile.HEADER)
    body = text.replace(f'#include "{compile.HEADER}"', header)
    whole = f'#include "{SHIM}"\n{body}\nSHIM_EXPORT({entry}, {taken})\n'
    digest = hashlib.sha256("\0".join((SHIM.read_text(), whole, *flags)).encode()).hexdigest()[:32]
    path = folder / f"{entry}-{digest}.so"
    if not path.exists():
        made = path.with_suffix(".tmp")
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=whole, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{entry}: {done.stderr}"
        made.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.run.argtypes = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_uint64
    loaded.run.restype = ctypes.c_char_p
    loaded.size.restype = ctypes.c_size_t
    return loaded
