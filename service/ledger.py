"""Ledger: the service's only importer of cconv.ledger. Without a URL it records nothing, and everything else goes on.

In: a bill.  Out: Bills, of which `settle` returns once the record is durable; the ledger's errors as the service's own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import ceil

import cconv.ledger as ledger

from .config import Settings
from .errors import Conflict, InvalidRequest, Mismatch, NotRecorded, Unavailable
from .metrics import Metrics

#: Beyond a request's deadline, how long its idempotency key stays its own.
LEASE_S = 30.0
#: Who pays where there are no API keys.
ACCOUNT = "anonymous"


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ledger.KeyReused as error:
        raise Mismatch(str(error)) from error
    except ledger.KeyInProgress as error:
        raise Conflict(str(error), ceil(error.retry_after_s)) from error
    except ledger.KeyExhausted as error:
        raise Conflict(str(error)) from error
    except ledger.LedgerUnavailable as error:
        # What failed is for the log: it may name hosts and files.
        raise NotRecorded("the usage record could not be written; nothing was answered, try again") from error
    except ledger.LedgerError as error:
        raise InvalidRequest(str(error)) from error


class Bill:
    """One request's entry: made before it is computed, and then settled or dropped, once."""

    def __init__(self, book: "Book", event: ledger.Event | None, reservation: ledger.Reservation | None):
        self._book, self._event, self._reservation = book, event, reservation

    @property
    def replay(self) -> bool:
        """Whether this has been billed under the same idempotency key before."""
        return self._reservation is not None and self._reservation.replay > 0

    def settle(self, queue_us: int, compute_us: int) -> None:
        """Record it; NotRecorded if that fails, and then there must be no answer."""
        if self._event is not None:
            event = replace(self._event, queue_us=queue_us, compute_us=compute_us, at=time.time_ns() // 1000)
            self._book.settle(event, self._reservation)

    def drop(self) -> None:
        """Nothing came of it: give its idempotency key back."""
        if self._reservation is not None:
            self._book.release(self._reservation)


class Book:
    """The ledger of this process, if it keeps one."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self._metrics = metrics
        self._lease_s = settings.deadline_s + LEASE_S
        self._ledger = None
        #: Keys of requests that failed with the ledger. Beyond so many their leases end by themselves.
        self._owed: deque[ledger.Reservation] = deque(maxlen=1000)
        if settings.ledger:
            spool = settings.ledger_spool or None
            self._ledger = ledger.Ledger(settings.ledger, spool=spool, timeout_s=settings.ledger_timeout_s)

    @property
    def kept(self) -> bool:
        return self._ledger is not None

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def require(self) -> None:
        """NotRecorded while the ledger is known to be out of order."""
        if self._ledger is not None:
            with _translated():
                self._ledger.require()

    def check(self) -> None:
        """Write something that is no bill; NotRecorded if that fails."""
        if self._ledger is not None:
            with _translated():
                self._ledger.check()

    def open(
        self, bill: Mapping[str, int], key: str, fingerprint: Callable[[], str], *, account: str = ACCOUNT, **fields
    ) -> Bill:
        """A request's bill. With a key, the same request may be computed again and costs nothing then.

        Raises
        ------
        Mismatch, Conflict
            Of the key: another request had it, or this one is under way, or was answered often enough.
        NotRecorded
        """
        if self._ledger is None:
            if key:
                raise Unavailable("Idempotency-Key: expected none, as this server keeps no ledger")
            return Bill(self, None, None)
        with self._failing():
            self._ledger.require()
            event = ledger.Event(account=account, **bill, **fields)
            reservation = None
            if key:
                self._pay_back()
                reservation = self._ledger.reserve(account, key, fingerprint(), lease_s=self._lease_s)
            return Bill(self, event, reservation)

    def settle(self, event: ledger.Event, reservation: ledger.Reservation | None) -> None:
        with self._failing():
            if reservation is None:
                self._ledger.append(event)
            elif reservation.replay:
                self._metrics.replays.inc()
                return
            else:
                self._ledger.record(reservation, event)
        self._metrics.ledger_writes.inc()

    def release(self, reservation: ledger.Reservation) -> None:
        try:
            self._ledger.release(reservation)
        except ledger.LedgerUnavailable:
            self._owed.append(reservation)

    def _pay_back(self) -> None:
        """Give back the keys that could not be while the ledger failed."""
        for _ in range(len(self._owed)):
            self._ledger.require()
            with suppress(IndexError):  # another thread was quicker
                self.release(self._owed.popleft())

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            with _translated():
                yield
        except NotRecorded:
            self._metrics.ledger_failures.inc()
            raise

    def usage(self, form: str, by: tuple[str, ...] | None, **selection) -> Iterator[str]:
        """Totals by these, or with None every event, as pieces of JSON or CSV; Unavailable without a ledger."""
        if self._ledger is None:
            raise Unavailable("usage: this server keeps no ledger")
        with _translated():
            kind = ledger.Event if by is None else ledger.Total
            rows = self._ledger.events(**selection) if by is None else self._ledger.totals(by, **selection)
            pieces = iter(ledger.as_csv(rows, kind) if form == "csv" else ledger.as_json(rows))
            first = next(pieces)  # what fails now is still an answer of its own
        return _chain(first, pieces)

    def used(self, account: str, since_us: int) -> int:
        """flops + flops_other that are recorded for an account since then; 0 without a ledger."""
        if self._ledger is None:
            return 0
        with self._failing():
            return sum(t.flops + t.flops_other for t in self._ledger.totals((), account=account, since_us=since_us))

    def audit(self, price: Callable[[str, str, dict], tuple[int, int, int]]) -> "ledger.Audit":
        """Every bill against the sum of `price(model, version, shapes)`, (macs, flops, flops_other), over its parts."""

        def recompute(event: ledger.Event) -> tuple[int, ...]:
            prices = (price(event.model, event.version, shapes) for shapes in event.shapes)
            return tuple(map(sum, zip(*prices, strict=True)))

        if self._ledger is None:
            raise Unavailable("audit: CCONV_LEDGER names no ledger")
        return self._ledger.audit(recompute)


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest
