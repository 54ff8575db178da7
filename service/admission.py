"""Admission: what one request may ask for, how much the house holds at once, and how much an account may have.

In: sizes, before anything of that size is allocated.  Out: a Permit; TooLarge (413), Overloaded (503) or, where the
house has room and the account has not, RateLimited (429). Only Python ints are compared here.

A permit is a request's share of the house: one place, its bytes and its FLOPs, from its arrival until its answer has
left. There are fewer places than request threads, so that a full house still answers health checks.

An account's share is held while its request is under way. Of the minute it is spent once it was computed, of the month
when it has been billed: what is refused costs nothing, what fails nothing of the month.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil, floor

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from .account import ADMIN, ANONYMOUS, Account
from .config import Settings
from .errors import DeadlineExceeded, Overloaded, QuotaExceeded, RateLimited, TooLarge
from .metrics import Metrics

#: Largest size of one axis, stride, padding or dilation: far beyond any image, far below any overflow.
LARGEST_SIZE = 65_535
#: What rates are counted in, rounded up: a request of next to nothing takes one.
MFLOP = 10**6
#: How old a month's count may be, as other servers bill the same account: for a request to be let in, to be refused,
#: and at least as many times what counting took.
COUNT_S, REFUSE_S, COUNT_TIMES = 10.0, 1.0, 20


class Permit:
    """One request's share; it grows as more of the request becomes known and is given back once."""

    def __init__(self, admission: "Admission", deadline: float, account: Account):
        self._admission = admission
        #: Who pays.
        self.account = account
        #: On time.monotonic()'s clock.
        self.began = time.monotonic()
        self.deadline = deadline
        #: What the client calls its request, what makes it this one, and its idempotency key.
        self.request_id = self.asked = self.key = ""
        #: How many bytes of its body have been read.
        self.came = lambda: 0
        self.bytes = 0
        self.flops = 0
        self.held = True
        #: What its account holds for it: of the minute, and of the month that began then.
        self.mflop = self.month_flops = 0
        self.month = 0.0

    @property
    def sees(self) -> str | None:
        """Whose bills this request may read: its own account's; None is everybody's."""
        return None if self.account.may(ADMIN) else self.account.id

    def take(self, *, nbytes: int = 0, flops: int = 0) -> None:
        """More bytes or FLOPs for this request; Overloaded while others hold too much of the house."""
        self._admission.grow(self, nbytes, flops)

    def shorten(self, timeout_s: float) -> None:
        """The client's own, earlier deadline."""
        self.deadline = min(self.deadline, time.monotonic() + timeout_s)

    def release(self) -> None:
        self._admission.release(self)


@dataclass
class _Month:
    """What an account has had of a month: counted in the ledger at a time, and billed by this process since."""

    began: float
    spent: int
    #: On time.monotonic()'s clock, and how long it took.
    counted: float
    took: float

    def is_older(self, age_s: float) -> bool:
        return time.monotonic() - self.counted > max(age_s, COUNT_TIMES * self.took)


