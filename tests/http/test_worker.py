"""Worker: slow clients and a full house, at the service under gunicorn: neither stops the others.

In: bytes on sockets, at a client's own pace.  Out: answers for everybody else; refusals at once, on a connection that
stays; what is in flight when SIGTERM comes is answered.
"""

import contextlib
import io
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cconv

pytestmark = pytest.mark.alone
NPY = "/v1/features?model=edges&format=npy"
FEW = {"CCONV_THREADS": "4", "CCONV_QUEUE_REQUESTS": "2", "CCONV_MODELS": "edges,vgg16"}
#: 13 MB of maps an image: more than sockets buffer.
LONG = "/v1/features?model=vgg16&layers=features.0&format=npy"


@pytest.fixture
def connect():
    """f(server) -> a socket to it."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))


def head(path: str, size: int, *more: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {size}", *more, "", "")).encode()


def read(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next answer and nothing behind it: status, headers, body."""
    text = b""
    while not text.endswith(b"\r\n\r\n"):
        text += receive(connection, 1)
    status, *fields = text.decode().split("\r\n")[:-2]
    headers = dict(field.split(": ", 1) for field in fields)
    left, pieces = int(headers["Content-Length"]), []
    while left:
        pieces.append(receive(connection, left))
        left -= len(pieces[-1])
    return int(status.split()[1]), headers, b"".join(pieces)


def receive(connection: socket.socket, most: int) -> bytes:
    if not (data := connection.recv(most)):
        raise ConnectionError("it was closed")
    return data


@pytest.fixture
def image(npy, rng):
    return npy(rng.random((1, 3, 24, 24), np.float32))


def is_served(server, image) -> bool:
    """Whether a request that anybody sends now is answered within a second."""
    began = time.monotonic()
    return server.ask(NPY, image)[0] == 200 and time.monotonic() - began < 1


class TestSlow:
    """More slow clients than there are threads, and places."""

    def test_senders_hold_neither_threads_nor_places(self, start_server, connect, image):
        server = start_server(**FEW)
        whole = head(NPY, len(image)) + image
        slow = [(connect(server), whole[: 20 * (i + 1)]) for i in range(40)]
        for connection, part in slow:
            connection.sendall(part)
        assert is_served(server, image)
        assert server.metrics()["cconv_pending_requests"] == 0
        for connection, part in slow:
            connection.sendall(whole[len(part) :])
            assert read(connection)[0] == 200

    def test_a_body_in_chunks_of_one_byte_holds_none(self, start_server, connect, image):
        server = start_server(**FEW)
        slow = [connect(server) for _ in range(12)]
        pieces = [b"1\r\n%c\r\n" % byte for byte in image]
        for connection in slow:
            connection.sendall(f"POST {NPY} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert is_served(server, image)
        for at in range(0, len(pieces), 97):
            for connection in slow:
                connection.sendall(b"".join(pieces[at : at + 97]))
        assert is_served(server, image)
        for connection in slow:
            connection.sendall(b"0\r\n\r\n")
            assert read(connection)[0] == 200

    def test_readers_hold_a_part_of_the_threads(self, start_server, connect, npy, rng, image):
        """Those beyond it are cut off after a moment; one goes on at its own pace."""
        server = start_server(**FEW)
        x = npy(rng.random((1, 3, 224, 224), np.float32))
        slow = [connect(server) for _ in range(6)]
        answered = []
        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            connection.sendall(head(LONG, len(x)) + x)
            end = time.monotonic() + 10
            while not (served := is_served(server, image)) and time.monotonic() < end:
                time.sleep(0.1)
            assert served
            answered.append(connection)
        finished = 0
        for connection in answered:
            with contextlib.suppress(OSError):
                status, _, maps = read(connection)
                finished += status == 200 and np.load(io.BytesIO(maps)).shape == (1, 64, 224, 224)
        assert finished >= 1
        assert server.metrics()["cconv_pending_requests"] == 0
        assert "Traceback" not in server.log.read_text()

    @pytest.mark.parametrize("part", [10, 200])
    def test_a_request_that_does_not_come_in_time_is_given_up(self, start_server, connect, image, part):
        server = start_server(**FEW, CCONV_DEADLINE_SECONDS="1")
        connection = connect(server)
        connection.sendall((head(NPY, len(image)) + image)[:part])
        assert read(connection)[0] == 408
        assert connection.recv(1) == b""

    def test_a_client_that_does_not_close_holds_nobody_up(self, start_server, connect, image):
        server = start_server(**FEW)
        lazy = [connect(server) for _ in range(5)]
        for connection in lazy:
            connection.sendall(b"no request\r\n\r\n")
            assert read(connection)[0] == 400
        assert is_served(server, image)


@pytest.fixture
def full(start_server, npy, rng):
    """A server whose one place is taken for seconds."""
    server = start_server(CCONV_THREADS="4", CCONV_QUEUE_REQUESTS="1", CCONV_MODELS="edges,vgg16")
    x = npy(rng.random((8, 3, 224, 224), np.float32))
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.ask, "/v1/features?model=vgg16&layers=features.30", x)
        while server.metrics()["cconv_pending_flops"] == 0:
            time.sleep(0.01)
        yield server
        assert long.result()[0] == 200


