"""Serving: servers as processes on ports of their own, and clients of one event loop, which take little of the machine.

In: a command and its environment; requests as bytes.  Out: processes that answer; answers per second.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The service as docs/service.md starts it.
SERVICE = (sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app()")
START_S = 60
_LENGTH = re.compile(rb"^content-length: *(\d+)\r$", re.I | re.M)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Process:
    """A server that is ready, as `GET ready` says with 200; SystemExit, with its log's name, if it never is."""

    def __init__(self, command, log: Path, port: int, ready: str, *, cwd: Path = ROOT, **environment: str):
        self.port, self.log = port, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
            )
        end = time.monotonic() + START_S
        while not self._answers(ready):
            if time.monotonic() > end or self.process.poll() is not None:
                self.stop()
                raise SystemExit(f"{command[0]}: it did not start; see {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM, and its exit code; what it started and left behind is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def post(path: str, body: bytes, **headers: str) -> bytes:
    """A request of HTTP/1.1, whole."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """The status and body of an answer that says its length."""
    writer.write(request)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head[9:12]), await reader.readexactly(int(_LENGTH.search(head)[1]))


async def _client(port: int, request: bytes, end: float, statuses: Counter) -> None:
    """One connection that asks as soon as it has been answered; refused, it waits as long as is told, at most 50 ms."""
    streams = None
    while time.perf_counter() < end:
        try:
            streams = streams or await asyncio.open_connection("127.0.0.1", port)
            status, _ = await ask(*streams, request)
        except (OSError, asyncio.IncompleteReadError):
            status, streams = 0, None
        statuses[status] += 1
        if status != 200:
            await asyncio.sleep(0.05)
    if streams:
        streams[1].close()


async def _crowd(port: int, request: bytes, clients: int, seconds: float) -> Counter:
    statuses: Counter[int] = Counter()
    end = time.perf_counter() + seconds
    await asyncio.gather(*(_client(port, request, end, statuses) for _ in range(clients)))
    return statuses


def crowd(port: int, request: bytes, clients: int, seconds: float) -> tuple[float, Counter]:
    """Answers per second of so many clients, and how many there were of every status; 0 is none."""
    began = time.perf_counter()
    statuses = asyncio.run(_crowd(port, request, clients, seconds))
    return statuses[200] / (time.perf_counter() - began), statuses


def once(port: int, request: bytes) -> bytes:
    """One answer's body; SystemExit unless it is a 200."""

    async def talk() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await ask(reader, writer, request)
        finally:
            writer.close()

    status, body = asyncio.run(talk())
    if status != 200:
        raise SystemExit(f"expected 200, got {status}: {body[:500]!r}")
    return body
