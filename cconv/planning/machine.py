"""Machine: what a plan needs to know of a device. A frozen value, made by a twin.

In: nothing.  Out: Machine, and the division that every tiling uses.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """One instruction set of a processor, and its caches."""

    isa: str
    vector_bytes: int
    #: Lanes "channels": rows (pixels) of the register tile, and vectors per row.
    tile_rows: int
    tile_vectors: int
    #: Lanes "pixels": outputs - 1 -> the most vectors of pixels of a register tile with so many outputs.
    pixel_vectors: tuple[int, ...]
    threads: int
    l2_bytes: int

    def panels(self, outputs: int, vectors: int) -> int:
        """The panels into which so many outputs are best cut when there are so many vectors of pixels to fill."""
        tiles = ((n, min(widest, vectors)) for n, widest in enumerate(self.pixel_vectors, start=1))
        # As many sums in registers as can be, with as few loads as can be.
        best, _ = max(tiles, key=lambda tile: (tile[0] * tile[1], -sum(tile)))
        return ceil_div(outputs, best)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
