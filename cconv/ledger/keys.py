"""Keys: Idempotency-Key, so that a client may send a request again and pay once.

In: an account's key, a fingerprint of the request, and connections within the writer's transactions.  Out: a
Reservation, or the KeyReused, KeyInProgress or KeyExhausted that the caller gets.

    absent --reserve--> held --record--> billed --reserve, record: `replays` times--> used up
       ^                  |                ^            |
       +----- release ----+                +- release --+

Who holds a key stands in this process's memory alone, so it ends with the process, and to give it back cannot fail. The
database has the keys that are billed: a row is made in the transaction of the bill, and counts what was answered again.
Processes that compute the same request at the same time do so for nothing: the bill is unique by the events' own
constraint, and the later ones' answers count as repetitions.
"""

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .errors import KeyExhausted, KeyInProgress, KeyReused, LedgerError
from .event import Event, Receipt
from .rows import append_bound
from .schema import idempotency_key as table


@dataclass(frozen=True)
class Reservation:
    """The right to compute a request.

    Attributes
    ----------
    account, key, fingerprint : str
    replay : int
        0 if it is to be billed. Otherwise it has been, and this is so many times again.
    event_id : str or None
        Of a replay, what was billed.
    """

    account: str
    key: str
    fingerprint: str
    replay: int = 0
    event_id: str | None = None
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)


class Held:
    """The keys that someone computes at this moment, in this process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._by_key: dict[tuple[str, str], Reservation] = {}

    def take(self, mine: Reservation) -> None:
        with self._lock:
            found = self._by_key.setdefault((mine.account, mine.key), mine)
        if found.fingerprint != mine.fingerprint:
            raise _reused()
        if found.holder != mine.holder:
            raise KeyInProgress("idempotency key: its request is being computed; try again later", 1.0)

    def give(self, mine: Reservation) -> None:
        with self._lock:
            found = self._by_key.get((mine.account, mine.key))
            if found is not None and found.holder == mine.holder:
                del self._by_key[mine.account, mine.key]


def _reused() -> KeyReused:
    return KeyReused("idempotency key: expected the request that it was first sent with, got another")


def _at(mine: Reservation):
    return sa.and_(table.c.account == mine.account, table.c.key == mine.key)


def find_all(connection: Connection, wishes: Sequence[tuple[Reservation, int]]) -> list[Reservation | LedgerError]:
    """Each reservation as the database knows its key, of which so many repetitions are allowed. Writes nothing."""
    found = []
    for mine, replays in wishes:
        row = connection.execute(sa.select(table).where(_at(mine))).first()
        if row is None:
            found.append(mine)
        elif row.fingerprint not in ("", mine.fingerprint):
            found.append(_reused())
        elif row.replays >= replays:
            found.append(KeyExhausted(f"idempotency key: expected at most {replays} repetitions, got another"))
        else:
            found.append(replace(mine, replay=row.replays + 1, event_id=row.event_id))
    return found


def record_all(
    connection: Connection, wishes: Sequence[tuple[Reservation, Event]]
) -> list[Receipt | LedgerError | None]:
    """Bill each request under its key, or count that it was answered again. The same wish again changes nothing."""
    receipts = iter(append_bound(connection, [(event, mine.fingerprint) for mine, event in wishes if not mine.replay]))
    return [_repeated(connection, mine, None if mine.replay else next(receipts)) for mine, _ in wishes]


def _repeated(
    connection: Connection, mine: Reservation, receipt: Receipt | LedgerError | None
) -> Receipt | LedgerError | None:
    """Count a repetition: of what was known to be billed, or of what another process billed meanwhile."""
    if isinstance(receipt, LedgerError) or (receipt is not None and not receipt.duplicate):
        return receipt
    row = connection.execute(sa.select(table).where(_at(mine)).with_for_update()).first()
    if row is None:  # a duplicate by its id: another event, which has no key
        return receipt
    if row.fingerprint not in ("", mine.fingerprint):
        return _reused()
    values = {"fingerprint": mine.fingerprint, "replays": max(row.replays, mine.replay or 1)}
    connection.execute(sa.update(table).where(_at(mine)).values(values))
    return receipt
