"""Host: a device that is none: programs of cconv.gpu run their own kernels here, compiled by g++ behind shim/shim.h.

In: what a Program asks of a device (cconv/gpu/device.py).  Out: a HostDevice, whose arrays are NumPy's or HostArrays,
which can no more than CuPy's; and HostTwin, a twin on it, which tests take for cconv.gpu or cconv.cpu.
tests/gpu/conftest.py hands this module to the tests, which cannot import each other.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cconv.gpu import compile, feeding
from cconv.gpu.program import Geometry, Program
from cconv.planning import Machine, specs

SHIM = Path(__file__).with_name("shim") / "shim.h"
#: Contraction of a*b + c as on a device, where the processor can; the least optimisation that keeps the grid short; C's
#: headers and not C++'s, which would take half of the time.
FLAGS = ("-std=c++17", "-nostdinc++", "-O2", "-fPIC", "-shared", "-w", "-march=native", "-ffp-contract=fast")
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


class HostArray:
    """An array of a device: what cconv may ask of CuPy's, and nothing else, so that no NumPy function takes it."""

    __array__ = None
    __array_ufunc__ = None

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def flags(self):
        return SimpleNamespace(c_contiguous=self.array.flags.c_contiguous)

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"data": (self.array.ctypes.data, False)}

    def __getattr__(self, name: str):
        if name not in ("dtype", "itemsize", "nbytes", "ndim", "shape", "size", "strides"):
            raise AttributeError(name)
        return getattr(self.array, name)

    def __len__(self) -> int:
        return len(self.array)

    def _like(self, array: np.ndarray):
        return HostArray(array)

    def __getitem__(self, key):
        return self._like(self.array[key])

    def __setitem__(self, key, value) -> None:
        self.array[key] = value.array

    def reshape(self, *shape):
        return self._like(self.array.reshape(*shape))

    def copy(self, order: str = "C"):
        return self._like(self.array.copy(order))

    def sum(self, axis: int):
        return self._like(self.array.sum(axis=axis))


