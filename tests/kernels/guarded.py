"""Guarded: convolutions whose arrays lie against pages that nobody may touch; a program, because a touch ends it.

In: arguments ISA, dtype, family, seed, number of layers (or pools), and a file.  Out: exit code 0 if every layer ran by
every tiling with all arrays ending at the end of their last page, and again beginning at the beginning of their first,
with the same results as anywhere else and no byte around them changed. The file names the run under way.
"""

import ctypes
import mmap
import sys
from math import prod
from pathlib import Path

import grid
import numpy as np

from cconv import cpu
from cconv.planning import plan, specs

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
CANARY = 0xA5


class Room:
    """Pages for one array, between two that may not be touched."""

    def __init__(self, pages: int):
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)[PAGE:-PAGE]
        address = self.bytes.ctypes.data
        for guard in (address - PAGE, address + pages * PAGE):
            if LIBC.mprotect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, array: np.ndarray | None, at_end: bool) -> np.ndarray | None:
        """A copy of an array, with the same strides, against one of the guards."""
        if array is None:
            return None
        steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
        before, after = -sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + array.itemsize
        self.bytes[:] = CANARY
        self.begin = self.bytes.size - before - after if at_end else 0
        self.end = self.begin + before + after
        placed = np.ndarray(array.shape, array.dtype, self.bytes, self.begin + before, array.strides)
        placed[...] = array
        self.expected = self.bytes.copy()
        return placed

    def changed(self, may_write: bool = False) -> bool:
        """Whether a byte of this room has changed, or one outside the array if that may be written."""
        if may_write:
            self.expected[self.begin : self.end] = self.bytes[self.begin : self.end]
        return not np.array_equal(self.bytes, self.expected)


def rooms_for(given: grid.Operands, output: tuple) -> dict[str, Room]:
    nbytes = {name: 0 if a is None else 3 * a.nbytes + 4 * a.strides[0] for name, a in vars_of(given).items()}
    nbytes["out"] = prod(output) * given.x.itemsize
    return {name: Room(-(-abs(n) // PAGE) + 1) for name, n in nbytes.items()}


def vars_of(given: grid.Operands) -> dict:
    return {name: getattr(given, name) for name in ("x", "weight", "bias", "residual", "before")}


def check(layer: grid.Layer, isa: str, dtype: str, tiling, precision: str, given: grid.Operands) -> None:
    """A tiling's run at both ends of its pages, against one in the middle of nowhere."""
    want = grid.run(grid.program(layer, isa, dtype, tiling, given, precision), given)
    rooms = rooms_for(given, want.shape)
    for at_end in (True, False):
        placed = grid.Operands(**{name: rooms[name].place(a, at_end) for name, a in vars_of(given).items()})
        out = rooms["out"].place(np.full_like(want, np.nan), at_end)
        grid.run(grid.program(layer, isa, dtype, tiling, placed, precision), placed, out)
        assert np.array_equal(out, want), "another result"
        for name, room in rooms.items():
            if name == "out" or vars_of(given)[name] is not None:
                assert not room.changed(may_write=name == "out"), f"bytes of or around {name} were written"


def pools(isa: str, dtype: str, seed: int, count: int, note: Path) -> None:
    """Pools of drawn windows, at both ends of their pages."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kernel, stride, dilation = rng.integers(1, [5, 4, 3])
        padding = rng.integers(0, (dilation * (kernel - 1) + 1) // 2 + 1)
        size = rng.integers(dilation * (kernel - 1) + 1, 45, 2)
        options = {"stride": int(stride), "padding": int(padding), "dilation": int(dilation)}
        for kind in ("max", "average"):
            spec = specs.pool(kind, (3, *map(int, size)), int(kernel), **options, dtype=dtype)
            program = cpu.build(plan.single(spec, cpu.machine_of(isa, 1)), None)
            x = rng.standard_normal((1, *spec.image)).astype(dtype)
            (want,) = program.run([x])
            inside, outside = (Room(-(-a.nbytes // PAGE) + 1) for a in (x, want))
            for at_end in (True, False):
                note.write_text(f"{kind} pool of {spec.image}, kernel {kernel}, {options} in {dtype} on {isa}")
                out = outside.place(np.full_like(want, np.nan), at_end)
                program.run([inside.place(x, at_end)], [out])
                assert np.array_equal(out, want), "another result"
                assert not inside.changed(), "x was written"
                assert not outside.changed(may_write=True), "bytes around y were written"


def main(isa: str, dtype: str, family: str, seed: str, count: str, log: str) -> None:
    rng = np.random.default_rng(int(seed))
    note = Path(log)
    if family == "pools":
        return pools(isa, dtype, int(seed), int(count), note)
    winograd = family == "winograd"
    draw = grid.winograd_layers if winograd else lambda seed, count: grid.layers(family, seed, count)
    for layer in draw(int(seed), int(count)):
        given = grid.operands(layer, dtype, lambda shape: rng.integers(-3, 4, shape))
        tilings = (
            grid.winograd_tilings(layer, isa, dtype, "high") if winograd else grid.direct_tilings(layer, isa, dtype)
        )
        with grid.Threads(layer.threads):
            for tiling in tilings:
                note.write_text(f"{layer} in {dtype} on {isa} by {tiling}")
                check(layer, isa, dtype, tiling, "high" if winograd else "highest", given)


def touch(log: str) -> None:
    """What must end this program: a convolution of an image said to be one row longer than its room."""
    layer = grid.Layer((1, 4, 8, 16), (4, 4, 1, 1))
    given = grid.operands(layer, "float32", np.ones)
    x = Room(1).place(given.x, at_end=True)
    Path(log).write_text("the planted run")
    longer = np.lib.stride_tricks.as_strided(x, (1, 4, 9, 16))
    wrong = grid.Layer((1, 4, 9, 16), (4, 4, 1, 1))
    operands = grid.Operands(longer, given.weight, None, None)
    grid.run(
        grid.program(wrong, grid.ISAS[0], "float32", grid.direct_tilings(wrong, grid.ISAS[0], "float32")[0], operands),
        operands,
    )


if __name__ == "__main__":
    touch(sys.argv[2]) if sys.argv[1] == "touch" else main(*sys.argv[1:])
