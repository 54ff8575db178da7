"""Weights: a layer's arrays by name, and what was made of them, once for all programs.

In: a function name -> (weight (K, C/G, R, S), bias (K,) or None), and (scale, shift) as (2, C) where a convolution is
preactivated.  Out: forms derived from them for a device.
The arrays themselves are not kept: a big network's weights are in memory once, packed.
"""

import os
import threading
from collections.abc import Callable, Hashable


class ProcessLock:
    """A lock of this process: a forked child begins with one of its own, whoever held its parent's."""

    def __init__(self):
        self._locks: dict[int, threading.RLock] = {}

    def _lock(self) -> threading.RLock:
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def __enter__(self):
        self._lock().acquire()

    def __exit__(self, *_):
        self._lock().release()


class Once:
    """One (weight, bias) pair for one program; nothing made of it is kept here."""

    #: Whether what is derived serves other programs too, in other threads.
    shared = False

    def __init__(self, arrays: tuple):
        self._arrays = arrays

    def derived(self, name: str, form: Hashable, make: Callable[[tuple], tuple]) -> tuple:
        """`make((weight, bias))`."""
        return make(self._arrays)


class Weights:
    """Named (weight, bias) pairs, fetched when a program is built, with the forms that programs made of them."""

    shared = True

    def __init__(self, source: Callable[[str], tuple]):
        self._source = source
        self._derived: dict[Hashable, tuple] = {}
        self._lock = ProcessLock()

    def derived(self, name: str, form: Hashable, make: Callable[[tuple], tuple]) -> tuple:
        """`make((weight, bias))`, called once per name and form however many programs and threads ask."""
        key = name, form
        try:
            return self._derived[key]
        except KeyError:
            with self._lock:
                if key not in self._derived:
                    self._derived[key] = make(self._source(name))
                return self._derived[key]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(array.nbytes for made in self._derived.values() for array in made if array is not None)


#: For programs of operators that have none.
NO_WEIGHTS = Weights({}.__getitem__)
