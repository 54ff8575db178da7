"""Query: what the events add up to, the events themselves, and whether every bill is right.

In: a database and a selection of events.  Out: iterators that hold a page of rows, or a row per group: exact integers,
which SQLite's own SUM would not give beyond 2**63.

Whoever reads SQLite keeps its writer from committing, so every statement looks at a bounded number of rows, whatever is
selected: it walks along the index of times, or of one account's times, in parts. Events recorded after the beginning
are not of the answer.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ArgumentError
from .database import Database
from .errors import CannotRecompute, LedgerTimeout
from .event import BILL, DAY_US, NAMES, Event, check_text, date
from .schema import usage_event

#: Rows that are in memory at a time; one may have a megabyte.
PAGE = 100
#: Rows that one statement looks at.
SPAN = 20_000
#: Sums of the upper and lower 32 bits stay below 2**63 for two billion rows.
_BITS = 32
_EVENT = [usage_event.c[name] for name in NAMES]
_seq, _at = usage_event.c.seq, usage_event.c.at
#: Where a row stands: rows are walked in this order.
_place = sa.tuple_(_at, _seq)

Bill = tuple[int, int, int]
Recompute = Callable[[Event], Bill]


@dataclass(frozen=True)
class Selection:
    """Which events; None is any."""

    account: str | None = None
    model: str | None = None
    since_us: int = 0
    until_us: int | None = None

    #: Longest time for all of the answer.
    timeout_s: float | None = None

    def __post_init__(self):
        for name in ("account", "model"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))

    def walked(self) -> list:
        """What an index finds: the rows that are looked at."""
        found = [] if self.account is None else [usage_event.c.account == self.account]
        return found if self.until_us is None else [*found, _at < self.until_us]

    def chosen(self) -> list:
        """What is chosen of the rows that are looked at."""
        return [] if self.model is None else [usage_event.c.model == self.model]


@dataclass(frozen=True)
class Total:
    """Events of one group; what it is not grouped by is None."""

    day: str | None
    model: str | None
    account: str | None
    events: int
    images: int
    macs: int
    flops: int
    flops_other: int

    def shown(self) -> dict:
        """For programs that may not hold 64 bits: the bill as decimal text."""
        return {**asdict(self), **{name: str(getattr(self, name)) for name in BILL}}


_GROUPS = {
    "day": _at.op("/")(sa.literal_column(str(DAY_US))),
    "model": usage_event.c.model,
    "account": usage_event.c.account,
}
#: What totals may be grouped by.
GROUPS = tuple(_GROUPS)
_ADDED = ("images", *BILL)


def _sums() -> list:
    mask = sa.literal_column(str(2**_BITS - 1))
    columns = []
    for name in _ADDED:
        column = usage_event.c[name]
        columns += [sa.func.sum(column.op(">>")(sa.literal_column(str(_BITS)))), sa.func.sum(column.op("&")(mask))]
    return [sa.func.count(), *columns]


Place = tuple[int, int]


def _spans(database: Database, connection: Connection, selection: Selection) -> Iterator[list]:
    """Conditions that select a bounded number of rows each, and together the time that was asked for."""
    ends = time.monotonic() + (float("inf") if selection.timeout_s is None else selection.timeout_s)
    newest = connection.execute(sa.select(sa.func.max(_seq))).scalar()
    start: Place | None = None if newest is None else (selection.since_us, 0)
    asked = [_seq <= (newest or 0), *selection.walked()]
    while start is not None:
        database.pause(connection)
        if time.monotonic() > ends:
            raise LedgerTimeout(f"ledger: no whole answer in {selection.timeout_s} s; ask for fewer days")
        after = [_place > sa.tuple_(*start), _at >= start[0]]  # of which planners know how many rows it leaves
        beyond = sa.select(_at, _seq).where(*after, *asked[1:]).order_by(_at, _seq)
        last = connection.execute(beyond.offset(SPAN - 1).limit(1)).first()
        part = [*after, *asked]
        yield part if last is None else [*part, _place <= sa.tuple_(*last)]
        start = last and tuple(last)


def each_total(database: Database, by: Sequence[str], selection: Selection) -> Iterator[Total]:
    """Totals in the order of their groups, `by` from left to right."""
    by = tuple(dict.fromkeys(by))
    if others := set(by) - set(_GROUPS):
        raise ArgumentError(f"by: expected some of {', '.join(_GROUPS)}, got {', '.join(sorted(others))}")
    return _totals(database, by, selection)


def _totals(database: Database, by: tuple[str, ...], selection: Selection) -> Iterator[Total]:
    groups = [_GROUPS[name] for name in by]
    statement = sa.select(*groups, *_sums()).where(*selection.chosen()).group_by(*groups)
    found: dict[tuple, list[int]] = {}
    with database.reading() as connection:
        for part in _spans(database, connection, selection):
            for row in connection.execute(statement.where(*part)):
                group, numbers = tuple(row[: len(by)]), [int(number or 0) for number in row[len(by) :]]
                if not numbers[0]:
                    continue  # without groups, a sum of nothing is a row
                count, *halves = numbers
                sums = [(high << _BITS) + rest for high, rest in zip(halves[::2], halves[1::2], strict=True)]
                before = found.get(group, [0] * (1 + len(sums)))
                found[group] = [a + b for a, b in zip(before, (count, *sums), strict=True)]
    for group in sorted(found):
        names = dict(zip(by, group, strict=True))
        if "day" in names:
            names["day"] = date(names["day"])
        yield Total(*(names.get(name) for name in _GROUPS), *found[group])


def each_event(database: Database, selection: Selection) -> Iterator[Event]:
    statement = sa.select(_seq, *_EVENT).where(*selection.chosen()).order_by(_at, _seq).limit(PAGE)
    with database.reading() as connection:
        for part in _spans(database, connection, selection):
            rest = part
            while rest is not None:
                rows = connection.execute(statement.where(*rest)).mappings().all()
                database.pause(connection)  # whoever asked may take its time with them
                yield from map(Event.of, rows)
                full = len(rows) == PAGE
                rest = [*part, _place > sa.tuple_(rows[-1]["at"], rows[-1]["seq"])] if full else None


def as_json(rows: Iterable[Event | Total]) -> Iterator[str]:
    """A JSON array in pieces, an object on each line. Nothing before the first row is there, or known not to be."""
    before = "["
    for row in rows:
        yield f"{before}\n{json.dumps(row.shown())}"
        before = ","
    yield "\n]\n" if before == "," else "[]\n"


def as_csv(rows: Iterable[Event | Total], kind: type[Event] | type[Total]) -> Iterator[str]:
    """CSV in pieces, a line each, after one of names, which comes when the first row is there, or known not to be.

    Texts that a spreadsheet would compute get an apostrophe.
    """
    names, rows = [entry.name for entry in fields(kind)], iter(rows)
    first = list(islice(rows, 1))
    yield _csv_line(names)
    for row in chain(first, rows):
        shown = row.shown()
        if kind is Event:
            shown["shapes"] = json.dumps(shown["shapes"])
        yield _csv_line([_inert(shown[name]) for name in names])


def _csv_line(cells: Sequence) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


def _inert(value):
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


@dataclass(frozen=True)
class Difference:
    """A bill that is not what its shapes say; `expected` is None where they could not be computed, for `reason`."""

    event: Event
    recorded: Bill
    expected: Bill | None
    reason: str


class Audit:
    """Iterate over it: it goes through the events and gives the differences, and counts on the way.

    Attributes
    ----------
    checked, right, wrong, unknown, failed : int
        Events seen, and of these: bills that are right; that differ; of which `recompute` said CannotRecompute; and
        with which it failed otherwise, so that nothing is known of them either.
    """

    def __init__(self, events: Iterator[Event], recompute: Recompute):
        self._events, self._recompute = events, recompute
        self.checked = self.right = self.wrong = self.unknown = self.failed = 0

    def __iter__(self) -> Iterator[Difference]:
        for event in self._events:
            self.checked += 1
            recorded = tuple(getattr(event, name) for name in BILL)
            try:
                expected = tuple(self._recompute(event))
            except CannotRecompute as error:
                self.unknown += 1
                yield Difference(event, recorded, None, str(error))
            except Exception as error:
                self.failed += 1
                yield Difference(event, recorded, None, f"{type(error).__name__}: {error}")
            else:
                if expected == recorded:
                    self.right += 1
                    continue
                self.wrong += 1
                yield Difference(event, recorded, expected, "the bill differs")
