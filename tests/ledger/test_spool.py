"""Spool: the lenient mode answers without the database, and the database has everything in the end."""

import contextlib
import json
import time

import pytest

from cconv import ledger
from cconv.ledger import Ledger


def _wait(condition, seconds: float = 15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_events_reach_the_database(url, folder, event):
    events = [event() for _ in range(700)]
    with Ledger(url, spool=folder) as book:
        for one in events:
            assert book.append(one) == (one, False)
        _wait(lambda: not book.waiting_bytes())
        assert sorted(e.id for e in book.events()) == sorted(e.id for e in events)
    assert list(folder.iterdir()) == []


def test_the_lag_is_the_age_of_the_oldest_event_that_waits(sqlite_url, folder, event):
    path = sqlite_url.removeprefix("sqlite:///")
    lock = ledger.sqlite3.connect(path, isolation_level=None)
    with Ledger(sqlite_url, spool=folder, timeout_s=0.5) as book:
        assert book.lag_s() == 0
        lock.execute("BEGIN EXCLUSIVE")
        now = time.time_ns() // 1000
        for age_s in (40, 10):
            book.append(event(at=now - age_s * 1_000_000))
        assert 40 <= book.lag_s() < 45
        lock.execute("COMMIT")
        _wait(lambda: book.lag_s() == 0)
        assert len(list(book.events())) == 2
    lock.close()
    with Ledger(sqlite_url) as book:
        assert book.lag_s() == 0


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
    lock = ledger.sqlite3.connect(path, isolation_level=None)
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
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    with Ledger(sqlite_url, spool=folder, timeout_s=0.2) as book:
        lock.execute("BEGIN IMMEDIATE")
        book.append(event())
        time.sleep(0.6)
        assert book.waiting_bytes()
        lock.close()
        _wait(lambda: not book.waiting_bytes())
        assert len(list(book.events())) == 1


def test_it_takes_no_more_than_its_share_of_the_disk(sqlite_url, folder, event):
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
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
from cconv.ledger.spool import Spool
from pathlib import Path
url, folder = sys.argv[1:]
spool_alone = Spool(Path(folder), 1 << 30)
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
        for replay in (1, 2, 3):
            again = book.reserve("anna", "k", "body")
            assert again.replay == replay, "known at once: a keyed bill does not wait in the spool"
            assert book.record(again, event()) is None
        with pytest.raises(ledger.KeyExhausted):
            book.reserve("anna", "k", "body")
        book.append(event(idempotency_key="k"))
        _wait(lambda: not book.waiting_bytes())
        assert len(list(book.events())) == 1


def test_a_line_of_any_length_keeps_those_behind_it(sqlite_url, folder, event, caplog):
    """As long as an event may be, its quotes written twice."""
    folder.mkdir()
    events = [event(shapes='"' * 524_287, id="large"), *(event(id=f"small/{n}") for n in range(100))]
    assert len(events[0].line()) > 2 << 20
    (folder / "1.events").write_bytes(b"".join(e.line() for e in events))
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: len(list(book.events())) == 101)
        book.append(events[0])
        _wait(lambda: not book.waiting_bytes())
        assert sorted(e.id for e in book.events()) == sorted(e.id for e in events)
    assert list(folder.iterdir()) == []
    assert "ends within a line" not in caplog.text


def test_a_torn_end_is_told(sqlite_url, folder, event, caplog):
    folder.mkdir()
    (folder / "1.events").write_bytes(event().line() + b"{...")
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: list(book.events()) and not list(folder.glob("1.events")))
    assert "1.events ends within a line: 4 bytes" in caplog.text


@pytest.mark.parametrize("line", [b"[]\n", b"[" * 100_000 + b"\n", b"\xff\n"], ids=["a list", "nested", "no UTF-8"])
def test_lines_of_which_none_is_an_event_stop_nothing(sqlite_url, folder, event, line, caplog):
    folder.mkdir()
    (folder / "1.events").write_bytes(300 * line)
    with Ledger(sqlite_url, spool=folder) as book:
        book.append(event())
        _wait(lambda: len(list(book.events())) == 1 and not book.waiting_bytes())
        book.require()
        assert book.refused_lines() == 300
    assert (folder / "refused.txt").read_bytes() == 300 * (b"not an event: " + line)
    assert "the ledger fails" not in caplog.text


def test_lines_are_refused_once_however_long_the_database_is_away(sqlite_url, folder, event):
    folder.mkdir()
    (folder / "1.events").write_bytes(b"[]\n" + event().line())
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with Ledger(sqlite_url, spool=folder, timeout_s=0.1) as book:
        time.sleep(2.0)
        lock.close()
        _wait(lambda: len(list(book.events())) == 1)
    assert (folder / "refused.txt").read_bytes() == b"not an event: []\n"


