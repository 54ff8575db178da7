"""Ledger: the service's only importer of cconv.ledger. Without a URL it records nothing, and everything else goes on.

In: a bill.  Out: Bills, of which `settle` returns once the record is durable; the ledger's errors as the service's own.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil

import cconv.ledger as ledger

from .config import Settings
from .errors import (
    INTERNAL,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    Mismatch,
    NotFound,
    NotRecorded,
    Overloaded,
    ServiceError,
    Unavailable,
)
from .metrics import Metrics

log = logging.getLogger(__name__)
#: Who pays where there are no API keys.
ACCOUNT = "anonymous"
#: What usage may be added up by.
GROUPS = ledger.GROUPS
UNWRITTEN = "the usage record could not be written; nothing was answered, try again"
#: Answers about usage that are written at a time, and of these for one account: they may be long, and readers slow.
READERS, READERS_OF_ONE = 4, 2


def _as_ours(error: ledger.LedgerError, unavailable: str) -> ServiceError:
    """A ledger's error as the service's. What failed in a database is for the log: it may name hosts and files."""
    if isinstance(error, ledger.KeyReused):
        return Mismatch(str(error))
    if isinstance(error, ledger.KeyInProgress):
        return Conflict(str(error), ceil(error.retry_after_s))
    if isinstance(error, ledger.KeyExhausted):
        return Conflict(str(error))
    if isinstance(error, ledger.LedgerTimeout):
        return DeadlineExceeded(str(error))
    if isinstance(error, ledger.LedgerDoubtful):
        text = "it is not known whether the usage record was written, so it may be recorded, and nothing was answered"
        return NotRecorded(f"{text}; sent again under its Idempotency-Key, the request is not billed twice")
    if isinstance(error, ledger.LedgerUnavailable):
        return NotRecorded(unavailable)
    log.error("the ledger", exc_info=error)
    return ServiceError(INTERNAL)


@contextmanager
def _translated(unavailable: str) -> Iterator[None]:
    try:
        yield
    except ledger.LedgerError as error:
        raise _as_ours(error, unavailable) from error


def _checked(**fields) -> ledger.Event:
    try:
        return ledger.Event(**fields)
    except ledger.EventError as error:
        raise InvalidRequest(str(error)) from error


def _merged(tasks: Sequence[Mapping]) -> dict:
    """Many tasks' shapes in one: what they have in common once, and the rest with how many there are of it."""
    if len(tasks) == 1:
        return {**tasks[0], "parts": [{"count": 1}]}
    common = dict(set(tasks[0].items()).intersection(*(one.items() for one in tasks)))
    rests = Counter(tuple(item for item in one.items() if item[0] not in common) for one in tasks)
    return {**common, "parts": [{**dict(rest), "count": count} for rest, count in rests.items()]}


def _parts(merged: Mapping) -> Iterator[tuple[dict, int]]:
    """Each task's shapes, and how many tasks had them."""
    common = {name: value for name, value in merged.items() if name != "parts"}
    for part in merged["parts"]:
        rest = dict(part)
        count = rest.pop("count")
        yield {**common, **rest}, count


