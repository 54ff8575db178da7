"""Device: the GPU through CuPy, touched on first use and by one process alone.

In: NumPy, CuPy or DLPack arrays; kernels by name.  Out: memory, launches, and BackendUnavailable where they cannot be;
CUDA's errors as OutOfMemory and DeviceError.
This is the only file that imports CuPy. A program (program.py) works with any object that has the methods of Device, so
the tests run the same programs on a machine without a GPU.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np

from ..errors import ArgumentError, BackendUnavailable, DeviceError, OutOfMemory
from ..planning import Machine
from ..weights import ProcessLock
from . import compile

#: Oldest architecture that CUDA 13 compiles for.
OLDEST = 75
#: CUDA's number for it, in the runtime's interface and in the driver's.
_NO_MEMORY = 2


class FirstUse:
    """Which process used CUDA first. Its state does not survive a fork; without this a child would crash or hang."""

    def __init__(self):
        self._pid: int | None = None

    def record(self) -> None:
        """This process has used CUDA."""
        self.check()
        self._pid = os.getpid()

    def check(self) -> None:
        """BackendUnavailable in a child that was forked after the first use."""
        if self._pid not in (None, os.getpid()):
            raise BackendUnavailable(
                f"gpu: expected process {self._pid}, which used CUDA first, got {os.getpid()}, a child forked from it; "
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
        self._own = threading.local()

    def check(self) -> None:
        """BackendUnavailable in a forked child, or where another device has been made the current one."""
        _first_use.check()
        now = self._cupy.cuda.runtime.getDevice()
        if now != self.id:
            raise BackendUnavailable(f"gpu: expected device {self.id}, the first one used, to be current, got {now}")

    @contextmanager
    def errors(self):
        """CUDA's errors in the block as cconv's."""
        cuda = self._cupy.cuda
        try:
            yield
        except cuda.memory.OutOfMemoryError as error:
            raise OutOfMemory(f"gpu: {error}") from None
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            if error.status == _NO_MEMORY:
                raise OutOfMemory(f"gpu: {error}") from None
            raise DeviceError(f"gpu: {error}") from error

    def asarray(self, array):
        """A CuPy array on this device: itself, shared by DLPack, or a copy of what lies on the host."""
        cupy = self._cupy
        if isinstance(array, cupy.ndarray):
            if array.device.id != self.id:
                raise ArgumentError(f"gpu: expected arrays on device {self.id}, got one on device {array.device.id}")
            return array
        if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
            return self.asarray(cupy.from_dlpack(array))
        return cupy.asarray(array)

    def contiguous(self, array):
        """The array on this device, in C order."""
        return self._cupy.ascontiguousarray(self.asarray(array))

    def to_numpy(self, array) -> np.ndarray:
        return self._cupy.asnumpy(array)

    def empty(self, shape: tuple[int, ...], dtype, kept: bool = False):
        """Memory of undefined content: the pool's, which belongs to the current stream, or such that may be `kept`.

        What is kept serves any stream and is no part of the pool, which would give it away while another stream than
        its own still reads it: giving back plain CUDA memory waits for the whole device.
        """
        if not kept:
            return self._cupy.empty(shape, dtype)
        nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        try:
            memory = self._cupy.cuda.Memory(nbytes)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            self._cupy.get_default_memory_pool().free_all_blocks()
            memory = self._cupy.cuda.Memory(nbytes)
        return self._cupy.ndarray(shape, dtype, memptr=self._cupy.cuda.MemoryPointer(memory, 0))

    def kept(self, array):
        """A copy in C order that may be kept; once `settle` returns, any stream may read it."""
        made = self.empty(array.shape, array.dtype, kept=True)
        if isinstance(array, np.ndarray):
            made.set(array)
        else:
            source = self.contiguous(array)
            made.data.copy_from_device_async(source.data, source.nbytes)
        return made

    def pinned(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Page-locked memory of the host, of undefined content."""
        import cupyx

        return cupyx.empty_pinned(shape, dtype)

    def streams(self) -> tuple:
        """This thread's own three, for feeding.py; they stay, since the pool's memory belongs to a stream."""
        found = getattr(self._own, "streams", None)
        if found is None:
            found = self._own.streams = tuple(self._cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        return found

    def upload(self, staged: np.ndarray, to, stream) -> None:
        """Queue a copy of page-locked memory to the device."""
        to.set(staged, stream=stream)

    def download(self, array, stream) -> np.ndarray:
        """Queue a copy to page-locked memory, which holds it once the stream has come so far."""
        into = self.pinned(array.shape, array.dtype)
        return array.get(stream=stream, out=into, blocking=False)

    def settle(self) -> None:
        """Wait for the current stream."""
        self._cupy.cuda.get_current_stream().synchronize()

    def pointer(self, array) -> int:
        """The address of an array's first element; 0 for None."""
        return 0 if array is None else array.data.ptr

    def kernel(self, name: str, entry: str, macros: Mapping[str, object]):
        """f(blocks, threads, parameters): a kernel of a file, compiled and loaded on first use."""
        key = name, entry, tuple(sorted(macros.items()))
        function = self._functions.get(key)
        if function is None:
            cubin = compile.cubin(name, macros, self.arch)
            with self._lock:
                function = self._functions.get(key)
                if function is None:
                    module = self._cupy.cuda.function.Module()
                    module.load(cubin)
                    function = self._functions[key] = module.get_function(entry)

        def launch(blocks: int, threads: int, parameters: np.ndarray) -> None:
            # CuPy passes a NumPy array of one element by value, whatever its type.
            function((blocks,), (threads,), (parameters,))

        return launch

    def synchronize(self) -> None:
        self._cupy.cuda.Device(self.id).synchronize()


_once = ProcessLock()
_device: Device | None = None


def _find() -> Device:
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(f"gpu: expected CuPy (pip install 'cconv[gpu]'), got: {error}") from None
    _first_use.check()
    try:
        if not cupy.cuda.is_available():
            raise BackendUnavailable("gpu: expected a CUDA device and its driver, CuPy found none")
        _first_use.record()
        found = Device(cupy)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"gpu: expected a CUDA device that works, got: {error}") from None
    compile.nvrtc()
    return found


def current() -> Device:
    """The device, on first use found and its process recorded; BackendUnavailable that says what was expected."""
    global _device
    with _once:
        _device = _device or _find()
    _device.check()
    return _device