def test_an_event_with_which_the_ledger_itself_fails_is_refused_alone(sqlite_url, folder, event, monkeypatch):
    """A bug is not an outage: nobody waits for it to pass."""
    from cconv.ledger import rows

    receipt = rows._receipt

    def stumble(one, stored):
        if one.id == "odd":
            raise ZeroDivisionError("a bug")
        return receipt(one, stored)

    monkeypatch.setattr(rows, "_receipt", stumble)
    with Ledger(sqlite_url, spool=folder) as book:
        for name in ("one", "odd", "two"):
            book.append(event(id=name))
        _wait(lambda: not book.waiting_bytes())
        assert [e.id for e in book.events()] == ["one", "two"]
    assert "a bug" in (folder / "refused.txt").read_text()


def test_no_error_ends_the_thread_that_empties_the_spool(sqlite_url, folder, event, monkeypatch):
    from cconv.ledger import spool

    failures, raised = [RecursionError("once"), ZeroDivisionError("twice")], []

    def adopt(self):
        if len(raised) < len(failures):
            raised.append(failures[len(raised)])
            raise raised[-1]

    monkeypatch.setattr(spool.Spool, "adopt", adopt)
    monkeypatch.setattr("cconv.ledger.ledger.ADOPT_S", 0.1)
    with Ledger(sqlite_url, spool=folder) as book:
        book.append(event())
        _wait(lambda: len(list(book.events())) == 1)
        _wait(lambda: raised == failures)
        book.require()
        book.append(event())
        _wait(lambda: len(list(book.events())) == 2)


WRITER = """
import sys
from pathlib import Path
from cconv.ledger import Event
from cconv.ledger import Ledger, spool
spool.SEGMENT_BYTES = 2000
url, folder, name, count = sys.argv[1:]
with Ledger(url, spool=folder, timeout_s=30) as book:
    book._spool.adopt()
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(int(count)):
        book.append(Event(account="a", model="m", shapes=0, macs=1, flops=2, flops_other=0, id=f"{name}/{n}"))
        if n % 10 == 0:
            book._spool.adopt()
"""


def test_processes_that_share_a_folder_lose_nothing(sqlite_url, folder, python):
    """Each makes many small segments and looks for the others' all the time."""
    processes = [python(WRITER, sqlite_url, str(folder), name, "600") for name in "abc"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with Ledger(sqlite_url, spool=folder) as book:
        _wait(lambda: not book.waiting_bytes() and not list(folder.glob("*.events")))
        assert sorted(e.id for e in book.events()) == sorted(f"{name}/{n}" for name in "abc" for n in range(600))


def test_what_waits_is_synced(sqlite_url, folder, event, monkeypatch):
    """Not before `append` returns, but soon."""
    from cconv.ledger import spool

    synced = []
    monkeypatch.setattr(spool.os, "fdatasync", synced.append)
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with Ledger(sqlite_url, spool=folder, timeout_s=0.1) as book:
        book.append(event())
        _wait(lambda: synced)
        time.sleep(1.5)
        assert len(synced) == 1, "once: nothing came since"
        book.append(event())
        _wait(lambda: len(synced) == 2)
        lock.close()


def test_it_is_ready_without_its_database_and_not_when_it_is_full(tmp_path, folder, event):
    url = f"sqlite:///{tmp_path}/none.db"
    with Ledger(url, spool=folder, spool_bytes=1000, timeout_s=0.2) as book:
        book.require()
        book.check()
        for _ in range(10):
            with contextlib.suppress(ledger.LedgerUnavailable):
                book.append(event())
        with pytest.raises(ledger.LedgerUnavailable, match="bytes wait"):
            book.append(event())
        with pytest.raises(ledger.LedgerUnavailable, match="bytes wait"):
            book.append(event())
        ledger.migrate(url)
        _wait(lambda: not book.waiting_bytes())
        book.require()
        book.append(event())


def test_a_spool_that_cannot_be_written_refuses_beforehand_and_recovers(sqlite_url, folder, event, monkeypatch):
    from cconv.ledger import spool

    write, full = spool.os.write, []

    def maybe(fd, data):
        if full:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(spool.os, "write", maybe)
    with Ledger(sqlite_url, spool=folder) as book:
        book.append(event())
        book.check()
        full.append(True)
        book.require()
        for call in (lambda: book.append(event()), book.require, book.check):
            with pytest.raises(ledger.LedgerUnavailable, match="No space left"):
                call()
        full.clear()

        def recovered():
            with contextlib.suppress(ledger.LedgerUnavailable):
                book.require()
                return True

        _wait(recovered)
        book.append(event())
        _wait(lambda: len(list(book.events())) == 2)
    assert list(folder.iterdir()) == []
