"""Connection: a client's connection, on which a request is gathered while no thread waits for it.

In: a socket.  Out: bytes for gunicorn's parser, once a request is there whole, and its body in one piece; an answer
whose head leaves with the body's first piece, at its reader's pace, by no more slow threads than the worker allows.

What is read off a head here only decides how much to wait for, and what may be refused. What a request is, gunicorn's
parser decides; where it wants more than was gathered, its thread waits for that as one of the few that may be slow.
"""

import errno
import re
import select
import socket
import sys
import threading
import time
from collections import deque

from gunicorn import http
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import TConn

from .body import Gathered

#: Seconds that a thread waits for a client during one request before it counts as slow, and that a slow one may take.
PATIENCE_S, SLOW_S = 1.0, 300.0
#: Longer heads are for the parser, which has limits of its own: the gathered part is looked at again and again.
LONGEST_HEAD = 1 << 16
#: Bytes of one look at a socket: where it is not known how much will come, for a body, and of all looks in a turn.
_FIRST, _MORE, _TURN = 1 << 16, 1 << 20, 4 << 20
#: Where bytes go that nobody wants; of a TCP connection Linux does not even copy them.
_WASTE = bytearray(_MORE)
_UNSEEN = socket.MSG_DONTWAIT | (socket.MSG_TRUNC if sys.platform == "linux" else 0)
#: The first piece of an answer's body, up to which it is copied behind the head: they leave in one packet.
_JOINED = 1 << 16
#: Longer lines between chunks are for the parser to refuse.
LONGEST_LINE = 1 << 14
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(0*[0-9]{1,18})[ \t]*(?=\r\n)")
_CONTINUE = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)
_CHUNK = re.compile(rb"[0-9a-f]+(?=[ \t;\r])", re.IGNORECASE)
_CLOSES = re.compile(rb"http/1\.0\r\n|\r\nconnection:[^\r\n]*close|\r\nexpect:")


