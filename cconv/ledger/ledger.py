"""Ledger: the ledger itself, the door to everything in this package.

In: a URL, then events, keys and questions.  Out: receipts that are on the disk, reservations, totals, rows.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import ArgumentError
from .database import Database
from .errors import (
    EventConflict,
    EventError,
    LedgerClosed,
    LedgerDoubtful,
    LedgerError,
    LedgerRefused,
    LedgerUnavailable,
)
from .event import Event, Receipt, check_text
from .keys import Held, Reservation, find_all, record_all
from .query import Audit, Recompute, Selection, Total, each_event, each_total
from .rows import append_all, append_groups, probe_all
from .spool import Spool
from .writer import MOST_IN_GROUP, Writer

log = logging.getLogger(__name__)
#: How often a spool looks for what dead processes left, and how long it leaves a database that fails alone.
ADOPT_S, PAUSE_S = 5.0, 0.5
#: Between two attempts to learn whether an event is recorded.
SETTLE_PAUSE_S = 0.1
#: How long a spool waits for more events, so that one transaction takes them all, and requests have the cores.
GATHER_S = 0.5


class Ledger:
    """A ledger in SQLite or PostgreSQL. It may be used by many threads; a forked child opens its own.

    Nothing is opened before the first use, so a database that is down at the start is like one that goes down later:
    LedgerUnavailable, until it is back.

    Parameters
    ----------
    url : str
        `sqlite:////absolute/path.db`, `sqlite:///relative.db` or `postgresql://user@host/name`, after `migrate(url)`.
    spool : path, optional
        The lenient mode: `append` returns when the event is in a file of this folder, from where it goes to the
        database. A killed process loses nothing, a machine without power may lose the last seconds. None: the strict
        mode.
    spool_bytes : int
        What may wait for the database, of each process that shares the folder; beyond that events are refused.
    timeout_s : float
        Longest wait for a call's turn. A commit that has begun is waited for twice as long again before it is doubtful.
    replays : int
        How often a request may be computed again under its idempotency key.

    Examples
    --------
    >>> import tempfile
    >>> from cconv import ledger
    >>> folder = tempfile.TemporaryDirectory()
    >>> url = f"sqlite:///{folder.name}/usage.db"
    >>> ledger.migrate(url)
    >>> with ledger.Ledger(url) as book:
    ...     receipt = book.append(
    ...         ledger.Event(account="anna", model="vgg16", shapes=[1, 3, 9, 9], macs=7, flops=14, flops_other=1)
    ...     )
    ...     [(total.model, total.flops) for total in book.totals(by=("model",))]
    [('vgg16', 14)]
    >>> folder.cleanup()
    """

    def __init__(
        self,
        url: str,
        *,
        spool: str | Path | None = None,
        spool_bytes: int = 256 << 20,
        timeout_s: float = 5.0,
        replays: int = 3,
    ):
        if not timeout_s > 0 or replays < 0 or spool_bytes < 1:
            raise ArgumentError("ledger: expected timeout_s > 0, replays >= 0 and spool_bytes >= 1")
        # A little less, so that the database's own refusal, which is certain, comes first.
        self._database = Database(url, 0.8 * timeout_s)
        self._timeout_s, self._replays = timeout_s, replays
        self._writer = Writer(self._database)
        self._spool = None if spool is None else Spool(Path(spool).absolute(), spool_bytes)
        self._held = Held()
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._drainer: threading.Thread | None = None
        if self._spool is not None:
            self._start_draining()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, event: Event, *, settle_s: float = 0.0) -> Receipt:
        """Record an event; when this returns it is durable, in the lenient mode in the spool.

        The same event may be appended again: it stays one. Of several events with one id, or with one idempotency key
        of an account, the first is recorded, and the receipts of the others say `duplicate` and show it; the lenient
        mode finds that out too late to say it.

        Parameters
        ----------
        settle_s : float
            Where it is doubtful whether the event is recorded, append it again for so long, until it certainly is.

        Raises
        ------
        EventConflict
            The id is recorded with another bill.
        LedgerUnavailable, LedgerDoubtful
            It is not recorded; in the second case it may be.
        """
        self._writer.check_process()
        if self._spool is None:
            return self._settle(append_all, event, settle_s)
        with self._lock:
            if self._closing.is_set():
                raise LedgerClosed("ledger: it is closed")
            self._spool.append(event)
        self._wanted.set()
        return Receipt(event, False)

    def reserve(self, account: str, key: str, fingerprint: str) -> Reservation:
        """The right to compute the request of an idempotency key: the first time, or again.

        Afterwards `record` it, or `release` it if nothing came of it. The right ends with the process. Where several
        processes serve one account, requests that they compute at the same moment are billed once all the same.

        Parameters
        ----------
        fingerprint : str
            A digest of all that makes the request what it is.

        Raises
        ------
        KeyReused
            The key came with another fingerprint before.
        KeyInProgress
            Someone computes it.
        KeyExhausted
            It has been answered again as often as it may be.
        LedgerUnavailable
        """
        for name, value in (("account", account), ("key", key), ("fingerprint", fingerprint)):
            check_text(name, value)
            if not value:
                raise EventError(f"{name}: expected a text, got an empty one")
        self._writer.check_process()
        mine = Reservation(account, key, fingerprint)
        self._held.take(mine)
        try:
            return self._submit(find_all, (mine, self._replays))
        except BaseException:
            self._held.give(mine)
            raise

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back that came to nothing: the key is as it was before."""
        self._held.give(reservation)

    def record(self, reservation: Reservation, event: Event, *, settle_s: float = 0.0) -> Receipt | None:
        """Append a reserved request's event under its key; None for a replay, which is billed already and counted.

        In the lenient mode too it is in the database when this returns. The receipt is a `duplicate` if another process
        has billed the same request meanwhile. `settle_s` is as `append` has it.

        Raises
        ------
        KeyReused
            Another process has billed another request under this key meanwhile.
        EventConflict, LedgerUnavailable, LedgerDoubtful
            As of `append`.
        """
        event = replace(event, account=reservation.account, idempotency_key=reservation.key)
        receipt = self._settle(record_all, (reservation, event), settle_s)
        self._held.give(reservation)
        return receipt

    def require(self) -> None:
        """LedgerUnavailable if `append` would refuse at once; asks nobody, so that work may be refused beforehand."""
        self._writer.check_process()
        if self._spool is None:
            self._writer.require()
            return
        if not self._drainer.is_alive():
            raise LedgerClosed("ledger: nobody empties the spool")
        self._spool.require()

    def check(self) -> None:
        """Write something that is no event to where events go, as a test; LedgerUnavailable if that fails."""
        if self._spool is None:
            self._submit(probe_all, None)
        else:
            self.require()
            self._spool.check()

    def totals(
        self,
        by: Sequence[str] = ("day", "model", "account"),
        *,
        account: str | None = None,
        model: str | None = None,
        since_us: int = 0,
        until_us: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Total]:
        """Exact sums of the events of since_us <= at < until_us, by day (UTC), model and account, or some of these.

        LedgerTimeout if that takes longer than `timeout_s`.
        """
        self._writer.check_process()
        return each_total(self._database, by, Selection(account, model, since_us, until_us, timeout_s))

    def events(
        self,
        *,
        account: str | None = None,
        model: str | None = None,
        since_us: int = 0,
        until_us: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Event]:
        """Events in the order of their time; a page of them is in memory. LedgerTimeout as of `totals`."""
        self._writer.check_process()
        return each_event(self._database, Selection(account, model, since_us, until_us, timeout_s))

    def audit(self, recompute: Recompute, *, since_us: int = 0, until_us: int | None = None) -> Audit:
        """Every bill against `recompute(event)`, (macs, flops, flops_other) from what the event says of its shapes."""
        return Audit(self.events(since_us=since_us, until_us=until_us), recompute)

    def waiting_bytes(self) -> int:
        """What the spool holds that the database has not."""
        return 0 if self._spool is None else self._spool.waiting_bytes()

    def lag_s(self) -> float:
        """How long the oldest event of the spool that the database has not got has been waiting for it; 0 if none."""
        return 0.0 if self._spool is None else self._spool.lag_s()

    def refused_lines(self) -> int:
        """Lines of the spool that no ledger takes, since the start; they are in its refused.txt."""
        return 0 if self._spool is None else self._spool.refused

    def close(self, timeout_s: float = 10.0) -> bool:
        """Record what waits and take no more; whether all of it was done in time. A spool keeps what was not."""
        self._writer.check_process()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closing.set()
        self._wanted.set()
        if self._drainer is not None:
            self._drainer.join(timeout_s)
        done = self._writer.close(max(0.1, deadline - time.monotonic()))
        if self._drainer is not None:
            self._drainer.join(1.0)  # the writer is closed: nothing holds it up any more
            done = done and not self._spool.waiting_bytes()
            if not self._drainer.is_alive():
                self._spool.close()
        return done

    def _submit(self, function: Callable, argument):
        return self._writer.submit(function, argument, self._timeout_s)

    def _settle(self, function: Callable, argument, settle_s: float):
        """Submit it; after a doubtful answer again and again, as only an answer says whether it is recorded."""
        until = time.monotonic() + settle_s
        doubt: LedgerDoubtful | None = None
        try:
            while True:
                try:
                    return self._submit(function, argument)
                except LedgerUnavailable as error:
                    doubt = error if isinstance(error, LedgerDoubtful) else doubt
                    if doubt is None:
                        raise
                    if time.monotonic() >= until or isinstance(error, LedgerClosed):
                        raise doubt from None
                time.sleep(SETTLE_PAUSE_S)
        finally:
            del doubt  # whose traceback has this frame, and those of callers with their images

    def _start_draining(self) -> None:
        self._drainer = threading.Thread(target=self._drain, name="cconv-ledger-spool", daemon=True)
        self._drainer.start()

    def _drain(self) -> None:
        adopted = float("-inf")
        while True:
            closing = self._closing.is_set()
            self._wanted.clear()
            try:
                if not closing and time.monotonic() - adopted > ADOPT_S:
                    adopted = time.monotonic()
                    self._spool.adopt()
                self._drain_once()
            except LedgerClosed:
                return
            except LedgerUnavailable as error:
                log.warning("the spool waits: %s", error)
                self._closing.wait(PAUSE_S)
                if not closing:
                    continue
            except Exception:  # a thread that ended would lose no bill, but leave all of them waiting
                log.exception("the spool cannot be emptied")
                self._closing.wait(PAUSE_S)
            if closing:
                return
            if self._wanted.wait(PAUSE_S if self._spool.failed() else ADOPT_S):
                self._closing.wait(GATHER_S)

    def _drain_once(self) -> None:
        try:
            for group in self._spool.groups(MOST_IN_GROUP):
                self._drain_group(group)
        finally:
            self._spool.sync()
            if self._spool.failed():  # nobody appends while `require` refuses
                with suppress(LedgerUnavailable):
                    self._spool.check()

    def _drain_group(self, group: Sequence[Event]) -> None:
        """Record all of a group; what no ledger takes goes to a file for people."""
        try:
            results = self._submit(append_groups, group)
        except (EventError, LedgerRefused):
            results = [self._drain_one(event) for event in group]
        for event, result in zip(group, results, strict=True):
            if isinstance(result, LedgerError):
                self._spool.refuse(event.line(), str(result))

    def _drain_one(self, event: Event) -> Receipt | LedgerError:
        try:
            return self._submit(append_all, event)
        except (EventError, EventConflict, LedgerRefused) as error:
            return error
