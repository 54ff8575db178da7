"""Weights: a layer's arrays by name, and what was made of them, once for all programs.

In: a function name -> (weight (K, C/G, R, S), bias (K,) or None).  Out: those arrays, or forms packed for a device.
"""

import threading
from collections.abc import Callable, Hashable


class Weights:
    """Named (weight, bias) pairs, fetched on first use, with the forms that programs derive from them."""

    def __init__(self, source: Callable[[str], tuple]):
        self._source = source
        self._made: dict[Hashable, object] = {}
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> tuple:
        return self.derived((name,), lambda: self._source(name))

    def derived(self, key: Hashable, make: Callable[[], object]):
        """`make()`, called once per key however many programs and threads ask."""
        try:
            return self._made[key]
        except KeyError:
            with self._lock:
                if key not in self._made:
                    self._made[key] = make()
                return self._made[key]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held, packed forms included."""
        arrays = (a for made in self._made.values() for a in (made if isinstance(made, tuple) else (made,)))
        return sum(getattr(a, "nbytes", 0) for a in arrays)
