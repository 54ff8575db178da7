"""Ledger faults: databases that are away, slow or full, disks that fail, processes that are killed or told to end.

In: the service with a ledger in SQLite, in this process and under gunicorn.  Out: no answer without its record, no
record twice, and everything as before once the fault is over.
"""

import contextlib
import http.client
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

from cconv import ledger
from cconv.ledger import Ledger

X = [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
W = [[[[0, 1], [2, 3]], [[1, 2], [3, 4]]]]
BODY = json.dumps({"x": X, "weight": W}).encode()
HEADERS = {"Content-Type": "application/json"}


@pytest.fixture
def locked(url):
    """The database while somebody else holds its lock."""

    @contextlib.contextmanager
    def lock():
        connection = ledger.sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()

    return lock


def conv2d(client, key=None):
    headers = {"Idempotency-Key": key} if key is not None else {}
    return client.post("/v1/conv2d?format=json", json={"x": X, "weight": W}, headers=headers)


def until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_while_the_ledger_fails_nothing_is_answered_and_then_everything_again(make_app, url, rows, locked):
    client = make_app(ledger=url, ledger_timeout_s=0.3).test_client()
    assert conv2d(client).status_code == 200
    assert client.get("/readyz").status_code == 200
    with locked():
        for _ in range(3):
            refused = conv2d(client)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
            assert "usage record" in refused.get_json()["error"]
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
    end = time.monotonic() + 10
    while (answer := conv2d(client)).status_code == 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer.status_code == 200
    assert client.get("/readyz").status_code == 200
    assert len(rows()) == 2


def test_a_key_whose_bill_could_not_be_recorded_is_given_back(make_app, url, rows, locked):
    """The ledger fails while the request is computed."""
    client = make_app(ledger=url, ledger_timeout_s=0.3).test_client()
    scheduler = client.application.extensions["cconv"]._scheduler
    run, lock = scheduler.run, locked()

    def run_and_lock(*arguments):
        lock.__enter__()
        return run(*arguments)

    scheduler.run = run_and_lock
    assert conv2d(client, "k").status_code == 503
    lock.__exit__(None, None, None)
    scheduler.run = run
    end = time.monotonic() + 10
    while (answer := conv2d(client, "k")).status_code == 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (answer.status_code, "Idempotent-Replay" in answer.headers) == (200, False)
    assert len(rows()) == 1


def test_a_ledger_that_is_not_there_leaves_the_service_alive_and_not_ready(make_app, tmp_path):
    client = make_app(ledger=f"sqlite:///{tmp_path}/none.db", ledger_timeout_s=1.0).test_client()
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 503
    refused = conv2d(client)
    assert refused.status_code == 503
    assert str(tmp_path) not in refused.get_json()["error"]


def test_the_lenient_mode_answers_without_the_database_and_records_in_the_end(make_app, url, tmp_path, rows, locked):
    client = make_app(ledger=url, ledger_spool=str(tmp_path / "spool"), ledger_timeout_s=0.3).test_client()
    with locked():
        assert [conv2d(client).status_code for _ in range(3)] == [200] * 3
        time.sleep(0.5)
    end = time.monotonic() + 15
    while len(rows()) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_its_database_the_lenient_mode_is_ready_and_computes(make_app, tmp_path):
    """And with a full spool it is not, and computes nothing that it could not record."""
    url = f"sqlite:///{tmp_path}/none.db"
    client = make_app(ledger=url, ledger_spool=str(tmp_path / "spool"), ledger_timeout_s=0.2).test_client()
    book = client.application.extensions["cconv"].book._ledger
    assert client.get("/readyz").status_code == 200
    assert conv2d(client).status_code == 200
    assert b"cconv_ledger_waiting_bytes" in client.get("/metrics").data
    assert conv2d(client, "k").status_code == 503, "keys are in the database"
    book._spool._most = book.waiting_bytes()
    runs = _series(client, "cconv_executions_total")
    for _ in range(3):
        assert conv2d(client).status_code == 503
    assert _series(client, "cconv_executions_total") == runs
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    book._spool._most = 1 << 20
    ledger.migrate(url)
    until(lambda: client.get("/readyz").status_code == 200)
    assert conv2d(client).status_code == 200
    until(lambda: conv2d(client, "k").status_code == 200)


def _series(client, name: str) -> list[str]:
    return [line for line in client.get("/metrics").get_data(as_text=True).splitlines() if line.startswith(name)]


def _stall_next_commit(client, seconds: float) -> None:
    """It takes so long, and succeeds."""
    import sqlalchemy as sa

    book = client.application.extensions["cconv"].book._ledger
    book.check()
    left = [seconds]
    sa.event.listen(book._writer._connection, "commit", lambda _: time.sleep(left.pop() if left else 0))


def test_a_disk_that_stalls_makes_answers_late_and_bills_nothing_twice(make_app, url, rows, bill):
    """Longer than the ledger's own patience, and shorter than the request's."""
    client = make_app(ledger=url, ledger_timeout_s=0.2).test_client()
    assert conv2d(client).status_code == 200
    _stall_next_commit(client, 1.5)
    assert conv2d(client).status_code == 200
    assert len(rows()) == 2
    assert bill(client)["cconv_flops_total"] == sum(e.flops for e in rows())


def test_what_is_doubtful_at_its_deadline_is_counted_and_free_under_its_key(make_app, url, rows):
    client = make_app(ledger=url, ledger_timeout_s=0.2, deadline_s=1.0).test_client()
    assert conv2d(client).status_code == 200
    pipeline = client.application.extensions["cconv"]
    run = pipeline._scheduler.run
    pipeline._scheduler.run = lambda *a: (_stall_next_commit(client, 2.5), run(*a))[1]
    refused = conv2d(client, "k")
    pipeline._scheduler.run = run
    assert refused.status_code == 503
    assert "may be recorded" in refused.get_json()["error"]
    assert b"cconv_ledger_doubtful_total 1.0" in client.get("/metrics").data
    answer = until(lambda: (a := conv2d(client, "k")).status_code == 200 and a)
    assert answer.headers["Idempotent-Replay"] == "true"
    assert len(rows()) == 2


#: What is killed when, and whether the bill is there then.
STEPS = {
    "before anything": ("reserve", "before", False),
    "with the key held": ("reserve", "after", False),
    "computed and not recorded": ("record", "before", False),
    "recorded and not answered": ("record", "after", True),
}
DIES = """
import os, signal, sys
from cconv.ledger import Ledger
from service import create_app
from service.config import Settings
url, name, moment = sys.argv[1:]
method = getattr(Ledger, name)
def die(self, *arguments, **more):
    result = method(self, *arguments, **more) if moment == "after" else None
    os.kill(os.getpid(), signal.SIGKILL)
setattr(Ledger, name, die)
create_app(Settings(ledger=url)).test_client().post(
    "/v1/conv2d?format=json", data=sys.stdin.buffer.read(),
    headers={"Idempotency-Key": "k", "Content-Type": "application/json"},
)
"""


@pytest.mark.parametrize(("name", "moment", "billed"), STEPS.values(), ids=STEPS)
def test_a_request_that_a_kill_cut_short_may_be_sent_again_at_once(make_app, url, rows, name, moment, billed):
    root = str(Path(__file__).parents[2])
    dead = subprocess.run(
        [sys.executable, "-c", DIES, url, name, moment], input=BODY, cwd=root, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL
    assert len(rows()) == billed
    again = make_app(ledger=url).test_client().post(
        "/v1/conv2d?format=json", data=BODY, headers={"Idempotency-Key": "k", **HEADERS}
    )  # fmt: skip
    assert again.status_code == 200
    assert again.headers.get("Idempotent-Replay", "false") == str(billed).lower()
    assert len(rows()) == 1


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """A library before libc in which fsync fails while the file SYNC_FAILS exists."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shim for fsync needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "syncs.so"
    source = Path(__file__).parents[1] / "ledger" / "syncs.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def _recovers(server, answered: list) -> None:
    def again():
        status = server.ask("/v1/conv2d", BODY, HEADERS)[0]
        answered.append(status)
        assert status in (200, 503)
        return status == 200

    until(again)


@pytest.mark.alone
def test_an_fsync_that_fails_is_a_503_and_passes(start_server, url, rows, shim, tmp_path):
    failing = tmp_path / "fails"
    server = start_server(
        CCONV_LEDGER=url, CCONV_DEADLINE_SECONDS="2", LD_PRELOAD=str(shim), SYNC_FAILS=str(failing)
    )  # fmt: skip
    codes = [server.ask("/v1/conv2d", BODY, HEADERS)[0] for _ in range(3)]
    assert codes == [200] * 3
    failing.touch()
    refused = [server.ask("/v1/conv2d", BODY, HEADERS) for _ in range(4)]
    assert [status for status, *_ in refused] == [503] * 4
    assert all(headers["Retry-After"] for _, headers, _ in refused)
    assert server.ask("/readyz")[0] == 503
    assert server.ask("/livez")[0] == 200
    failing.unlink()
    _recovers(server, codes)
    assert server.ask("/readyz")[0] == 200
    doubtful = server.metrics()["cconv_ledger_doubtful_total"]
    assert codes.count(200) <= len(rows()) <= codes.count(200) + doubtful


@pytest.mark.alone
def test_a_full_disk_is_a_503_and_passes(start_server, url, rows, tmp_path):
    """For the worker, files end a little behind where the database does."""
    server = start_server(CCONV_LEDGER=url, CCONV_DEADLINE_SECONDS="2")
    (worker,) = _workers(server)
    size = Path(url.removeprefix("sqlite:///")).stat().st_size
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
    headers = {**HEADERS, "X-Request-Id": "x" * 128}
    codes = []
    until(lambda: codes.append(server.ask("/v1/conv2d", BODY, headers)[0]) or codes[-1] != 200, 60)
    refused = [server.ask("/v1/conv2d", BODY, headers)[0] for _ in range(4)]
    assert {codes.pop(), *refused} == {503}
    assert server.ask("/livez")[0] == 200
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _recovers(server, codes)
    assert _workers(server) == [worker], "nobody was started anew"
    doubtful = server.metrics()["cconv_ledger_doubtful_total"]
    assert codes.count(200) <= len(rows()) <= codes.count(200) + doubtful


@pytest.mark.alone
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lenient", [False, True], ids=["strict", "lenient"])
def test_no_kill_of_the_worker_leaves_an_answer_without_its_record(
    start_server, url, rng, rounds, rows, lenient, tmp_path
):
    """SIGKILL of the worker at random moments under load; gunicorn starts another.

    Every other request has a key, and is sent again until it is answered.
    """
    spool = tmp_path / "spool"
    server = start_server(CCONV_LEDGER=url, CCONV_LEDGER_SPOOL=str(spool) if lenient else "")
    draw = random.Random(int(rng.integers(2**32)))
    answered, resent, statuses, stop = [], [], set(), threading.Event()

    def ask(name: str, keyed: bool) -> bool:
        key = {"Idempotency-Key": name} if keyed else {}
        try:
            status = server.ask("/v1/conv2d", BODY, {**HEADERS, "X-Request-Id": name, **key})[0]
            statuses.add(status)
            return status == 200
        except (OSError, http.client.HTTPException):  # no connection, or an answer that was cut short
            time.sleep(0.05)
            return False

    def work(thread: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            name, keyed = f"{thread}/{n}", n % 2 == 0
            done = ask(name, keyed)
            while keyed and not done:
                resent.append(name)
                done = ask(name, keyed)
            if done:
                answered.append(name)

    threads = [threading.Thread(target=work, args=[thread]) for thread in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        time.sleep(draw.uniform(0.2, 0.8))
        (worker,) = until(lambda: _workers(server))
        os.kill(worker, signal.SIGKILL)
        until(lambda worker=worker: _workers(server) not in ([], [worker]), 30)
        before = len(answered)
        until(lambda before=before: len(answered) >= before + 5, 30)
    stop.set()
    for thread in threads:
        thread.join()
    assert server.stop() == 0
    if lenient:
        assert Ledger(url, spool=spool).close(60)
    recorded = Counter(event.request_id for event in rows())
    assert resent, "no kill met a request under way"
    assert 200 in statuses <= {200, 409, 503}
    assert set(answered) <= set(recorded)
    assert set(recorded.values()) == {1}
    assert sum(recorded.values()) - len(answered) <= 4 * rounds


def _workers(server) -> list[int]:
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.alone
def test_twenty_in_flight_at_sigterm_are_all_answered_and_recorded(start_server, url, rows, npy):
    server = start_server(
        CCONV_LEDGER=url, CCONV_THREADS="24", CCONV_QUEUE_REQUESTS="20", CCONV_MODELS="vgg16", CCONV_LANES="1"
    )  # fmt: skip
    path, pending = "/v1/features?model=vgg16&layers=features.9", "cconv_pending_requests"
    # The first is computed while the others come; no two of these may run together.
    bodies = [npy(np.ones((1 if i else 24, 3, 160, 128 + 8 * i), np.float32)) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(server.ask, path, bodies[0])]
        until(lambda: server.metrics()["cconv_pending_flops"] > 0)
        answers += [pool.submit(server.ask, path, body) for body in bodies[1:]]
        until(lambda: server.metrics()[pending] == 20)
        assert not any(answer.done() for answer in answers)
        assert server.stop() == 0
        assert [answer.result()[0] for answer in answers] == [200] * 20
    assert len(rows()) == 20
