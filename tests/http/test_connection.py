"""Connection: what the worker's loop knows of a request that comes in pieces, without a server around it.

In: bytes on a pair of sockets.  Out: how much is waited for, counted and held; nobody waits for a reader without end.
"""

import contextlib
import logging
import os
import runpy
import selectors
import socket
import threading
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from service import connection
from service.body import Gathered
from service.connection import LONGEST_HEAD, Connection, Stream
from service.worker import Worker

MOST = 1 << 20


@pytest.fixture
def pair():
    """A client's socket, and the Stream that is its other end; no thread may be slow."""
    client, accepted = socket.socketpair()
    stream = Stream(accepted, threading.Semaphore(0))
    stream.setblocking(False)
    with client, stream:
        yield client, stream


@pytest.fixture
def conn(pair):
    return Connection(Config(), pair[1], ("127.0.0.1", 1), ("127.0.0.1", 2), MOST)


@pytest.fixture
def worker():
    """A worker that has not started, at a door that `refuses` or not."""
    made = Worker(0, os.getppid(), [], None, 120, Config(), logging.getLogger(__name__))
    made.poller = selectors.DefaultSelector()
    made.method_queue.init()
    made.refuses = b""
    made._busy = made._gathered = 0
    made._placed = set()
    made._timed = set()
    made._door = SimpleNamespace(
        refusal=lambda *_: made.refuses, queue_bytes=10 * MOST, places=9, deadline_s=60.0, full=lambda: False
    )
    yield made
    made.poller.close()
    made.method_queue.close()
    made.tmp.close()


def feed(conn: Connection, client: socket.socket, data: bytes, size: int) -> list[int]:
    """After how many bytes, sent in pieces of this size, the request was whole."""
    whole = []
    for at in range(0, len(data), size):
        client.sendall(data[at : at + size])
        if conn.gather():
            whole.append(min(at + size, len(data)))
            break
    return whole


class TestWhole:
    CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
    @pytest.mark.parametrize(
        "body",
        [
            b"0\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\r\n",
            b"00000000000000000004;a=b\r\n\r\n\r\n\r\n0\r\n\r\n",
            b"7\r\n0\r\n\r\n0\r\r\n0\r\nA: b\r\nC: d\r\n\r\n",
        ],
    )
    def test_chunks_end_with_the_last_and_its_trailers(self, conn, pair, body, size):
        assert feed(conn, pair[0], self.CHUNKED + body, size) == [len(self.CHUNKED + body)]

    def test_what_follows_the_last_chunk_is_not_waited_for(self, conn, pair):
        assert feed(conn, pair[0], self.CHUNKED + b"0\r\n\r\nPOST / HTTP/1.1\r\n", 1000)

    def test_chunks_that_are_none_are_the_parsers(self, conn, pair):
        assert feed(conn, pair[0], self.CHUNKED + b"-5\r\n", 1000)

    def test_a_head_without_end_is_the_parsers(self, conn, pair):
        (size,) = feed(conn, pair[0], b"GET /" + b"a" * (2 * LONGEST_HEAD), 1 << 16)
        assert LONGEST_HEAD < size <= LONGEST_HEAD + (1 << 16)


def test_small_pieces_are_held_as_one(conn, pair):
    pair[0].sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n")
    assert feed(conn, pair[0], bytes(2000), 2) == []
    assert len(conn.chunks) <= 2
    assert len(b"".join(conn.chunks)) == conn.bytes


