"""Crowd: many clients of a server in one thread, so that what is measured is the server and not its clients' queue.

In: a port, the bytes of a request, how many clients, for how long.  Out: the statuses, and how long each answer took.
Each client keeps its connection, asks again as soon as it is answered, and pauses after a refusal.
"""

import heapq
import selectors
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

#: Instead of a status, where the connection was closed without an answer.
CUT = 0
_READ = 1 << 20


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """An HTTP request as it is sent."""
    named = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class Connection:
    """One client's, which sends a request and takes its answer as the socket lets it."""

    def __init__(self, port: int, sent: bytes, pause_s: float = 0.0):
        self.port, self.sent, self.pause_s = port, memoryview(sent), pause_s
        self.socket: socket.socket | None = None
        self.began = 0.0

    def begin(self, poller: selectors.BaseSelector) -> None:
        """Send what the socket takes at once."""
        self.began = time.perf_counter()
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.setblocking(False)
            poller.register(self.socket, selectors.EVENT_READ, self)
        self._rest, self._head, self._left, self.status = self.sent, b"", None, CUT
        self.keeps = True
        self._send(poller)

    def go_on(self, poller: selectors.BaseSelector, events: int) -> bool:
        """Send and read what there is; whether the answer is there, or will never be."""
        if events & selectors.EVENT_WRITE:
            self._send(poller)
        if not events & selectors.EVENT_READ:
            return False
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.keeps = False
            return True
        return self._take(data)

    def _send(self, poller: selectors.BaseSelector) -> None:
        """What a server that has answered does not read any more is left."""
        try:
            while self._rest:
                self._rest = self._rest[self.socket.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._rest = self._rest[:0]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._rest else 0)
        if poller.get_key(self.socket).events != wanted:
            poller.modify(self.socket, wanted, self)

    def _take(self, data: bytes) -> bool:
        if self._left is None:
            self._head += data
            head, found, body = self._head.partition(b"\r\n\r\n")
            if not found:
                return False
            lines = head.lower().split(b"\r\n")
            fields = dict(line.split(b": ", 1) for line in lines[1:])
            self.status = int(lines[0].split()[1])
            self.keeps = fields.get(b"connection") != b"close"
            self._left = int(fields[b"content-length"]) - len(body)
        else:
            self._left -= len(data)
        return self._left <= 0

    def end(self, poller: selectors.BaseSelector) -> None:
        """After an answer: the connection is kept if the server keeps it and all has been sent."""
        if self.socket is not None and not (self.keeps and not self._rest):
            self.close(poller)

    def close(self, poller: selectors.BaseSelector) -> None:
        if self.socket is not None:
            poller.unregister(self.socket)
            self.socket.close()
            self.socket = None


@dataclass
class Seen:
    """What some clients saw: how many answers of each status, and the milliseconds of each."""

    statuses: Counter = field(default_factory=Counter)
    taken_ms: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, taken_ms: float) -> None:
        self.statuses[status] += 1
        self.taken_ms.setdefault(status, []).append(taken_ms)


def crowd(port: int, sent: bytes, count: int, span_s: float, pause_s: float, probe: bytes) -> tuple[Seen, Seen]:
    """What so many clients saw in a span, and what one saw that asks `probe` every 50 ms."""
    poller = selectors.DefaultSelector()
    asking, probing = Seen(), Seen()
    clients = [Connection(port, sent, pause_s) for _ in range(count)] + [Connection(port, probe)]
    now = time.perf_counter()
    end = now + span_s
    # Not all at once: a server's queue of connections is no part of this.
    due = [(now + index / 1000, index) for index in range(len(clients))]
    try:
        while (now := time.perf_counter()) < end:
            while due and due[0][0] <= now:
                clients[heapq.heappop(due)[1]].begin(poller)
            wait = min(due[0][0] if due else end, end) - time.perf_counter()
            for key, events in poller.select(max(0.0, wait)):
                client = key.data
                if not client.go_on(poller, events):
                    continue
                now = time.perf_counter()
                index = clients.index(client)
                (probing if index == count else asking).add(client.status, 1e3 * (now - client.began))
                client.end(poller)
                pause = 0.05 if index == count else pause_s if client.status != 200 else 0.0
                heapq.heappush(due, (now + pause, index))
    finally:
        for client in clients:
            client.close(poller)
        poller.close()
    return asking, probing
