"""Threads: how many a run may use.

In: the process's CPU affinity, its cgroup's quota, CCONV_NUM_THREADS, set_num_threads(), limit_threads().
Out: a count, and the team (_team.pyx) knows it.
"""

import operator
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

from ..errors import ArgumentError
from ._team import limit, use_limit, use_threads

#: Where libgomp cannot start a thread it ends the process, so nobody may ask for any number.
MOST_THREADS = 1024

_chosen: int | None = None


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the cgroup may use, v2's or v1's; infinity without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return float("inf")
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)


def _checked(count, name: str) -> int:
    try:
        number = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = 0
    if not 1 <= number <= MOST_THREADS:
        raise ArgumentError(f"{name}: expected an integer from 1 to {MOST_THREADS}, got {count!r}")
    return number


@lru_cache(maxsize=1)
def default() -> int:
    """CCONV_NUM_THREADS, else the CPUs that affinity and cgroup leave to this process. Read once."""
    asked = os.environ.get("CCONV_NUM_THREADS")
    if asked is not None:
        count = _checked(int(asked) if asked.isdecimal() and len(asked) < 10 else asked, "CCONV_NUM_THREADS")
    else:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, int(min(affinity, _quota())))
    use_threads(_chosen or count)
    return count


def get_num_threads() -> int:
    """Threads that one call may use."""
    return _chosen or default()


def set_num_threads(count: int | None) -> None:
    """Threads that one call may use from now on; None goes back to the default. Results do not depend on it."""
    global _chosen
    _chosen = None if count is None else _checked(count, "set_num_threads")
    use_threads(get_num_threads())


def limit_threads(count: int) -> AbstractContextManager[None]:
    """Threads that one call of the calling thread may use within the context, at most. Results do not depend on it."""
    return _limited(_checked(count, "limit_threads"))


@contextmanager
def _limited(count: int) -> Iterator[None]:
    before = limit()
    use_limit(min(count, before) if before else count)
    try:
        yield
    finally:
        use_limit(before)
