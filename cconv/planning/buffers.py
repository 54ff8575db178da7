"""Buffers: where the intermediate maps of a program lie in one arena, decided before it runs.

In: sizes and lifetimes (first and last step that touches a value).  Out: an offset per value and the arena's size.
Unit: elements per image; at run time both are multiplied by the number of images.
"""

from bisect import insort
from operator import itemgetter
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
    placed: list[tuple[int, int, Lifetime]] = []  # (begin, end, life), by begin
    offsets = {}
    for value, life in sorted(lifetimes.items(), key=lambda item: (-item[1].size, item[0])):
        need = -(-life.size // ALIGNMENT) * ALIGNMENT
        begin = 0
        for other_begin, other_end, other in placed:
            if other.first > life.last or other.last < life.first:
                continue
            if begin + need <= other_begin:
                break
            begin = max(begin, other_end)
        offsets[value] = begin
        insort(placed, (begin, begin + need, life), key=itemgetter(0))
    return Arena(offsets, max((end for _, end, _ in placed), default=0))
