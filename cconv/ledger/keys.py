"""Keys: Idempotency-Key, so that a client may send a request again and pay once.

In: a connection within a transaction, an account's key and a fingerprint of the request.  Out: a Reservation, or the
KeyReused, KeyInProgress or KeyExhausted that the caller gets.

    absent --reserve--> held by one until its lease ends --append--> billed --reserve, `replays` times--> used up
       ^                  |  (then the next may take over)
       +----- release ----+

The bill itself is unique by the events' own constraint, whatever clocks and leases say: they only save work.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .errors import KeyExhausted, KeyInProgress, KeyReused, LedgerError
from .event import now_us
from .rows import insert
from .schema import idempotency_key as table

#: A key may be released between two looks at it, but not for ever.
_LOOKS = 8


@dataclass(frozen=True)
class Reservation:
    """The right to compute a request.

    Attributes
    ----------
    account, key, fingerprint : str
    replay : int
        0 if it is to be billed: append an event with this idempotency key. Otherwise it has been, and this is so many
        times again: append nothing.
    event_id : str or None
        Of a replay, what was billed.
    """

    account: str
    key: str
    fingerprint: str
    replay: int = 0
    event_id: str | None = None
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Wish:
    """What reserve is asked for."""

    reservation: Reservation
    lease_us: int
    replays: int


def _at(reservation: Reservation):
    return sa.and_(table.c.account == reservation.account, table.c.key == reservation.key)


def reserve_all(connection: Connection, wishes: Sequence[Wish]) -> list[Reservation | LedgerError]:
    """Repeatable: a first reservation is known by its holder; of a replay at worst one fewer is left."""
    return [_reserve(connection, wish) for wish in wishes]


def _reserve(connection: Connection, wish: Wish) -> Reservation | LedgerError:
    mine = wish.reservation
    for _ in range(_LOOKS):
        now = now_us()
        lease = {"holder": mine.holder, "lease_until": now + wish.lease_us}
        row = {"account": mine.account, "key": mine.key, "fingerprint": mine.fingerprint, "replays": 0, **lease}
        new = insert(connection, table).values(row).on_conflict_do_nothing().returning(table.c.key)
        if connection.execute(new).first():
            return mine
        found = connection.execute(sa.select(table).where(_at(mine)).with_for_update()).first()
        if found is None:
            continue
        if found.fingerprint not in ("", mine.fingerprint):
            return KeyReused("idempotency key: expected the request that it was first sent with, got another")
        if found.event_id is not None:
            return _replay(connection, wish, found)
        if found.holder != mine.holder and found.lease_until > now:
            seconds = (found.lease_until - now) / 1e6
            return KeyInProgress("idempotency key: its first request is not done; try again later", seconds)
        connection.execute(sa.update(table).where(_at(mine)).values(lease))
        return mine
    return KeyInProgress("idempotency key: others reserve and release it all the time; try again later", 1.0)


def _replay(connection: Connection, wish: Wish, found) -> Reservation | KeyExhausted:
    mine = wish.reservation
    if found.replays >= wish.replays:
        return KeyExhausted(f"idempotency key: expected at most {wish.replays} repetitions, got another")
    connection.execute(
        sa.update(table).where(_at(mine)).values(replays=found.replays + 1, fingerprint=mine.fingerprint)
    )
    return Reservation(mine.account, mine.key, mine.fingerprint, found.replays + 1, found.event_id, mine.holder)


def release_all(connection: Connection, reservations: Sequence[Reservation]) -> list[None]:
    """Not repeatable: a replay that is given back twice would be one too many."""
    for mine in reservations:
        if mine.replay:
            left = sa.update(table).where(_at(mine), table.c.replays > 0)
            connection.execute(left.values(replays=table.c.replays - 1))
        else:
            unused = (table.c.holder == mine.holder, table.c.event_id.is_(None))
            connection.execute(sa.delete(table).where(_at(mine), *unused))
    return [None for _ in reservations]


reserve_all.repeatable = True
release_all.repeatable = False
