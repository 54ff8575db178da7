"""Backend: which twin an array belongs to. No state: the array decides.

In: an array, or a twin's name.  Out: the module `cconv.cpu`, `cconv.gpu` or `cconv.reference`.
"""

import functools
import importlib
from contextlib import AbstractContextManager
from types import ModuleType

import numpy as np

from . import cpu  # here, so that no first call waits for it
from .errors import ArgumentError, BackendUnavailable, CconvError, DTypeError
from .planning import specs

NAMES = ("cpu", "gpu", "reference")
#: DLPack's kinds of devices -> the twin that takes them: kDLCPU, kDLCUDAHost (pinned), kDLCUDA, kDLCUDAManaged.
DLPACK = {1: "cpu", 3: "cpu", 2: "gpu", 13: "gpu"}
#: Looked up on every call; dtype.name alone takes microseconds.
DTYPE_NAMES = {np.dtype(name): name for name in specs.ITEMSIZE if hasattr(np, name)}


@functools.cache
def get(name: str) -> ModuleType:
    """The twin of that name, imported on first use but for the CPU's; BackendUnavailable where it cannot work."""
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
    if type(array) is np.ndarray:  # most are, and calls are short
        return get("cpu"), array
    if isinstance(array, np.ma.MaskedArray):
        raise DTypeError(f"{name}: expected an array without a mask, got a masked one; fill it first")
    if isinstance(array, np.ndarray):
        return get("cpu"), array
    if type(array).__module__.partition(".")[0] == "cupy":
        return get("gpu"), array
    device = getattr(array, "__dlpack_device__", None)
    owner = DLPACK.get(int(device()[0])) if device else None
    if owner is None:
        raise DTypeError(f"{name}: expected a NumPy, CuPy or DLPack array, got {type(array).__name__}")
    twin = get(owner)
    try:
        return twin, np.from_dlpack(array) if owner == "cpu" else twin.asarray(array)
    except CconvError:
        raise
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        kind = type(array).__name__
        raise DTypeError(f"{name}: expected an array that DLPack can share, got a {kind}: {error}") from None


def checked(array, name: str, twin=None, dtype: str | None = None):
    """The array's twin, the array and its type's name; a DTypeError unless that is supported and equals `dtype`."""
    owner, array = of(array, name)
    if twin is not None and owner is not twin:
        raise DTypeError(f"{name}: expected an array on {twin.name} like x, got one on {owner.name}")
    found = DTYPE_NAMES.get(array.dtype)
    if found not in owner.dtypes:
        try:
            native = array.dtype.isnative
            named = array.dtype.name if native else f"{array.dtype.str} (not in native byte order)"
            found = specs.checked_dtype(named, owner.dtypes)
        except DTypeError as error:
            raise DTypeError(f"{name}: {error}") from None
    if dtype is not None and found != dtype:
        raise DTypeError(f"{name}: expected {dtype}, the type of x, got {found}")
    return owner, array, found


def _extent(array) -> tuple[int, int]:
    """The first byte of a device's array, and the one behind its last."""
    interface = array.__cuda_array_interface__
    begin = interface["data"][0]
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return begin + sum(r for r in reach if r < 0), begin + sum(r for r in reach if r > 0) + array.dtype.itemsize


def overlap(a, b) -> bool:
    """Whether two arrays of one twin may share memory; exactly for NumPy's, where that can be found out quickly."""
    if type(a) is not type(b) and not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    if not isinstance(a, np.ndarray):
        (first, behind), (begin, end) = _extent(a), _extent(b)
        return first < end and begin < behind
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=10_000)
    except np.exceptions.TooHardError:
        return True


def get_num_threads() -> int:
    """How many CPU threads one call may use: CCONV_NUM_THREADS, or what affinity and cgroup leave to this process."""
    return get("cpu").get_num_threads()


def set_num_threads(count: int | None) -> None:
    """Let one call use so many CPU threads from now on; None goes back to the default. No result depends on it."""
    get("cpu").set_num_threads(count)


def limit_threads(count: int) -> AbstractContextManager[None]:
    """Let calls of this thread use at most so many CPU threads each, within the context; no result depends on it.

    For callers that compute side by side: n callers of one thread each give more than n that share the team, of which
    one at a time has helpers. Of nested limits the least holds. It does not change `get_num_threads`, and is the
    calling thread's alone: enter and leave it in the same one.

    Parameters
    ----------
    count : int, 1 to 1024

    Raises
    ------
    ArgumentError
        For anything else.

    Examples
    --------
    >>> import numpy as np
    >>> from cconv import conv2d
    >>> with limit_threads(1):
    ...     conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3))).item()
    9.0
    """
    return get("cpu").limit_threads(count)


def cancel_flag():
    """A flag that calls off the runs it is given to, as `cancel`: set(), clear(), is_set(), from any thread.

    A run takes any object with is_set(), such as a threading.Event, which it asks between its steps; for that it needs
    the GIL, and waits where other threads hold it. This one is asked without.

    Examples
    --------
    >>> flag = cancel_flag()
    >>> flag.set()
    >>> flag.is_set()
    True
    """
    return get("cpu").CancelFlag()


def set_pool_limit(nbytes: int | None) -> None:
    """Let at most so many bytes of memory lie idle between calls; None goes back to the default, 256 MiB, 0 keeps none.

    Results, scratch and intermediate maps come from memory that is used again. A result's memory is idle once neither
    it nor a view of it is referred to; what does not fit into the limit goes back to the system at once.

    Parameters
    ----------
    nbytes : int, >= 0, or None

    Raises
    ------
    ArgumentError
        For anything else.

    Examples
    --------
    >>> set_pool_limit(64 << 20)
    >>> show_config()["pool_limit_bytes"]
    67108864
    >>> set_pool_limit(None)
    """
    get("cpu").set_pool_limit(nbytes)


def show_config() -> dict:
    """What this installation is and what it runs on, as a dict that can be printed as JSON."""
    from importlib import metadata  # here: it brings email and zipfile, a third of the time of `import cconv`

    machine = cpu.machine()
    return {
        "cconv": metadata.version("cconv"),
        "numpy": np.__version__,
        "isa": machine.isa,
        "instruction_sets": {name: usable for name, usable, *_ in cpu.instruction_sets()},
        "threads": machine.threads,
        "l2_bytes": machine.l2_bytes,
        "pool_limit_bytes": cpu.get_pool_limit(),
        "pool_idle_bytes": cpu.idle_bytes(),
        "backends": {name: reason or "available" for name, reason in available().items()},
    }
