"""PostgreSQL: servers that stop, crash, cut connections, hold locks or keep nothing; test_faults.py has SQLite's."""

import contextlib
import dataclasses
import os
import signal
import threading
import time

import pytest
import sqlalchemy as sa

from cconv import ledger
from cconv.ledger import Ledger, schema
from cconv.ledger.rows import append_groups


def _until_available(call, seconds: float = 15):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except ledger.LedgerUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_goes_and_comes_back(postgres, postgres_url, event, mode):
    with Ledger(postgres_url) as book:
        book.append(event(id="before"))
        postgres.stop(mode)
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(ledger.LedgerUnavailable):
                book.append(event(id="refused"))
        assert time.monotonic() - began < 5
        postgres.start()
        began = time.monotonic()
        _until_available(book.check)
        assert time.monotonic() - began < 5
        book.append(event(id="after"))
        assert [e.id for e in book.events()] == ["before", "after"]


def test_a_server_that_restarts_between_two_events_is_not_noticed(postgres, postgres_url, event):
    with Ledger(postgres_url) as book:
        book.append(event(id="before"))
        postgres.stop("fast")
        postgres.start()
        book.append(event(id="after"))
        assert [e.id for e in book.events()] == ["before", "after"]


def test_a_crash_loses_no_acknowledged_event(postgres, postgres_url, event):
    """`immediate` is the server's own crash: it recovers from its log. What was under way is there once or not."""
    acknowledged, refused = [], []
    with Ledger(postgres_url) as book:

        def work(thread):
            for n in range(400):
                try:
                    acknowledged.append(book.append(event(id=f"{thread}/{n}")).event.id)
                except ledger.LedgerUnavailable:
                    refused.append(n)
                    time.sleep(0.01)

        threads = [threading.Thread(target=work, args=[thread]) for thread in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        postgres.stop("immediate")
        postgres.start()
        for thread in threads:
            thread.join()
        _until_available(book.check)
        ids = [e.id for e in book.events()]
    assert refused
    assert len(ids) == len(set(ids))
    assert set(acknowledged) <= set(ids)


def test_connections_that_the_server_ends_lose_nothing(postgres, postgres_url, event):
    """A commit whose answer does not come is tried again, and is one row."""
    acknowledged = []
    with Ledger(postgres_url) as book:
        ended, cut = threading.Event(), []

        def end():
            name = book._database.url.database
            while not ended.is_set():
                cut.extend(postgres.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{name}' AND pid <> pg_backend_pid()"
                ))  # fmt: skip
                time.sleep(0.02)

        killer = threading.Thread(target=end)
        killer.start()
        for n in range(150):
            one = event(id=f"e{n}")
            _until_available(lambda one=one: acknowledged.append(book.append(one).event.id))
        ended.set()
        killer.join()
        _until_available(book.check)
        ids = _until_available(lambda: [e.id for e in book.events()])
    assert sorted(acknowledged) == sorted(ids)
    assert cut.count((True,)) > 3, "connections were cut"


def test_a_server_that_hangs_is_a_refusal_in_time(postgres_url, event):
    """Its process is stopped: the connection stays open, and no answer comes."""
    with Ledger(postgres_url, timeout_s=1) as book:
        book.append(event(id="before"))
        pid = book._writer._connection.connection.driver_connection.info.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(ledger.LedgerDoubtful):
                book.append(event(id="doubtful"))
            for _ in range(10):
                with pytest.raises(ledger.LedgerUnavailable) as caught:
                    book.append(event(id="refused"))
                assert not isinstance(caught.value, ledger.LedgerDoubtful)
            assert time.monotonic() - began < 4, "who comes later is refused at once"
        finally:
            os.kill(pid, signal.SIGCONT)
        _until_available(book.check)
        book.append(event(id="doubtful"))
        assert sorted(e.id for e in book.events()) == ["before", "doubtful"]


def test_a_commit_without_an_answer_is_doubtful_even_if_the_server_is_gone_then(postgres, postgres_url, event):
    with Ledger(postgres_url) as book:
        book.append(event(id="before"))
        connection = book._writer._connection

        def commit_and_cut(_):
            """The server commits, and its answer is lost with it."""
            connection.connection.driver_connection.commit()
            postgres.stop("fast")
            raise sa.exc.OperationalError("COMMIT", None, Exception("connection lost"), connection_invalidated=True)

        sa.event.listen(connection, "commit", commit_and_cut)
        try:
            with pytest.raises(ledger.LedgerDoubtful):
                book.append(event(id="doubtful"))
        finally:
            postgres.start()
        _until_available(book.check)
        again = event(id="doubtful")
        assert book.append(again).duplicate
        assert sorted(e.id for e in book.events()) == ["before", "doubtful"]


