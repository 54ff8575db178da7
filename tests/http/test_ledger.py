"""Ledger: no answer without its record, no record without its answer, and the same integers in both.

In: the service with a ledger in SQLite, in this process and under gunicorn.  Out: answers, rows, metrics.
"""

import csv
import io
import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

from cconv import ledger
from cconv.ledger import Ledger
from service import auth
from service.__main__ import audit
from service.config import Settings
from service.errors import DeadlineExceeded


@pytest.fixture
def client(make_app, url):
    """Of a service that keeps a strict ledger."""
    return make_app(ledger=url).test_client()


X = [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
W = [[[[0, 1], [2, 3]], [[1, 2], [3, 4]]]]


def conv2d(client, key=None, query="?format=json", **body):
    headers = {"Idempotency-Key": key} if key is not None else {}
    return client.post(f"/v1/conv2d{query}", json={"x": X, "weight": W, **body}, headers=headers)


def test_one_number_is_predicted_answered_recorded_and_metered(client, rows, bill, png, npy, rng, infer_json):
    """Over every route that bills; and the ledger's sum is the metrics'."""
    picture = {"image": (io.BytesIO(png(40, 50)), "a.png"), "other": (io.BytesIO(png(32, 32)), "b.png")}
    x = rng.random((2, 3, 32, 48), np.float32)
    admission, admitted = client.application.extensions["cconv"]._admission, []
    work = admission.work
    admission.work = lambda flops, nbytes: (admitted.append(flops), work(flops, nbytes))
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
    assert admitted == [flops + other for _, flops, other in answered]
    predicted = client.post("/v1/cost", json={"model": "edges", "shape": [2, 3, 32, 48]}).get_json()
    assert (predicted["macs"], predicted["flops"], predicted["flops_other"]) == answered[2] == answered[5]
    metered = bill(client)
    assert metered["cconv_flops_total"] == sum(e.flops for e in events)
    assert metered["cconv_inferences_total"] == sum(e.images for e in events) == 2 + 1 + 2 + 1 + 1 + 2
    assert [e.model for e in events] == ["edges", "texture", "edges", "conv2d", "conv2d", "edges"]
    assert events[5].request_id == "mine/1"
    assert all(e.account == "anonymous" and e.bytes_in > 0 and e.compute_us > 0 for e in events)
    assert [e.bytes_out for e in events] == [len(a.data) for a in answers]


@pytest.mark.parametrize("lanes", [1, 3])
def test_among_runs_side_by_side_that_fail_and_run_late_the_numbers_agree(
    make_app, url, rows, bill, rng, infer_json, lanes
):
    """Short runs and long ones, alone and together, answered or not: what was answered, and only that, is recorded."""
    app = make_app(ledger=url, lanes=lanes, threads=40, queue_requests=32)
    task, runs = app.extensions["cconv"].engine.task, itertools.count()

    def made(*arguments):
        found = task(*arguments)

        def run(images, cancel, run=found.run):
            number = next(runs)
            time.sleep(0.02 * (number % 3))
            if number % 7 == 3:
                raise MemoryError
            return run(images, cancel)

        object.__setattr__(found, "run", run)
        return found

    app.extensions["cconv"].engine.task = made
    bodies = [
        infer_json(rng.random((1 + i % 2, 3, 20 + i % 3, 20), np.float32), parameters={"timeout": 10**4 * (1 + i % 9)})
        for i in range(120)
    ]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: app.test_client().post("/v2/models/edges/infer", data=body), bodies))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503, 504}
    answered = [int(a.headers["X-Cconv-Macs"]) for a in answers if a.status_code == 200]
    assert sorted(event.macs for event in rows()) == sorted(answered)
    assert bill(app.test_client())["cconv_macs_total"] == sum(answered)


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
    assert "replay" not in first.get_json()
    billed = bill(client)
    for _ in range(3):
        again = conv2d(client, "key-1")
        assert again.status_code == 200
        assert again.headers["Idempotent-Replay"] == "true"
        assert again.get_json()["replay"] is True
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
    "query",
    [
        "by=hour", "by=day,event", "from=yesterday", "from=2026-13-01", "to=0001-01-01", "format=xml", "key=x",
        "model=", "model=%00", "model=" + "x" * 256,
    ],
)  # fmt: skip
def test_usage_refuses_what_it_does_not_know(client, query):
    assert client.get(f"/v1/usage?{query}").status_code == 400


