"""The CPU twin: Cython loops over C micro-kernels, float32 and float64.

In: a Plan and Weights.  Out: a Program. Which instruction set and how many threads is decided here: CCONV_ISA and
CCONV_NUM_THREADS, read once, override the machine's own.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import BackendUnavailable
from ..planning import Machine, Plan
from ..weights import Weights
from . import _core
from ._core import CancelFlag, instruction_sets
from .memory import get_pool_limit, idle_bytes, set_pool_limit
from .program import Program, prepare
from .threads import get_num_threads, limit_threads, set_num_threads

name = "cpu"
#: Element types.
dtypes = ("float32", "float64")

__all__ = [
    "CancelFlag", "Program", "asarray", "build", "dtypes", "get_num_threads", "get_pool_limit", "idle_bytes",
    "instruction_sets", "limit_threads", "machine", "machine_of", "name", "prepare", "scaled", "set_num_threads",
    "set_pool_limit", "synchronize", "to_numpy",
]  # fmt: skip


@lru_cache(maxsize=1)
def _l2_bytes() -> int:
    """The second-level cache of one core, 1 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError):
        return 1 << 20


@lru_cache(maxsize=64)
def machine_of(isa: str | None, threads: int) -> Machine:
    """The machine as one instruction set sees it; None takes the best one. BackendUnavailable if it cannot run here."""
    known = instruction_sets()
    for found, usable, vector_bytes, rows, vectors, wide, kept, widest in known:
        if usable and isa in (None, found):
            return Machine(found, vector_bytes, rows, vectors, widest, threads, _l2_bytes(), wide, kept)
    here = ", ".join(found for found, usable, *_ in known if usable)
    raise BackendUnavailable(f"CCONV_ISA: expected one that this processor runs ({here}), got {isa!r}")


@lru_cache(maxsize=1)
def _forced_isa() -> str | None:
    return os.environ.get("CCONV_ISA") or None


def machine() -> Machine:
    return machine_of(_forced_isa(), get_num_threads())


def asarray(array) -> np.ndarray:
    return np.asarray(array)


def to_numpy(array: np.ndarray) -> np.ndarray:
    return array


def synchronize() -> None:
    """Nothing to wait for: a run has ended when it returns."""


def scaled(weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """A float32 weight (K, ...) times a float64 factor for each of its K outputs, in double and rounded once."""
    return _core.scaled(weight, factors, get_num_threads())


def build(plan: Plan, weights: Weights) -> Program:
    """`prepare(plan)(weights)`; what `prepare` gives holds no weights and may be kept."""
    return prepare(plan)(weights)