class Bill:
    """One request's entry: made before it is computed, and then settled or dropped, once."""

    def __init__(self, book: "Book", event: ledger.Event | None, reservation: ledger.Reservation | None):
        self._book, self._event, self._reservation = book, event, reservation

    @property
    def replay(self) -> bool:
        """Whether this is known to have been billed before."""
        return self._reservation is not None and self._reservation.replay > 0

    def settle(self, deadline: float, **measured: int) -> bool:
        """Record it; NotRecorded if that fails, and then there must be no answer. Whether it is billed by this.

        Until `deadline` (time.monotonic) it is found out of a doubtful commit whether it is there.
        """
        if self._event is None:
            return True
        event = self._event.measured(at=time.time_ns() // 1000, **measured)
        return self._book.settle(event, self._reservation, max(0.0, deadline - time.monotonic()))

    def drop(self) -> None:
        """Nothing came of it: give its idempotency key back."""
        if self._reservation is not None:
            self._book.release(self._reservation)


class Book:
    """The ledger of this process, if it keeps one."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self._metrics = metrics
        self._readers = _Readers()
        self._ledger = None
        if settings.ledger:
            spool = settings.ledger_spool or None
            self._ledger = ledger.Ledger(settings.ledger, spool=spool, timeout_s=settings.ledger_timeout_s)
            metrics.ledger_waiting.set_function(self._ledger.waiting_bytes)
            metrics.ledger_lag.set_function(self._ledger.lag_s)
            metrics.ledger_refused.set_function(self._ledger.refused_lines)

    @property
    def kept(self) -> bool:
        return self._ledger is not None

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def require(self) -> None:
        """NotRecorded while the ledger is known to be out of order."""
        if self._ledger is not None:
            with _translated(UNWRITTEN):
                self._ledger.require()

    def check(self) -> None:
        """Write something that is no bill; NotRecorded if that fails."""
        if self._ledger is not None:
            with _translated(UNWRITTEN):
                self._ledger.check()

    def open(
        self, bill: Mapping[str, int], key: str, fingerprint: Callable[[], str], *, account: str = ACCOUNT, **fields
    ) -> Bill:
        """A request's bill. With a key, the same request may be computed again and costs nothing then.

        `shapes` are those of each task.

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
        shapes = _merged(fields.pop("shapes"))
        event = _checked(account=account, idempotency_key=key or None, shapes=shapes, **bill, **fields)
        try:
            self._ledger.require()
            reservation = self._ledger.reserve(account, key, fingerprint()) if key else None
        except ledger.LedgerError as error:
            raise self._failure(error) from error
        return Bill(self, event, reservation)

    def settle(self, event: ledger.Event, reservation: ledger.Reservation | None, settle_s: float) -> bool:
        """Record it; whether it is billed by this, and not by the same request before."""
        try:
            if reservation is None:
                receipt = self._ledger.append(event, settle_s=settle_s)
            else:
                receipt = self._ledger.record(reservation, event, settle_s=settle_s)
        except ledger.LedgerError as error:
            raise self._failure(error) from error
        billed = receipt is not None and not receipt.duplicate
        (self._metrics.ledger_writes if billed else self._metrics.replays).inc()
        return billed

    def release(self, reservation: ledger.Reservation) -> None:
        self._ledger.release(reservation)

    def _failure(self, error: ledger.LedgerError) -> ServiceError:
        """What a request is told that is refused because of it, counted. (A context would cost each that is not.)"""
        ours = _as_ours(error, UNWRITTEN)
        if isinstance(ours, NotRecorded):
            self._metrics.ledger_failures.inc()
        if isinstance(error, ledger.LedgerDoubtful):
            self._metrics.ledger_doubtful.inc()
        return ours

    def usage(self, form: str, by: tuple[str, ...] | None, deadline: float, reader: str, **selection) -> "Pieces":
        """Totals by these, or with None every event, as pieces of JSON or CSV; Unavailable without a ledger.

        `reader` is the account that asks.

        Raises
        ------
        InvalidRequest, Overloaded, DeadlineExceeded, NotRecorded
        """
        if self._ledger is None:
            raise Unavailable("usage: this server keeps no ledger")
        place = self._readers.enter(reader, deadline)
        selection["timeout_s"] = max(0.0, deadline - time.monotonic())
        try:
            with _translated("the usage records cannot be read; try again"):
                kind = ledger.Event if by is None else ledger.Total
                rows = self._ledger.events(**selection) if by is None else self._ledger.totals(by, **selection)
                pieces = ledger.as_csv(rows, kind) if form == "csv" else ledger.as_json(rows)
                return Pieces(pieces, partial(self._readers.leave, place), deadline)
        except BaseException:
            self._readers.leave(place)
            raise

    def used(self, account: str, since_us: int, timeout_s: float) -> int:
        """flops + flops_other that are recorded for an account since then."""
        try:
            found = self._ledger.totals((), account=account, since_us=since_us, timeout_s=timeout_s)
            return sum(total.flops + total.flops_other for total in found)
        except ledger.LedgerError as error:
            raise self._failure(error) from error

    def audit(self, price: Callable[[str, str, dict], tuple[int, int, int]]) -> "ledger.Audit":
        """Every bill against the sum of `price(model, version, shapes)`, (macs, flops, flops_other), over its parts."""

        def recompute(event: ledger.Event) -> tuple[int, ...]:
            try:
                prices = [
                    [count * number for number in price(event.model, event.version, shapes)]
                    for shapes, count in _parts(event.shapes)
                ]
            except NotFound as error:
                raise ledger.CannotRecompute(str(error)) from error
            return tuple(map(sum, zip(*prices, strict=True)))

        if self._ledger is None:
            raise Unavailable("audit: CCONV_LEDGER names no ledger")
        return self._ledger.audit(recompute)


class _Readers:
    """Places for those who read usage: few in all, and of them half for one account. A place ends with its deadline.

    So a reader who stalls keeps nobody out for longer, though it may be noticed only when it reads on.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._places: dict[object, tuple[str, float]] = {}

    def enter(self, account: str, deadline: float) -> object:
        with self._lock:
            now = time.monotonic()
            self._places = {place: one for place, one in self._places.items() if one[1] > now}
            mine = sum(reader == account for reader, _ in self._places.values())
            if mine >= READERS_OF_ONE or len(self._places) >= READERS:
                whose = f"{mine} answers for this account" if mine >= READERS_OF_ONE else f"{READERS} answers"
                raise Overloaded(f"usage: {whose} are being read; try again")
            place = object()
            self._places[place] = account, deadline
            return place

    def leave(self, place: object) -> None:
        with self._lock:
            self._places.pop(place, None)


class Pieces:
    """An answer in pieces, the first of which is there: what fails before it is still an answer of its own.

    It calls `leave` when it is closed, and ends unfinished past its deadline, for readers may be slow.
    """

    def __init__(self, pieces: Iterable[str], leave: Callable[[], None], deadline: float):
        self._deadline = deadline
        self._rest = iter(pieces)
        self._first: list[str] = [next(self._rest)]
        self._leave = leave

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded("the deadline passed before the usage had been read")
        return self._first.pop() if self._first else next(self._rest)

    def close(self) -> None:
        self._rest.close()
        self._leave()
