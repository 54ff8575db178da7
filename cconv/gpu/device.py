"""Device: the GPU through CuPy, touched on first use and by one process alone.

In: NumPy, CuPy or DLPack arrays; kernels by name.  Out: memory, launches, and BackendUnavailable where they cannot be.
This is the only file that imports CuPy. A program (program.py) works with any object that has the methods of Device, so
the tests run the same programs on a machine without a GPU.
"""

import os
import threading
from collections.abc import Mapping
from functools import cache

import numpy as np

from ..errors import ArgumentError, BackendUnavailable
from ..planning import Machine
from . import compile

#: Oldest architecture that CUDA 13 compiles for.
OLDEST = 75


class FirstUse:
    """Which process used CUDA first. Its state does not survive a fork; without this a child would crash or hang."""

    def __init__(self):
        self._pid: int | None = None

    def check(self) -> None:
        """Record this process, or BackendUnavailable in a child that was forked after the first use."""
        pid = os.getpid()
        if self._pid is None:
            self._pid = pid
        elif self._pid != pid:
            raise BackendUnavailable(
                f"gpu: expected process {self._pid}, which used CUDA first, got {pid}, a child forked from it; "
                "start children by spawn, or use the GPU in children only"
            )


_first_use = FirstUse()


class Device:
    """The current CUDA device, its arrays and kernels."""

    def __init__(self, cupy):
        self._cupy = cupy
        device = cupy.cuda.Device()
        self.id = device.id
        self.arch = f"sm_{device.compute_capability}"
        if int(device.compute_capability) < OLDEST:
            raise BackendUnavailable(f"gpu: expected a GPU of compute capability {OLDEST} or more, got {self.arch}")
        attributes = device.attributes
        # Planning for a GPU reads the multiprocessors ("threads"); register tiles of vectors are a CPU's.
        self.machine = Machine(
            self.arch, 16, 1, 1, (1,), attributes["MultiProcessorCount"], attributes["L2CacheSize"], device="cuda"
        )
        self._functions: dict[tuple, object] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """BackendUnavailable in a forked child, or where another device has been made the current one."""
        _first_use.check()
        now = self._cupy.cuda.runtime.getDevice()
        if now != self.id:
            raise BackendUnavailable(f"gpu: expected device {self.id}, the first one used, to be current, got {now}")

    def asarray(self, array):
        """A CuPy array on this device: itself, shared by DLPack, or a copy of what lies on the host."""
        cupy = self._cupy
        if isinstance(array, cupy.ndarray):
            if array.device.id != self.id:
                raise ArgumentError(f"x: expected an array on device {self.id}, got one on device {array.device.id}")
            return array
        if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
            return self.asarray(cupy.from_dlpack(array))
        return cupy.asarray(array)

    def contiguous(self, array):
        """The array on this device, in C order."""
        return self._cupy.ascontiguousarray(self.asarray(array))

    def to_numpy(self, array) -> np.ndarray:
        return self._cupy.asnumpy(array)

    def empty(self, shape: tuple[int, ...], dtype: str):
        """Memory of the pool, its content undefined."""
        return self._cupy.empty(shape, dtype)

    def upload(self, table: np.ndarray):
        """A structured or plain NumPy table as bytes on this device."""
        return self._cupy.asarray(np.ascontiguousarray(table).view(np.uint8))

    def pointer(self, array) -> int:
        """The address of an array's first element; 0 for None."""
        return 0 if array is None else array.data.ptr

    def kernel(self, name: str, entry: str, macros: Mapping[str, object]):
        """f(blocks, threads, parameters): a kernel of a file, compiled and loaded on first use."""
        key = name, entry, tuple(sorted(macros.items()))
        function = self._functions.get(key)
        if function is None:
            path = compile.cubin(name, macros, self.arch)
            with self._lock:
                function = self._functions.get(key)
                if function is None:
                    function = self._cupy.RawModule(path=str(path)).get_function(entry)
                    self._functions[key] = function

        def launch(blocks: int, threads: int, parameters: np.ndarray) -> None:
            # CuPy passes a NumPy array of one element by value, whatever its type.
            function((blocks,), (threads,), (parameters,))

        return launch

    def synchronize(self) -> None:
        self._cupy.cuda.Device(self.id).synchronize()


@cache
def _found() -> Device:
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(f"gpu: expected CuPy (pip install 'cconv[gpu]'), got: {error}") from None
    _first_use.check()
    try:
        if not cupy.cuda.is_available():
            raise BackendUnavailable("gpu: expected a CUDA device and its driver, CuPy found none")
        found = Device(cupy)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"gpu: expected a CUDA device that works, got: {error}") from None
    compile.nvrtc()
    return found


def current() -> Device:
    """The device, on first use found and its process recorded; BackendUnavailable that says what was expected."""
    found = _found()
    found.check()
    return found