class Stream(socket.socket):
    """A client's socket, on which no thread waits for long unless it gets one of the few slots of slow threads."""

    def __init__(self, accepted: socket.socket, slots: threading.Semaphore):
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._slots, self._slow, self._waited = slots, False, 0.0
        #: The head of an answer, which waits for what follows; None before it is there, empty once it has left.
        self._head: bytes | None = None

    def renew(self) -> None:
        """A request has been answered, or given up."""
        self._waited, self._head = 0.0, None
        if self._slow:
            self._slow = False
            self._slots.release()

    def send(self, data, flags: int = 0) -> int:
        """Gunicorn tells clients to go on by this, and they need not read that."""
        if flags & socket.MSG_DONTWAIT:
            return super().send(data, flags)
        self._send_whole(data)
        return len(data)

    def sendall(self, data, flags: int = 0) -> None:
        """Send a piece of an answer, of which the first is the head: gunicorn sends that by itself."""
        if self._head is None:
            self._head = bytes(data)
        elif self._head and len(data) <= _JOINED:
            whole, self._head = self._head + data, b""
            self._send_whole(whole)
        else:
            self.flush()
            self._send_whole(data)

    def flush(self) -> None:
        """Nothing follows on the head, or nothing small."""
        head, self._head = self._head, b""
        if head:
            self._send_whole(head)

    def _send_whole(self, data) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def receive(self, most: int) -> bytes:
        """Some bytes, or none at the end."""
        while True:
            try:
                return self.recv(most, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(select.POLLIN)

    def _wait(self, event: int) -> None:
        began = time.monotonic()
        ready = is_ready(self, event, (SLOW_S if self._slow else PATIENCE_S) - self._waited)
        self._waited += time.monotonic() - began
        if ready:
            return
        if self._slow or not self._slots.acquire(blocking=False):
            raise ConnectionResetError(errno.ECONNRESET, "too slow a client, or one of too many slow ones")
        self._slow = True
        self._wait(event)


class _Unreader(SocketUnreader):
    """Hands out what was gathered, and then what the socket has."""

    def __init__(self, connection: "Connection"):
        super().__init__(connection.sock)
        self._connection = connection

    def chunk(self, size_hint=None):
        chunks = self._connection.chunks
        return chunks.popleft() if chunks else self.sock.receive(max(self.mxchunk, min(size_hint or 0, _MORE)))


class _Chunks:
    """Where a chunked body ends: what is between the chunks is looked at, and what is none is for the parser."""

    def __init__(self):
        self.ended = False
        self._line, self._rest, self._last = b"", 0, False

    def add(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self.ended:
            if self._rest:
                step = min(self._rest, len(data) - at)
                self._rest, at = self._rest - step, at + step
                continue
            end = data.find(b"\n", at) + 1
            self._line += data[at : end or len(data)]
            if not end:
                self.ended = len(self._line) > LONGEST_LINE
                return
            line, self._line, at = self._line, b"", end
            size = None if self._last else _CHUNK.match(line)
            if self._last or size is None:  # a trailer, or what the parser refuses
                self.ended = line == b"\r\n" or not self._last
            elif length := int(size[0], 16):
                self._rest = length + 2
            else:
                self._last = True


class Connection(TConn):
    """One client's, with what has come of its next request; of bodies beyond `most` bytes only the head is awaited."""

    def __init__(self, cfg, sock: Stream, client, server, most: int):
        super().__init__(cfg, sock, client, server)
        self.parser = http.get_parser(cfg, sock, client)
        self.parser.unreader = _Unreader(self)
        self.initialized = True  # for gunicorn: the parser is there
        self.most = most + LONGEST_HEAD
        #: Until when, on time.monotonic()'s clock, what is awaited must have come.
        self.deadline = 0.0
        #: Bytes to throw away, and whether the connection ends after them.
        self.unwanted, self.ending = 0, False
        #: Bytes of what is gathered that the loop has counted.
        self.counted = 0
        self.renew()

    def renew(self, rest: bytes = b"") -> None:
        """Await the next request, of which `rest` has come."""
        self.chunks: deque[bytes] = deque()
        self.bytes = 0
        #: Of head and body, and of the body alone; None before the head has come, and of a chunked body.
        self.size: int | None = None
        self.length = 0
        #: Whether it may be answered without a look at the whole: a POST with one plain length and nothing doubtful.
        self.plain = False
        #: Whether the connection ends with it, and whether it was let in when its head had come.
        self.closes = self.welcome = False
        self._chunked: _Chunks | None = None
        self._ended = False
        if rest:
            self._add(rest)

    @property
    def whole(self) -> bool:
        """Whether the parser need not wait, or nothing more is to be waited for."""
        if self._ended or self.bytes > self.most:
            return True
        if self._chunked:
            return self._chunked.ended
        if self.size is None:
            return self.bytes > LONGEST_HEAD
        return self.bytes >= self.size or self.size > self.most

    @property
    def headed(self) -> bool:
        """Whether the head has come."""
        return self.size is not None or self._chunked is not None

    @property
    def complete(self) -> bool:
        """Whether all of a request of known length is there, so that the next one begins behind it."""
        return self.size is not None and self.bytes >= self.size

    def gather(self) -> bool:
        """Take what the socket has; whether that is enough for the parser."""
        before = self.bytes
        while not self.whole and self.bytes < before + (_FIRST if self.size is None else _TURN):
            try:
                # No more than is missing: a large piece of memory is fresh pages, a microsecond and more for each.
                missing = _FIRST if self.size is None else min(_MORE, self.size - self.bytes)
                data = self.sock.recv(missing, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if data:
                self._add(data)
            else:
                self._ended = True
        return self.whole

    def _add(self, data: bytes) -> None:
        self.bytes += len(data)
        if self.chunks and len(self.chunks[-1]) + len(data) <= _FIRST:  # small ones take memory that nobody counts
            self.chunks[-1] += data
        else:
            self.chunks.append(data)
        if self._chunked:
            self._chunked.add(data)
        elif self.size is None:
            self._look(b"".join(self.chunks), len(data))

    def _look(self, came: bytes, fresh: int) -> None:
        """At the head, if it is there now that so many bytes more have come."""
        self.chunks = deque([came])
        end = came.find(b"\r\n\r\n", max(0, len(came) - fresh - 3)) + 4
        if end < 4:
            return
        head = came[: end - 2].lower()
        lengths = _LENGTH.findall(head)
        if b"\r\ntransfer-encoding:" in head:
            self._chunked = _Chunks()
            self._chunked.add(came[end:])
        else:
            self.length = int(lengths[0] if lengths else 0)
            self.size = end + self.length
        same_lines = head.count(b"\n") == head.count(b"\r\n")
        one_length = head.count(b"\r\ncontent-length") == len(lengths) == 1
        self.plain = same_lines and one_length and b"transfer-encoding" not in head and came.startswith(b"POST ")
        self.closes = _CLOSES.search(head) is not None

    def invite(self) -> None:
        """Tell a client that waits for it to go on; gunicorn's parser would, when it has all."""
        came = b"".join(self.chunks)
        end = came.find(b"\r\n\r\n") + 2
        head, wishes = _CONTINUE.subn(b"", came[:end])
        if wishes and b" HTTP/1.0\r\n" not in head:
            self.chunks = deque([head + came[end:]])
            self.bytes -= end - len(head)
            if self.size is not None:
                self.size -= end - len(head)
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def agrees(self) -> bool:
        """Whether gunicorn's parser saw a body of the same length, so that what follows is the next request."""
        found = [int(value) for name, value in self.parser.mesg.headers if name == "CONTENT-LENGTH"]
        return self.complete and len(found) <= 1 and sum(found) == self.length

    def take_body(self) -> Gathered:
        """The body, all of which has come: gunicorn's reader would copy it again and again."""
        came = b"".join((self.parser.unreader.take_buffered(), *self.chunks))
        self.chunks = deque([came[self.length :]])
        return Gathered(came[: self.length])

    def following(self) -> bytes:
        """What came behind the request that was answered."""
        rest = b"".join((self.parser.unreader.take_buffered(), *self.chunks))
        if not self.complete:
            return rest
        self.parser.mesg = None  # what the application did not read of the body is skipped here
        more = self.bytes - self.size
        return rest[-more:] if more else b""

    def send(self, data: bytes) -> bool:
        """Whether the socket took all of it at once."""
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT) == len(data)
        except OSError:
            return False

    def skip(self) -> bool | None:
        """Throw away what comes and is not wanted; whether that is all. None: no more will come."""
        while self.unwanted > 0:
            try:
                taken = self.sock.recv_into(_WASTE, min(self.unwanted, _MORE), _UNSEEN)
            except BlockingIOError:
                return False
            except OSError:
                return None
            if not taken:
                return None
            self.unwanted -= taken
        return True


def is_ready(sock: socket.socket, event: int, wait_s: float) -> bool:
    """Whether a socket can be read or written within so many seconds."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(max(0.0, 1e3 * wait_s)))
