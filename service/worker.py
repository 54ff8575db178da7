"""Worker: gunicorn's worker with threads, but clients hold none while they send, and a full house refuses at once.

In: connections.  Out: whole requests for the threads; or, from the loop itself, 503 where there is no room.

    loop:   accept -> gather -> room? -- no --> 503, and the rest of the body is thrown away
                                  | yes
    pool:                         +-> gunicorn's handle() -> the application -> the answer

ThreadWorker's own threads read from sockets, so that as many slow clients as there are threads stop it, and its loop
waits up to 2 s for each connection that it closes. Where a thread has answered, it awaits the client's next request
itself for a moment: two hand-overs less for a client that asks one thing after the other.
"""

import errno
import select
import selectors
import socket
import threading
import time
from functools import partial

from gunicorn.errors import ConfigError
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from .connection import Connection, Stream, is_ready

#: How long a thread awaits the next request of the client that it has answered.
LINGER_S = 0.005
#: Most bytes of a refused body that are thrown away to keep the connection.
REFUSED_BYTES = 16 << 20
#: How long a connection that the server ends may take to end, and how much it may still send.
END_S, END_BYTES = 2.0, 1 << 20
SWEEP_S = 0.5
#: Before another attempt to accept a connection where descriptors have run out: the listener stays ready.
NO_DESCRIPTOR_S = 0.01
LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Worker(ThreadWorker):
    """One loop, which owns the connections, and a pool of threads, which own requests."""

    @classmethod
    def check_config(cls, cfg, log):
        super().check_config(cfg, log)
        if cfg.is_ssl:
            raise ConfigError("certfile, keyfile: expected none: this worker speaks plain HTTP; put a proxy before it")

    def init_process(self):
        self._slots = threading.BoundedSemaphore(max(1, self.cfg.threads // 4))
        #: Threads' requests, and bytes that are gathered of others.
        self._busy = self._gathered = 0
        #: Of threads' requests, those that want a place, until they are answered; changes of a set need no lock.
        self._placed: set[Connection] = set()
        self._timed: set[Connection] = set()
        self._swept = 0.0
        super().init_process()

    def load_wsgi(self):
        super().load_wsgi()
        self._door = self.wsgi.extensions["cconv.door"]

    def handle_exit(self, sig, frame):
        if self.booted:
            self._door.close()
        super().handle_exit(sig, frame)

    def set_accept_enabled(self, enabled):
        # While requests in flight finish, probes hear that this process is not ready, and others are refused: there is
        # one worker, so nobody else would say it.
        super().set_accept_enabled(enabled or not self.alive)

    # ------------------------------------------------------------------------------------------------------- the loop

    def accept(self, listener):
        try:
            accepted, address = listener.accept()
        except OSError as error:  # the client went away, or there is no descriptor left: the next turn tries again
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(NO_DESCRIPTOR_S)
            return
        stream = Stream(accepted, self._slots)
        stream.setblocking(False)
        if stream.family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.nr_conns += 1
        self._arrive(Connection(self.cfg, stream, address, listener.getsockname(), self._door.max_body_bytes))

    def on_client_socket_readable(self, conn, client):
        self.keepalived_conns.remove(conn)
        self.poller.unregister(client)
        self._arrive(conn)

    def _watch(self, conn: Connection, callback, span_s: float) -> None:
        """Call it whenever something comes, for so long."""
        conn.deadline = time.monotonic() + span_s
        self._timed.add(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(callback, conn))

    def _unwatch(self, conn: Connection) -> None:
        if conn in self._timed:
            self._timed.remove(conn)
            self.poller.unregister(conn.sock)

    def _arrive(self, conn: Connection, *_) -> None:
        """Gather a request; once it is whole a thread has it, and where there is no room nobody."""
        whole = conn.gather()
        self._count(conn)
        overflowing = self._gathered > self._door.queue_bytes
        # Those that threads have count before they have their place: to be refused there takes as long as a small run.
        busy = overflowing or len(self._placed) >= self._door.places
        if conn.plain and (text := self._door.refusal(conn.welcome, busy)):
            self._refuse(conn, text)
        elif whole and conn.bytes:
            self._leave(conn)
            self.enqueue_req(conn)
        elif whole or overflowing:
            self._close(conn)
        else:
            if conn.headed and not conn.welcome:
                conn.welcome = True
                conn.invite()
            if conn not in self._timed:
                self._watch(conn, self._arrive, self._door.deadline_s)

    def _count(self, conn: Connection) -> None:
        """What is gathered on it, once, however often it changes."""
        self._gathered += conn.bytes - conn.counted
        conn.counted = conn.bytes

    def _leave(self, conn: Connection) -> None:
        """What was gathered on it is no matter of the loop any more."""
        self._unwatch(conn)
        self._gathered -= conn.counted
        conn.counted = 0

    def _refuse(self, conn: Connection, text: bytes) -> None:
        """Answer without having read all; the connection is kept if the rest is not too long."""
        self._leave(conn)
        rest = b"".join(conn.chunks)[conn.size :]
        conn.unwanted = max(0, conn.size - conn.bytes)
        if not conn.send(text) or conn.closes or not self.alive or conn.unwanted > REFUSED_BYTES:
            self._end(conn)
        else:
            conn.renew(rest)
            self._skip(conn)

    def _skip(self, conn: Connection, *_) -> None:
        """Throw away what is not wanted; then the connection is as new, or ends."""
        done = conn.skip()
        if done is None or (done and conn.ending):
            self._close(conn)
        elif done:
            self._unwatch(conn)
            self._keep(conn)
        elif conn not in self._timed:
            self._watch(conn, self._skip, END_S if conn.ending else self._door.deadline_s)

    def _keep(self, conn: Connection) -> None:
        """Await the next request, which may have begun already."""
        self._count(conn)
        if conn.bytes:
            self.method_queue.defer(self._arrive, conn)
            return
        conn.set_timeout()
        if not self.alive:
            conn.timeout = min(conn.timeout, time.monotonic() + STOP_KEEPALIVE_LINGER)
        self.keepalived_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    def _end(self, conn: Connection) -> None:
        """Close it, but not before the client has had the chance to read its answer."""
        conn.ending, conn.unwanted = True, END_BYTES
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(conn)
        else:
            self._skip(conn)

    def _close(self, conn: Connection) -> None:
        self._leave(conn)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self):
        """Give up clients that did not send in time."""
        now = time.monotonic()
        if now < self._swept + SWEEP_S:
            return
        self._swept = now
        for conn in list(self._timed):
            if not self.alive and not conn.bytes:
                conn.deadline = min(conn.deadline, now + STOP_KEEPALIVE_LINGER)
            if conn.deadline > now:
                continue
            if conn.bytes and not conn.ending and conn.send(LATE):
                self._leave(conn)
                conn.renew()
                self._end(conn)
            else:
                self._close(conn)

    def enqueue_req(self, conn):
        self._busy += 1
        if conn.plain:
            self._placed.add(conn)
        super().enqueue_req(conn)

    def finish_request(self, conn, fs):
        self._busy -= 1
        self._placed.discard(conn)
        if not fs.cancelled() and fs.exception() is None and fs.result() is True:
            self._keep(conn)
        else:
            conn.renew()
            self._end(conn)

    # ------------------------------------------------------------------------------------------------------- a thread

    def handle(self, conn):
        kept = self._answer(conn)
        self._placed.discard(conn)  # its client may ask again by another connection, while this thread lingers
        while kept and self._lingers(conn):
            kept = self._answer(conn)
        return kept

    def _answer(self, conn: Connection) -> bool:
        kept = super().handle(conn) is True
        try:
            conn.sock.flush()  # an error's answer, which gunicorn sends in one piece
        except OSError:
            kept = False
        conn.sock.renew()
        if kept:
            conn.renew(conn.following())
        return kept

    def handle_request(self, req, conn):
        if conn.agrees():
            req.body = conn.take_body()
        return super().handle_request(req, conn)

    def _lingers(self, conn: Connection) -> bool:
        """Whether this thread takes the client's next request too, as it is there and nobody needs the thread."""
        if not self.alive or self._busy > self.cfg.threads // 2:
            return False
        if not conn.bytes and not is_ready(conn.sock, select.POLLIN, LINGER_S):
            return False
        return conn.gather() and conn.bytes > 0 and not self._door.full()

    def _keepalive_after(self, conn, keepalive):
        """Whether the connection may be kept: all of this request has come, so where the next begins is known."""
        conn.sock.flush()  # an answer without a body
        if conn.complete:
            return keepalive and conn.agrees()
        return super()._keepalive_after(conn, keepalive)
