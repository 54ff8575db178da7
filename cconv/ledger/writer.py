"""Writer: the one thread that changes a ledger. What waits while a commit runs shares the next one, and its fsync.

In: a function of a connection and a list of arguments, and one argument.  Out: that function's result for it, durable;
or the error that kept it from being so. A function may be run twice, when nobody knows whether the first time counts.

After a failure everything is refused at once, until the thread, which tries from time to time, has written something.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from .database import Database, concerns_one, is_conflict, unavailable
from .errors import LedgerClosed, LedgerDoubtful, LedgerError, LedgerForked, LedgerRefused, LedgerUnavailable
from .rows import probe_all

log = logging.getLogger(__name__)
MOST_IN_GROUP = 256
MOST_WAITING = 10_000
MOST_CONFLICTS = 3
#: Between two attempts to write again: the first pause, and the longest.
RETRY_S = (0.05, 1.0)
#: A transaction waits for a lock at its begin and at its commit, each time less than a caller's timeout.
CERTAIN = 2


class _Task:
    """What one caller waits for: a Future would wake it through two locks more, at every request."""

    __slots__ = ("_error", "_result", "_settled", "argument", "function")

    def __init__(self, function: Callable[..., Sequence], argument):
        self.function, self.argument = function, argument
        self._result, self._error = None, None
        self._settled = threading.Lock()
        self._settled.acquire()

    def settle(self, result) -> None:
        self._result = result
        self._settled.release()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._settled.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is settled within so many seconds; its one caller asks no more once it is."""
        return self._settled.acquire(timeout=timeout_s)

    def result(self):
        """Of a settled one, once: an error that stayed here would hold, by its traceback, all that its caller has."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error


class Writer:
    """Starts its thread with the first task, and opens its connection there."""

    def __init__(self, database: Database):
        self._database = database
        #: Held for whatever follows.
        self._lock = threading.Lock()
        #: Open when the thread has to look; a Condition would wake it through two locks more, at every request.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._queue: deque[_Task] = deque()
        self._fault: LedgerUnavailable | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._connection: sa.engine.Connection | None = None
        self._pid = os.getpid()
        #: Groups committed and tasks in them, since the start.
        self.groups = self.tasks = 0

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LedgerForked("ledger: it was opened by this process's parent; open one here")

    def require(self) -> None:
        """The error of the last attempt, if that is why everything is refused now."""
        self.check_process()
        fault = self._fault
        if fault is not None:
            raise type(fault)(str(fault))

    def submit(self, function, argument, timeout_s: float):
        """Run it in the next transaction and wait until that is on the disk.

        It waits `timeout_s` for its turn. What has had its turn is waited for CERTAIN times as long again, as the
        database refuses in that time what it cannot do; only one that hangs makes it LedgerDoubtful.
        """
        self.check_process()
        task = _Task(function, argument)
        with self._lock:
            if self._closed:
                raise LedgerClosed("ledger: it is closed")
            if self._fault is not None:
                raise type(self._fault)(str(self._fault))
            if len(self._queue) >= MOST_WAITING:
                raise LedgerUnavailable(f"ledger: {MOST_WAITING} others wait; nothing was recorded")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="cconv-ledger", daemon=True)
                thread.start()  # first, as it may fail
                self._thread = thread
            self._queue.append(task)
            self._ring()
        if not task.wait(timeout_s):
            with self._lock:
                if task in self._queue:
                    self._queue.remove(task)
                    raise LedgerUnavailable(f"ledger: no turn in {timeout_s} s; nothing was recorded")
                settled = task.wait(0)
                if not settled:
                    # The next ones need not wait as long to learn it; the thread takes this back once it has written.
                    # (With nothing left to do it would sleep, wait for tasks that are all refused, and never wake.)
                    self._fault = self._fault or LedgerUnavailable(f"ledger: no answer in {timeout_s} s")
            if not settled and not task.wait(CERTAIN * timeout_s):
                raise LedgerDoubtful(f"ledger: no answer in {(1 + CERTAIN) * timeout_s} s; it may be recorded")
        return task.result()

    def close(self, timeout_s: float) -> bool:
        """Take no more, finish what waits; whether that was done in time."""
        self.check_process()
        with self._lock:
            self._closed = True
            self._ring()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        pause, longest = RETRY_S
        while (group := self._take(pause)) is not None:
            if group:  # even if one of its callers has just run out of patience, and said so
                self._commit(group)
                pause = RETRY_S[0]
            elif self._recovers():
                log.warning("the ledger works again")
                with self._lock:
                    self._fault = None
            else:
                pause = min(2 * pause, longest)
        self._refuse_waiting(LedgerClosed("ledger: it is closed; nothing was recorded"))
        self._disconnect()

    def _ring(self) -> None:
        """Have the thread look; the lock is held, so that nobody else opens the bell."""
        if self._bell.locked():
            self._bell.release()

    def _take(self, pause_s: float) -> list[_Task] | None:
        """The next group; an empty one when it is time to try again; None at the end."""
        while True:
            with self._lock:  # for the fault too: who has just given up sets it, and rings no bell
                if self._fault is not None:
                    break
                if self._queue or self._closed:
                    return [self._queue.popleft() for _ in range(min(MOST_IN_GROUP, len(self._queue)))] or None
            self._bell.acquire()
        end = time.monotonic() + pause_s
        while not self._closed and (left := end - time.monotonic()) > 0:
            self._bell.acquire(timeout=left)
        return None if self._closed else []

    def _recovers(self) -> bool:
        try:
            self._transact([_Task(probe_all, None)])
        except Exception as error:
            self._fault = _as_unavailable(error)
            return False
        return True

    def _commit(self, group: list[_Task]) -> None:
        """Settle every task of the group."""
        try:
            results = self._transact(group)
        except Exception as error:
            if concerns_one(error) and len(group) > 1:
                for task in group:
                    self._commit_or_refuse(task)
            elif concerns_one(error):
                log.error("the ledger refused an operation", exc_info=error)
                group[0].fail(_refusal(error))
            else:
                self._fail(group, _as_unavailable(error))
            return
        for task in group:
            self._settle(task, results[task])

    def _commit_or_refuse(self, task: _Task) -> None:
        if self._fault is None:
            self._commit([task])
        else:
            task.fail(type(self._fault)(str(self._fault)))

    @staticmethod
    def _settle(task: _Task, result) -> None:
        if isinstance(result, LedgerError):
            task.fail(result)
        else:
            task.settle(result)

    def _fail(self, group: list[_Task], error: LedgerUnavailable) -> None:
        """Refuse the group, what waits behind it and what comes; nobody's request thread is held up by a dead disk."""
        certain = LedgerUnavailable(str(error)) if isinstance(error, LedgerDoubtful) else error
        log.error("the ledger fails and refuses everything: %s", error)
        with self._lock:
            self._fault = certain
        self._refuse_waiting(certain)
        for task in group:
            task.fail(type(error)(str(error)))

    def _refuse_waiting(self, error: LedgerUnavailable) -> None:
        with self._lock:
            waiting = list(self._queue)
            self._queue.clear()
        for task in waiting:
            task.fail(type(error)(str(error)))

    def _transact(self, group: list[_Task]) -> dict[_Task, object]:
        """All of it in one durable transaction, or an error.

        A connection that died meanwhile is replaced, once; what stood in another transaction's way goes again.
        """
        again, conflicts = self._connection is not None, MOST_CONFLICTS
        doubtful = False
        while True:
            committing = False
            try:
                if self._connection is None:
                    self._connection = self._database.open_writer()
                transaction = self._connection.begin()
                results = _results(self._connection, group)
                committing = True
                transaction.commit()
            except Exception as error:
                self._abandon(error)
                doubtful = doubtful or (committing and not concerns_one(error))
                if again and _lost_connection(error):
                    again = False
                    continue
                if conflicts and is_conflict(error):
                    conflicts -= 1
                    continue
                if doubtful:
                    raise unavailable(error, LedgerDoubtful) from error
                raise
            self.groups += 1
            self.tasks += len(group)
            return results

    def _abandon(self, error: Exception) -> None:
        """Roll back; after anything but a conflict of rows the connection goes too, and what it had not written."""
        if self._connection is None:
            return
        try:
            self._connection.rollback()
        except Exception:
            self._disconnect()
        if not concerns_one(error):
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception:  # it is lost either way
                connection.invalidate()


def _results(connection, group: list[_Task]) -> dict[_Task, object]:
    """Each function once, for all of its tasks."""
    by_function: dict[Callable, list[_Task]] = {}
    for task in group:
        by_function.setdefault(task.function, []).append(task)
    results = {}
    for function, tasks in by_function.items():
        results |= zip(tasks, function(connection, [task.argument for task in tasks]), strict=True)
    return results


def _lost_connection(error: Exception) -> bool:
    return isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated


def _refusal(error: Exception) -> LedgerError:
    """Of one task, by itself: what would fail again, or a conflict that may be over the next time."""
    return unavailable(error) if is_conflict(error) else LedgerRefused(str(unavailable(error)))


def _as_unavailable(error: Exception) -> LedgerUnavailable:
    return error if isinstance(error, LedgerUnavailable) else unavailable(error)
