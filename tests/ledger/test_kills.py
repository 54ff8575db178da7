"""Kills: a process that is killed at any moment loses no event that it acknowledged, and leaves none twice.

In: a writer with many threads that notes every acknowledgement in a file, SIGKILL after a random time, again and again
on the same database.  Out: every noted event is there, once; what is there beyond was under way.
"""

import random
import signal
import time
from collections import Counter

import pytest

from cconv.ledger import Ledger, sqlite3

THREADS = 8
WRITER = """
import os, sys, threading
from cconv import ledger
from cconv.ledger import Event, Ledger, database
url, log, round_, spool = sys.argv[1:]
database.wal_is_safe = lambda version: bool(os.environ["WAL"])
noted = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
book = Ledger(url, spool=spool or None, timeout_s=30)
book.check()
print("ready", flush=True)
def work(thread):
    n = 0
    while True:
        n += 1
        name = f"{round_}/{thread}/{n}"
        mine = book.reserve("anna", name, "body") if n % 3 == 0 and not spool else None
        event = Event(account="anna", model="m", shapes=[n], macs=1, flops=2, flops_other=0, id=name)
        receipt = book.record(mine, event) if mine else book.append(event)
        os.write(noted, f"{receipt.event.id}\\n".encode())
threads = [threading.Thread(target=work, args=[thread]) for thread in range(THREADS)]
for thread in threads:
    thread.start()
""".replace("THREADS", str(THREADS))

MODES = {"rollback journal": ("", False), "write-ahead log": ("1", False), "spool": ("", True)}
ROUNDS = [3, pytest.param(40, marks=pytest.mark.slow)]


def kill_again_and_again(python, url, tmp_path, draw, rounds, wal="", lenient=False):
    """The noted events, and how many of each event there are in the end."""
    log, spool = tmp_path / "noted", str(tmp_path / "spool") if lenient else ""
    for round_ in range(rounds):
        process = python(WRITER, url, str(log), str(round_), spool, WAL=wal)
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    noted = log.read_text().split("\n")[:-1] if log.exists() else []
    if lenient:
        assert Ledger(url, spool=spool).close(timeout_s=60)
    with Ledger(url) as book:
        return noted, Counter(event.id for event in book.events())


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_kill_loses_or_doubles_an_event(python, sqlite_url, tmp_path, rng, mode, rounds):
    wal, lenient = MODES[mode]
    draw = random.Random(int(rng.integers(2**32)))
    noted, there = kill_again_and_again(python, sqlite_url, tmp_path, draw, rounds, wal, lenient)
    assert len(noted) > 10 * rounds
    assert len(noted) == len(set(noted))
    assert set(noted) <= set(there)
    assert set(there.values()) == {1}
    assert len(there) - len(noted) <= THREADS * rounds, "more than was under way"
    check = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    bound = "SELECT count(*) FROM idempotency_key JOIN usage_event ON event_id = usage_event.id"
    billed = "SELECT count(*) FROM usage_event WHERE idempotency_key IS NOT NULL"
    assert check.execute(bound).fetchone() == check.execute(billed).fetchone()
    check.close()


@pytest.mark.parametrize("rounds", ROUNDS)
def test_no_kill_of_a_client_loses_or_doubles_an_event_in_postgresql(python, postgres_url, tmp_path, rng, rounds):
    draw = random.Random(int(rng.integers(2**32)))
    noted, there = kill_again_and_again(python, postgres_url, tmp_path, draw, rounds)
    assert len(noted) > 10 * rounds
    assert set(noted) <= set(there)
    assert set(there.values()) == {1}
    assert len(there) - len(noted) <= THREADS * rounds
