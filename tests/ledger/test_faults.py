"""Faults: full disks, fsync errors, locked and absent databases. What is refused is not there, what is acknowledged is,
and the ledger recovers by itself.

The disk is a limit on file sizes, or a library that is loaded before libc and fails at fsync and fdatasync while a file
exists; it also counts them, which is the only way to see that a commit was on the disk: a process that is killed keeps
what its system has in memory.
"""

import json
import threading
import time

import pytest
import sqlalchemy as sa

from cconv import ledger
from cconv.ledger import Ledger
from cconv.ledger.rows import append_all

#: A ledger that does what it is told, a line at a time, and answers with JSON.
OBEDIENT = """
import ctypes, json, os, resource, sys
from cconv import ArgumentError, ledger
from cconv.ledger import Event, Ledger, database
database.wal_is_safe = lambda version: bool(os.environ["WAL"])
book = Ledger(sys.argv[1], timeout_s=5)
sent = 0
def syncs():
    return ctypes.CDLL(None).syncs()
for line in sys.stdin:
    command, *words = line.split()
    answer = None
    if command == "append":
        try:
            sent += 1
            event = Event(account="a", model="m", shapes="x" * 2000, macs=1, flops=2, flops_other=0, id=f"e{sent}")
            book.append(event)
            answer = event.id
        except ledger.LedgerUnavailable as error:
            answer = {"refused": event.id, "doubtful": isinstance(error, ledger.LedgerDoubtful), "text": str(error)}
    elif command == "reserve":
        answer = book.reserve("a", words[0], "body").replay
    elif command == "syncs":
        answer = syncs()
    elif command == "limit":
        limit = int(words[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    elif command == "ids":
        answer = [event.id for event in book.events()]
    elif command == "close":
        answer = book.close()
    print(json.dumps(answer), flush=True)
"""


class Obedient:
    def __init__(self, process):
        self._process = process

    def __call__(self, command: str):
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def append_until(self, wanted: type, tries: int = 400):
        """Append until the answer is of this type, a text for what is recorded; all answers on the way."""
        answers = []
        for _ in range(tries):
            answers.append(self("append"))
            if isinstance(answers[-1], wanted):
                return answers
            time.sleep(0.02)
        raise AssertionError(answers[-3:])


@pytest.fixture
def failing(tmp_path):
    """While this file exists, fsync fails."""
    return tmp_path / "fsync fails"


@pytest.fixture(params=["", "1"], ids=["rollback journal", "write-ahead log"])
def obedient(request, python, sqlite_url, shim, failing):
    """A ledger in a process of its own; in WAL mode too, where it is the only one that writes."""
    environment = {"LD_PRELOAD": str(shim), "SYNC_FAILS": str(failing), "WAL": request.param}
    return Obedient(python(OBEDIENT, sqlite_url, **environment))


#: Of a commit with synchronous=FULL: the journal's pages, its header, the database and the journal's end; of a
#: write-ahead log the log alone.
SYNCS = {"rollback journal": 5, "write-ahead log": 1}


def soft(statement: str) -> str:
    """The obedient ledger on connections that were made soft beforehand, as a build of SQLite may make them."""
    return OBEDIENT.replace(
        "book = ",
        f"""
connect = database.Database._connect_sqlite
def soften(self):
    connection = connect(self)
    connection.execute({statement!r})
    return connection
database.Database._connect_sqlite = soften
book = """,
    )


@pytest.mark.parametrize("journal", SYNCS)
@pytest.mark.parametrize("made", ["as it comes", "PRAGMA synchronous = OFF", "PRAGMA synchronous = NORMAL"])
def test_every_acknowledged_event_has_been_synced(python, sqlite_url, shim, failing, journal, made):
    """Deleting the pragma fails this: the connections begin with less than is needed."""
    script = soft(made) if made.startswith("PRAGMA") else OBEDIENT
    wal = "1" if journal == "write-ahead log" else ""
    run = Obedient(python(script, sqlite_url, LD_PRELOAD=str(shim), SYNC_FAILS=str(failing), WAL=wal))
    run("append")
    for _ in range(5):
        before = run("syncs")
        run("append")
        assert run("syncs") - before >= SYNCS[journal]


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
@pytest.mark.parametrize("journal", SYNCS)
def test_without_the_pragma_fewer_would_be_synced(sqlite_url, python, shim, failing, journal, level):
    """The test of the test above."""
    careless = OBEDIENT.replace(
        "book = ",
        f"""
harden = database.Database._harden
def soften(self, connection):
    harden(self, connection)
    connection.connection.driver_connection.execute("PRAGMA synchronous = {level}")
database.Database._harden = soften
book = """,
    )
    wal = "1" if journal == "write-ahead log" else ""
    run = Obedient(python(careless, sqlite_url, LD_PRELOAD=str(shim), SYNC_FAILS=str(failing), WAL=wal))
    assert run("append") == "e1"
    before = run("syncs")
    assert run("append") == "e2"
    assert run("syncs") - before < SYNCS[journal]


