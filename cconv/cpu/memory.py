"""Memory: how much may lie idle in the pool (_pool.pyx).

In: set_pool_limit().  Out: what the pool keeps, and how much of it lies idle now.
"""

import operator
import os
import sys

from ..errors import ArgumentError
from ._pool import drop_idle, idle_bytes, keep_idle

__all__ = ["get_pool_limit", "idle_bytes", "set_pool_limit"]

#: Bytes that may lie idle unless set_pool_limit says otherwise.
DEFAULT_LIMIT = 256 << 20

_limit = DEFAULT_LIMIT
keep_idle(_limit)
# Its parent's pages would be copied one by one as a child writes to them; fresh ones come whole.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=drop_idle)


def get_pool_limit() -> int:
    """Bytes that may lie idle."""
    return _limit


def set_pool_limit(nbytes: int | None) -> None:
    """Keep at most so many bytes idle from now on; None goes back to the default."""
    global _limit
    try:
        limit = DEFAULT_LIMIT if nbytes is None else -1 if isinstance(nbytes, bool) else operator.index(nbytes)
    except TypeError:
        limit = -1
    if not 0 <= limit <= sys.maxsize:
        raise ArgumentError(f"set_pool_limit: expected an integer from 0 to {sys.maxsize}, got {nbytes!r:.80}")
    keep_idle(limit)
    _limit = limit
