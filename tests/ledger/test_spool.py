"""Spool: the lenient mode answers without the database, and the database has everything in the end."""

import json
import sqlite3
import time

import pytest

from cconv import ledger
from cconv.ledger import Ledger


def _wait(condition, seconds: float = 15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "spool"


def test_events_reach_the_database(url, folder, event):
    events = [event() for _ in range(700)]
    with Ledger(url, spool=folder) as book:
        for one in events:
            assert book.append(one) == (one, False)
        _wait(lambda: not book.waiting_bytes())
        assert sorted(e.id for e in book.events()) == sorted(e.id for e in events)
    assert list(folder.iterdir()) == []


def test_closing_drains(url, folder, event):
    with Ledger(url, spool=folder) as book:
        for _ in range(300):
            book.append(event())
        assert book.close()
        with pytest.raises(ledger.LedgerClosed):
            book.append(event())
    with Ledger(url) as book:
        assert len(list(book.events())) == 300


def test_without_its_database_it_takes_events_and_keeps_them_for_the_next_process(sqlite_url, folder, event):
    path = sqlite_url.removeprefix("sqlite:///")
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    events = [event() for _ in range(50)]
    book = Ledger(sqlite_url, spool=folder, timeout_s=0.2)
    for one in events:
        book.append(one)
    with pytest.raises(ledger.LedgerUnavailable):
        book.reserve("anna", "k", "body")
    assert not book.close(timeout_s=1)
    lock.execute("ROLLBACK")
    assert lock.execute("SELECT count(*) FROM usage_event").fetchone() == (0,)
    lock.close()
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: len(list(book.events())) == 50)
        assert sorted(e.id for e in book.events()) == sorted(e.id for e in events)


def test_it_recovers_when_the_database_does(sqlite_url, folder, event):
    lock = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    with Ledger(sqlite_url, spool=folder, timeout_s=0.2) as book:
        lock.execute("BEGIN IMMEDIATE")
        book.append(event())
        time.sleep(0.6)
        assert book.waiting_bytes()
        lock.close()
        _wait(lambda: not book.waiting_bytes())
        assert len(list(book.events())) == 1


def test_it_takes_no_more_than_its_share_of_the_disk(sqlite_url, folder, event):
    lock = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with Ledger(sqlite_url, spool=folder, spool_bytes=5000, timeout_s=0.2) as book:
        taken = []

        def fill():
            for _ in range(100):
                book.append(event())
                taken.append(True)

        with pytest.raises(ledger.LedgerUnavailable, match="5000 bytes wait"):
            fill()
        assert 5 < len(taken) < 50
        lock.close()
        _wait(lambda: not book.waiting_bytes())
        book.append(event())
        _wait(lambda: len(list(book.events())) == len(taken) + 1)


@pytest.mark.parametrize("torn", [b"{", b'{"id": "x"', b"\0" * 100], ids=["a brace", "half an event", "zeros"])
def test_a_line_that_a_kill_cut_short_is_left_out(sqlite_url, folder, event, torn):
    folder.mkdir()
    whole = event()
    (folder / "1.events").write_bytes(whole.line() + torn)
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: list(book.events()) == [whole])
        book.append(event())
        _wait(lambda: len(list(book.events())) == 2)
    assert list(folder.iterdir()) == []


def test_what_no_ledger_takes_is_kept_for_people_and_stops_nothing(sqlite_url, folder, event):
    folder.mkdir()
    first, last = event(id="one"), event(id="two")
    wrong = json.loads(first.line()) | {"flops": 99}
    negative = json.loads(first.line()) | {"flops": -1, "id": "three"}
    lines = [first.line(), *(json.dumps(row).encode() + b"\n" for row in (wrong, negative)), b"[]\n", last.line()]
    (folder / "1.events").write_bytes(b"".join(lines))
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: list(book.events()) == [first, last])
    assert [file.name for file in folder.iterdir()] == ["refused.txt"]
    assert len((folder / "refused.txt").read_text().splitlines()) == 3


def test_the_segments_of_a_living_process_are_its_own(sqlite_url, folder, event, python):
    script = """
import sys
from cconv.ledger import Event
from cconv.ledger.spool import Spool
spool = Spool(sys.argv[1], 1 << 20)
spool.append(Event(account="a", model="m", shapes=0, macs=1, flops=2, flops_other=0, id="theirs"))
print("ready", flush=True)
sys.stdin.readline()
"""
    process = python(script, str(folder))
    assert process.stdout.readline() == "ready\n"
    with Ledger(sqlite_url, spool=folder) as book:
        book.append(event(id="mine"))
        _wait(lambda: list(book.events()))
        assert [e.id for e in book.events()] == ["mine"]
    process.communicate("end\n")
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: len(list(book.events())) == 2)


def test_a_full_disk_is_a_refusal_and_leaves_no_half_line(sqlite_url, folder, python):
    script = """
import resource, sys, time
from cconv import ledger
from cconv.ledger import Event, Ledger
from pathlib import Path
url, folder = sys.argv[1:]
spool_alone = ledger.book.Spool(Path(folder), 1 << 30)
def one(n):
    return Event(account="a", model="m", shapes="x" * 3000, macs=1, flops=2, flops_other=0, id=f"e{n}")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
taken = []
for n in range(20):
    try:
        spool_alone.append(one(n))
        taken.append(n)
    except ledger.LedgerUnavailable:
        break  # the next line follows on what was cut off
assert 4 < len(taken) < 7, taken
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool_alone.append(one(99))
spool_alone.close()
with Ledger(url, spool=folder) as book:
    deadline = time.monotonic() + 20
    while len(list(book.events())) < len(taken) + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [event.id for event in book.events()] == sorted(f"e{n}" for n in [*taken, 99])
print("done")
"""
    out, _ = python(script, sqlite_url, str(folder)).communicate(timeout=60)
    assert out == "done\n"


def test_keys_are_billed_once_in_the_lenient_mode_too(url, folder, event):
    with Ledger(url, spool=folder) as book:
        book.record(book.reserve("anna", "k", "body"), event())
        _wait(lambda: not book.waiting_bytes())
        assert [book.reserve("anna", "k", "body").replay for _ in range(3)] == [1, 2, 3]
        with pytest.raises(ledger.KeyExhausted):
            book.reserve("anna", "k", "body")
        book.append(event(idempotency_key="k"))
        _wait(lambda: not book.waiting_bytes())
        assert len(list(book.events())) == 1
