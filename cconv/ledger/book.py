"""Book: the ledger itself, the door to everything in this package.

In: a URL, then events, keys and questions.  Out: receipts that are on the disk, reservations, totals, rows.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ArgumentError
from .database import Database
from .errors import EventConflict, EventError, LedgerClosed, LedgerError, LedgerUnavailable
from .event import LONGEST_TEXT, Event, Receipt
from .keys import Reservation, Wish, release_all, reserve_all
from .query import Audit, Recompute, Selection, Total, each_event, each_total
from .rows import append_all, append_groups, probe_all
from .spool import Spool
from .writer import MOST_IN_GROUP, Writer

log = logging.getLogger(__name__)
#: How often a spool looks for what dead processes left, and how long it leaves a database that fails alone.
ADOPT_S, PAUSE_S = 5.0, 0.5


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
        database. A killed process loses nothing, a machine without power may lose the last. None: the strict mode.
    spool_bytes : int
        What may wait in the folder for the database; beyond that events are refused.
    timeout_s : float
        Longest wait for a call's turn and commit.
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
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._drainer: threading.Thread | None = None
        if self._spool is not None:
            self._start_draining()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, event: Event) -> Receipt:
        """Record an event; when this returns it is durable, in the lenient mode in the spool.

        The same event may be appended again: it stays one. Of several events with one id, or with one idempotency key
        of an account, the first is recorded, and the receipts of the others say `duplicate` and show it; the lenient
        mode finds that out too late to say it.

        Raises
        ------
        EventConflict
            The id is recorded with another bill.
        LedgerUnavailable, LedgerDoubtful
            It is not recorded; in the second case it may be.
        """
        self._writer.check_process()
        if self._spool is None:
            return self._submit(append_all, event)
        with self._lock:
            if self._closing.is_set():
                raise LedgerClosed("ledger: it is closed")
            self._spool.append(event)
        self._wanted.set()
        return Receipt(event, False)

    def reserve(self, account: str, key: str, fingerprint: str, *, lease_s: float = 120.0) -> Reservation:
        """The right to compute the request of an idempotency key: the first time, or again.

        The first time, append an event with this account and key, or `release` the reservation; one of which nothing is
        heard may be taken over after `lease_s`. A reservation with `replay` above 0 has been billed.

        Parameters
        ----------
        fingerprint : str
            A digest of all that makes the request what it is.

        Raises
        ------
        KeyReused
            The key came with another fingerprint before.
        KeyInProgress
            Someone computes it for the first time.
        KeyExhausted
            It has been computed again as often as it may be.
        LedgerUnavailable
        """
        for name, value in (("account", account), ("key", key), ("fingerprint", fingerprint)):
            if not value or len(value) > LONGEST_TEXT or not value.isprintable():
                raise EventError(f"{name}: expected 1 to {LONGEST_TEXT} printable characters, got {value!r:.60}")
        wish = Wish(Reservation(account, key, fingerprint), round(1e6 * lease_s), self._replays)
        return self._submit(reserve_all, wish)

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back that came to nothing: the key is as it was before."""
        self._submit(release_all, reservation)

    def record(self, reservation: Reservation, event: Event) -> Receipt | None:
        """Append a reserved request's event under its key; None for a replay, which is billed already."""
        if reservation.replay:
            return None
        return self.append(replace(event, account=reservation.account, idempotency_key=reservation.key))

    def require(self) -> None:
        """LedgerUnavailable if `append` would refuse at once; asks nobody, so that work may be refused beforehand."""
        if self._spool is None:
            self._writer.require()

    def check(self) -> None:
        """Write something that is no event, as a test; LedgerUnavailable if that fails."""
        self._submit(probe_all, None)

    def totals(
        self,
        by: Sequence[str] = ("day", "model", "account"),
        *,
        account: str | None = None,
        model: str | None = None,
        since_us: int = 0,
        until_us: int | None = None,
    ) -> Iterator[Total]:
        """Exact sums of the events of since_us <= at < until_us, by day (UTC), model and account, or some of these."""
        self._writer.check_process()
        return each_total(self._database, by, Selection(account, model, since_us, until_us))

    def events(
        self,
        *,
        account: str | None = None,
        model: str | None = None,
        since_us: int = 0,
        until_us: int | None = None,
    ) -> Iterator[Event]:
        """Events in the order in which they were recorded; a page of them is in memory."""
        self._writer.check_process()
        return each_event(self._database, Selection(account, model, since_us, until_us))

    def audit(self, recompute: Recompute, *, since_us: int = 0, until_us: int | None = None) -> Audit:
        """Every bill against `recompute(event)`, (macs, flops, flops_other) from what the event says of its shapes."""
        return Audit(self.events(since_us=since_us, until_us=until_us), recompute)

    def waiting_bytes(self) -> int:
        """What the spool holds that the database has not."""
        return 0 if self._spool is None else self._spool.waiting_bytes()

    def group_size(self) -> float:
        """Operations of one commit, in the mean since the start."""
        return self._writer.tasks / max(1, self._writer.groups)

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
            self._spool.close()
        return done

    def _submit(self, function: Callable, argument):
        return self._writer.submit(function, argument, self._timeout_s)

    def _start_draining(self) -> None:
        self._drainer = threading.Thread(target=self._drain, name="cconv-ledger-spool", daemon=True)
        self._drainer.start()

    def _drain(self) -> None:
        adopted = float("-inf")
        while True:
            closing = self._closing.is_set()
            self._wanted.clear()
            try:
                if time.monotonic() - adopted > ADOPT_S:
                    adopted = time.monotonic()
                    self._spool.adopt()
                for group in self._spool.groups(MOST_IN_GROUP):
                    self._drain_group(group)
            except LedgerClosed:
                return
            except LedgerUnavailable as error:
                log.warning("the spool waits: %s", error)
                self._closing.wait(PAUSE_S)
                if not closing:
                    continue
            except OSError:
                log.exception("the spool cannot be read")
                self._closing.wait(PAUSE_S)
            if closing:
                return
            self._wanted.wait(ADOPT_S)

    def _drain_group(self, group: Sequence[Event]) -> None:
        """Record all of a group; what no ledger takes goes to a file for people."""
        try:
            results = self._submit(append_groups, group)
        except EventError:
            results = [self._drain_one(event) for event in group]
        for event, result in zip(group, results, strict=True):
            if isinstance(result, EventConflict):
                self._refuse(event, result)

    def _drain_one(self, event: Event) -> Receipt | LedgerError:
        try:
            return self._submit(append_all, event)
        except EventError as error:
            self._refuse(event, error)
            return error
        except EventConflict as error:
            return error

    def _refuse(self, event: Event, error: LedgerError) -> None:
        log.error("an event that cannot be recorded is left in the spool's refused.txt: %s", error)
        self._spool.refuse(event.line(), str(error))
