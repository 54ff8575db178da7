"""Body: a request's bytes as they are read: whole, and of no more than is allowed, compressed or not.

In: the server's stream.  Out: streams that raise InvalidRequest where a body is broken, and TooLarge beyond the cap.
"""

import zlib
from io import BytesIO, RawIOBase

from werkzeug.exceptions import RequestEntityTooLarge

from .errors import InvalidRequest, TooLarge, UnsupportedEncoding

#: zlib's names of the protocol's encodings; deflate is zlib's own format, says HTTP.
ENCODINGS = {"gzip": 31, "deflate": 15}
#: Compressed bytes of one step.
STEP = 1 << 16


class Gathered(BytesIO):
    """A body that has come whole and is as long as was announced: it is handed on as it lies in memory."""


class Body(RawIOBase):
    """A request's body as it is read; InvalidRequest where it is broken, or ends before its announced size.

    Gunicorn hands an early end on as if all had come: it would be computed and billed.
    """

    def __init__(self, stream, announced: int | None):
        self._stream, self._announced, self.came = stream, announced, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except (RequestEntityTooLarge, MemoryError):
            raise
        except Exception as error:  # broken chunks, a lost connection: the server in front of us has its own names
            raise InvalidRequest("body: expected a whole body, got one that is broken or cut short") from error
        self.came += len(data)
        ended = size is None or size < 0 or (size and not data)
        if ended and self._announced is not None and self.came < self._announced:
            raise InvalidRequest(f"body: expected {self._announced} bytes by its Content-Length, got {self.came}")
        return data


class Inflated(RawIOBase):
    """A compressed body as what it was before; it never grows beyond `most` bytes, however small it came."""

    def __init__(self, stream: Body, encoding: str, most: int):
        self.check(encoding)
        self._stream, self._encoding, self._most, self._inflated = stream, encoding, most, 0
        self._inflater = zlib.decompressobj(ENCODINGS[encoding])
        self._done = False

    @staticmethod
    def check(encoding: str) -> None:
        """UnsupportedEncoding unless there is one of this name."""
        if encoding not in ENCODINGS:
            known = ", ".join(ENCODINGS)
            raise UnsupportedEncoding(f"Unsupported compression type: expected {known} or none, got {encoding[:32]!r}")

    @property
    def came(self) -> int:
        """Bytes that have been read of what was sent."""
        return self._stream.came

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """All of it, or at most `size` bytes, of which there are none at the end only."""
        every = size is None or size < 0
        pieces, wanted = [], self._most + 1 if every else size
        while wanted and not self._done:
            piece = self._step(wanted)
            pieces.append(piece)
            wanted -= len(piece)
            if piece and not every:
                break
        return b"".join(pieces)

    def _step(self, wanted: int) -> bytes:
        packed = self._inflater.unconsumed_tail or self._stream.read(STEP)
        try:
            # Even without bytes: the last ones may have left something to say.
            piece = self._inflater.decompress(packed, wanted)
        except zlib.error:
            raise self._broken() from None
        self._inflated += len(piece)
        if self._inflated > self._most:
            raise TooLarge(f"body: expected at most {self._most} bytes once it is inflated, got more")
        if self._inflater.eof:
            if self._inflater.unused_data or self._stream.read(1):
                raise self._broken()
            self._done = True
        elif not packed and not piece:
            raise self._broken()
        return piece

    def _broken(self) -> InvalidRequest:
        return InvalidRequest(f"body: expected {self._encoding} by its Content-Encoding, got something else or a part")
