"""Scheduler: a queue in front of the lanes that compute.

In: a request's tasks and its deadline.  Out: each task's maps, how long it waited and how long its run took; or
DeadlineExceeded, or what the run raised.

A CPU has a lane for every core, a GPU one. A run has its share of the cores: alone all of them, beside others one
thread, which gives more in total. Tasks with equal keys that wait at the same moment run as one batch where that was
seen to gain (pace.py); nothing waits for company. A short task that finds a lane free runs in the thread that asks for
it, which spares two hand-overs. No byte of an answer depends on any of this. Only admitted requests come here, so the
queue is bounded by admission.py: in requests, in FLOPs and in bytes.

A run whose last waiter has gone is cancelled, and looks at that between its steps. One that does not stop holds up
everybody: a watchdog ends the process then, and gunicorn starts another.

    request threads --run()--> [ queue ] --> a lane --> one run(images, cancel) --> split --> request threads
                       \\__ short, and nobody waits: the same run, here __/
"""

import faulthandler
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from .engine import Task, cancel_flag, cores, limit_threads
from .errors import CLOSING, NO_MEMORY, SHUTTING_DOWN, DeadlineExceeded, DeviceLost, InvalidRequest, Overloaded
from .lanes import Lanes
from .metrics import Metrics
from .pace import Pace

log = logging.getLogger(__name__)
#: Exit code of a process one of whose runs hangs: EX_SOFTWARE.
STUCK = 70
#: Estimated seconds of a core of a task that the thread runs itself which asks for it.
SHORT_S = 0.002
#: Of a deadline, how many times the estimate must be left for that: nobody else looks at the clock meanwhile.
SPARE = 10
#: Niceness of the threads that compute on the CPU: a tenth of a processor's time where another thread wants it too.
NICE = 10
#: Why this process is of no use any more.
GPU_FAILED, THREAD_ENDED = "the GPU failed", "a compute thread has ended"


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

    def __init__(self, tasks: Sequence[Task], deadline: float):
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.tasks = tasks
        self.results: list[Result | None] = [None] * len(tasks)
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self._left = len(tasks)

    def put(self, index: int, result: Result) -> None:
        self.results[index] = result
        self._left -= 1
        if not self._left:
            self.finished.set()


@dataclass(eq=False)
class _Entry:
    request: _Request
    index: int

    @property
    def task(self) -> Task:
        return self.request.tasks[self.index]


def _kind(task: Task) -> Hashable:
    """What tasks have in common that take their time alike. (A key would keep its model in memory.)"""
    return (task.label, task.device) if task.key is None else hash(task.key)


@dataclass(eq=False)
class _Run:
    """Tasks that are computed together, from when they leave the queue until each is answered."""

    device: str
    entries: list[_Entry]
    threads: int
    cancel: object = field(default_factory=cancel_flag)

    def compute(self) -> dict[str, np.ndarray]:
        tasks = [entry.task for entry in self.entries]
        images = tasks[0].images if len(tasks) == 1 else np.concatenate([task.images for task in tasks])
        with limit_threads(self.threads):
            return tasks[0].run(images, self.cancel)


