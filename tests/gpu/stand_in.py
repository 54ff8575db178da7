"""Stand-in: what cconv/gpu/device.py calls of CuPy, on the host's memory, so that the real Device runs without a GPU.

In: a HostDevice, which runs the kernels; faults, planted by tests.  Out: modules that go by the names of CuPy's, and
what was asked of them. It knows nothing that CALLED of test_door.py has not found in the CuPy that is installed.
"""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
from gpu_host import HostArray, HostDevice, Lane  # conftest.py has put it there


class CudaError(RuntimeError):
    """An error of CUDA's with its number, by either interface."""

    def __init__(self, status: int):
        super().__init__(f"CUDA error {status}, planted")
        self.status = status


class PoolError(MemoryError):
    """The pool's."""


class Memory:
    """Plain memory: a row of bytes, in which nothing is a number yet."""

    def __init__(self, nbytes: int):
        self.array = np.full(nbytes, 0xFF, np.uint8)


class MemoryPointer:
    """An address in a memory or an array, which lives as long."""

    def __init__(self, owner, offset: int):
        self.owner, self.ptr = owner, owner.array.ctypes.data + offset

    def copy_from_device_async(self, source: "MemoryPointer", nbytes: int) -> None:
        ctypes.memmove(self.ptr, source.ptr, nbytes)


class ndarray(HostArray):
    """An array of CuPy's, as far as cconv knows it."""

    __module__ = "cupy"

    def __init__(self, shape, dtype=float, memptr: MemoryPointer | None = None):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = memptr.owner if memptr else Memory(nbytes)
        super().__init__(memory.array[:nbytes].view(dtype).reshape(shape))
        self.device = SimpleNamespace(id=0)

    def _like(self, array: np.ndarray) -> "ndarray":
        made = ndarray.__new__(ndarray)
        made.array, made.device = array, self.device
        return made

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self, 0)

    def set(self, array: np.ndarray, stream=None) -> None:
        (stream.queue if stream else _now)(lambda: np.copyto(self.array, array))

    def get(self, stream=None, out=None, blocking=True) -> np.ndarray:
        out = np.empty(self.shape, self.dtype) if out is None else out
        (_now if blocking else stream.queue)(lambda: np.copyto(out, self.array))
        return out


def _now(copy) -> None:
    copy()


class _OnHost:
    """An array of "CUDA" as NumPy takes it."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


class StandIn:
    """`cupy` and `cupyx`; `kernels` runs what is launched.

    Attributes
    ----------
    refused : list of int
        Errors of the next allocations of plain memory, the next one last.
    present : int
        The device that is current.
    freed, loaded, waited : int
        How often the pool was emptied, a module loaded, the whole device waited for.
    pinned : list of arrays
        All page-locked memory that was asked for.
    streams : list of Lane
    """

    def __init__(self, kernels: HostDevice, capability: str = "90"):
        self._kernels, self._capability = kernels, capability
        self.refused, self.pinned, self.streams = [], [], []
        self.present = self.freed = self.loaded = self.waited = 0
        self._current = [Lane()]
        self.cupy = SimpleNamespace(
            ndarray=ndarray, empty=ndarray, asarray=self._asarray, asnumpy=ndarray.get, cuda=self._cuda(),
            ascontiguousarray=self._in_order, from_dlpack=lambda array: self._wrapped(np.from_dlpack(_OnHost(array))),
            get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=self._free),
        )  # fmt: skip
        self.cupyx = SimpleNamespace(empty_pinned=self._empty_pinned)

    def _cuda(self) -> SimpleNamespace:
        return SimpleNamespace(
            is_available=lambda: True, Device=self._device, Memory=self._memory, MemoryPointer=MemoryPointer,
            Stream=self._stream, get_current_stream=lambda: self._current[-1],
            function=SimpleNamespace(Module=lambda: _Module(self)), memory=SimpleNamespace(OutOfMemoryError=PoolError),
            driver=SimpleNamespace(CUDADriverError=CudaError),
            runtime=SimpleNamespace(CUDARuntimeError=CudaError, getDevice=lambda: self.present),
        )  # fmt: skip

    def _device(self, number: int = 0) -> SimpleNamespace:
        attributes = {"MultiProcessorCount": 4, "L2CacheSize": 50 << 20}
        return SimpleNamespace(
            id=number, compute_capability=self._capability, attributes=attributes, synchronize=self._wait
        )

    @staticmethod
    def _wrapped(array: np.ndarray) -> ndarray:
        return ndarray((0,))._like(array)

    def _asarray(self, array) -> ndarray:
        return array if isinstance(array, ndarray) else self._wrapped(np.array(array, order="C"))

    def _in_order(self, array: ndarray) -> ndarray:
        return array if array.array.flags.c_contiguous else self._wrapped(np.ascontiguousarray(array.array))

    def _memory(self, nbytes: int) -> Memory:
        if self.refused:
            raise CudaError(self.refused.pop())
        return Memory(nbytes)

    def _wait(self) -> None:
        self.waited += 1

    def _free(self) -> None:
        self.freed += 1

    def _empty_pinned(self, shape, dtype) -> np.ndarray:
        self.pinned.append(np.full(shape, np.nan, dtype))
        return self.pinned[-1]

    def _stream(self, non_blocking: bool = False) -> Lane:
        assert non_blocking, "it would wait for the default stream"
        self.streams.append(Lane())
        return self.streams[-1]


class _Module:
    def __init__(self, owner: StandIn):
        self._owner = owner

    def load(self, cubin: bytes) -> None:
        self._owner.loaded += 1
        self._name, self._macros, _ = json.loads(cubin)

    def get_function(self, entry: str):
        launch = self._owner._kernels.kernel(self._name, entry, self._macros)
        return lambda grid, block, parameters: launch(*grid, *block, *parameters)


def cubin(name: str, macros, arch: str) -> bytes:
    """For compile.cubin: what _Module.load takes."""
    return json.dumps([name, dict(macros), arch]).encode()
