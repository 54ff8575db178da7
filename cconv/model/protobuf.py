"""Protobuf: an ONNX file without its weights, and where they lie in it, so that reading a network copies none of them.

In: a file's bytes.  Out: the bytes of the same message without the raw data of its large initializers, and places.

Protobuf's own reader holds a message whole, in memory: of a network of 575 MB that took longer than everything else.
A message is fields one after the other: a key (number and kind), then a number, 4 or 8 bytes, or a length and so many
bytes (https://protobuf.dev/programming-guides/encoding).
"""

import mmap
from collections.abc import Iterator

#: Numbers of fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
#: Fields of a file that are looked at: more than networks have, few enough to be done soon.
MOST_FIELDS = 1 << 20

Place = tuple[int, int]
#: A field's number, where it begins, and where its contents lie; they begin nowhere if it has no length.
Field = tuple[int, int, int | None, int]
Part = bytes | memoryview


class Reader:
    """One pass over the fields of a file, at most MOST_FIELDS of them; ValueError where it is no message."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._left = MOST_FIELDS

    def without(self, least: int) -> tuple[bytes, list[Place | None]]:
        """The file without raw data of `least` bytes and more; of every initializer of so many bytes, where its raw
        data lies, if it has any."""
        places: list[Place | None] = []
        parts: list[Part] = []
        view = memoryview(self._data)  # parts of it are copied once, when they are joined
        for number, start, begin, end in self._fields(0, len(view)):
            if number == GRAPH and begin is not None:
                parts += _wrapped(GRAPH, self._graph(view, begin, end, least, places))
            else:
                parts.append(view[start:end])
        return b"".join(parts), places

    def _graph(self, view: memoryview, begin: int, end: int, least: int, places: list[Place | None]) -> list[Part]:
        """The parts of a graph's contents, and a place for each of its initializers."""
        parts, done = [], begin
        for number, start, inside, behind in self._fields(begin, end):
            if number != INITIALIZER or inside is None:
                continue
            raw = []
            if behind - inside >= least:
                inner = tuple(self._fields(inside, behind))
                raw = [(at, to) for field, _, at, to in inner if field == RAW_DATA and at is not None]
            places.append(raw[-1] if raw else None)
            if any(to - at >= least for at, to in raw):
                kept = [view[at:to] for field, at, _, to in inner if field != RAW_DATA]
                parts += view[done:start], *_wrapped(INITIALIZER, kept)
                done = behind
        parts.append(view[done:end])
        return parts

    def _fields(self, at: int, end: int) -> Iterator[Field]:
        data = self._data
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MOST_FIELDS} fields")
            start, begin, key = at, None, data[at]
            at += 1
            if key >= 0x80:  # numbers beyond 15, which ONNX's messages hardly have
                key, at = self._varint(start, end)
            match key & 7:
                case 2:
                    length, begin = self._varint(at, end)
                    at = begin + length
                case 0:
                    _, at = self._varint(at, end)
                case 1:
                    at += 8
                case 5:
                    at += 4
                case kind:
                    raise ValueError(f"a field of kind {kind}")
            if at > end:
                raise ValueError("a field that is longer than what it is in")
            yield key >> 3, start, begin, at

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = shift = 0
        while at < end and shift < 70:
            byte, at = self._data[at], at + 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, at
            shift += 7
        raise ValueError("a number without end")


def _wrapped(number: int, contents: list[Part]) -> list[Part]:
    """The parts of a field with a length, as a message has it."""
    head = bytearray()
    for value in (number << 3 | 2, sum(map(len, contents))):
        while value >= 0x80:
            head.append(value & 0x7F | 0x80)
            value >>= 7
        head.append(value)
    return [bytes(head), *contents]
