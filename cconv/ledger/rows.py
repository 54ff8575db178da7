"""Rows: what the writer does to the events' table. Each function takes a whole group of operations in one transaction,
and may be run again after a transaction of which nobody knows whether it was committed.

In: a connection within a transaction, and events.  Out: for each a Receipt, or the EventConflict that its caller gets.
"""

from collections.abc import Sequence
from functools import cache
from itertools import islice

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from .errors import EventConflict
from .event import NAMES, Event, Receipt, now_us
from .schema import idempotency_key, ledger_probe, usage_event

_INSERT = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
_COLUMNS = [usage_event.c[name] for name in NAMES]


def insert(connection: Connection, table: sa.Table):
    """An INSERT that knows ON CONFLICT, in this database's dialect."""
    return _INSERT[connection.dialect.name](table)


@cache
def _append(dialect: str):
    """Made once: it takes as long as the rest of a small group."""
    return _INSERT[dialect](usage_event).on_conflict_do_nothing().returning(usage_event.c.id)


@cache
def _append_one() -> tuple[str, list[str]]:
    """For SQLite's own driver, and the names of its places: of one row it says itself whether it is new."""
    statement = sqlite.insert(usage_event).on_conflict_do_nothing()
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="qmark"), column_keys=NAMES)
    return str(compiled), compiled.positiontup


def _append_rows(connection: Connection, rows: Sequence[dict]) -> set[str]:
    """The ids of those that are new."""
    if len(rows) > 1:
        return set(connection.execute(_append(connection.dialect.name), rows).scalars())
    if connection.dialect.name != "sqlite":  # a list of one would go the long way of a list
        return set(connection.execute(_append(connection.dialect.name), rows[0]).scalars())
    # Whoever waits for a single row waits for SQLAlchemy as long as for SQLite.
    statement, names = _append_one()
    cursor = connection.connection.driver_connection.execute(statement, [rows[0][name] for name in names])
    return {rows[0]["id"]} if cursor.rowcount else set()


def append_all(connection: Connection, events: Sequence[Event]) -> list[Receipt | EventConflict]:
    """Insert what is new."""
    return append_bound(connection, [(event, "") for event in events])


def append_bound(connection: Connection, pairs: Sequence[tuple[Event, str]]) -> list[Receipt | EventConflict]:
    """Insert what is new, each event with the fingerprint that its idempotency key is for from now on."""
    if not pairs:
        return []
    # In the order of ids: two processes that insert the same ones wait for each other, not both.
    rows = [event.row() for event, _ in sorted(pairs, key=lambda pair: pair[0].id)]
    fresh = _append_rows(connection, rows)
    receipts = []
    for event, fingerprint in pairs:
        stored = event if event.id in fresh else _stored(connection, event)
        fresh.discard(event.id)
        receipts.append(_receipt(event, stored))
        if event.idempotency_key is not None and stored == event:
            _bind(connection, event, fingerprint)
    return receipts


def append_groups(connection: Connection, groups: Sequence[Sequence[Event]]) -> list[list[Receipt | EventConflict]]:
    """Groups that came together, of which each gets its own receipts."""
    receipts = iter(append_all(connection, [event for group in groups for event in group]))
    return [list(islice(receipts, len(group))) for group in groups]


def _receipt(event: Event, stored: Event) -> Receipt | EventConflict:
    if stored is event:  # as nearly all are: to compare them takes as long as to insert one
        return Receipt(event, False)
    if stored.id == event.id and not stored.same_bill(event):
        return EventConflict(f"event {event.id}: expected the bill that is recorded, got another; nothing was recorded")
    return Receipt(stored, stored != event)


def _stored(connection: Connection, event: Event) -> Event:
    """The event that stood in the way of this one."""
    same_key = sa.and_(usage_event.c.account == event.account, usage_event.c.idempotency_key == event.idempotency_key)
    found = sa.select(*_COLUMNS).where(sa.or_(usage_event.c.id == event.id, same_key))
    rows = sorted(connection.execute(found).mappings(), key=lambda row: row["id"] != event.id)
    return Event.of(rows[0])


def _bind(connection: Connection, event: Event, fingerprint: str) -> None:
    """The key's request is billed now; where it is already, this is the same event again."""
    row = {"account": event.account, "key": event.idempotency_key, "fingerprint": fingerprint, "event_id": event.id}
    connection.execute(insert(connection, idempotency_key).values(replays=0, **row).on_conflict_do_nothing())


def probe_all(connection: Connection, probes: Sequence[None]) -> list[None]:
    """Write something, to see that it can be done."""
    statement = insert(connection, ledger_probe).values(id=1, at=now_us())
    connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"at": statement.excluded.at}))
    return [None for _ in probes]