def test_a_lock_that_is_held_is_a_refusal_in_time(postgres, postgres_url, event):
    import psycopg

    with Ledger(postgres_url, timeout_s=0.5) as book:
        book.check()
        name = book._database.url.database
        with psycopg.connect(f"host={postgres.folder} user={postgres.user} dbname={name}") as blocker:
            blocker.execute("LOCK TABLE usage_event IN ACCESS EXCLUSIVE MODE")
            began = time.monotonic()
            with pytest.raises(ledger.LedgerUnavailable):
                book.append(event())
            assert time.monotonic() - began < 3
            blocker.rollback()
        _until_available(book.check)
        book.append(event())


def test_sessions_are_durable_whatever_the_server_says(postgres, postgres_url, event):
    name = postgres_url.rpartition("@/")[2].partition("?")[0]
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with Ledger(postgres_url) as book:
        book.append(event())
        cursor = book._writer._connection.connection.driver_connection.execute("SHOW synchronous_commit")
        assert cursor.fetchone() == ("on",)


def test_a_read_only_server_is_refused(postgres, postgres_url, event):
    name = postgres_url.rpartition("@/")[2].partition("?")[0]
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with Ledger(postgres_url) as book, pytest.raises(ledger.LedgerUnavailable, match="read-only"):
        book.append(event())


def test_a_server_without_fsync_is_refused(postgres, postgres_url, event):
    postgres.sql("ALTER SYSTEM SET fsync = off")
    try:
        postgres.sql("SELECT pg_reload_conf()")
        time.sleep(0.2)
        with Ledger(postgres_url) as book, pytest.raises(ledger.LedgerUnavailable, match="without fsync"):
            book.append(event())
    finally:
        postgres.sql("ALTER SYSTEM RESET fsync")
        postgres.sql("SELECT pg_reload_conf()")
        time.sleep(0.2)


def test_a_deadlock_of_two_ledgers_is_resolved(postgres, postgres_url, event):
    """Two writers that hold each other's rows: the server ends one, which goes again."""
    met, results = threading.Barrier(2), []

    def cross(connection, pairs):
        for pair in pairs:
            for key in pair:
                row = sa.update(schema.idempotency_key).where(schema.idempotency_key.c.key == key)
                connection.execute(row.values(replays=schema.idempotency_key.c.replays + 1))
                with contextlib.suppress(threading.BrokenBarrierError):  # both have their first row now
                    met.wait(3)
                    met.abort()
        return pairs

    with Ledger(postgres_url, timeout_s=20) as one, Ledger(postgres_url, timeout_s=20) as other:
        for key in ("a", "b"):
            one.append(event(idempotency_key=key))
        other.check()
        threads = [
            threading.Thread(target=lambda book=book, pair=pair: results.append(book._submit(cross, pair)))
            for book, pair in ((one, ("a", "b")), (other, ("b", "a")))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [("a", "b"), ("b", "a")]
    name = postgres_url.rpartition("@/")[2].partition("?")[0]
    assert postgres.sql("SELECT replays FROM idempotency_key", name) == [(2,), (2,)]
    end = time.monotonic() + 10
    while postgres.sql(f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{name}'") == [(0,)]:
        assert time.monotonic() < end, "there was no deadlock"
        time.sleep(0.1)


def test_writers_that_append_the_same_events_record_each_once(postgres_url, event):
    """In whatever order they come: a group is sorted, so that two wait for each other and not both."""
    with Ledger(postgres_url, timeout_s=20) as one, Ledger(postgres_url, timeout_s=20) as other:
        results = []
        for round_ in range(10):
            groups = [[event(id=f"{round_}/{n}")] for n in range(40)]
            again = [[dataclasses.replace(e, compute_us=1) for e in group] for group in reversed(groups)]
            threads = [
                threading.Thread(
                    target=lambda book=book, group=group: results.append(book._submit(append_groups, group))
                )
                for book, all_ in ((one, groups), (other, again))
                for group in all_
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        receipts = [receipt for group in results for receipt in group]
        assert len(receipts) == 800
        assert sum(receipt.duplicate for receipt in receipts) == 400
        assert [total.events for total in one.totals(by=[])] == [400]