class Scheduler:
    """Owns the queue and the lanes, whose threads start with the first tasks: in the worker, never before a fork.

    Parameters
    ----------
    watchdog_s : float
        How long a run may go on after its last deadline.
    on_stuck : function (reason)
        Called once when it has.
    lanes : int
        Runs on the CPU at a time; 0 is one for every core.
    """

    def __init__(
        self,
        metrics: Metrics,
        max_batch: int,
        watchdog_s: float = 120.0,
        on_stuck: Callable[[str], None] = end_process,
        lanes: int = 0,
    ):
        self._watchdog_s, self._on_stuck = watchdog_s, on_stuck
        self._metrics, self._max_batch = metrics, max_batch
        #: Held for whatever follows; a request's end and its discarded work are one change.
        self._lock = threading.Lock()
        self._queues: dict[str, deque[_Entry]] = {"cpu": deque(), "cuda": deque()}
        self._lanes = {
            device: Lanes(device, most, self._lock, lambda device=device: self._take(device), self._compute, nice)
            for device, most, nice in (("cpu", lanes or cores(), NICE), ("cuda", 1, 0))
        }
        self._runs: set[_Run] = set()
        self._drained = threading.Condition(self._lock)
        self._pace = Pace()
        self._closed = self._lost = False
        self._ended = threading.Event()
        self._watchdog: threading.Thread | None = None
        #: Called when this process can compute nothing any more.
        self.on_lost: Callable[[], None] = lambda: None

    def run(self, tasks: Sequence[Task], deadline: float) -> list[Result]:
        """Run the tasks and wait for them until `deadline` (time.monotonic)."""
        request = _Request(tasks, deadline)
        if (short := self._submit(request)) is not None:
            self._compute(short)
        elif not request.finished.wait(max(0.0, deadline - time.monotonic())):
            self._abandon(request)
        try:
            if request.error is not None:
                raise request.error
            return request.results
        finally:
            del request  # whose error's traceback has this frame: images would wait for the collector of cycles

    def refusal(self) -> str:
        """Why no work can be taken any more; "" while it can."""
        if self._lost:
            return GPU_FAILED
        if self._closed:
            return SHUTTING_DOWN
        return "" if all(lanes.alive for lanes in self._lanes.values()) else THREAD_ENDED

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs, refuse what comes, and wait for all threads that compute."""
        self._refuse(*self._lanes)
        self._ended.set()  # not before: what goes on after a GPU has failed can hang as well
        with self._lock:
            self._drained.wait_for(lambda: not self._runs, timeout_s)
        for lanes in self._lanes.values():
            lanes.join(timeout_s)
        if self._watchdog is not None:
            self._watchdog.join(timeout_s)

    def lose(self, error: DeviceLost) -> None:
        """The GPU has failed, and this process must end: what the CPU computes is finished, nothing else begun.

        A request with tasks that wait is refused, and what only it wants called off."""
        with self._lock:
            before, self._lost = self._lost, True
        if not before:
            log.critical("the GPU failed; this process ends", exc_info=error)
            self._refuse("cuda")
            self.on_lost()

    def _refuse(self, *called_off: str) -> None:
        """Nothing is begun any more, neither what waits nor what comes; what runs on these devices is called off."""
        with self._lock:
            self._closed = True
            for request in {entry.request for queue in self._queues.values() for entry in queue}:
                self._fail(request, Overloaded(CLOSING))
            for run in self._runs:
                if run.device in called_off:
                    run.cancel.set()
            for lanes in self._lanes.values():
                lanes.close()

    # ------------------------------------------------------------------------------------------- what to run, and where

    def _submit(self, request: _Request) -> _Run | None:
        """Queue the tasks; or begin the only one here, which its caller computes."""
        entries = [_Entry(request, index) for index in range(len(request.tasks))]
        with self._lock:
            if self._closed:
                raise Overloaded(CLOSING)
            if self._watchdog is None:
                watchdog = threading.Thread(target=self._watch, name="cconv-watchdog", daemon=True)
                watchdog.start()  # first, as it may fail
                self._watchdog = watchdog
            if len(entries) == 1 and self._is_short(request):
                return self._begin("cpu", entries)
            for device, queue in self._queues.items():
                if mine := [entry for entry in entries if entry.task.device == device]:
                    self._lanes[device].call(len(queue) + len(mine))  # first, as it may fail
                    queue.extend(mine)
        return None

    def _is_short(self, request: _Request) -> bool:
        """Whether a request's only task is done as soon as it could have been handed to a lane, and one is free."""
        task = request.tasks[0]
        if task.device != "cpu" or self._queues["cpu"] or self._running("cpu") >= self._lanes["cpu"].most:
            return False
        seconds = self._pace.estimate(_kind(task), task.quote.flops)
        return seconds < SHORT_S and request.submitted + SPARE * seconds < request.deadline

    def _running(self, device: str) -> int:
        return sum(run.device == device for run in self._runs)

    def _begin(self, device: str, entries: list[_Entry]) -> _Run:
        """A run with its share of the cores, rounded up, among those that run and those that begin now.

        Who began with more keeps it; but one caller at a time has the library's team, the others are one thread each.
        """
        running, lanes = self._running(device), self._lanes[device].most
        sharing = max(running + 1, min(running + 1 + len(self._queues[device]), lanes))
        run = _Run(device, entries, ceil(cores() / sharing))
        self._runs.add(run)
        return run

    def _take(self, device: str) -> _Run | None:
        """The oldest task that waits, and others with the same key; those whose deadline has passed are dropped."""
        now = time.monotonic()
        for late in {entry.request for entry in self._queues[device] if entry.request.deadline <= now}:
            self._expire(late)
        if not self._queues[device]:
            return None
        head = self._queues[device].popleft()
        entries = [head, *self._company(device, head.task)]
        taken = set(entries)
        self._queues[device] = deque(entry for entry in self._queues[device] if entry not in taken)
        return self._begin(device, entries)

    def _company(self, device: str, head: Task) -> list[_Entry]:
        """Who runs along, of those that wait with the same key: with several lanes no more than each one's share."""
        same = [entry for entry in self._queues[device] if head.key is not None and entry.task.key == head.key]
        most, lanes = self._max_batch, self._lanes[device].most
        if same and lanes > 1:
            free = max(1, lanes - self._running(device))
            most = min(most, ceil((head.count + sum(entry.task.count for entry in same)) / free))
            same = same[: int(min(len(same), self._pace.company(_kind(head))))]
        company, room = [], most - head.count
        for entry in same:
            if entry.task.count <= room:
                company.append(entry)
                room -= entry.task.count
        return company

    # ----------------------------------------------------------------------------------------------- a run, and its end

    def _compute(self, run: _Run) -> None:
        """Compute a run and tell who waits for it."""
        try:
            self._attempt(run)
        finally:
            with self._lock:
                self._runs.discard(run)
                self._drained.notify_all()
            # An idle lane keeps its last run, and so does the traceback of its error: no images here.
            run.entries.clear()

    def _attempt(self, run: _Run) -> None:
        task, began, used = run.entries[0].task, time.monotonic(), time.thread_time()
        try:
            maps = run.compute()
        except Exception as error:
            self._fail_all(run, self._translated(error))
            return
        used, seconds = time.thread_time() - used, time.monotonic() - began
        flops = sum(entry.task.quote.flops for entry in run.entries)
        # Of a run of one thread without what it waited for the GIL and the processor, which a batch does less often.
        cores_s = used if run.threads == 1 else seconds * run.threads
        with self._lock:
            self._pace.learn(_kind(task), flops, cores_s, together=len(run.entries) > 1)
        self._metrics.ran(task.label, task.version, sum(entry.task.count for entry in run.entries), seconds)
        first = 0
        for entry in run.entries:
            part, last = maps, first + entry.task.count
            if len(run.entries) > 1:
                part = {name: array[first:last] for name, array in maps.items()}
            first = last
            self._answer(entry, Result(part, began - entry.request.submitted, seconds))

    def _translated(self, error: Exception) -> Exception:
        """What a request is told where a run raised this."""
        if isinstance(error, DeviceLost):
            self.lose(error)
        elif isinstance(error, MemoryError):
            return Overloaded(NO_MEMORY)
        elif isinstance(error, DeadlineExceeded) and self._closed:
            return Overloaded(CLOSING)  # what somebody waits for is cancelled by nobody else
        return error

    def _answer(self, entry: _Entry, result: Result) -> None:
        self._metrics.queue_seconds.observe(result.queue_s)
        request = entry.request
        with self._lock:
            if request.error is None and request.deadline <= time.monotonic():
                self._expire(request)
            if request.error is None:
                request.put(entry.index, result)
            else:
                self._discard(entry.task)

    def _fail_all(self, run: _Run, error: Exception) -> None:
        with self._lock:
            for entry in run.entries:
                if not isinstance(error, InvalidRequest):  # which the library raises before it computes
                    self._discard(entry.task)
                self._fail(entry.request, error)

    # -------------------------------------------------------------------------------- a request's end; the lock is held

    def _fail(self, request: _Request, error: Exception) -> None:
        """End a request, once: what it has is discarded, what waits dropped, what nobody else wants cancelled."""
        if request.error is not None:
            return
        request.error = error
        for task, result in zip(request.tasks, request.results, strict=True):
            if result is not None:
                self._discard(task)
        request.results = []
        for device, queue in self._queues.items():
            self._queues[device] = deque(entry for entry in queue if entry.request is not request)
        for run in self._runs:
            if all(entry.request.error is not None for entry in run.entries):
                run.cancel.set()
        request.finished.set()

    def _expire(self, request: _Request) -> None:
        error = DeadlineExceeded("the deadline passed before the answer was ready; nothing was billed")
        error.computed = any(request.results) or any(
            entry.request is request for run in self._runs for entry in run.entries
        )
        self._fail(request, error)

    def _discard(self, task: Task) -> None:
        self._metrics.discarded(task.label, task.device, task.quote.flops)

    # -------------------------------------------------------------------------------------------------------- the clock

    def _abandon(self, request: _Request) -> None:
        """Its time ran out."""
        with self._lock:
            if not request.finished.is_set():
                self._expire(request)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._watchdog_s / 4)):
            with self._lock:
                reason = self._trouble()
            if reason:
                self._on_stuck(reason)
                return

    def _trouble(self) -> str:
        """Why this process is of no use any more, if that is so. Runs whose time is over are called off."""
        now = time.monotonic()
        if not all(lanes.alive for lanes in self._lanes.values()):
            return THREAD_ENDED
        for run in self._runs:
            for request in [entry.request for entry in run.entries]:
                if request.deadline < now and not request.finished.is_set():
                    self._expire(request)  # of a short run, whose request computes and looks at no clock
            last = max((entry.request.deadline for entry in run.entries), default=now)
            if last + self._watchdog_s < now:
                label = run.entries[0].task.label
                return f"a run of {label} has not ended {self._watchdog_s:g} s after its deadline"
        return ""
