"""Lanes: the threads that compute, as many for a device as may compute side by side on it.

In: a function that says what to run next, one that runs it.  Out: all of it run, and threads that have ended.
"""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Run = TypeVar("Run")


class Lanes(Generic[Run]):
    """The lanes of one device. A thread starts when something waits that no idle one will take: never before a fork.

    Parameters
    ----------
    name : str
        What the threads are called by.
    most : int
        Threads.
    lock : Lock
        Of whoever has the queue. `call` and `close` expect it held, `take` is called with it, `compute` without.
    take : function without arguments
        What to run now, or None if nothing waits.
    compute : function (run)
        Its thread ends with what it raises. An idle lane keeps its last run, so it leaves nothing large in there.
    nice : int
        How much the threads give way to the process's others, on Linux, where a thread has a niceness of its own. A run
        takes as long as it takes; who refuses, reads or writes wants a processor for a moment, and soon.
    """

    def __init__(
        self,
        name: str,
        most: int,
        lock: threading.Lock,
        take: Callable[[], Run | None],
        compute: Callable[[Run], None],
        nice: int = 0,
    ):
        self.most = most
        self._name, self._take, self._compute, self._nice = name, take, compute, nice
        self._changed = threading.Condition(lock)
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether every thread that was started goes on."""
        return self._closed or all(thread.is_alive() for thread in self._threads)

    def call(self, waiting: int) -> None:
        """A lane for each of so many runs, as far as there are lanes; RuntimeError if not even one can be had."""
        for _ in range(min(waiting - self._idle, self.most - len(self._threads))):
            name = f"cconv-{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left
                if not self._threads:
                    raise
                break
            self._threads.append(thread)
            self._idle += 1
        self._changed.notify(waiting)

    def close(self) -> None:
        """Nothing more is taken."""
        self._closed = True
        self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of closed lanes, each for so long."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _work(self) -> None:
        if self._nice and sys.platform == "linux":
            thread = threading.get_native_id()
            with suppress(OSError):  # a sandbox may forbid it, which is no reason to compute nothing
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._nice)
        while (run := self._next()) is not None:
            self._compute(run)
            with self._changed:
                self._idle += 1

    def _next(self) -> Run | None:
        with self._changed:
            while not self._closed:
                if (run := self._take()) is not None:
                    self._idle -= 1
                    return run
                self._changed.wait()
        return None
