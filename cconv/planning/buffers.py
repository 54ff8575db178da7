"""Buffers: where the intermediate maps of a program lie in one arena, decided before it runs.

In: sizes and lifetimes (first and last step that touches a value).  Out: an offset per value and the arena's size.
Unit: elements per image; at run time both are multiplied by the number of images.
"""

from bisect import insort
from typing import NamedTuple

#: Offsets are multiples of this many elements, so that no two maps share a cache line.
ALIGNMENT = 64


class Lifetime(NamedTuple):
    size: int
    first: int
    last: int


class Arena(NamedTuple):
    offsets: dict[int, int]
    size: int


def place(lifetimes: dict[int, Lifetime]) -> Arena:
    """Greedy by size: the largest first, each at the lowest gap free during its whole life."""
    placed: list[tuple[int, int, int, int]] = []  # (begin, end, first, last), by begin
    offsets = {}
    for value, (size, first, last) in sorted(lifetimes.items(), key=lambda item: (-item[1].size, item[0])):
        need = -(-size // ALIGNMENT) * ALIGNMENT
        begin = 0
        for other_begin, other_end, other_first, other_last in placed:
            if other_first <= last and other_last >= first and begin < other_end:
                if begin + need <= other_begin:
                    break
                begin = other_end
        offsets[value] = begin
        insort(placed, (begin, begin + need, first, last))
    return Arena(offsets, max((end for _, end, *_ in placed), default=0))