def test_to_reserve_a_key_costs_no_sync(obedient):
    obedient("append")
    before = obedient("syncs")
    assert [obedient(f"reserve k{n}") for n in range(3)] == [0, 0, 0]
    assert obedient("syncs") == before


def test_an_fsync_that_fails_is_a_refusal_and_passes(obedient, failing):
    acknowledged = [obedient("append") for _ in range(3)]
    failing.touch()
    refused = [obedient("append") for _ in range(4)]
    assert all(isinstance(answer, dict) for answer in refused)
    assert [answer["doubtful"] for answer in refused[1:]] == [False] * 3, "refused before they were tried"
    failing.unlink()
    answers = obedient.append_until(str)
    acknowledged.append(answers[-1])
    ids = obedient("ids")
    assert len(ids) == len(set(ids))
    assert set(acknowledged) <= set(ids)
    certain = {a["refused"] for a in (*refused, *answers[:-1]) if not a["doubtful"]}
    assert not certain & set(ids)
    assert obedient("close") is True


def test_nothing_follows_in_a_log_on_what_a_failed_fsync_left_there(python, sqlite_url, shim, failing):
    """The system takes such pages for written, and writes them no more: a power cut would take what follows, too."""
    run = Obedient(python(OBEDIENT, sqlite_url, LD_PRELOAD=str(shim), SYNC_FAILS=str(failing), WAL="1"))

    def salts() -> bytes:
        """What every frame of a log that is begun anew has anew."""
        with open(sqlite_url.removeprefix("sqlite:///") + "-wal", "rb") as file:
            return file.read(24)[16:]

    assert run("append") == "e1"
    before = salts()
    failing.touch()
    assert run("append")["doubtful"]
    assert salts() == before, "the log is found again"
    failing.unlink()
    run.append_until(str)
    assert salts() != before


def test_a_full_disk_is_a_refusal_and_passes(obedient, sqlite_url):
    for _ in range(3):
        assert isinstance(obedient("append"), str)
    path = sqlite_url.removeprefix("sqlite:///")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
    obedient(f"limit {size + 40_000}")
    answers = obedient.append_until(dict)
    refused = [obedient("append") for _ in range(4)]
    assert all(isinstance(answer, dict) for answer in refused), "a full disk stays full"
    obedient("limit 0")
    everything = [*answers, *refused, *obedient.append_until(str)]
    ids = obedient("ids")
    assert len(ids) == len(set(ids))
    assert {a for a in everything if isinstance(a, str)} <= set(ids)
    assert not {a["refused"] for a in everything if isinstance(a, dict) and not a["doubtful"]} & set(ids)
    assert obedient("close") is True
    check = ledger.sqlite3.connect(path)
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check.close()


def test_a_locked_database_is_a_refusal_and_passes(sqlite_url, event):
    with Ledger(sqlite_url, timeout_s=0.3) as book:
        book.append(event(id="before"))
        lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(ledger.LedgerUnavailable):
            book.append(event(id="refused"))
        assert time.monotonic() - began < 2
        with pytest.raises(ledger.LedgerUnavailable):
            book.check()
        lock.execute("ROLLBACK")
        lock.close()
        _until_available(book.check)
        book.append(event(id="after"))
        assert {"before", "after"} <= {e.id for e in book.events()} <= {"before", "after", "refused"}


