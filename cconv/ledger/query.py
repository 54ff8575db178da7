"""Query: what the events add up to, the events themselves, and whether every bill is right.

In: a database and a selection of events.  Out: iterators that hold a page of rows, or a row per group: exact integers,
which SQLite's own SUM would not give beyond 2**63.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ArgumentError
from .database import Database
from .event import BILL, DAY_US, NAMES, Event, date
from .schema import usage_event

#: Rows of one look into the database: while SQLite reads them, it cannot commit.
PAGE = 1000
#: Numbers of rows that one statement adds up.
SPAN = 20_000
#: Sums of the upper and lower 32 bits stay below 2**63 for two billion rows.
_BITS = 32
_EVENT = [usage_event.c[name] for name in NAMES]
_SEQ = usage_event.c.seq

Bill = tuple[int, int, int]
Recompute = Callable[[Event], Bill]


@dataclass(frozen=True)
class Selection:
    """Which events; None is any."""

    account: str | None = None
    model: str | None = None
    since_us: int = 0
    until_us: int | None = None

    def conditions(self) -> list:
        at = usage_event.c.at
        found = [at >= self.since_us]
        if self.until_us is not None:
            found.append(at < self.until_us)
        for name in ("account", "model"):
            if getattr(self, name) is not None:
                found.append(usage_event.c[name] == getattr(self, name))
        return found


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


#: What totals may be grouped by.
_GROUPS = {
    "day": usage_event.c.at.op("/")(sa.literal_column(str(DAY_US))),
    "model": usage_event.c.model,
    "account": usage_event.c.account,
}
_ADDED = ("images", *BILL)


def _sums() -> list:
    mask = sa.literal_column(str(2**_BITS - 1))
    columns = []
    for name in _ADDED:
        column = usage_event.c[name]
        columns += [sa.func.sum(column.op(">>")(sa.literal_column(str(_BITS)))), sa.func.sum(column.op("&")(mask))]
    return [sa.func.count(), *columns]


def _span(connection: Connection, selection: Selection) -> tuple[int, int]:
    """Numbers of the first and the last selected row; (1, 0) if there are none. Later rows are not of this answer."""
    ends = sa.select(sa.func.min(_SEQ), sa.func.max(_SEQ))
    if selection.since_us or selection.until_us is not None:  # by the index of `at`
        ends = ends.where(*Selection(since_us=selection.since_us, until_us=selection.until_us).conditions())
    first, last = connection.execute(ends).one()
    return (1, 0) if first is None else (first, last)


def each_total(database: Database, by: Sequence[str], selection: Selection) -> Iterator[Total]:
    """Totals in the order of their groups, `by` from left to right."""
    by = tuple(dict.fromkeys(by))
    if others := set(by) - set(_GROUPS):
        raise ArgumentError(f"by: expected some of {', '.join(_GROUPS)}, got {', '.join(sorted(others))}")
    return _totals(database, by, selection)


def _totals(database: Database, by: tuple[str, ...], selection: Selection) -> Iterator[Total]:
    groups = [_GROUPS[name] for name in by]
    statement = sa.select(*groups, *_sums()).where(*selection.conditions()).group_by(*groups)
    found: dict[tuple, list[int]] = {}
    with database.reading() as connection:
        first, last = _span(connection, selection)
        for low in range(first, last + 1, SPAN):
            database.pause(connection)
            part = statement.where(_SEQ.between(low, min(last, low + SPAN - 1)))
            for row in connection.execute(part):
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
    statement = sa.select(_SEQ, *_EVENT).where(*selection.conditions()).order_by(_SEQ).limit(PAGE)
    with database.reading() as connection:
        first, last = _span(connection, selection)
        while first <= last:
            database.pause(connection)
            rows = connection.execute(statement.where(_SEQ.between(first, last))).mappings().all()
            database.pause(connection)  # whoever asked may take its time with them
            yield from map(Event.of, rows)
            if len(rows) < PAGE:
                return
            first = rows[-1]["seq"] + 1


def as_json(rows: Iterable[Event | Total]) -> Iterator[str]:
    """A JSON array in pieces, an object on each line."""
    before = "["
    for row in rows:
        yield f"{before}\n{json.dumps(row.shown())}"
        before = ","
    yield "\n]\n" if before == "," else "[]\n"


def as_csv(rows: Iterable[Event | Total], kind: type[Event] | type[Total]) -> Iterator[str]:
    """CSV in pieces, a line each, after one of names. Texts that a spreadsheet would compute get an apostrophe."""
    names = [entry.name for entry in fields(kind)]
    yield _csv_line(names)
    for row in rows:
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
    checked, wrong, unknown : int
        Events seen; bills that differ; bills that could not be computed again.
    """

    def __init__(self, events: Iterator[Event], recompute: Recompute):
        self._events, self._recompute = events, recompute
        self.checked = self.wrong = self.unknown = 0

    def __iter__(self) -> Iterator[Difference]:
        for event in self._events:
            self.checked += 1
            recorded = tuple(getattr(event, name) for name in BILL)
            try:
                expected = tuple(self._recompute(event))
            except Exception as error:
                self.unknown += 1
                yield Difference(event, recorded, None, f"{type(error).__name__}: {error}")
                continue
            if expected != recorded:
                self.wrong += 1
                yield Difference(event, recorded, expected, "the bill differs")