class TestAnswers:
    """The head of an answer leaves with what follows, and without it where nothing does."""

    @pytest.fixture
    def sent(self, pair, monkeypatch):
        """The sizes that the stream hands to the system."""
        sizes, send = [], Stream.send
        monkeypatch.setattr(
            Stream, "send", lambda stream, data, flags=0: sizes.append(len(data)) or send(stream, data, flags)
        )
        return sizes

    @pytest.mark.parametrize("rest", [(), (b"b" * 5,), (b"b" * 5, b"c" * 7), (b"b" * (1 << 17),)])
    def test_whatever_follows_comes_behind_its_head(self, pair, sent, rest):
        client, stream = pair
        whole = b"".join((b"head", *rest))
        for _ in range(2):
            for data in (b"head", *rest):
                stream.sendall(data)
            stream.flush()
            stream.renew()
            assert client.recv(len(whole), socket.MSG_WAITALL) == whole
        if rest and len(rest[0]) < 1000:
            assert sent[0] == 4 + len(rest[0]), "one packet"
        assert 0 not in sent

    def test_who_waits_is_told_to_go_on_at_once(self, pair):
        client, stream = pair
        stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert client.recv(100, socket.MSG_DONTWAIT).startswith(b"HTTP/1.1 100")

    def test_of_a_reader_that_is_gone_are_errors(self, pair):
        client, stream = pair
        client.close()
        stream.sendall(b"head")
        with pytest.raises(OSError, match="Broken pipe"):
            stream.flush()


class TestBodies:
    """A body that came whole is handed on in one piece, and what is behind it stays for the next request."""

    HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"

    @pytest.mark.parametrize("size", [0, 5, 100_000])
    @pytest.mark.parametrize("behind", [b"", b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"])
    def test_that_came_with_another_request_behind_it(self, conn, pair, size, behind):
        body = bytes(range(250)) * (size // 250) + b"x" * (size % 250)
        whole = self.HEAD % size + body + behind
        sender = threading.Thread(target=pair[0].sendall, args=[whole])
        sender.start()
        while not conn.gather():
            pass
        sender.join()
        next(conn.parser)
        assert conn.agrees()
        taken = conn.take_body()
        assert isinstance(taken, Gathered)
        assert taken.read() == body
        came = conn.following()
        assert behind.startswith(came), "what was gathered of it"
        conn.renew(came)
        conn.gather()
        assert b"".join(conn.chunks) == behind


class TestReaders:
    """Who reads nothing, with a full buffer."""

    @pytest.fixture
    def stuck(self, pair, monkeypatch):
        monkeypatch.setattr(connection, "PATIENCE_S", 0.05)
        stream = pair[1]
        with contextlib.suppress(BlockingIOError):
            while stream.send(bytes(1 << 16), socket.MSG_DONTWAIT):
                pass
        stream.setblocking(True)
        return stream

    def test_holds_no_thread_that_tells_it_to_go_on(self, stuck):
        with pytest.raises(ConnectionResetError):
            stuck.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def test_gets_no_file_by_the_kernel_which_would_wait(self):
        assert runpy.run_path("service/gunicorn.conf.py")["sendfile"] is False


class TestCounted:
    """Bytes that are gathered are counted once, and no more when they are gone."""

    HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"

    @pytest.mark.parametrize("more", [b"\r\n", b"Connection: close\r\n\r\n", b"Expect: 100-continue\r\n\r\n"])
    @pytest.mark.parametrize("refuses", [b"", b"HTTP/1.1 503 \r\n\r\n"])
    def test_whatever_becomes_of_them(self, worker, conn, pair, more, refuses):
        client, _ = pair
        worker.nr_conns, worker.handle = 1, lambda _: False
        client.sendall(self.HEAD + more + bytes(50))
        worker._arrive(conn)
        assert worker._gathered > 50
        worker.refuses = refuses
        client.sendall(bytes(50))
        client.shutdown(socket.SHUT_WR)
        with worker.get_thread_pool() as worker.tpool:
            worker._arrive(conn)
        for _ in range(5):
            for key, _ in worker.poller.select(0):
                key.data(key.fileobj)
            worker.method_queue.defer(int)
            worker.method_queue.run_callbacks(None)
        assert worker.nr_conns == 0
        assert worker._gathered == 0


def test_sigterm_while_it_starts_ends_it(worker):
    del worker._door
    worker.handle_exit(15, None)
    assert not worker.alive