def _until_available(call, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except ledger.LedgerUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def stalled(connection, arguments):
    """As a disk does that is busy with something else."""
    time.sleep(max(arguments))
    return arguments


def test_what_has_begun_is_waited_for(sqlite_url, event):
    """A caller whose event is being written hears that it is, not that nobody knows."""
    with Ledger(sqlite_url, timeout_s=0.3) as book:
        began = time.monotonic()
        assert book._submit(stalled, 0.6) == 0.6
        assert time.monotonic() - began < 0.9
        _until_available(book.require)
        assert not book.append(event()).duplicate


@pytest.fixture
def slow_commit(monkeypatch):
    """f(book, seconds): the next commit takes so long, and succeeds."""

    def slow(book, seconds: float) -> None:
        book.check()
        left = [seconds]
        connection = book._writer._connection

        def wait(_):
            if left:
                time.sleep(left.pop())

        sa.event.listen(connection, "commit", wait)

    return slow


def test_a_doubtful_event_is_settled_while_there_is_time(url, event, slow_commit):
    with Ledger(url, timeout_s=0.2) as book:
        slow_commit(book, 1.5)
        one = event()
        began = time.monotonic()
        assert book.append(one, settle_s=10) == (one, False)
        assert 1.0 < time.monotonic() - began < 5
        assert list(book.events()) == [one]


def test_a_doubtful_reservation_is_settled_too(url, event, slow_commit):
    with Ledger(url, timeout_s=0.2) as book:
        mine = book.reserve("anna", "k", "body")
        slow_commit(book, 1.5)
        assert not book.record(mine, event(), settle_s=10).duplicate
        assert book.reserve("anna", "k", "body").replay == 1
        assert len(list(book.events())) == 1


def test_without_time_it_stays_doubtful_and_may_be_there(url, event, slow_commit):
    with Ledger(url, timeout_s=0.2) as book:
        slow_commit(book, 1.5)
        one = event()
        with pytest.raises(ledger.LedgerDoubtful):
            book.append(one, settle_s=0.3)
        with pytest.raises(ledger.LedgerUnavailable) as caught:
            book.append(event())
        assert not isinstance(caught.value, ledger.LedgerDoubtful), "who comes meanwhile is refused at once, certainly"
        _until_available(book.check)
        assert list(book.events()) == [one]


def test_a_failure_that_is_certain_is_not_waited_for(sqlite_url, event):
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    with Ledger(sqlite_url, timeout_s=0.2) as book:
        book.check()
        lock.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(ledger.LedgerUnavailable) as caught:
            book.append(event(), settle_s=30)
        assert not isinstance(caught.value, ledger.LedgerDoubtful)
        assert time.monotonic() - began < 5
        lock.close()


def test_one_operation_that_fails_takes_no_other_with_it(url, event, caplog):
    """Of a group that shares a transaction."""

    def fail_all(connection, arguments):
        if any(arguments):
            raise ZeroDivisionError("a bug")
        return arguments

    with Ledger(url) as book:
        outcomes = []

        def work(function, argument):
            try:
                outcomes.append(book._submit(function, argument) or "done")
            except ledger.LedgerRefused as error:
                outcomes.append(str(error))

        tasks = [(fail_all, n == 3) for n in range(6)] + [(append_all, event()) for _ in range(6)]
        threads = [threading.Thread(target=work, args=task) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [outcome for outcome in outcomes if isinstance(outcome, str) and "bug" in outcome] == [
            "ledger: ZeroDivisionError: a bug"
        ]
        book.require()
        assert len(list(book.events())) == 6
    assert "the ledger refused an operation" in caplog.text


def test_a_dead_database_does_not_pile_up_its_callers(sqlite_url, event, caplog):
    """A hundred threads are refused within the time of one."""
    with Ledger(sqlite_url, timeout_s=0.5) as book:
        book.check()
        lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        refused = []

        def work():
            with pytest.raises(ledger.LedgerUnavailable):
                book.append(event())
            refused.append(True)

        began = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 4
        assert len(refused) == 100
        lock.close()
        _until_available(book.check)
        assert list(book.events()) == []
    assert "the ledger fails and refuses everything" in caplog.text
    assert "the ledger works again" in caplog.text


def test_a_file_that_is_no_database_is_refused(tmp_path, event):
    path = tmp_path / "usage.db"
    path.write_bytes(b"not a database" * 1000)
    with Ledger(f"sqlite:///{path}") as book, pytest.raises(ledger.LedgerUnavailable, match="not a database"):
        book.append(event())
    with pytest.raises(ledger.LedgerUnavailable):
        ledger.migrate(f"sqlite:///{path}")


def test_tables_that_are_missing_are_named_and_awaited(tmp_path, event):
    url = f"sqlite:///{tmp_path}/usage.db"
    with Ledger(url) as book:
        with pytest.raises(ledger.LedgerUnavailable):
            book.append(event())
        assert not list(tmp_path.iterdir()), "an empty file would hide a wrong path"
        ledger.sqlite3.connect(tmp_path / "usage.db").close()
        (tmp_path / "usage.db").touch()
        time.sleep(1.1)
        with pytest.raises(ledger.SchemaOutdated, match=r"python -m cconv\.ledger migrate"):
            book.append(event())
        ledger.migrate(url)
        _until_available(book.check)
        book.append(event())
