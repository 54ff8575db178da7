"""PostgreSQL: servers that stop, crash, cut connections, hold locks or keep nothing; test_faults.py has SQLite's."""

import os
import signal
import threading
import time

import pytest
import sqlalchemy as sa

from cconv import ledger
from cconv.ledger import Ledger


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
        ended = threading.Event()

        def end():
            name = book._database.url.database
            while not ended.is_set():
                postgres.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{name}' AND pid <> pg_backend_pid()"
                )
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
            assert time.monotonic() - began < 2, "who comes later is refused at once"
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


def test_a_deadlock_of_two_ledgers_is_resolved(postgres_url, event):
    """Two writers whose groups hold each other's rows: the server ends one, which goes on with its tasks one by one."""
    import dataclasses

    from cconv.ledger.rows import append_groups

    with Ledger(postgres_url, timeout_s=20) as one, Ledger(postgres_url, timeout_s=20) as other:
        for book in (one, other):
            book.check()
        for round_ in range(10):
            groups = [[event(id=f"{round_}/{n}")] for n in range(40)]
            again = [[dataclasses.replace(e, compute_us=1) for e in group] for group in reversed(groups)]
            threads = [
                threading.Thread(target=book._submit, args=[append_groups, group])
                for book, all_ in ((one, groups), (other, again))
                for group in all_
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [total.events for total in one.totals(by=[])] == [400]
