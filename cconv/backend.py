"""Backend: which twin an array belongs to. No state: the array decides.

In: an array, or a twin's name.  Out: the module `cconv.cpu`, `cconv.gpu` or `cconv.reference`.
"""

import functools
import importlib
import importlib.metadata
from types import ModuleType

import numpy as np

from .errors import ArgumentError, BackendUnavailable, DTypeError

NAMES = ("cpu", "gpu", "reference")


@functools.cache
def get(name: str) -> ModuleType:
    """The twin of that name, imported on first use; BackendUnavailable where it cannot work."""
    if name not in NAMES:
        raise ArgumentError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"{__package__}.{name}")


def available() -> dict[str, str]:
    """Every twin's name, and "" if it can be used here or the reason why not."""
    reasons = {}
    for name in NAMES:
        try:
            get(name).machine()
            reasons[name] = ""
        except BackendUnavailable as error:
            reasons[name] = str(error)
    return reasons


def of(array, name: str = "x") -> tuple[ModuleType, object]:
    """The twin for an array and the array as that twin's own kind; other libraries' arrays come in by DLPack."""
    if isinstance(array, np.ma.MaskedArray):
        raise DTypeError(f"{name}: expected an array without a mask, got a masked one; fill it first")
    if isinstance(array, np.ndarray):
        return get("cpu"), array
    if type(array).__module__.partition(".")[0] == "cupy":
        return get("gpu"), array
    if hasattr(array, "__dlpack_device__"):
        kind = int(array.__dlpack_device__()[0])
        if kind == 1:  # kDLCPU
            try:
                return get("cpu"), np.from_dlpack(array)
            except (BufferError, TypeError, RuntimeError) as error:
                kind = type(array).__name__
                raise DTypeError(f"{name}: expected an array that DLPack can share, got a {kind}: {error}") from None
        if kind in (2, 3, 13):  # kDLCUDA, kDLCUDAHost, kDLCUDAManaged
            twin = get("gpu")
            return twin, twin.asarray(array)
    raise DTypeError(f"{name}: expected a NumPy, CuPy or DLPack array, got {type(array).__name__}")


def get_num_threads() -> int:
    """How many CPU threads one call may use: CCONV_NUM_THREADS, or what affinity and cgroup leave to this process."""
    return get("cpu").get_num_threads()


def set_num_threads(count: int | None) -> None:
    """Let one call use so many CPU threads from now on; None goes back to the default. No result depends on it."""
    get("cpu").set_num_threads(count)


def show_config() -> dict:
    """What this installation is and what it runs on, as a dict that can be printed as JSON."""
    cpu = get("cpu")
    machine = cpu.machine()
    return {
        "cconv": importlib.metadata.version("cconv"),
        "numpy": np.__version__,
        "isa": machine.isa,
        "instruction_sets": {name: usable for name, usable, *_ in cpu.instruction_sets()},
        "threads": machine.threads,
        "l2_bytes": machine.l2_bytes,
        "backends": {name: reason or "available" for name, reason in available().items()},
    }