class TestFull:
    """No place is left."""

    def test_a_refusal_is_quick_and_keeps_the_connection(self, full, connect):
        connection, body = connect(full), bytes(400_000)
        taken = []
        for _ in range(20):
            began = time.monotonic()
            connection.sendall(head(NPY, len(body), "Inference-Header-Content-Length: 9") + body)
            status, headers, text = read(connection)
            taken.append(time.monotonic() - began)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "the server is full" in json.loads(text)["error"]
            assert headers["X-Content-Type-Options"] == "nosniff"
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read(connection)[0] == 200
        assert sorted(taken)[10] < 0.05
        assert full.metrics()['cconv_requests_total{code="503",model="",route="unread",version=""}'] == 20

    def test_a_refusal_comes_before_the_body_and_what_comes_of_it_is_no_request(self, full, connect):
        connection = connect(full)
        connection.sendall(head(NPY, 100_000))
        assert read(connection)[0] == 503
        connection.sendall(
            (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 4000)[:100_000] + b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        status, _, text = read(connection)
        assert status == 200
        assert json.loads(text)["name"] == "cconv"

    def test_who_asks_first_is_not_told_to_go_on(self, full, connect):
        connection = connect(full)
        connection.sendall(head(NPY, 100_000, "Expect: 100-continue"))
        assert read(connection)[0] == 503
        assert connection.recv(1) == b""

    def test_what_is_doubtful_is_not_refused_unread(self, full, connect, image):
        """Two lengths: where the next request begins is for the parser to say."""
        connection = connect(full)
        connection.sendall(head(NPY, len(image), f"Content-Length: {len(image) - 1}") + image)
        assert read(connection)[0] == 400
        assert connection.recv(1) == b""


class TestRequests:
    """One after the other on a connection."""

    def test_that_come_together_are_answered_in_their_order(self, server, connect, image):
        connection = connect(server)
        one = head(NPY, len(image)) + image
        get = b"GET /v2/models/edges/ready HTTP/1.1\r\nHost: x\r\n\r\n"
        unread = head("/v2/models/nonesuch/infer", len(image)) + image
        chunked = (
            f"POST {NPY} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{len(image):x}\r\n".encode()
            + image
            + b"\r\n0\r\n\r\n"
        )
        connection.sendall(one + get + unread + chunked + one + chunked + get)
        assert [read(connection)[0] for _ in range(7)] == [200, 200, 404, 200, 200, 200, 200]

    def test_an_answer_without_a_body_leaves_and_the_connection_stays(self, server, connect):
        connection = connect(server)
        for _ in range(2):
            connection.sendall(b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            text = b""
            while not text.endswith(b"\r\n\r\n"):
                text += receive(connection, 1)
            assert text.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert json.loads(read(connection)[2]) == {"live": True}

    @pytest.mark.parametrize("digits", ["{:021}", "1{:018}"])
    def test_a_body_that_nobody_reads_is_no_request_however_its_length_is_written(self, server, connect, digits):
        connection = connect(server)
        hidden = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(head("/v2/models/nonesuch", digits.format(len(hidden))) + hidden)
        assert read(connection)[0] in (404, 405)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        if digits.startswith("1"):
            assert connection.recv(1) == b""
        else:
            assert json.loads(read(connection)[2]) == {"live": True}

    def test_of_the_older_protocol_are_not_told_to_go_on(self, server, connect, image):
        connection = connect(server)
        connection.sendall(head(NPY, len(image), "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"))
        time.sleep(0.1)
        connection.sendall(image)
        assert read(connection)[0] == 200

    def test_who_waits_to_be_told_to_go_on_is_told(self, server, connect, image):
        connection = connect(server)
        connection.sendall(head(NPY, len(image), "Expect: 100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(image)
        assert read(connection)[0] == 200

    def test_in_pieces_of_any_size_are_the_same(self, server, connect, image):
        whole = head(NPY, len(image)) + image
        answers = set()
        for size in (1, 7, 1000, len(whole)):
            connection = connect(server)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(whole), size):
                connection.sendall(whole[at : at + size])
            status, _, maps = read(connection)
            answers.add((status, maps))
        assert len(answers) == 1
        assert answers.pop()[0] == 200


@pytest.mark.parametrize("lanes", [1, 2])
def test_twenty_in_flight_at_sigterm_are_answered_while_others_hear_that_it_ends(
    lanes, start_server, npy, rng, connect
):
    """What waits or runs when SIGTERM comes is answered, and rightly; then the process ends with 0, its port free."""
    server = start_server(CCONV_THREADS="24", CCONV_QUEUE_REQUESTS="20", CCONV_MODELS="vgg16", CCONV_LANES=str(lanes))
    layer = "features.9"
    long = 24  # images: the lanes are busy with them until all twenty are in the house
    images = [rng.random((long if i < lanes else 1, 3, 160, 128 + 8 * i), np.float32) for i in range(20)]
    path = f"/v1/features?model=vgg16&layers={layer}&format=npy"
    kept = connect(server)
    with ThreadPoolExecutor(20) as pool:
        pending = [pool.submit(server.ask, path, npy(x)) for x in images[:lanes]]
        end = time.monotonic() + 30
        while server.metrics()["cconv_pending_requests"] != lanes and time.monotonic() < end:
            time.sleep(0.002)
        pending += [pool.submit(server.ask, path, npy(x)) for x in images[lanes:]]
        while server.metrics()["cconv_pending_requests"] != 20 and time.monotonic() < end:
            time.sleep(0.002)
        assert not any(request.done() for request in pending)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while server.ask("/readyz")[0] == 200 and time.monotonic() < end:
            time.sleep(0.002)
        assert json.loads(server.ask("/readyz")[2])["error"] == "the server is shutting down"
        assert server.ask("/livez")[0] == 200
        kept.sendall(head(path, 9) + bytes(9))
        status, headers, text = read(kept)
        assert (status, headers["Connection"]) == (503, "close")
        assert "shutting down" in json.loads(text)["error"]
        assert not all(request.done() for request in pending)
        answers = [request.result() for request in pending]
    model = cconv.load("vgg16")
    for x, (status, _, body) in zip(images, answers, strict=True):
        assert status == 200, body[:300]
        assert np.array_equal(np.load(io.BytesIO(body)), model.run(x, [layer])[layer])
    assert server.process.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    assert "Traceback" not in server.log.read_text()