def test_an_audit_finds_the_bills_right_and_then_the_one_that_is_wrong(make_app, url, png, npy, rng, capsys):
    client = make_app(ledger=url).test_client()
    client.post("/v1/features?model=texture", data=png(40, 50))
    client.post("/v1/features?model=edges&format=npy", data=npy(rng.random((3, 3, 20, 20), np.float32)))
    conv2d(client, bias=[1.0], padding=[1, 2], activation="leaky_relu,0.1", precision="high")
    conv2d(client, padding="same")
    assert audit(Settings(ledger=url)) == 0
    nothing = "0 of models that are not served, 0 that could not be computed\n"
    assert capsys.readouterr().out == f"4 bills, 4 right, 0 wrong, {nothing}"
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
    assert out.endswith("6 bills, 4 right, 1 wrong, 1 of models that are not served, 0 that could not be computed\n")


@pytest.mark.parametrize(("model", "shapes", "code"), [
    ("gone", {"shape": [1, 3, 9, 9], "layers": None, "parts": [{"count": 1}]}, "1 of models that are not served, 0"),
    ("edges", {"parts": [{"count": 1}]}, "0 of models that are not served, 1"),
    ("edges", "of another program", "0 of models that are not served, 1"),
])  # fmt: skip
def test_an_audit_that_computes_nothing_does_not_succeed(url, capsys, model, shapes, code):
    with Ledger(url) as book:
        book.append(ledger.Event(account="a", model=model, version="1", shapes=shapes, macs=1, flops=2, flops_other=0))
    assert audit(Settings(ledger=url)) == 1
    assert capsys.readouterr().out.endswith(f"1 bills, 0 right, 0 wrong, {code} that could not be computed\n")


def test_an_audit_leaves_the_spool_to_the_service(url, tmp_path, capsys):
    spool = tmp_path / "spool"
    spool.mkdir()
    one = ledger.Event(account="a", model="edges", shapes=[], macs=1, flops=2, flops_other=0)
    (spool / "1.events").write_bytes(one.line())
    assert audit(Settings(ledger=url, ledger_spool=str(spool))) == 0
    assert (spool / "1.events").read_bytes() == one.line()


def test_many_pictures_are_recorded_by_what_they_have_in_common(make_app, url, rows, png):
    """So that many of them fit into a row."""
    client = make_app(ledger=url).test_client()
    sizes = [(8 + n % 3, 9) for n in range(200)]
    form = [(io.BytesIO(png(*size)), f"{n}.png") for n, size in enumerate(sizes)]
    layers = "level1.relu,level1.conv"
    answer = client.post("/v1/features", content_type="multipart/form-data", data={
        "image": form, "model": "texture", "layers": layers, "format": "npys"
    })  # fmt: skip
    assert answer.status_code == 200, answer.data[:300]
    (event,) = rows()
    assert event.shapes["layers"] == layers.split(",")
    assert sorted(part["count"] for part in event.shapes["parts"]) == [66, 67, 67]
    assert event.images == 200
    assert audit(Settings(ledger=url)) == 0


def test_the_protocols_own_id_is_recorded_unless_a_header_names_the_request(client, rows, infer_json, rng):
    x = rng.random((1, 3, 8, 8), np.float32)
    for name, headers in (("r/1", {}), ("r 2", {}), ("r/3", {"X-Request-Id": "mine"})):
        assert client.post("/v2/models/edges/infer", data=infer_json(x, id=name), headers=headers).status_code == 200
    assert [event.request_id for event in rows()] == ["r/1", "", "mine"]


def test_an_empty_key_is_refused(client, rows):
    """A client whose template broke would pay for every attempt."""
    assert conv2d(client, "").status_code == 400
    assert conv2d(client, "  ").status_code == 400
    assert rows() == []


