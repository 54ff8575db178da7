"""Machine: what a plan needs to know of a device. A frozen value, made by a twin.

In: nothing.  Out: Machine, and the division that every tiling uses.
"""

from dataclasses import dataclass
from functools import lru_cache


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
    #: Lanes "channels": vectors per row of the register tiles with fewer rows, which direct convolutions take.
    wide_vectors: int = 2
    #: Pixels, or outputs, of the largest register tile of one vector that has room for the totals of its chains; 0
    #: where they wait in memory while a chain is summed.
    kept: int = 0
    #: "cpu" or "cuda": whose algorithms a plan chooses among.
    device: str = "cpu"

    def panels(self, outputs: int, vectors: int) -> int:
        """The panels into which so many outputs are best cut when there are so many vectors of pixels to fill."""
        return _panels(self.pixel_vectors, outputs, vectors)


@lru_cache(maxsize=4096)
def _panels(widest: tuple[int, ...], outputs: int, vectors: int) -> int:
    def tile(n: int, w: int) -> float:
        """Cycles of n x w products: two a cycle, but not before those of the last step, nor before their operands are
        loaded, vectors of pixels from the second level; one more for the end of a chain of twenty steps."""
        return max(n * w / 2, (n + 3 * w) / 2, 4) + 1

    def panel(n: int) -> float:
        cuts = ceil_div(vectors, widest[n - 1])
        narrow, wide = divmod(vectors, cuts)
        return (wide and wide * tile(n, narrow + 1)) + (cuts - wide) * tile(n, narrow)

    def time(panels: int) -> float:
        small, larger = divmod(outputs, panels)
        return (panels - larger) * panel(small) + (larger and larger * panel(small + 1))

    return min({ceil_div(outputs, n) for n in range(1, min(len(widest), outputs) + 1)}, key=time)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
