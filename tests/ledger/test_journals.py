"""Journals: which SQLite opens a ledger, and its journal: a write-ahead log where that is safe and can be had.

In: pretended versions and file systems, and a Python of its own that has nothing but its own SQLite.  Out: every event,
and no file that two kinds of journal write at a time.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cconv import ArgumentError, ledger
from cconv.ledger import Ledger, database, sqlite


def journal(book) -> str:
    """The journal of a ledger's own connection, which may be asked as the writer's thread is idle."""
    (name,) = book._writer._connection.connection.driver_connection.execute("PRAGMA journal_mode").fetchone()
    return name


def pretend(monkeypatch, safe: bool) -> None:
    monkeypatch.setattr(database, "wal_is_safe", lambda _: safe)


def until_available(call, seconds: float = 10):
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except ledger.LedgerUnavailable:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_the_newest_sqlite_is_taken():
    python, package, same = (SimpleNamespace(sqlite_version_info=v) for v in ((3, 40, 1), (3, 53, 4), (3, 40, 1)))
    assert sqlite.newest(python, package) is package
    assert sqlite.newest(package, python) is package
    assert sqlite.newest(python, same) is python, "one that is built against the system's brings nothing"
    assert ledger.sqlite3 is sqlite.newest(sqlite.of_python, sqlite.of_package) is database.sqlite3


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False), ((3, 44, 5), False), ((3, 44, 6), True), ((3, 45, 0), False), ((3, 46, 1), False),
        ((3, 50, 6), False), ((3, 50, 7), True), ((3, 51, 0), False), ((3, 51, 2), False), ((3, 51, 3), True),
        ((3, 53, 0), True),
    ],
)  # fmt: skip
def test_the_write_ahead_log_is_for_versions_that_have_the_fix(sqlite_url, event, monkeypatch, version, safe):
    assert database.wal_is_safe(version) is safe
    monkeypatch.setattr(database.sqlite3, "sqlite_version_info", version)
    with Ledger(sqlite_url) as book:
        book.append(event())
        cursor = book._writer._connection.connection.driver_connection
        # The writer's own thread is idle, so its connection may be asked.
        assert cursor.execute("PRAGMA journal_mode").fetchone() == ("wal" if safe else "persist",)


def test_an_sqlite_without_returning_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(database.sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ArgumentError, match=r"expected SQLite 3\.35\.0 or newer"):
        Ledger(f"sqlite:///{tmp_path}/usage.db")


def test_a_log_that_an_unsafe_version_finds_is_given_up(sqlite_url, event, monkeypatch):
    monkeypatch.setattr(database, "wal_is_safe", lambda _: True)
    with Ledger(sqlite_url) as book:
        book.append(event())
    monkeypatch.setattr(database, "wal_is_safe", lambda _: False)
    with Ledger(sqlite_url) as book:
        book.append(event())
        assert len(list(book.events())) == 2
    with open(sqlite_url.removeprefix("sqlite:///"), "rb") as file:
        assert file.read(20)[18:] == b"\1\1", "the file's own mark of its journal"


def test_an_unsafe_version_writes_nothing_beside_one_that_has_a_log(sqlite_url, event, monkeypatch, caplog):
    """Neither when it comes later, nor when it was there before; and it goes on once the other one has gone."""
    pretend(monkeypatch, safe=False)
    with Ledger(sqlite_url, timeout_s=0.3) as early:
        early.append(event(id="one"))
        pretend(monkeypatch, safe=True)
        safe = Ledger(sqlite_url)
        safe.append(event(id="two"))
        pretend(monkeypatch, safe=False)
        with pytest.raises(ledger.LedgerUnavailable, match="write-ahead log, which is not safe with SQLite 3"):
            early.append(event(id="refused"))
        with Ledger(sqlite_url, timeout_s=0.3) as late, pytest.raises(ledger.LedgerUnavailable, match="locked"):
            late.append(event(id="refused too"))
        assert "which is not safe with SQLite 3" in caplog.text
        assert [e.id for e in early.events()] == ["one", "two"], "to read is safe"
        safe.close()
        until_available(early.check)
        assert journal(early) == "persist"
        early.append(event(id="three"))
        assert [e.id for e in early.events()] == ["one", "two", "three"]


#: A ledger by Python's own SQLite, as where there is no wheel of the other.
ALONE = """
import json, sys
sys.modules["pysqlite3"] = None
from cconv import ledger
from cconv.ledger import Event, Ledger, sqlite
assert ledger.sqlite3 is sqlite.of_python
url, name = sys.argv[1:]
ledger.migrate(url)
with Ledger(url) as book:
    book.append(Event(account="a", model="m", shapes=[], macs=1, flops=2, flops_other=0, id=name))
    print(json.dumps([event.id for event in book.events()]))
