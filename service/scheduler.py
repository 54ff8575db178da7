"""Scheduler: a queue in front of the one thread that computes.

In: a request's tasks and its deadline.  Out: each task's maps, how long it waited and how long its run took; or
DeadlineExceeded, or what the run raised.

One thread computes because cconv has one team of threads; whoever finds it busy works alone. Tasks with equal keys that
wait at the same moment run as one batch; nothing waits for company. Only admitted requests come here, so the queue is
bounded by admission.py: in requests, in FLOPs and in bytes.

A run whose last waiter has gone is cancelled, and looks at that between its steps. One that does not stop holds up
everybody: a watchdog ends the process then, and gunicorn starts another.

    request threads --run()--> [ queue ] --> compute thread --> one run(images, cancel) --> split --> request threads
"""

import faulthandler
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .engine import Task
from .errors import DeadlineExceeded, DeviceLost, InvalidRequest, Overloaded
from .metrics import Metrics

log = logging.getLogger(__name__)
#: Exit code of a process whose compute thread hangs: EX_SOFTWARE.
STUCK = 70


def end_process(reason: str) -> None:
    """Say what every thread is at, and end without waiting for any of them."""
    log.critical("%s; this process ends itself", reason)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STUCK)


@dataclass
class Result:
    """What one task got. Its maps may be a part of a larger batch's."""

    maps: dict[str, np.ndarray]
    queue_s: float
    compute_s: float


class _Request:
    """The tasks of one request; all of them are answered, or none."""

    def __init__(self, count: int, deadline: float):
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.results: list[Result | None] = [None] * count
        self.error: BaseException | None = None
        self.finished = threading.Event()

    def put(self, index: int, result: Result) -> None:
        self.results[index] = result
        if all(self.results):
            self.finished.set()

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.finished.set()


@dataclass(eq=False)
class _Entry:
    request: _Request
    index: int
    task: Task


