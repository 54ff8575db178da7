"""Protobuf: an ONNX file without its weights, and where they lie in it, so that reading a network copies none of them.

In: a file's bytes.  Out: the bytes of the same message without the raw data of its large initializers, and places.

Protobuf's own reader holds a message whole, in memory: of a network of 575 MB that took longer than everything else.
A message is fields one after the other: a key (number and kind), then a number, 4 or 8 bytes, or a length and so many
bytes (https://protobuf.dev/programming-guides/encoding).
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

#: Numbers of fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
#: Fields of a file that are looked at: more than networks have, few enough to be done soon.
MOST_FIELDS = 1 << 20

Place = tuple[int, int]


class Field(NamedTuple):
    """A field's number, where it begins, and where its contents lie; they begin nowhere if it has no length."""

    number: int
    start: int
    begin: int | None
    end: int


class Reader:
    """One pass over the fields of a file, at most MOST_FIELDS of them; ValueError where it is no message."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._left = MOST_FIELDS

    def without(self, least: int) -> tuple[bytes, list[Place | None]]:
        """The file without raw data of `least` bytes and more; of every initializer of so many bytes, where its raw
        data lies, if it has any."""
        places: list[Place | None] = []
        parts = []
        for field in self._fields(0, len(self._data)):
            if field.number == GRAPH and field.begin is not None:
                parts += _wrapped(GRAPH, b"".join(self._graph(field, least, places)))
            else:
                parts.append(self._data[field.start : field.end])
        return b"".join(parts), places

    def _graph(self, graph: Field, least: int, places: list[Place | None]) -> Iterator[bytes]:
        done = graph.begin
        for field in self._fields(graph.begin, graph.end):
            if field.number != INITIALIZER or field.begin is None:
                continue
            raw = []
            if field.end - field.begin >= least:
                inner = tuple(self._fields(field.begin, field.end))
                raw = [(one.begin, one.end) for one in inner if one.number == RAW_DATA and one.begin is not None]
            places.append(raw[-1] if raw else None)
            if any(end - begin >= least for begin, end in raw):
                yield self._data[done : field.start]
                kept = b"".join(self._data[one.start : one.end] for one in inner if one.number != RAW_DATA)
                yield from _wrapped(INITIALIZER, kept)
                done = field.end
        yield self._data[done : graph.end]

    def _fields(self, at: int, end: int) -> Iterator[Field]:
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MOST_FIELDS} fields")
            start, begin = at, None
            key, at = self._varint(at, end)
            match key & 7:
                case 0:
                    _, at = self._varint(at, end)
                case 1:
                    at += 8
                case 2:
                    length, begin = self._varint(at, end)
                    at = begin + length
                case 5:
                    at += 4
                case kind:
                    raise ValueError(f"a field of kind {kind}")
            if at > end:
                raise ValueError("a field that is longer than what it is in")
            yield Field(key >> 3, start, begin, at)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        number = shift = 0
        while at < end and shift < 70:
            byte, at = self._data[at], at + 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, at
            shift += 7
        raise ValueError("a number without end")


def _wrapped(number: int, contents: bytes) -> tuple[bytes, bytes]:
    """A field with a length, as a message has it."""
    head = bytearray()
    for value in (number << 3 | 2, len(contents)):
        while value >= 0x80:
            head.append(value & 0x7F | 0x80)
            value >>= 7
        head.append(value)
    return bytes(head), contents
