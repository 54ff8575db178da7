"""Runs: what a test of the lanes has its tasks do, and how it waits for what comes of them.

In: schedulers and tasks of conftest.py.  Out: runs that are held or wait to be cancelled; what was computed in vain.
"""

import threading
import time

from cconv.cpu._team import limit
from service.errors import DeadlineExceeded

WAIT_S = 20


def soon(condition) -> bool:
    """Whether the condition holds in the end."""
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def later(seconds=WAIT_S) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def waste(scheduler, task) -> float:
    """How many times the task's FLOPs were discarded."""
    found = scheduler._metrics.registry.get_sample_value(
        "cconv_discarded_flops_total", {"model": task.label, "device": task.device}
    )
    return (found or 0) / task.quote.flops


def until_cancelled(cancel) -> None:
    assert soon(cancel.is_set)
    raise DeadlineExceeded("cancelled")


class Held:
    """Runs that begin and go on until they are let go; `threads` are the limits they ran with."""

    def __init__(self):
        self.go, self.began, self.threads = threading.Event(), threading.Semaphore(0), []

    def __call__(self, cancel):
        self.threads.append(limit())
        self.began.release()
        assert self.go.wait(WAIT_S)

    def wait(self, runs):
        for _ in range(runs):
            assert self.began.acquire(timeout=WAIT_S)
