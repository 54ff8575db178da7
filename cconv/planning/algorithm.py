"""Algorithm: how a convolution is cut into tiles for one machine. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine.  Out: a Tiling, which cpu/_core.pyx executes.

Two micro-kernels share one tile of input. The tile is planar and padded with zeros; with a stride its rows and columns
are sorted by phase (index modulo stride), so that neighbouring outputs read neighbouring inputs whatever the stride:

    stride 2, columns of the image   0 1 2 3 4 5 6    ->   phase 0: 0 2 4 6    phase 1: 1 3 5

lanes = "channels": a vector holds output channels, `mr` pixels by `nr` channels in registers, inputs broadcast.
lanes = "pixels":   a vector holds output pixels, weights broadcast; for groups with few output channels (depthwise).
"""

from dataclasses import dataclass
from math import isqrt

from ..errors import ArgumentError
from .shapes import Pair
from .specs import ITEMSIZE, ConvSpec

ALGORITHMS = ("auto", "direct")

#: Products summed in one register chain before they join the total: bounds the rounding error (docs/kernels.md).
#: A weight panel of so many rows (12 KB on AVX-512) also stays in the first-level cache, which decides the speed.
CHAIN = 96
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
    #: A 1x1 kernel: the image is one long row.
    flat: bool
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


def _chains(depth: int) -> int:
    """How many chains: their number grows no faster than their length, for both round."""
    return _ceil_div(depth, max(CHAIN, isqrt(depth)))


def _tile(spec: ConvSpec, machine: Machine, height: int, width: int, plane_bytes) -> Pair:
    """Output rows and columns of a tile: about TILE_PIXELS pixels, whose input planes fit the cache share."""
    budget = int(machine.l2_bytes * TILE_SHARE) // (spec.C // spec.groups)
    tile_q = _ceil_div(width, _ceil_div(width, TILE_PIXELS))
    tile_p = min(height, max(1, TILE_PIXELS // tile_q))
    while tile_p > 1 and plane_bytes(tile_p, tile_q) > budget:
        tile_p -= 1
    while tile_q > 2 * machine.tile_rows and plane_bytes(tile_p, tile_q) > budget:
        tile_q = _ceil_div(tile_q, 2)
    return _ceil_div(height, _ceil_div(height, tile_p)), tile_q


def choose(spec: ConvSpec, machine: Machine) -> Tiling:
    """The tiling for a spec; an unknown algorithm is an ArgumentError."""
    if spec.algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {spec.algorithm!r}")
    itemsize = ITEMSIZE[spec.dtype]
    vector = machine.vector_bytes // itemsize
    outputs = spec.K // spec.groups
    across_images = spec.P * spec.Q == 1
    lanes = "pixels" if outputs < vector // 2 and not across_images else "channels"
    flat = (spec.R, spec.S, *spec.stride, *spec.padding) == (1, 1, 1, 1, 0, 0, 0, 0) and not across_images
    height, width = (1, spec.P * spec.Q) if flat else (spec.P, spec.Q)
    row_phases = _phases(spec.R, spec.stride[0], spec.dilation[0])
    column_phases = _phases(spec.S, spec.stride[1], spec.dilation[1])
    row_reach = (spec.R - 1) * spec.dilation[0] // spec.stride[0]
    column_reach = (spec.S - 1) * spec.dilation[1] // spec.stride[1]

    def plane_bytes(p: int, q: int) -> int:
        return len(row_phases) * len(column_phases) * (p + row_reach) * (q + column_reach) * itemsize

    if across_images:
        tile_p, tile_q, column_reach = 1, machine.tile_rows, 0
    else:
        tile_p, tile_q = _tile(spec, machine, height, width, plane_bytes)
    spatial = _ceil_div(height, tile_p) * _ceil_div(width, tile_q)
    # Several tasks for every thread of a single image, at the price of packing a tile once per part.
    wanted = 1 if machine.threads == 1 else _ceil_div(4 * machine.threads, spatial)
    panels = 1 if lanes == "pixels" else _ceil_div(outputs, vector * machine.tile_vectors)
    channel_parts = min(spec.groups if spec.groups > 1 else panels, wanted)

    pitch = tile_q + column_reach
    if lanes == "channels":
        products = height * width * spec.groups * _ceil_div(outputs, vector) * vector
    else:
        products = spatial * spec.K * _ceil_div((tile_p - 1) * pitch + tile_q, vector) * vector
    return Tiling(
        "direct", lanes, flat, across_images, tile_p, tile_q, channel_parts, _chains(spec.depth),
        row_phases, column_phases, tile_p + row_reach, pitch, 2 * products * spec.depth,
    )  # fmt: skip
