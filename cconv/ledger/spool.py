"""Spool: files that hold events until the database has them, for those who would rather answer than wait for a disk.

In: events, one line of JSON each, handed to the system before `append` returns: a killed process loses none, a machine
that loses its power may lose what came since the last `sync`.  Out: the same events in groups, until they are said to
be done.

A segment is locked by the process that writes it, as long as that lives. Whoever drains takes its own segments and
those that nobody holds any more; to take an event twice does no harm, as its id is recorded once.
"""

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import LedgerUnavailable
from .event import Event

log = logging.getLogger(__name__)
SUFFIX = ".events"
#: Beyond this a segment is left, and deleted once all of it is recorded.
SEGMENT_BYTES = 4 << 20
#: What one look into a segment reads at first; a line may be longer.
READ_BYTES = 1 << 18
#: A test of whether the disk takes more.
_PROBE = bytes(4096)
#: New files that others take away before they are locked.
_TRIES = 8


class _Segment:
    """An open, locked file of events: written at its end, drained from its beginning.

    Another process's may end in the middle of a line, so nothing is written to it.
    """

    def __init__(self, path: Path, fd: int, *, writable: bool):
        self.path, self.fd, self.writable = path, fd, writable
        self.length = os.fstat(fd).st_size
        self.drained = self.synced = 0

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

    def probe(self) -> None:
        """Write what is no line, and take it back."""
        length = self.length
        self.write(_PROBE)
        self.length = length
        self._cut()

    def _cut(self) -> None:
        try:
            os.ftruncate(self.fd, self.length)
        except OSError:
            self.writable = False  # the next line must not follow on half of one

    def read(self, most: int) -> tuple[list[bytes], int]:
        """Lines not drained yet, and where they end. A last line without its end was never acknowledged."""
        rest, size = self.length - self.drained, READ_BYTES
        data = os.pread(self.fd, min(size, rest), self.drained)
        while b"\n" not in data and size < rest:
            size *= 2
            data = os.pread(self.fd, min(size, rest), self.drained)
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
        #: What must be free for work to begin whose event is not known yet.
        self._margin = min(4096, most_bytes // 4)
        self._fault: LedgerUnavailable | None = None
        self._closed = False
        #: Lines that no ledger takes, since the start.
        self.refused = 0

    def append(self, event: Event) -> None:
        line = event.line()
        with self._lock:
            self._check_room(len(line))
            self._write(lambda segment: segment.write(line))

    def require(self) -> None:
        """LedgerUnavailable if the last line could not be written, or there is no room for one."""
        with self._lock:
            if self._fault is not None:
                raise LedgerUnavailable(str(self._fault))
            self._check_room(self._margin)

    def check(self) -> None:
        """Write something that is no event; LedgerUnavailable if that fails."""
        with self._lock:
            self._check_room(self._margin)
            self._write(_Segment.probe)

    def failed(self) -> bool:
        return self._fault is not None

    def _check_room(self, nbytes: int) -> None:
        if self._waiting() + nbytes > self._most:
            raise LedgerUnavailable(f"ledger: spool: {self._most} bytes wait for the database; try again")

    def _write(self, write: Callable[[_Segment], None]) -> None:
        try:
            if not self._mine or not self._mine[-1].has_room():
                self._mine.append(self._create())
            write(self._mine[-1])
        except LedgerUnavailable as error:
            self._fault = error
            raise
        self._fault = None

    def waiting_bytes(self) -> int:
        with self._lock:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(segment.length - segment.drained for segment in self._mine)

    def lag_s(self) -> float:
        """Age of the oldest line that is not drained, by what it says of its time."""
        with self._lock:
            segment = next((s for s in self._mine if s.drained < s.length), None)
            lines, _ = segment.read(1) if segment else ([], 0)
        event = _parse(lines[0]) if lines else None
        return 0.0 if event is None else max(0.0, time.time() - event.at / 1e6)

    def _create(self) -> _Segment:
        """A new segment. Whoever sees it before it is locked may take it for a dead process's, and delete it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                path = self._folder / f"{time.time_ns():020}-{uuid.uuid4().hex}{SUFFIX}"
                fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
                if _take(fd):
                    _sync_folder(self._folder)
                    return _Segment(path, fd, writable=True)
        except OSError as error:
            raise LedgerUnavailable(f"ledger: spool: {error.strerror}; nothing was recorded") from error
        raise LedgerUnavailable(f"ledger: spool: {self._folder.name} is taken by others; nothing was recorded")

    def adopt(self) -> None:
        """Take over the segments of processes that are no more."""
        with self._lock:
            known = {segment.path for segment in self._mine}
        adopted = []
        for path in sorted(set(self._folder.glob(f"*{SUFFIX}")) - known):
            try:
                fd = os.open(path, os.O_RDWR | os.O_APPEND)
                if _take(fd):
                    adopted.append(_Segment(path, fd, writable=False))
            except OSError:  # another one was quicker
                continue
        with self._lock:
            if not self._closed:
                self._mine[:0] = adopted  # the oldest first, and before what is written here
                return
        for segment in adopted:
            segment.close(delete=False)

    def groups(self, most: int) -> Iterator[list[Event]]:
        """Groups of events from the oldest on; asking for the next says that the one before is recorded."""
        while True:
            with self._lock:
                segment = next((s for s in self._mine if s.drained < s.length), None)
                lines, end = segment.read(most) if segment else ([], 0)
                if segment and not lines:
                    left = segment.length - segment.drained
                    log.warning("%s ends within a line: %d bytes that nobody was promised", segment.path.name, left)
                    segment.drained = segment.length
            if segment is None:
                self._sweep(everything=False)
                return
            if lines:
                events = [_parse(line) for line in lines]
                if any(events):
                    yield [event for event in events if event is not None]
                for line, event in zip(lines, events, strict=True):
                    if event is None:
                        self.refuse(line, "not an event")
                with self._lock:
                    segment.drained = end

    def refuse(self, line: bytes, reason: str) -> None:
        """Keep what no ledger takes beside the spool, for a person to look at."""
        log.error("a line that cannot be recorded is left in the spool's refused.txt: %s", reason)
        self.refused += 1
        with open(self._folder / "refused.txt", "ab") as file:
            file.write(reason.encode() + b": " + line.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """What waits is on the disk when this returns."""
        with self._lock:
            waiting = [(s, s.length) for s in self._mine if max(s.drained, s.synced) < s.length]
        for segment, length in waiting:  # only whoever drains closes files, and only that calls this
            os.fdatasync(segment.fd)
            segment.synced = length

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
            self._closed = True
            for segment in self._mine:
                segment.close(delete=False)
            self._mine.clear()


def _take(fd: int) -> bool:
    """Lock a segment; False, and closed, if another process has it, or has deleted it meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return True
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return False


def _sync_folder(folder: Path) -> None:
    """A file is there after a power cut only if its folder's entry is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parse(line: bytes) -> Event | None:
    try:
        return Event.of(json.loads(line))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
