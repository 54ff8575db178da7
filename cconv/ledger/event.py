"""Event: one bill and what it was for, checked before it goes anywhere near a database.

In: fields.  Out: Event, a frozen value that turns into a row, a line of JSON and back; Receipt, what a writer answers.
"""

import json
import time
import uuid
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .errors import EventError

#: What a column of 64 bits takes. Sums may be larger.
LARGEST = 2**63 - 1
LONGEST_TEXT = 255
LONGEST_SHAPES = 1 << 20
BILL = ("macs", "flops", "flops_other")
#: What must agree for two events to be the same bill; the rest says when and how fast.
IDENTITY = ("account", "model", "version", "images", "shapes", *BILL)
DAY_US = 86_400_000_000
#: Made once: json.dumps makes one at every call that wants more than the defaults.
_ENCODER = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)


def now_us() -> int:
    return time.time_ns() // 1000


def iso(at_us: int) -> str:
    """2026-11-22T09:30:00.000000Z"""
    seconds, micros = divmod(at_us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{micros:06d}Z"


def date(day: int) -> str:
    """The day that begins so many days after 1970-01-01."""
    return datetime.fromtimestamp(day * DAY_US // 1_000_000, UTC).strftime("%Y-%m-%d")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A request, or a shard of a batch job, that has been computed.

    Attributes
    ----------
    account : str
        Who pays: the id of an API key.
    model : str
    shapes : dict, list or anything else that JSON holds
        What the bill can be computed from again.
    macs, flops, flops_other : int
        The bill; exact, each below 2**63.
    images : int
    version, device, algorithm, request_id : str
    bytes_in, bytes_out : int
    queue_us, compute_us : int
        Microseconds.
    id : str
        Unique for ever: an event that is appended again is not billed again. Random unless given.
    at : int
        Microseconds since 1970-01-01 UTC; now unless given.
    idempotency_key : str or None
        Unique for ever within its account.

    Raises
    ------
    EventError
    """

    account: str
    model: str
    shapes: Any
    macs: int
    flops: int
    flops_other: int
    images: int = 1
    version: str = ""
    device: str = ""
    algorithm: str = ""
    request_id: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    queue_us: int = 0
    compute_us: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: int = field(default_factory=now_us)
    idempotency_key: str | None = None

    def __post_init__(self):
        for name in TEXTS:
            check_text(name, getattr(self, name))
        if self.idempotency_key is not None:
            check_text("idempotency_key", self.idempotency_key)
            if not self.idempotency_key:
                raise EventError("idempotency_key: expected a text, got an empty one")
        for name in ("id", "account", "model"):
            if not getattr(self, name):
                raise EventError(f"{name}: expected a text, got an empty one")
        for name in NUMBERS:
            check_number(name, getattr(self, name))
        text = _json(self.shapes)
        if len(text) > LONGEST_SHAPES:
            raise EventError(f"shapes: expected at most {LONGEST_SHAPES} characters of JSON, got more")
        object.__setattr__(self, "shapes", json.loads(text))  # as it will be read: tuples are lists
        object.__setattr__(self, "_shapes_text", text)

    def measured(self, **numbers: int) -> "Event":
        """This event with some of its numbers as they turned out; its texts and shapes have been checked."""
        for name, value in numbers.items():
            check_number(name, value)
        other = object.__new__(Event)
        vars(other).update(vars(self), **numbers)
        return other

    def row(self) -> dict:
        """As the table has it."""
        values = vars(self)
        return {**{name: values[name] for name in NAMES}, "shapes": self._shapes_text}

    def line(self) -> bytes:
        """As a line of JSON, its end included."""
        return json.dumps(self.row(), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of(cls, row) -> "Event":
        """From what `row` or a line of JSON gave."""
        values = {entry.name: row[entry.name] for entry in fields(cls)}
        return cls(**{**values, "shapes": json.loads(values["shapes"])})

    def shown(self) -> dict:
        """For people and programs that may not hold 64 bits: the time as ISO 8601, the bill as decimal text."""
        bill = {name: str(getattr(self, name)) for name in BILL}
        return {**{entry.name: getattr(self, entry.name) for entry in fields(self)}, **bill, "at": iso(self.at)}

    def same_bill(self, other: "Event") -> bool:
        return all(getattr(self, name) == getattr(other, name) for name in IDENTITY)


NAMES = tuple(entry.name for entry in fields(Event))
TEXTS = ("id", "account", "model", "version", "device", "algorithm", "request_id")
NUMBERS = ("at", "images", "bytes_in", "bytes_out", "queue_us", "compute_us", *BILL)


def check_text(name: str, value) -> None:
    """EventError for what no column of text takes."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or "\0" in value or not value.isprintable():
        raise EventError(f"{name}: expected at most {LONGEST_TEXT} printable characters, got {value!r:.60}")


def check_number(name: str, value) -> None:
    """EventError for what no column of 64 bits takes."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise EventError(f"{name}: expected an int from 0 to 2**63 - 1, got {value!r:.60}")


def _json(shapes) -> str:
    try:
        return _ENCODER.encode(shapes)
    except (TypeError, ValueError, RecursionError) as error:
        raise EventError(f"shapes: expected what JSON holds, got {error}") from None


class Receipt(NamedTuple):
    """A durable event.

    Attributes
    ----------
    event : Event
        As it is recorded: of a duplicate the one that was there.
    duplicate : bool
        Whether another event with this id, or with this account's idempotency key, was there; this one is not billed.
    """

    event: Event
    duplicate: bool