"""


def test_either_sqlite_goes_on_with_the_others_file(python, tmp_path, event):
    url = f"sqlite:///{tmp_path}/usage.db"
    expected = []
    for turn in range(3):
        out, _ = python(ALONE, url, f"python {turn}").communicate(timeout=60)
        expected.append(f"python {turn}")
        assert json.loads(out) == expected
        ledger.migrate(url)
        with Ledger(url) as book:
            book.append(event(id=f"ours {turn}"))
            assert journal(book) == ("wal" if database.wal_is_safe(ledger.sqlite3.sqlite_version_info) else "persist")
            expected.append(f"ours {turn}")
            assert [e.id for e in book.events()] == expected


#: It leaves a log behind that nobody has written into the database's file.
LEAVER = """
import os, sys
from cconv.ledger import Event, Ledger, database
database.wal_is_safe = lambda version: True
book = Ledger(sys.argv[1])
book.append(Event(account="a", model="m", shapes=[], macs=1, flops=2, flops_other=0, id="left"))
print("left", flush=True)
os.kill(os.getpid(), 9)
"""


def test_python_s_own_sqlite_takes_over_a_log_that_was_left(python, sqlite_url):
    left = python(LEAVER, sqlite_url)
    assert left.communicate(timeout=60)[0] == "left\n"
    assert Path(sqlite_url.removeprefix("sqlite:///") + "-wal").stat().st_size > 0
    out, _ = python(ALONE, sqlite_url, "after").communicate(timeout=60)
    assert json.loads(out) == ["left", "after"]
    safe = database.wal_is_safe(sqlite.of_python.sqlite_version_info)
    with open(sqlite_url.removeprefix("sqlite:///"), "rb") as file:
        assert file.read(20)[18:] == (b"\2\2" if safe else b"\1\1")


def test_where_there_is_no_log_the_journal_is_a_rollback_journal(tmp_path, event, monkeypatch, caplog):
    """By SQLite's layer for file systems that have neither locks nor shared memory."""

    def connect(self):
        name, threads = f"file:{self._path}?vfs=unix-dotfile", {"check_same_thread": False}
        return ledger.sqlite3.connect(name, uri=True, isolation_level=None, **threads)

    url = f"sqlite:///{tmp_path}/usage.db"
    pretend(monkeypatch, safe=False)
    ledger.migrate(url)
    pretend(monkeypatch, safe=True)
    monkeypatch.setattr(database.Database, "_connect_sqlite", connect)
    with Ledger(url) as book:
        book.append(event())
        assert journal(book) == "persist"
        assert len(list(book.events())) == 1
    assert "has no write-ahead log" in caplog.text


@pytest.mark.parametrize("log", [False, True], ids=["never had one", "has one"])
def test_where_files_are_not_shared_as_memory_the_journal_is_a_rollback_journal(
    tmp_path, python, shim, monkeypatch, event, log
):
    """Nor is a log begun there, which nobody could open again; one that was brought along is given up."""
    script = """
import sys
from cconv.ledger import Event, Ledger, database
database.wal_is_safe = lambda version: True
with Ledger(sys.argv[1]) as book:
    book.append(Event(account="a", model="m", shapes=[], macs=1, flops=2, flops_other=0, id="there"))
    print(*(event.id for event in book.events()))
"""
    url = f"sqlite:///{tmp_path}/usage.db"
    pretend(monkeypatch, safe=log)
    ledger.migrate(url)
    with Ledger(url) as book:
        book.append(event(id="elsewhere"))
    preload = {"LD_PRELOAD": str(shim), "SYNC_FAILS": str(tmp_path / "never"), "MAPS_FAIL": "1"}
    out, _ = python(script, url, **preload).communicate(timeout=60)
    assert out == "elsewhere there\n"
    with open(tmp_path / "usage.db", "rb") as file:
        assert file.read(20)[18:] == b"\1\1", "the file's own mark of its journal"


def test_a_reader_who_is_the_last_to_close_and_so_writes_the_log_back_is_as_durable(sqlite_url, event, monkeypatch):
    pretend(monkeypatch, safe=True)
    log = Path(sqlite_url.removeprefix("sqlite:///") + "-wal")
    with database.Database(sqlite_url).reading() as connection:
        with Ledger(sqlite_url) as book:
            book.append(event())
        assert log.exists()
        ask = connection.connection.driver_connection.execute
        assert [ask(f"PRAGMA {name}").fetchone() for name in ("synchronous", "fullfsync")] == [(2,), (1,)]
    assert not log.exists()


def test_a_log_that_has_grown_shrinks_again(sqlite_url, event, monkeypatch):
    pretend(monkeypatch, safe=True)
    monkeypatch.setattr(database, "LOG_BYTES", 1 << 16)
    log = Path(sqlite_url.removeprefix("sqlite:///") + "-wal")
    with Ledger(sqlite_url) as book:
        large = [event(shapes="x" * 1_000_000) for _ in range(3)]
        for one in large:
            book.append(one)
        grown = log.stat().st_size
        assert grown > 3_000_000
        for _ in range(300):
            book.append(event())
            assert log.stat().st_size < grown + (database.LOG_PAGES << 12)
        assert log.stat().st_size < grown
