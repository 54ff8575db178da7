"""Spool: files that hold events until the database has them, for those who would rather answer than wait for a disk.

In: events, one line of JSON each, handed to the system before `append` returns: a killed process loses none, a machine
that loses its power may lose the last.  Out: the same events in groups, until they are said to be done.

A segment is locked by the process that writes it, as long as that lives. Whoever drains takes its own segments and
those that nobody holds any more; to take an event twice does no harm, as its id is recorded once.
"""

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import EventError, LedgerUnavailable
from .event import Event

SUFFIX = ".events"
#: Beyond this a segment is left, and deleted once all of it is recorded.
SEGMENT_BYTES = 4 << 20


class _Segment:
    """An open, locked file of events: written at its end, drained from its beginning.

    Another process's may end in the middle of a line, so nothing is written to it.
    """

    def __init__(self, path: Path, fd: int, *, writable: bool):
        self.path, self.fd, self.writable = path, fd, writable
        self.length = os.fstat(fd).st_size
        self.drained = 0

    def has_room(self) -> bool:
        return self.writable and self.length < SEGMENT_BYTES

    def write(self, line: bytes) -> None:
        """All of it or nothing."""
        try:
            written = os.write(self.fd, line)
        except OSError as error:
            self._cut()
            raise LedgerUnavailable(f"ledger: spool: {error.strerror}; nothing was recorded") from error
        if written < len(line):
            self._cut()
            raise LedgerUnavailable("ledger: spool: the disk is full; nothing was recorded")
        self.length += written

    def _cut(self) -> None:
        try:
            os.ftruncate(self.fd, self.length)
        except OSError:
            self.writable = False  # the next line must not follow on half of one

    def read(self, most: int) -> tuple[list[bytes], int]:
        """Lines not drained yet, and where they end. A last line without its end was never acknowledged."""
        data = os.pread(self.fd, min(1 << 20, self.length - self.drained), self.drained)
        lines = data.split(b"\n")[:-1][:most]
        return lines, self.drained + sum(len(line) + 1 for line in lines)

    def close(self, *, delete: bool) -> None:
        if delete:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)


class Spool:
    """A folder of segments, which several processes may share.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    most_bytes : int
        What may wait in this process's segments; beyond that events are refused.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most = Path(folder), most_bytes
        self._lock = threading.Lock()
        self._mine: list[_Segment] = []

    def append(self, event: Event) -> None:
        line = event.line()
        with self._lock:
            if self._waiting() + len(line) > self._most:
                raise LedgerUnavailable(f"ledger: spool: {self._most} bytes wait for the database; try again")
            if not self._mine or not self._mine[-1].has_room():
                self._mine.append(self._create())
            self._mine[-1].write(line)

    def waiting_bytes(self) -> int:
        with self._lock:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(segment.length - segment.drained for segment in self._mine)

    def _create(self) -> _Segment:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{time.time_ns():020}-{uuid.uuid4().hex}{SUFFIX}"
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise LedgerUnavailable(f"ledger: spool: {error.strerror}; nothing was recorded") from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        return _Segment(path, fd, writable=True)

    def adopt(self) -> None:
        """Take over the segments of processes that are no more."""
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            with self._lock:
                if any(segment.path == path for segment in self._mine):
                    continue
            try:
                fd = os.open(path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                orphan = os.fstat(fd).st_nlink > 0
            except OSError:
                orphan = False
            if not orphan:
                os.close(fd)
                continue
            with self._lock:
                self._mine.insert(0, _Segment(path, fd, writable=False))

    def groups(self, most: int) -> Iterator[list[Event]]:
        """Groups of events from the oldest on; asking for the next says that the one before is recorded."""
        while True:
            with self._lock:
                segment = next((s for s in self._mine if s.drained < s.length), None)
                lines, end = segment.read(most) if segment else ([], 0)
                if segment and not lines:  # a torn end
                    segment.drained = segment.length
            if segment is None:
                self._sweep(everything=False)
                return
            if lines:
                yield [event for line in lines if (event := self._parse(line)) is not None]
                with self._lock:
                    segment.drained = end

    def _parse(self, line: bytes) -> Event | None:
        try:
            return Event.of(json.loads(line))
        except (ValueError, KeyError, TypeError, EventError):
            self.refuse(line, "not an event")
            return None

    def refuse(self, line: bytes, reason: str) -> None:
        """Keep what no ledger takes beside the spool, for a person to look at."""
        with open(self._folder / "refused.txt", "ab") as file:
            file.write(reason.encode() + b": " + line.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _sweep(self, *, everything: bool) -> None:
        """Delete segments that are recorded whole, but for one that has room for more."""
        with self._lock:
            for segment in list(self._mine):
                done = segment.drained >= segment.length
                if done and (everything or segment is not self._mine[-1] or not segment.has_room()):
                    self._mine.remove(segment)
                    segment.close(delete=True)

    def close(self) -> None:
        """What is recorded is deleted; the rest is for the next process."""
        self._sweep(everything=True)
        with self._lock:
            for segment in self._mine:
                segment.close(delete=False)
            self._mine.clear()