def test_servers_that_compute_one_request_at_the_same_time_bill_it_once(make_app, url, rows, bill):
    """Neither knows of the other; the later answer says that it is a repetition, and is metered as one."""
    one, other = (make_app(ledger=url) for _ in range(2))
    scheduler = one.extensions["cconv"]._scheduler
    run = scheduler.run

    def run_after_the_other(*arguments):
        assert conv2d(other.test_client(), "k").status_code == 200
        return run(*arguments)

    scheduler.run = run_after_the_other
    late = conv2d(one.test_client(), "k")
    assert (late.status_code, late.headers["Idempotent-Replay"]) == (200, "true")
    (event,) = rows()
    assert bill(one.test_client())["cconv_flops_total"] == 0
    assert bill(other.test_client())["cconv_flops_total"] == event.flops


def test_usage_has_few_readers_at_a_time_and_computing_goes_on(client):
    assert conv2d(client).status_code == 200
    slow = [client.get("/v1/usage?by=event", buffered=False) for _ in range(2)]
    assert [one.status_code for one in slow] == [200, 200]
    refused = client.get("/v1/usage")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert conv2d(client).status_code == 200
    for one in slow:
        one.close()
    assert [client.get("/v1/usage").status_code for _ in range(5)] == [200] * 5
    assert [client.head("/v1/usage").status_code for _ in range(5)] == [200] * 5
    assert [client.get("/v1/usage?model=").status_code for _ in range(5)] == [400] * 5


def test_a_reader_who_stalls_keeps_others_out_until_its_deadline_alone(make_app, url):
    client = make_app(ledger=url, deadline_s=1.0).test_client()
    assert conv2d(client).status_code == 200
    began = time.monotonic()
    slow = [client.get("/v1/usage?by=event", buffered=False) for _ in range(2)]
    assert client.get("/v1/usage").status_code == 503
    time.sleep(max(0.0, began + 1.1 - time.monotonic()))
    assert [client.get("/v1/usage").status_code for _ in range(3)] == [200] * 3
    for one in slow:
        with pytest.raises(DeadlineExceeded):
            one.get_data()
        one.close()


def test_an_account_whose_readers_are_slow_keeps_out_no_other(make_app, url, tmp_path):
    path = tmp_path / "keys.json"
    anna, ben, boss = ({"X-API-Key": auth.make(path, "a", scopes)} for scopes in (("usage",), ("usage",), ("admin",)))
    client = make_app(ledger=url, api_keys=str(path)).test_client()
    slow = [client.get("/v1/usage?by=event", headers=anna, buffered=False) for _ in range(2)]
    answers = [client.get("/v1/usage", headers=one) for one in (anna, ben, boss)]
    assert [one.status_code for one in answers] == [503, 200, 200]
    assert "for this account" in answers[0].json["error"]
    slow += [client.get("/v1/usage?by=event", headers=ben, buffered=False) for _ in range(2)]
    full = client.get("/v1/usage", headers=boss)
    assert (full.status_code, full.headers["Retry-After"], "4 answers" in full.json["error"]) == (503, "1", True)
    for one in slow:
        one.close()
    assert [client.get("/v1/usage", headers=one).status_code for one in (anna, ben, boss)] == [200] * 3


def test_usage_has_a_deadline(make_app, url, monkeypatch):
    from cconv.ledger.database import Database

    client = make_app(ledger=url, deadline_s=1.0).test_client()
    assert conv2d(client).status_code == 200
    pause = Database.pause
    monkeypatch.setattr(Database, "pause", lambda *a: (time.sleep(1.1), pause(*a)))
    late = client.get("/v1/usage")
    assert (late.status_code, "fewer days" in late.get_json()["error"]) == (504, True)


@pytest.mark.parametrize("query", ["", "?format=csv", "?by=event", "?by=event&format=csv"])
def test_usage_without_its_database_is_an_answer_of_its_own(make_app, tmp_path, query):
    client = make_app(ledger=f"sqlite:///{tmp_path}/none.db", ledger_timeout_s=0.5).test_client()
    for _ in range(3):
        answer = client.get(f"/v1/usage{query}")
        assert (answer.status_code, "cannot be read" in answer.get_json()["error"]) == (503, True)
        assert str(tmp_path) not in answer.get_json()["error"]


def test_a_fault_of_the_ledger_is_not_the_clients(client, monkeypatch):
    from cconv.ledger import rows

    def fail(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(rows, "_receipt", fail)
    answer = conv2d(client)
    assert (answer.status_code, "secret" in answer.get_json()["error"]) == (500, False)
    monkeypatch.undo()
    assert conv2d(client).status_code == 200
