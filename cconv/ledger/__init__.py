"""Ledger: who used how much. Append-only usage events, durable before `append` returns, each billed once.

In: Events, with the bill and the shapes it came from.  Out: receipts, totals as exact integers, rows, an audit.

    callers --append, reserve, release--> [ queue ] --> one writer thread --> one transaction, one fsync --> receipts
                                                                 ^
    lenient mode: callers --> spool file ------------------------+
    totals, events, audit <-- read connections of their own, some rows at a time

Service and batch jobs bill with it. Needs SQLAlchemy and Alembic, for PostgreSQL psycopg: `pip install cconv[ledger]`.
"""

from .errors import (
    CannotRecompute,
    EventConflict,
    EventError,
    KeyExhausted,
    KeyInProgress,
    KeyReused,
    LedgerClosed,
    LedgerDoubtful,
    LedgerError,
    LedgerForked,
    LedgerRefused,
    LedgerTimeout,
    LedgerUnavailable,
    SchemaOutdated,
)
from .event import Event, Receipt
from .keys import Reservation
from .ledger import Ledger
from .migrate import migrate
from .query import GROUPS, Audit, Difference, Total, as_csv, as_json
from .sqlite import sqlite3

__all__ = [
    "GROUPS",
    "Audit",
    "CannotRecompute",
    "Difference",
    "Event",
    "EventConflict",
    "EventError",
    "KeyExhausted",
    "KeyInProgress",
    "KeyReused",
    "Ledger",
    "LedgerClosed",
    "LedgerDoubtful",
    "LedgerError",
    "LedgerForked",
    "LedgerRefused",
    "LedgerTimeout",
    "LedgerUnavailable",
    "Receipt",
    "Reservation",
    "SchemaOutdated",
    "Total",
    "as_csv",
    "as_json",
    "migrate",
    "sqlite3",
]