class Scheduler:
    """Owns the compute thread, which starts with the first task: in the worker process, never before a fork.

    Parameters
    ----------
    watchdog_s : float
        How long a run may go on after its last deadline.
    on_stuck : function (reason)
        Called once when it has.
    """

    def __init__(
        self,
        metrics: Metrics,
        max_batch: int,
        watchdog_s: float = 120.0,
        on_stuck: Callable[[str], None] = end_process,
    ):
        self._watchdog_s, self._on_stuck = watchdog_s, on_stuck
        self._ended = threading.Event()
        self._metrics = metrics
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._cancel = threading.Event()
        self._closed = False
        #: Called when this process can compute nothing any more.
        self.on_lost: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._watchdog: threading.Thread | None = None

    def run(self, tasks: Sequence[Task], deadline: float) -> list[Result]:
        """Run the tasks and wait for them until `deadline` (time.monotonic)."""
        request = _Request(len(tasks), deadline)
        with self._changed:
            if self._closed:
                raise Overloaded("the server is shutting down; try again")
            self._queue.extend(_Entry(request, index, task) for index, task in enumerate(tasks))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="cconv-compute", daemon=True)
                self._thread.start()
                self._watchdog = threading.Thread(target=self._watch, name="cconv-watchdog", daemon=True)
                self._watchdog.start()
            self._changed.notify()
        if not request.finished.wait(max(0.0, deadline - time.monotonic())):
            self._abandon(request)
        if request.error is not None:
            for task, result in zip(tasks, request.results, strict=True):
                if result is not None:
                    self._discard(task)
            raise request.error
        return request.results

    def alive(self) -> bool:
        return not self._closed and (self._thread is None or self._thread.is_alive())

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs, refuse what comes, and wait for the threads."""
        self._refuse()
        for thread in (self._thread, self._watchdog):
            if thread is not None:
                thread.join(timeout_s)

    def lose(self, error: DeviceLost) -> None:
        """The GPU has failed: this process can compute nothing any more."""
        log.critical("the GPU failed; this process ends", exc_info=error)
        self._refuse()
        self.on_lost()

    def _refuse(self) -> None:
        """Nothing is computed any more: neither what waits nor what comes."""
        with self._changed:
            self._closed = True
            self._ended.set()
            self._cancel.set()
            for entry in self._queue:
                entry.request.fail(Overloaded("the server is shutting down; try again"))
            self._queue.clear()
            self._changed.notify()

    def _abandon(self, request: _Request) -> None:
        """Take a request whose time ran out from the queue; stop the run if nobody waits for it any more."""
        with self._changed:
            if request.finished.is_set():
                return
            error = DeadlineExceeded("the deadline passed before the answer was ready; nothing was billed")
            began = any(entry.request is request for entry in self._running)
            error.computed = began or any(result is not None for result in request.results)
            request.fail(error)
            self._queue = deque(entry for entry in self._queue if entry.request is not request)
            if self._running and all(entry.request.error is not None for entry in self._running):
                self._cancel.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._watchdog_s / 4)):
            if reason := self._trouble():
                self._on_stuck(reason)
                return

    def _trouble(self) -> str:
        """Why the compute thread is of no use any more, if that is so."""
        with self._changed:
            if not self._closed and not self._thread.is_alive():
                return "the compute thread has ended"
            last = max((entry.request.deadline for entry in self._running), default=float("inf"))
            if last + self._watchdog_s < time.monotonic():
                label = self._running[0].task.label
                return f"a run of {label} has not ended {self._watchdog_s:g} s after its deadline"
        return ""

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._execute(batch)
            del batch  # an idle thread holds no images

    def _next(self) -> list[_Entry] | None:
        """What to run now, once there is something; None at the end."""
        with self._changed:
            self._running = []
            while not (self._closed or self._running):
                if not self._queue:
                    self._changed.wait()
                self._running = self._take()
            self._cancel.clear()
            return None if self._closed else self._running

    def _take(self) -> list[_Entry]:
        """The oldest task, and the others that wait with the same key; those whose deadline has passed are dropped."""
        now = time.monotonic()
        batch: list[_Entry] = []
        rest: deque[_Entry] = deque()
        images = 0
        for entry in self._queue:
            head = batch[0].task if batch else None
            if entry.request.deadline <= now:
                entry.request.fail(DeadlineExceeded("the deadline passed in the queue; nothing was computed"))
            elif entry.request.error is not None:
                continue  # a sibling failed, so this one is not wanted
            elif head is None:
                batch.append(entry)
                images = entry.task.count
            elif head.key is not None and entry.task.key == head.key and images + entry.task.count <= self._max_batch:
                batch.append(entry)
                images += entry.task.count
            else:
                rest.append(entry)
        self._queue = rest
        return batch

    def _execute(self, batch: list[_Entry]) -> None:
        started = time.monotonic()
        task = batch[0].task
        try:
            images = task.images if len(batch) == 1 else np.concatenate([entry.task.images for entry in batch])
            maps = task.run(images, self._cancel)
        except MemoryError:
            self._fail(batch, Overloaded("the server has no memory left for this request; try again"))
            return
        except DeviceLost as error:
            self.lose(error)
            self._fail(batch, error)
            return
        except Exception as error:
            self._fail(batch, error)
            return
        seconds = time.monotonic() - started
        self._metrics.ran(task.label, task.version, sum(entry.task.count for entry in batch), seconds)
        first = 0
        for entry in batch:
            part = maps
            if len(batch) > 1:
                last = first + entry.task.count
                part = {name: array[first:last] for name, array in maps.items()}
                first = last
            queue_s = started - entry.request.submitted
            self._metrics.queue_seconds.observe(queue_s)
            if entry.request.error is None:
                entry.request.put(entry.index, Result(part, queue_s, seconds))
            else:
                self._discard(entry.task)

    def _fail(self, batch: list[_Entry], error: Exception) -> None:
        for entry in batch:
            if not isinstance(error, InvalidRequest):  # which the library raises before it computes
                self._discard(entry.task)
            entry.request.fail(error)

    def _discard(self, task: Task) -> None:
        self._metrics.discarded(task.label, task.device, task.quote.flops)