class Spending:
    """What the accounts have had of their minutes and of their months, and what their requests hold just now.

    Minutes slide, are kept in memory and count all that was computed. Months are UTC's and count what was billed, by
    this process at once and by all others of the ledger within COUNT_S: they are counted again and again, and never
    too low for this process's own bills. Without a ledger they begin with the process.

    Parameters
    ----------
    used : function (account, microseconds since 1970, seconds) -> int, or None
        flops + flops_other that are recorded for an account since then, found out in so much time; None where nothing
        is recorded.
    delayed : bool
        Whether what this process bills reaches the ledger only later, so that a count may lack it.
    """

    def __init__(self, used: Callable[[str, int, float], int] | None, delayed: bool = False):
        self._used, self._delayed = used, delayed
        self._lock = threading.Lock()
        self._limiter: SlidingWindowCounterRateLimiter | None = None
        self._held_mflop: Counter[str] = Counter()
        self._held_flops: Counter[str] = Counter()
        self._months: dict[str, _Month] = {}
        #: Billed since the last counting began, which may have come too late for it.
        self._since: Counter[str] = Counter()
        self._counting: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def hold_minute(self, permit: Permit, flops: int) -> None:
        """Room for this much work in the account's minute, or RateLimited."""
        account, cost = permit.account, max(1, ceil(flops / MFLOP))
        if account.mflop_per_minute is None:
            return
        if cost > account.mflop_per_minute:
            raise TooLarge(
                f"work: expected at most {account.mflop_per_minute} MFLOP, which account {account.id} may have in a "
                f"minute, got {cost}; send fewer or smaller images"
            )
        item = RateLimitItemPerMinute(account.mflop_per_minute)
        with self._lock:
            if self._limiter is None:  # it owns a thread
                self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
            held = self._held_mflop[account.id]
            if not self._limiter.test(item, account.id, cost=cost + held):
                raise RateLimited(
                    f"account {account.id}: expected at most {item.amount} MFLOP in a minute, got {cost} more; try "
                    f"again later",
                    self._wait_s(item, account.id, cost, held),
                )
            self._held_mflop[account.id] += cost
            permit.mflop += cost

    def _wait_s(self, item: RateLimitItemPerMinute, account: str, cost: int, held: int) -> int:
        """Seconds until the window has room for `cost`, if all that is held is spent and nothing else comes."""
        span = item.get_expiry()
        before, _, current, _ = self._limiter.storage.get_sliding_window(item.key_for(account), span)
        current += held
        # Until what it counts is below `most`: the window's own share, and what of the one before is still looked at.
        left, most = span - time.time() % span, item.amount - cost + 1
        if current < most and before:
            wait = left - span * (most - current) / before
        else:
            wait = left + span * (1 - min(1.0, most / max(1, current)))
        return floor(max(0.0, wait)) + 1

    def hold_month(self, permit: Permit, flops: int) -> None:
        """Room for this bill in the account's month, or QuotaExceeded."""
        account = permit.account
        if account.mflop_per_month is None:
            return
        now = datetime.now(UTC)
        month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        began = month.timestamp()
        if flops > account.mflop_per_month * MFLOP:
            raise TooLarge(
                f"work: expected at most {account.mflop_per_month} MFLOP, which account {account.id} may have in a "
                f"month, got {flops} flops; send fewer or smaller images"
            )
        self._count(permit, began, COUNT_S)
        if (spent := self._try_hold(permit, flops, began)) is not None:
            self._count(permit, began, REFUSE_S)
            spent = self._try_hold(permit, flops, began)
        if spent is not None:
            following = month.replace(year=now.year + now.month // 12, month=now.month % 12 + 1)
            raise QuotaExceeded(
                f"account {account.id}: expected at most {account.mflop_per_month} MFLOP in a month, got {flops} "
                f"flops more after {spent}",
                ceil((following - now).total_seconds()),
            )

    def _try_hold(self, permit: Permit, flops: int, began: float) -> int | None:
        """Hold it; or, where there is no room for it, what the account has had."""
        account = permit.account
        with self._lock:
            spent = self._months[account.id].spent + self._held_flops[account.id]
            if spent + flops > account.mflop_per_month * MFLOP:
                return spent
            self._held_flops[account.id] += flops
            permit.month_flops, permit.month = flops, began
            return None

    def _count(self, permit: Permit, began: float, age_s: float) -> None:
        """Ask the ledger what the account has had of the month, if that is not known or was asked too long ago."""
        name = permit.account.id
        with self._lock:
            counting, known = self._counting[name], self._months.get(name)
        this = known is not None and known.began == began
        if this and (self._used is None or not known.is_older(age_s)):
            return
        # Before it has been counted once nobody spends; later one counts, and the others go by what is known.
        if not counting.acquire(timeout=0 if this else max(0.0, permit.deadline - time.monotonic())):
            if this:
                return
            raise DeadlineExceeded("the deadline passed before the account's month was counted; nothing was billed")
        try:
            with self._lock:
                if self._months.get(name) is not known:  # somebody else has counted meanwhile
                    return
                self._since[name] = 0
            asked = time.monotonic()
            spent = 0 if self._used is None else self._used(name, round(1e6 * began), max(0.0, permit.deadline - asked))
            with self._lock:
                spent += self._since[name]
                if this and self._delayed:
                    spent = max(spent, known.spent)
                self._months[name] = _Month(began, spent, asked, time.monotonic() - asked)
        finally:
            counting.release()

    def spend_minute(self, permit: Permit) -> None:
        """What is held of the minute has been computed, whatever comes of it."""
        account = permit.account
        with self._lock:
            if permit.mflop:
                self._limiter.hit(RateLimitItemPerMinute(account.mflop_per_minute), account.id, cost=permit.mflop)
            self._drop(self._held_mflop, account.id, permit.mflop)
            permit.mflop = 0

    def spend_month(self, permit: Permit) -> None:
        """What is held of the month has been billed."""
        account = permit.account
        with self._lock:
            month = self._months.get(account.id)
            if permit.month_flops and permit.month == month.began:
                month.spent += permit.month_flops
                self._since[account.id] += permit.month_flops
            self._give_back(permit)

    def give_back(self, permit: Permit) -> None:
        with self._lock:
            self._give_back(permit)

    def _give_back(self, permit: Permit) -> None:
        self._drop(self._held_mflop, permit.account.id, permit.mflop)
        self._drop(self._held_flops, permit.account.id, permit.month_flops)
        permit.mflop = permit.month_flops = 0

    @staticmethod
    def _drop(held: Counter[str], account: str, amount: int) -> None:
        if amount:
            held[account] -= amount
            if not held[account]:
                del held[account]


class Admission:
    """The limits of one request, of all requests together, and of the accounts.

    Parameters
    ----------
    used : function (account, microseconds since 1970, seconds) -> int, or None
        As `Spending` has it.
    """

    def __init__(self, settings: Settings, metrics: Metrics, used: Callable[[str, int, float], int] | None = None):
        self._settings = settings
        self.spending = Spending(used, delayed=bool(settings.ledger_spool))
        self._metrics = metrics
        self._lock = threading.Lock()
        self._requests = self._flops = self._bytes = 0
        metrics.pending_requests.set_function(lambda: self._requests)
        metrics.pending_flops.set_function(lambda: self._flops)
        metrics.pending_bytes.set_function(lambda: self._bytes)

    def enter(self, body_bytes: int | None, account: Account = ANONYMOUS) -> Permit:
        """A place for a request whose body has this announced size; None is a body of unknown size."""
        if body_bytes is not None:
            self.body(body_bytes)
        permit = Permit(self, time.monotonic() + self._settings.deadline_s, account)
        with self._lock:
            if self._requests >= self._settings.queue_requests:
                raise Overloaded(f"the server is full: {self._requests} requests are waiting or running; try again")
            self._requests += 1
        try:
            permit.take(nbytes=self._settings.max_body_bytes if body_bytes is None else body_bytes)
        except Overloaded:
            permit.release()
            raise
        self._metrics.bytes_in.inc(body_bytes or 0)
        return permit

    def full(self) -> bool:
        """Whether there is no place; a look without a lock, as `enter` decides."""
        return self._requests >= self._settings.queue_requests

    def grow(self, permit: Permit, nbytes: int, flops: int) -> None:
        limits = self._settings
        if permit.bytes + nbytes > limits.queue_bytes:
            raise TooLarge(
                f"request: expected at most {limits.queue_bytes} bytes of body, images and maps, got "
                f"{permit.bytes + nbytes}; send fewer or smaller images"
            )
        with self._lock:
            if self._bytes + nbytes > limits.queue_bytes:
                raise Overloaded(f"the server is full: requests in it hold {self._bytes} bytes; try again")
            if self._flops + flops > limits.queue_flops:
                raise Overloaded(f"the server is full: {self._flops} flops are waiting or running; try again")
            permit.bytes += nbytes
            permit.flops += flops
            self._bytes += nbytes
            self._flops += flops

    def release(self, permit: Permit) -> None:
        self.spending.give_back(permit)
        with self._lock:
            if permit.held:
                permit.held = False
                self._requests -= 1
                self._bytes -= permit.bytes
                self._flops -= permit.flops

    def body(self, nbytes: int) -> None:
        if nbytes > self._settings.max_body_bytes:
            raise TooLarge(f"body: expected at most {self._settings.max_body_bytes} bytes, got {nbytes}")

    def json(self, nbytes: int) -> None:
        if nbytes > self._settings.max_json_bytes:
            raise TooLarge(
                f"JSON: expected at most {self._settings.max_json_bytes} bytes, got {nbytes}; "
                f"send tensors in binary form"
            )

    def sizes(self, name: str, sizes) -> None:
        """Every size of a shape or option, so that no later product or loop runs away."""
        for size in sizes:
            if isinstance(size, int) and size > LARGEST_SIZE:
                raise TooLarge(f"{name}: expected sizes of at most {LARGEST_SIZE}, got {size}")

    def images(self, count: int) -> None:
        if count > self._settings.max_images:
            raise TooLarge(f"images: expected at most {self._settings.max_images} in a request, got {count}")

    def work(self, flops: int, output_bytes: int) -> None:
        """A request's whole work: flops + flops_other, and the bytes of its answer."""
        if flops > self._settings.max_flops:
            raise TooLarge(
                f"work: expected at most {self._settings.max_flops} floating-point operations (flops + flops_other) "
                f"in a request, got {flops}"
            )
        if output_bytes > self._settings.max_output_bytes:
            raise TooLarge(
                f"answer: expected at most {self._settings.max_output_bytes} bytes of maps, got {output_bytes}; "
                f"ask for fewer layers or images"
            )
