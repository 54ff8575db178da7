"""Algorithm: how a convolution is cut into tiles for one machine. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine.  Out: a Tiling, which cpu/_core.pyx executes.

Two micro-kernels share one tile of input. The tile is planar and padded with zeros; with a stride its rows and columns
are sorted by phase (index modulo stride), so that neighbouring outputs read neighbouring inputs whatever the stride:

    stride 2, columns of the image   0 1 2 3 4 5 6    ->   phase 0: 0 2 4 6    phase 1: 1 3 5

lanes = "channels": a vector holds output channels, `mr` pixels by `nr` channels in registers, inputs broadcast.
lanes = "pixels":   a vector holds output pixels, weights broadcast; for groups with few output channels (depthwise).
"""

from dataclasses import dataclass

from ..errors import ArgumentError
from .specs import ITEMSIZE, ConvSpec

ALGORITHMS = ("auto", "direct")

#: Products summed in one register chain before they join the total: bounds the rounding error (docs/kernels.md).
CHAIN = 512
#: How much of the second-level cache a tile of input may take.
TILE_SHARE = 0.4
#: Output pixels of a tile: enough to reuse a weight panel from L1/L2, few enough that the sums stay there.
TILE_PIXELS = 256


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan needs to know of a device."""

    isa: str
    vector_bytes: int
    #: Rows (pixels) of the register tile, and vectors per row.
    tile_rows: int
    tile_vectors: int
    threads: int
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one convolution runs on one machine."""

    algorithm: str
    lanes: str  # "channels" or "pixels"
    #: The tile's pixels are images instead of positions: for maps of one pixel (a dense layer).
    across_images: bool
    tile_p: int
    tile_q: int
    #: Parts into which the output channels (lanes="channels") or groups (lanes="pixels") are split for the threads.
    channel_parts: int
    chains: int
    row_phases: tuple[int, ...]
    column_phases: tuple[int, ...]
    tile_rows: int
    pitch: int
    #: Multiplications and additions that the kernels issue for one image, lanes of padding included.
    executed_flops: int

    @property
    def plane(self) -> int:
        """Elements of one channel of an input tile."""
        return len(self.row_phases) * len(self.column_phases) * self.tile_rows * self.pitch


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _phases(kernel: int, stride: int, dilation: int) -> tuple[int, ...]:
    return tuple(sorted({k * dilation % stride for k in range(kernel)}))


def choose(spec: ConvSpec, machine: Machine) -> Tiling:
    """The tiling for a spec; an unknown algorithm is an ArgumentError."""
    if spec.algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {spec.algorithm!r}")
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    outputs = spec.K // spec.groups
    lanes = "pixels" if outputs < vector // 2 and spec.P * spec.Q > 1 else "channels"
    across_images = spec.P * spec.Q == 1
    row_phases = _phases(spec.R, spec.stride[0], spec.dilation[0])
    column_phases = _phases(spec.S, spec.stride[1], spec.dilation[1])
    row_reach = (spec.R - 1) * spec.dilation[0] // spec.stride[0]
    column_reach = (spec.S - 1) * spec.dilation[1] // spec.stride[1]
    channels = spec.C // spec.groups

    if across_images:
        tile_p, tile_q = 1, machine.tile_rows
    else:
        tile_q = min(spec.Q, TILE_PIXELS)
        tile_q = _ceil_div(spec.Q, _ceil_div(spec.Q, tile_q))
        tile_p = min(spec.P, max(1, TILE_PIXELS // tile_q))

        def tile_bytes(p: int, q: int) -> int:
            return channels * len(row_phases) * len(column_phases) * (p + row_reach) * (q + column_reach) * ITEMSIZE[spec.dtype]

        budget = int(machine.l2_bytes * TILE_SHARE)
        while tile_p > 1 and tile_bytes(tile_p, tile_q) > budget:
            tile_p -= 1
        while tile_q > 2 * machine.tile_rows and tile_bytes(tile_p, tile_q) > budget:
            tile_q = _ceil_div(tile_q, 2)
        tile_p = _ceil_div(spec.P, _ceil_div(spec.P, tile_p))

    panels = spec.groups * _ceil_div(outputs, vector * machine.tile_vectors) if lanes == "channels" else spec.groups
    spatial = _ceil_div(spec.P, tile_p) * _ceil_div(spec.Q, tile_q)
    # Enough parts for every thread to have several, at the price of packing a tile once per part.
    wanted = 1 if machine.threads == 1 else _ceil_div(4 * machine.threads, spatial)
    channel_parts = panels if spec.groups > 1 else min(panels, wanted)
    if spec.groups > 1:
        channel_parts = min(spec.groups, max(wanted, 1) if lanes == "channels" else spec.groups)

    pitch = tile_q + column_reach
    if lanes == "channels":
        executed = 2 * spec.P * spec.Q * spec.groups * _ceil_div(outputs, vector) * vector * spec.depth
    else:
        tiles = spatial * spec.K
        flat = _ceil_div((tile_p - 1) * pitch + tile_q, vector) * vector
        executed = 2 * tiles * flat * spec.depth
    return Tiling(
        "direct", lanes, across_images, tile_p, tile_q, channel_parts, _ceil_div(spec.depth, CHAIN),
        row_phases, column_phases, tile_p + row_reach, pitch, executed,
    )  # fmt: skip
