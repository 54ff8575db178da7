"""Threads: how many, and whose turn it is.

In: the process's CPU affinity, its cgroup's quota, CCONV_NUM_THREADS, set_num_threads().  Out: a count for each run.

One run at a time uses the OpenMP team; a run that finds it busy goes on alone, on its caller's thread. A child forked
after the team was started runs on one thread: libgomp's team does not survive a fork and would hang.
"""

import operator
import os
import threading
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from ..errors import ArgumentError

#: Below so many multiplications and additions waking a second thread costs more than it saves.
SERIAL_FLOPS = 1_500_000
#: Where libgomp cannot start a thread it ends the process, so nobody may ask for any number.
MOST_THREADS = 1024

_gate = threading.Lock()
_chosen: int | None = None
_team_started = False
_team_lost = False


def _forked() -> None:
    global _gate, _team_lost
    _gate = threading.Lock()
    _team_lost = _team_started


os.register_at_fork(after_in_child=_forked)


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
    """CCONV_NUM_THREADS, else the CPUs that affinity and cgroup leave to this process."""
    asked = os.environ.get("CCONV_NUM_THREADS")
    if asked is not None:
        return _checked(int(asked) if asked.isdecimal() and len(asked) < 10 else asked, "CCONV_NUM_THREADS")
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, _quota())))


def get_num_threads() -> int:
    """Threads that one call may use."""
    return _chosen or default()


def set_num_threads(count: int | None) -> None:
    """Threads that one call may use from now on; None goes back to the default. Results do not depend on it."""
    global _chosen
    _chosen = None if count is None else _checked(count, "set_num_threads")


@contextmanager
def team(flops: int):
    """The number of threads for a run of so many operations, for as long as it holds the team."""
    global _team_started
    count = get_num_threads()
    if count == 1 or flops < SERIAL_FLOPS or _team_lost or not _gate.acquire(blocking=False):
        yield 1
        return
    try:
        _team_started = True
        yield count
    finally:
        _gate.release()