class Lane:
    """A stream of copies: each is made when it is waited for and not before, so that a wait left out is seen."""

    def __init__(self):
        self._queued, self._done = [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Kernels run at once on the host."""

    def queue(self, copy) -> None:
        self._queued.append(copy)

    def record(self):
        """An event: what has been queued so far."""
        return SimpleNamespace(synchronize=partial(self._until, len(self._queued)))

    def wait_event(self, event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self._until(len(self._queued))

    def _until(self, count: int) -> None:
        while self._done < count:
            self._queued[self._done]()
            self._done += 1


class HostDevice:
    """A device of so many multiprocessors, for the plans; `folder` is where libraries are kept from run to run.

    Its arrays are NumPy's, or all of them HostArrays."""

    def __init__(self, folder: Path, multiprocessors: int = 4, sanitize: bool = False, wrap: bool = False):
        self.arch = "host"
        self.machine = Machine("sm_90", 16, 1, 1, (1,), multiprocessors, 50 << 20, device="cuda")
        self.seed = 0
        self.launches = self.settled = 0
        self._wrap = HostArray if wrap else (lambda array: array)
        self._folder, self._flags = folder, FLAGS + (SANITIZE if sanitize else ())
        self._functions: dict[tuple, object] = {}

    def check(self) -> None:
        """Never refuses."""

    def asarray(self, array):
        return array if isinstance(array, HostArray) else self._wrap(np.asarray(array))

    def contiguous(self, array):
        return self._wrap(np.require(self.to_numpy(array), requirements="CA"))

    def to_numpy(self, array) -> np.ndarray:
        return array.array if isinstance(array, HostArray) else array

    def errors(self):
        """Nothing of CUDA's comes up."""
        return nullcontext()

    def empty(self, shape: tuple[int, ...], dtype, kept: bool = False):
        """NaN everywhere, so that what no kernel writes is seen."""
        return self._wrap(np.full(shape, np.nan, dtype))

    def kept(self, array):
        """A copy: what is kept is no memory of the caller's."""
        return self._wrap(np.array(self.to_numpy(array), order="C"))

    def pinned(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """NaN, as all memory that nothing was written to."""
        return np.full(shape, np.nan, dtype)

    def streams(self) -> tuple:
        """Three, on which copies wait for somebody to need them."""
        return tuple(Lane() for _ in range(3))

    def upload(self, staged: np.ndarray, to, stream) -> None:
        """Later."""
        stream.queue(lambda: np.copyto(self.to_numpy(to), staged))

    def download(self, array, stream) -> np.ndarray:
        """Later."""
        into = self.pinned(array.shape, array.dtype)
        stream.queue(lambda: np.copyto(into, self.to_numpy(array)))
        return into

    def settle(self) -> None:
        """Counts what a real device would wait for."""
        self.settled += 1

    def pointer(self, array) -> int:
        return 0 if array is None else self.to_numpy(array).ctypes.data

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
            error = run(library, parameters, blocks, threads, self.seed + self.launches)
            assert error is None, f"{name}: {entry}: {error}"

        return launch

    def _compiled(self, name: str, entry: str, macros: Mapping[str, object]):
        return library(compile.text(name, macros), entry, self._folder, self._flags)


_one_at_a_time = threading.Lock()  # a library has one set of fibers, and all of them have the same stacks


@cache
def _stacks(size: int) -> np.ndarray:
    """Stacks of a block's fibers."""
    return np.empty(size, np.uint8)


def run(library, parameters: np.ndarray, blocks: int, threads: int, seed: int) -> str | None:
    """Run a kernel; what the shim says went wrong, or None."""
    with _one_at_a_time:
        stacks = _stacks(library.room())
        error = library.run(parameters.ctypes.data, blocks, threads, seed, stacks.ctypes.data)
    return error and error.decode()


def library(text: str, entry: str, folder: Path, flags=FLAGS):
    """A kernel of a source as a library of the host."""
    taken = re.search(rf"\b{entry}\(const (\w+) p\)", text)[1]
    header = compile.source(compile.HEADER)
    body = text.replace(f'#include "{compile.HEADER}"', header)
    whole = f'#include "{SHIM}"\n{body}\nSHIM_EXPORT({entry}, {taken})\n'
    digest = hashlib.sha256("\0".join((SHIM.read_text(), whole, *flags)).encode()).hexdigest()[:32]
    path = folder / f"{entry}-{digest}.so"
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")  # several processes may want it at once
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(made)]
        # Python may run with a sanitizer's library loaded before it; the compiler need not.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, input=whole, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{entry}: {done.stderr}"
        made.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.run.argtypes = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p
    loaded.run.restype = ctypes.c_char_p
    loaded.size.restype = loaded.room.restype = ctypes.c_size_t
    return loaded


class HostTwin:
    """A twin on a HostDevice, by the names of cconv.gpu; `machine_of` is cconv.cpu's, for tests written for that."""

    name = "gpu"
    Program = Program
    chunk = staticmethod(feeding.chunk)
    dtypes = tuple(specs.ITEMSIZE)

    def __init__(self, device: HostDevice):
        self._device = device

    def machine(self) -> Machine:
        return self._device.machine

    def machine_of(self, isa: str, threads: int) -> Machine:
        """So many threads are so many multiprocessors."""
        return replace(self._device.machine, threads=threads)

    def asarray(self, array):
        return self._device.asarray(array)

    def to_numpy(self, array) -> np.ndarray:
        return self._device.to_numpy(array)

    def synchronize(self) -> None:
        self._device.synchronize()

    def feed(self, function, images, step, cancel=None):
        return feeding.feed(self._device, function, images, step, cancel)

    def prepare(self, plan) -> Geometry:
        return Geometry(plan, self._device)

    def build(self, plan, weights) -> Program:
        return self.prepare(plan)(weights)
