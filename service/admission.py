"""Admission: what one request may ask for, and how much the house holds at once. Only Python ints are compared here.

In: sizes, before anything of that size is allocated.  Out: a Permit, TooLarge (413) or Overloaded (503).

A permit is a request's share of the house: one place, its bytes and its FLOPs, from its arrival until its answer has
left. There are fewer places than request threads, so that a full house still answers health checks.
"""

import threading
import time

from .account import ADMIN, ANONYMOUS, Account
from .config import Settings
from .errors import Overloaded, TooLarge
from .metrics import Metrics

#: Largest size of one axis, stride, padding or dilation: far beyond any image, far below any overflow.
LARGEST_SIZE = 65_535


class Permit:
    """One request's share; it grows as more of the request becomes known and is given back once."""

    def __init__(self, admission: "Admission", deadline: float, account: Account):
        self._admission = admission
        #: Who pays.
        self.account = account
        #: On time.monotonic()'s clock.
        self.deadline = deadline
        #: What the client calls its request, what makes it this one, and its idempotency key.
        self.request_id = self.asked = self.key = ""
        self.body_bytes = 0
        self.bytes = 0
        self.flops = 0
        self.held = True

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


class Admission:
    """The limits of one request, and of all requests together."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self._settings = settings
        self._metrics = metrics
        self._lock = threading.Lock()
        self._requests = self._flops = self._bytes = 0

    def enter(self, body_bytes: int | None, account: Account = ANONYMOUS) -> Permit:
        """A place for a request whose body has this announced size; None is a body of unknown size."""
        if body_bytes is not None:
            self.body(body_bytes)
        permit = Permit(self, time.monotonic() + self._settings.deadline_s, account)
        permit.body_bytes = body_bytes or 0
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
            self._observe()

    def release(self, permit: Permit) -> None:
        with self._lock:
            if permit.held:
                permit.held = False
                self._requests -= 1
                self._bytes -= permit.bytes
                self._flops -= permit.flops
                self._observe()

    def _observe(self) -> None:
        self._metrics.pending_requests.set(self._requests)
        self._metrics.pending_flops.set(self._flops)
        self._metrics.pending_bytes.set(self._bytes)

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
