"""The GPU twin: kernels in CUDA C++, compiled for the device that is there, on CuPy's arrays of any of `dtypes`.

In: a Plan and Weights.  Out: a Program. Importing this touches neither CuPy nor CUDA; the first call of a name does,
and raises BackendUnavailable where no GPU can be used, or in a child forked from a process that used it.
"""

import numpy as np

from ..planning import Machine, Plan, specs
from ..weights import Weights
from . import device, feeding
from .feeding import chunk
from .program import Geometry, Program

name = "gpu"
dtypes = tuple(specs.ITEMSIZE)

__all__ = [
    "Program",
    "asarray",
    "build",
    "chunk",
    "dtypes",
    "feed",
    "machine",
    "name",
    "prepare",
    "synchronize",
    "to_numpy",
]


def machine() -> Machine:
    return device.current().machine


def asarray(array):
    """A CuPy array: the same one, one that shares the memory of a CUDA array (DLPack), or a copy of a NumPy array."""
    found = device.current()
    with found.errors():
        return found.asarray(array)


def to_numpy(array) -> np.ndarray:
    """A copy on the host; waits for what computes it on the current stream."""
    found = device.current()
    with found.errors():
        return found.to_numpy(array)


def synchronize() -> None:
    """Wait for all that was launched."""
    found = device.current()
    with found.errors():
        found.synchronize()


def prepare(plan: Plan) -> Geometry:
    """The plan compiled for the device: `prepare(plan)(weights)` is a Program."""
    return Geometry(plan, device.current())


def build(plan: Plan, weights: Weights) -> Program:
    """`prepare(plan)(weights)`; what `prepare` gives holds no weights and may be kept."""
    return prepare(plan)(weights)


def feed(function, images: np.ndarray, step: int, cancel=None):
    """`function` of so many images after the other, that lie on the host: an iterator over its results on the host."""
    return feeding.feed(device.current(), function, images, step, cancel)
