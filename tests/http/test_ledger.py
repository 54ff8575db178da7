"""Ledger: no answer without its record, no record without its answer, and the same integers in both.

In: the service with a ledger in SQLite, in this process and under gunicorn.  Out: answers, rows, metrics.
"""

import contextlib
import csv
import io
import json
import random
import signal
import sqlite3
import threading
import time
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

from cconv import ledger
from cconv.ledger import Ledger
from service.__main__ import audit
from service.config import Settings


@pytest.fixture
def url(tmp_path):
    url = f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    return url


@pytest.fixture
def client(make_app, url):
    """Of a service that keeps a strict ledger."""
    return make_app(ledger=url).test_client()


@pytest.fixture
def rows(url):
    """f() -> the ledger's events, read by somebody else."""

    def read():
        with Ledger(url) as book:
            return list(book.events())

    return read


@pytest.fixture
def locked(url):
    """The database while somebody else holds its lock."""

    @contextlib.contextmanager
    def lock():
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()

    return lock


X = [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
W = [[[[0, 1], [2, 3]], [[1, 2], [3, 4]]]]


def conv2d(client, key=None, query="?format=json", **body):
    headers = {"Idempotency-Key": key} if key is not None else {}
    return client.post(f"/v1/conv2d{query}", json={"x": X, "weight": W, **body}, headers=headers)


def test_one_number_is_predicted_answered_recorded_and_metered(client, rows, bill, png, npy, rng, infer_json):
    """Over every route that bills; and the ledger's sum is the metrics'."""
    picture = {"image": (io.BytesIO(png(40, 50)), "a.png"), "other": (io.BytesIO(png(32, 32)), "b.png")}
    x = rng.random((2, 3, 32, 48), np.float32)
    answers = [
        client.post("/v1/features?model=edges", data=picture, content_type="multipart/form-data"),
        client.post("/v1/features?model=texture&layers=level1.relu&format=png", data=png(20, 30)),
        client.post("/v1/features?model=edges&format=npys", data=npy(x)),
        conv2d(client),
        conv2d(client, bias=[1.0], padding="same", query="?format=npy"),
        client.post("/v2/models/edges/infer", data=infer_json(x), headers={"X-Request-Id": "mine/1"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 6
    events = rows()
    answered = [tuple(int(a.headers[f"X-Cconv-{n}"]) for n in ("Macs", "Flops", "Flops-Other")) for a in answers]
    assert [(e.macs, e.flops, e.flops_other) for e in events] == answered
    predicted = client.post("/v1/cost", json={"model": "edges", "shape": [2, 3, 32, 48]}).get_json()
    assert (predicted["macs"], predicted["flops"], predicted["flops_other"]) == answered[2] == answered[5]
    metered = bill(client)
    assert metered["cconv_flops_total"] == sum(e.flops for e in events)
    assert metered["cconv_inferences_total"] == sum(e.images for e in events) == 2 + 1 + 2 + 1 + 1 + 2
    assert [e.model for e in events] == ["edges", "texture", "edges", "conv2d", "conv2d", "edges"]
    assert events[5].request_id == "mine/1"
    assert all(e.account == "anonymous" and e.bytes_in > 0 and e.compute_us > 0 for e in events)


REFUSED = {
    "no JSON": ("/v1/conv2d", {"data": b"{"}, 400),
    "no model": ("/v1/features?model=none", {"data": b"x"}, 404),
    "no picture": ("/v1/features?model=edges", {"data": b"GIF89a"}, 400),
    "no shape that fits": ("/v1/conv2d", {"json": {"x": X, "weight": [[[[1.0]]]]}}, 400),
    "another type": ("/v1/features?model=edges", {"data": b"x", "headers": {"Content-Encoding": "br"}}, 415),
    "no form of answer": ("/v1/conv2d", {"data": b"{}", "headers": {"Accept": "text/html"}}, 406),
    "a key too long": ("/v1/conv2d", {"json": {"x": X, "weight": W}, "headers": {"Idempotency-Key": "k" * 256}}, 400),
    "the dry run": ("/v1/cost", {"json": {"model": "edges"}}, 200),
}


@pytest.mark.parametrize(("path", "request_", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_or_only_asked_leaves_no_row(client, rows, path, request_, status):
    assert client.post(path, **request_).status_code == status
    assert client.get("/readyz").status_code == 200
    assert rows() == []


def test_what_is_too_large_too_late_or_too_much_leaves_no_row(make_app, url, rows):
    small = make_app(ledger=url, max_flops=10).test_client()
    assert conv2d(small).status_code == 413
    late = make_app(ledger=url, deadline_s=1.0).test_client()
    late.application.extensions["cconv"]._scheduler.run = _late
    assert conv2d(late, "k").status_code == 504
    assert rows() == []
    assert conv2d(make_app(ledger=url).test_client(), "k").status_code == 200, "the key was given back"


def _late(*_):
    from service.errors import DeadlineExceeded

    raise DeadlineExceeded("late")


def test_an_answer_that_cannot_be_written_is_not_billed(client, rows):
    pipeline = client.application.extensions["cconv"]
    with pytest.raises(RuntimeError):
        _run(pipeline, lambda _: (_ for _ in ()).throw(RuntimeError("encoder")))
    assert rows() == []
    _run(pipeline, lambda _: b"")
    assert len(rows()) == 1


def _run(pipeline, encode):
    permit = pipeline.enter(0)
    try:
        x = np.ones((1, 1, 3, 3), np.float32)
        return pipeline.run(permit, [pipeline.conv2d_task(x, x, None, {})], encode)
    finally:
        permit.release()


def test_a_request_that_is_sent_again_is_billed_once_answered_four_times_and_then_refused(client, rows, bill):
    first = conv2d(client, "key-1")
    assert "Idempotent-Replay" not in first.headers
    billed = bill(client)
    for _ in range(3):
        again = conv2d(client, "key-1")
        assert again.status_code == 200
        assert again.headers["Idempotent-Replay"] == "true"
        assert again.get_json()["data"] == first.get_json()["data"]
        assert again.headers["X-Cconv-Flops"] == first.headers["X-Cconv-Flops"]
    for _ in range(2):
        refused = conv2d(client, "key-1")
        assert (refused.status_code, "at most 3" in refused.get_json()["error"]) == (409, True)
    (event,) = rows()
    assert event.idempotency_key == "key-1"
    assert bill(client) == billed
    assert b"cconv_replays_total 3.0" in client.get("/metrics").data


@pytest.mark.parametrize(
    "other",
    [
        {"padding": 1}, {"weight": [[[[0, 1], [2, 3]], [[1, 2], [3, 5]]]]}, {"bias": [0.0]}, {"dtype": "float64"},
        {"precision": "high"}, {"query": "?format=npy"},
    ],
)  # fmt: skip
def test_another_request_under_a_key_is_refused_and_leaves_no_row(client, rows, other):
    assert conv2d(client, "key-1").status_code == 200
    refused = conv2d(client, "key-1", **other)
    assert (refused.status_code, refused.get_json()["error"][:15]) == (422, "idempotency key")
    assert conv2d(client, "key-1", x=(np.array(X) + 1).tolist()).status_code == 422
    assert len(rows()) == 1


def test_a_form_that_is_packed_anew_is_the_same_request(client, npy, rows):
    """Each time with another boundary between its parts."""
    answers = []
    for boundary in ("aaa", "bbb"):
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode()
            + npy(np.array(values, np.float32)) + b"\r\n" for name, values in (("x", X), ("weight", W))
        ) + f"--{boundary}--\r\n".encode()  # fmt: skip
        answers.append(client.post("/v1/conv2d", data=body, headers={
            "Content-Type": f"multipart/form-data; boundary={boundary}", "Idempotency-Key": "k"
        }))  # fmt: skip
    assert [a.status_code for a in answers] == [200, 200]
    assert answers[0].data == answers[1].data
    assert len(rows()) == 1


def test_threads_that_send_one_request_pay_once(make_app, url, rows):
    app, codes = make_app(ledger=url), []
    threads = [
        threading.Thread(target=lambda: codes.append(conv2d(app.test_client(), "k").status_code)) for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 409}
    assert 1 <= codes.count(200) <= 4
    assert len(rows()) == 1


def test_without_a_ledger_keys_are_refused_and_everything_else_goes_on(make_app):
    client = make_app().test_client()
    assert conv2d(client).status_code == 200
    assert conv2d(client, "k").status_code == 503
    assert client.get("/v1/usage").status_code == 503


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


def test_usage_is_the_sum_of_the_answers_as_json_and_csv(client, png):
    answers = [client.post("/v1/features?model=edges", data=png(n, 30)) for n in (20, 30)] + [conv2d(client)]
    flops = [int(answer.headers["X-Cconv-Flops"]) for answer in answers]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    usage = client.get("/v1/usage").get_json()
    assert [(one["day"], one["model"], one["account"], one["flops"], one["events"]) for one in usage] == [
        (today, "conv2d", "anonymous", str(flops[2]), 1),
        (today, "edges", "anonymous", str(flops[0] + flops[1]), 2),
    ]
    (edges,) = client.get(f"/v1/usage?by=model&model=edges&from={today}&to={today}").get_json()
    assert edges["flops"] == str(flops[0] + flops[1])
    assert client.get("/v1/usage?to=2020-01-01").get_json() == []
    table = client.get("/v1/usage?by=event&format=csv")
    assert table.mimetype == "text/csv"
    found = list(csv.DictReader(io.StringIO(table.get_data(as_text=True))))
    assert [int(row["flops"]) for row in found] == flops


@pytest.mark.parametrize(
    "query", ["by=hour", "by=day,event", "from=yesterday", "from=2026-13-01", "to=0001-01-01", "format=xml", "key=x"]
)
def test_usage_refuses_what_it_does_not_know(client, query):
    assert client.get(f"/v1/usage?{query}").status_code == 400


def test_an_audit_finds_the_bills_right_and_then_the_one_that_is_wrong(make_app, url, png, npy, rng, capsys):
    client = make_app(ledger=url).test_client()
    client.post("/v1/features?model=texture", data=png(40, 50))
    client.post("/v1/features?model=edges&format=npy", data=npy(rng.random((3, 3, 20, 20), np.float32)))
    conv2d(client, bias=[1.0], padding=[1, 2], activation="leaky_relu,0.1", precision="high")
    conv2d(client, padding="same")
    assert audit(Settings(ledger=url)) == 0
    assert capsys.readouterr().out == "4 bills, 0 wrong, 0 that could not be computed\n"
    with Ledger(url) as book:
        right = next(iter(book.events()))
        book.append(ledger.Event(
            account="a", model="texture", version="1", shapes=right.shapes, macs=right.macs + 1, flops=right.flops,
            flops_other=right.flops_other, id="wrong",
        ))  # fmt: skip
        book.append(ledger.Event(account="a", model="gone", shapes=right.shapes, macs=1, flops=2, flops_other=0))
    assert audit(Settings(ledger=url)) == 1
    out = capsys.readouterr().out
    assert "wrong texture: recorded" in out
    assert out.endswith("6 bills, 1 wrong, 1 that could not be computed\n")


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_no_kill_of_the_worker_leaves_an_answer_without_its_record(start_server, url, rng, rounds, rows):
    """SIGKILL of the worker at random moments under load; gunicorn starts another."""
    server = start_server(CCONV_LEDGER=url)
    draw = random.Random(int(rng.integers(2**32)))
    body, answered, stop = json.dumps({"x": X, "weight": W}).encode(), [], threading.Event()

    def work(thread: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            name = f"{thread}/{n}"
            headers = {"Content-Type": "application/json", "X-Request-Id": name}
            if n % 2:
                headers["Idempotency-Key"] = name
            try:
                if server.ask("/v1/conv2d", body, headers)[0] == 200:
                    answered.append(name)
            except OSError:
                time.sleep(0.05)

    threads = [threading.Thread(target=work, args=[thread]) for thread in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        time.sleep(draw.uniform(0.2, 0.8))
        _kill_worker(server)
        before, end = len(answered), time.monotonic() + 30
        while len(answered) < before + 5:
            assert time.monotonic() < end, "the new worker does not answer"
            time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert server.stop() == 0
    recorded = Counter(event.request_id for event in rows())
    assert set(answered) <= set(recorded)
    assert set(recorded.values()) == {1}
    assert sum(recorded.values()) - len(answered) <= 4 * rounds


def _kill_worker(server) -> None:
    import os
    from pathlib import Path

    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == server.process.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_answers_in_flight_at_sigterm_have_their_records(start_server, url, rows):
    server = start_server(CCONV_LEDGER=url)
    body, codes = json.dumps({"x": X, "weight": W}).encode(), []

    def ask():
        with contextlib.suppress(OSError):
            codes.append(server.ask("/v1/conv2d", body, {"Content-Type": "application/json"})[0])

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    assert codes.count(200) == len(rows())
