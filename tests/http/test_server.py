"""Server: the service under gunicorn, as it is deployed: signals, sockets, many clients, and a log without tracebacks.

In: processes on free ports of this machine.  Out: every answer whole and right, every process gone at the end.
"""

import http.client
import io
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cconv
from cconv import filters

pytestmark = pytest.mark.alone
NPY = "/v1/features?model=edges&format=npy"


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.fixture
def raw(server):
    """A connection of the test's own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    yield connection
    connection.close()


def test_a_worker_that_is_killed_is_replaced(start_server):
    server = start_server()
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGKILL)
    end = time.monotonic() + 30
    while children(server.process.pid) in ([], [worker]) and time.monotonic() < end:
        time.sleep(0.02)
    assert server.ask("/readyz")[0] == 200
    assert children(server.process.pid) != [worker]
    assert server.stop() == 0


def test_the_computing_thread_and_cconv_live_in_the_worker_alone(server):
    """The master forks, and neither threads nor an OpenMP team survive that: it must not even load them."""
    with open(f"/proc/{server.process.pid}/maps") as file:
        loaded = file.read()
    assert "_core" not in loaded
    assert "libgomp" not in loaded
    assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1


def test_16_clients_at_once_get_their_own_answers(start_server, npy, rng):
    server = start_server(CCONV_THREADS="20", CCONV_QUEUE_REQUESTS="18")
    weights = filters.bank("edges")
    images = [[rng.random((1, 3, 40 + i % 3, 50), np.float32) for _ in range(4)] for i in range(16)]

    def work(mine):
        return [server.ask(NPY, npy(x)) for x in mine]

    with ThreadPoolExecutor(16) as pool:
        for mine, answers in zip(images, pool.map(work, images), strict=True):
            for x, (status, headers, body) in zip(mine, answers, strict=True):
                assert status == 200, body[:300]
                assert np.array_equal(np.load(io.BytesIO(body)), cconv.conv2d(x, weights))
                assert int(headers["X-Cconv-Macs"]) == cconv.conv2d_cost(x.shape, weights.shape).macs


def test_hostile_bodies_leave_the_server_alive_and_the_bill_at_zero(start_server, png):
    server = start_server(CCONV_MAX_BODY_BYTES="2000000")
    worker = children(server.process.pid)
    infer = "/v2/models/edges/infer"
    for path, body, status in (  # the whole corpus is in test_hostile.py
        (infer, b"[" * 250_000, 400),
        (infer, b'{"inputs":' + b"[" * 250_000 + b"]" * 250_000 + b"}", 400),
        (NPY, png(10_000, 10_000), 400),
        (NPY, png(64, 64)[:-40], 400),
        (NPY, b"\x93NUMPY\x01\x00\xff\xff", 400),
        (NPY, bytes(2_000_001), 413),
        ("/v2/models/nonesuch/infer", b"{}", 404),
        ("/v1/nonesuch", b"{}", 404),
    ):
        got, headers, answer = server.ask(path, body)
        assert got == status, answer[:300]
        assert headers["Content-Type"].startswith("application/json")
        assert b'"error":' in answer
        assert server.ask("/livez")[0] == 200
    assert not server.billed()
    assert children(server.process.pid) == worker
    assert "Traceback" not in server.log.read_text()


def peak_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1])


def test_an_enormous_dilation_costs_neither_time_nor_memory(start_server):
    """A 3x3 window whose taps lie further apart than any image: only the middle one ever meets it."""
    server = start_server()
    (worker,) = children(server.process.pid)

    def ask(distance):
        document = {"x": [[[[1, 2], [3, 4]]]], "weight": [[[[5, 0, 0], [0, 10, 0], [0, 0, 5]]]]}
        document |= {"padding": distance, "dilation": distance}
        return server.ask("/v1/conv2d?format=json", json.dumps(document).encode(), {"Content-Type": "application/json"})

    assert ask(1)[0] == 200
    before = peak_bytes(worker)
    for distance in (5_000, 30_000, 65_535):
        begin = time.monotonic()
        status, _, body = ask(distance)
        assert time.monotonic() - begin < 5
        if status == 200:
            assert json.loads(body)["data"] == [[[[10, 20], [30, 40]]]]
        else:
            assert 400 <= status < 500, body[:300]
            assert "expected" in json.loads(body)["error"]
        assert children(server.process.pid) == [worker]
        assert peak_bytes(worker) - before < 100 << 20
    assert "Traceback" not in server.log.read_text()


def test_a_chunked_body_is_read_and_limited(start_server, npy, rng):
    server = start_server(CCONV_MAX_BODY_BYTES="100000")
    x = rng.random((1, 3, 20, 20), np.float32)

    def send(data):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        parts = (data[i : i + 1000] for i in range(0, len(data), 1000))
        connection.request("POST", NPY, parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body

    status, body = send(npy(x))
    assert status == 200, body
    assert np.array_equal(np.load(io.BytesIO(body)), cconv.conv2d(x, filters.bank("edges")))
    status, body = send(bytes(150_000))
    assert status == 413
    assert b"100000 bytes" in body


def test_a_connection_outlives_a_pause_between_two_requests(raw, npy, rng):
    """gunicorn's own default closes after two seconds, in the middle of a client's next request."""
    body = npy(rng.random((1, 3, 20, 20), np.float32))
    for pause in (2.5, 0):
        raw.request("POST", NPY, body)
        answer = raw.getresponse()
        assert answer.status == 200
        answer.read()
        local = raw.sock.getsockname()
        time.sleep(pause)
    assert raw.sock.getsockname() == local


def test_clients_that_go_away_give_their_place_back(server, npy, rng):
    body = npy(rng.random((1, 3, 400, 400), np.float32))
    head = f"POST {NPY} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head, head + body[: len(body) // 2], head + body) * 6:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(sent)
    end, quiet = time.monotonic() + 20, 0
    while quiet < 10 and time.monotonic() < end:  # some are read only when those before them are done
        metrics = server.metrics()
        quiet = 0 if metrics["cconv_pending_requests"] or metrics["cconv_pending_bytes"] else quiet + 1
        time.sleep(0.05)
    assert quiet == 10
    assert server.ask(NPY, body)[0] == 200


def test_requests_are_in_the_access_log(server):
    server.ask("/v2/models")
    end = time.monotonic() + 10  # the line is written once the answer has left
    while not re.search(r'"GET /v2/models HTTP/1.1" 200', server.access_log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"CCONV_THREADS": "many"}, "CCONV_THREADS: expected int, got 'many'"),
        ({"CCONV_MODELS": "edges,nonesuch"}, "models: expected names of"),
    ],
)
def test_a_setting_that_cannot_be_ends_the_start_with_a_text(start_server, variables, text, capfd):
    with pytest.raises(RuntimeError, match="not ready"):
        start_server(**variables)
    assert text in capfd.readouterr().err


def test_only_the_chosen_models_are_served(start_server):
    server = start_server(CCONV_MODELS="edges, texture")
    assert server.ask("/v2/models")[2] == b'{"models":["edges","texture"]}'
    assert server.ask("/v2/models/vgg16")[0] == 404
