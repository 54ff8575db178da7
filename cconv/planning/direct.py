"""Direct: how a convolution computed product by product is cut into tiles. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine.  Out: Direct tilings, which cpu/_conv.pyx executes; Depthwise ones are in depthwise.py.

Two micro-kernels share one tile of input. The tile is planar and padded with zeros; its rows and columns are sorted so
that neighbouring outputs read neighbouring inputs whatever the stride. Where windows overlap, by phase (index modulo
stride); where they do not, as with a large dilation, by tap, and only what a tap touches is in the tile:

    stride 2, 3 taps, columns of the image   0 1 2 3 4 5 6    ->   phase 0: 0 2 4 6    phase 1: 1 3 5
    stride 1, 2 taps, dilation 9             0 1 2 ...        ->   tap 0: 0 1 2 3      tap 1: 9 10 11 12

lanes = "pixels":   a vector holds output pixels, weights are broadcast; what it sums lies as the output map does.
lanes = "channels": a vector holds output channels, inputs are broadcast; wastes no lane on maps of few pixels, but its
                    sums have to be transposed.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, isqrt
from typing import NamedTuple

from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec

#: Products summed in one register chain before they join the total: bounds the rounding error (docs/kernels.md).
#: A weight panel of so many rows (12 KB on AVX-512) also stays in the first-level cache, which decides the speed.
CHAIN = 96
#: How much of the second-level cache a tile of input may take, and one that is not packed.
TILE_SHARE, IMAGE_SHARE = 0.4, 0.7
#: The same of a piece of its channels where a tile is packed in pieces (lanes "channels"), and of all panels' sums.
PIECE_SHARE, SUMS_SHARE = 0.25, 0.4
#: Bytes that a tile of input may take beyond which it shrinks whatever that costs: bounds the scratch of odd layers.
TILE_LIMIT = 64 << 20
#: Output pixels of a tile: enough to reuse a weight panel from L1/L2, few enough that the sums stay there.
TILE_PIXELS = {"channels": 256, "pixels": 512}
#: Fewest pixels of a tile of one long row that is read where it lies, and most of one that is a whole image.
SHORT_RUN, LONG_RUN = 64, 800
#: Of the time of a layer, what threads lose that write neighbouring runs of pixels: lines asked for ahead are others'.
BORDERS = 0.03
#: Pixels of a tile of one long row below which threads share tiles rather than have more of them.
LEAST_PIXELS = 128
#: Bytes of a first-level cache that a small tile and its sums may take, and the sums' share in it.
L1_SHARE = 36 << 10
PANEL_OUTPUTS = 14
#: What packing costs per row and per element of a tile, and reading an element where it is, in vectors' products.
PACK_ROW, PACK_ELEMENT, READ_ELEMENT = 96, 2, 1
#: Of the time of a task, what threads lose to each other at the end of a layer: their cores are never equally free.
UNEVEN = 0.05
#: Parts of a tile for each thread, at most.
MOST_PARTS = 24
#: Panels of lanes "channels" that may read a piece of an image where it lies, where a vector is less than a line: more
#: of them read faster what is packed. Elements from the first to the last that a table of offsets can reach.
FEW_PANELS, FARTHEST = 2, 2**31 - 1
#: A cache line, a result beyond the caches (docs/kernels.md), and more images than there are.
LINE_BYTES, FAR_BYTES, NEVER = 64, 8 << 20, 2**62
#: Rows of an image, each on a page of its own, that short vectors may read in place: their steps are too short to wait
#: for the address of a page that the first-level buffer does not hold.
FEW_PAGES = 64
#: Bytes of a page; of so many, besides those of weights and outputs, the first-level buffer holds the addresses.
PAGE_BYTES, NEAR_PAGES = 4096, 48
#: Fewest sums of a register tile of one vector: of a packed tile, and (lanes "pixels") of an image where it lies.
NARROW_SUMS = 7, 12
#: Activations that lanes "pixels" apply in registers.
REGISTER_ACTIVATIONS = ("relu", "relu6")


class Axis(NamedTuple):
    """The rows (or columns) of a tile of input: blocks of neighbouring outputs' inputs."""

    #: First input of every block, relative to that of the tile's first output.
    starts: tuple[int, ...]
    #: Tap -> (block, place in it) of the first output's input.
    taps: tuple[tuple[int, int], ...]
    #: Elements of a block.
    extent: int
    #: Elements behind them that the block of the next row begins with: zeros.
    shared: int = 0

    @property
    def size(self) -> int:
        return len(self.starts) * self.extent


@dataclass(frozen=True, slots=True)
class Direct:
    """A convolution as products of a packed tile of input with panels of weights."""

    lanes: str  # "channels" or "pixels"
    #: A 1x1 kernel: the image is one long row.
    flat: bool
    #: The tile's pixels are images instead of positions: for maps of one pixel (a dense layer).
    across_images: bool
    #: Lanes "pixels": the rows of a tile are one run of pixels, the gaps between them included.
    joined: bool
    #: Register tiles are one vector wide: they have room for the totals of their chains.
    narrow: bool
    #: A tile is a piece of a flat image as it lies in memory, and read there.
    in_place: bool
    #: Weights are not packed ahead: the task that multiplies with them packs them, chain by chain.
    unpacked: bool
    tile_p: int
    tile_q: int
    #: Panels into which a group's output channels are cut.
    panels: int
    #: Parts into which the panels of all groups are split for the threads.
    channel_parts: int
    chains: int
    #: Lanes "channels": pieces of whole chains in which a tile is packed and multiplied.
    pieces: int
    rows: Axis
    columns: Axis
    #: Images from which on the result goes past the caches.
    far_images: int
    #: Time until the last thread ends, over that of threads that end together.
    waiting: float
    #: Multiplications and additions that the kernels issue for one image, lanes of padding included.
    executed_flops: int

    algorithm = "direct"

    @property
    def label(self) -> str:
        return f"direct {self.lanes}"

    @property
    def packing(self) -> tuple:
        """What the packed form of a weight depends on."""
        return "direct", self.lanes, self.panels, self.unpacked

    @property
    def plane(self) -> int:
        """Elements of one channel of an input tile."""
        return self.rows.size * self.columns.size + self.columns.shared

    @property
    def pitch(self) -> int:
        """Elements from a pixel to the one below."""
        return self.columns.extent

    def offsets(self, spec: ConvSpec) -> Sequence[int]:
        """Where product k = (c, r, s) of a pixel lies in the tile, relative to the pixel."""
        if self.across_images:
            return range(0, spec.depth * self.pitch, self.pitch)
        area = self.rows.extent * self.pitch
        rows = [b * len(self.columns.starts) * area + place * self.pitch for b, place in self.rows.taps]
        columns = [b * area + place for b, place in self.columns.taps]
        window = [r + s for r in rows for s in columns]
        return [c * self.plane + w for c in range(spec.C // spec.groups) for w in window]

    def gaps(self, vector: int) -> tuple[list[int], list[int]]:
        """Where every pixel of joined rows lies in their run, and the pixels before every vector of it; behind the last
        pixel, a vector that lies nowhere."""
        at = [p * self.pitch + q for p in range(self.tile_p) for q in range(self.tile_q)]
        return at + [0] * vector, [bisect_left(at, v) for v in range(0, at[-1] + 2 * vector, vector)]


def chains(depth: int) -> int:
    """How many chains, all but the last one of the same length: their number grows no faster, for both round."""
    length = ceil_div(depth, ceil_div(depth, max(CHAIN, isqrt(depth))))
    return ceil_div(depth, length)


def far_images(spec: ConvSpec, machine: Machine) -> int:
    """Images whose results are together too large to be found in a cache by whoever reads them. They then go past the
    caches where a vector is a line: less than a line would be read first."""
    if machine.vector_bytes < LINE_BYTES:
        return NEVER
    return ceil_div(FAR_BYTES, spec.K * spec.P * spec.Q * ITEMSIZE[spec.dtype])


def _axis(kernel: int, stride: int, dilation: int, outputs: int) -> Axis:
    """By phase or by tap, whichever is smaller."""
    at = [k * dilation for k in range(kernel)]
    phases = tuple(sorted({a % stride for a in at}))
    extent = outputs + at[-1] // stride
    if len(phases) * extent <= kernel * outputs:
        return Axis(phases, tuple((phases.index(a % stride), a // stride) for a in at), extent)
    return Axis(tuple(at), tuple((k, 0) for k in range(kernel)), outputs)


def _axis_size(kernel: int, stride: int, dilation: int, outputs: int) -> int:
    """`_axis(...).size`, without the axis."""
    phases = min(kernel, stride // gcd(stride, dilation))
    return min(phases * (outputs + (kernel - 1) * dilation // stride), kernel * outputs)


def _axes(spec: ConvSpec, tile_p: int, tile_q: int) -> tuple[Axis, Axis]:
    return (
        _axis(spec.R, spec.stride[0], spec.dilation[0], tile_p),
        _axis(spec.S, spec.stride[1], spec.dilation[1], tile_q),
    )


def _sharing(spec: ConvSpec, columns: Axis) -> Axis:
    """The columns where rows that are joined share padding: zeros right of one are those left of the next."""
    if spec.stride[1] > 1 or len(columns.starts) > 1:
        return columns
    zeros = min(spec.padding[1], spec.padding[3], (spec.S - 1) * spec.dilation[1])
    return columns._replace(extent=columns.extent - zeros, shared=zeros)


def _flat(spec: ConvSpec) -> bool:
    """Whether an image is one long row: a 1x1 kernel that reads every pixel once."""
    window = spec.R, spec.S, *spec.stride, *spec.padding
    return window == (1, 1, 1, 1, 0, 0, 0, 0) and spec.P * spec.Q > 1


def _lies_in_rows(spec: ConvSpec) -> bool:
    """Whether an image may be read as it lies: channels are one long row each, and not too far apart."""
    return _flat(spec) and not spec.preactivated and spec.depth * spec.H * spec.W <= FARTHEST


def _ends_in_registers(spec: ConvSpec) -> bool:
    """Whether lanes "pixels" can finish sums in the registers."""
    return spec.activation is None or spec.activation.name in REGISTER_ACTIVATIONS


def _narrow_panels(spec: ConvSpec, machine: Machine, lanes: str, pixels: int) -> int:
    """Panels for register tiles of one vector, 0 where wider ones are better. The totals of their chains wait in
    registers, and one is finished while the next is under way. But more of them go through the whole input, of which
    every step may be on another page, or come from the third level, if it is read where it lies. Lanes "channels": so
    many pixels lie side by side."""
    if not machine.kept:
        return 0
    outputs, several = spec.K // spec.groups, chains(spec.depth) > 1
    channel_bytes = spec.H * spec.W * ITEMSIZE[spec.dtype]
    in_rows = _lies_in_rows(spec)
    far = in_rows and spec.depth > NEAR_PAGES and channel_bytes > PAGE_BYTES / 2
    if lanes == "channels":
        vectors = ceil_div(outputs, machine.vector_bytes // ITEMSIZE[spec.dtype])
        far = far or (in_rows and spec.depth * channel_bytes > machine.l2_bytes * IMAGE_SHARE)
        return vectors if several and not far and pixels >= NARROW_SUMS[0] else 0
    panels = ceil_div(outputs, machine.kept)
    if spec.P * spec.Q <= LONG_RUN:  # one tile: two threads share its panels
        panels += panels % 2
    return panels if (several or not far) and outputs // panels >= NARROW_SUMS[in_rows] else 0


def _run(width: int, cuts: int, vector: int, lanes: str, threads: int) -> int:
    """Pixels of a tile of one long row that is cut into about so many: whole pairs of vectors but for the last tile,
    or, if one thread then had much more than another, whole vectors or, with lanes "channels", any number."""
    even = ceil_div(width, cuts)
    if even == width:
        return width

    def longest(tile: int) -> int:
        """Pixels of the thread that has most."""
        whole, rest = divmod(width, tile)
        return max(ceil_div(whole, threads) * tile, whole // threads * tile + rest)

    units = (2 * vector, vector, 1) if lanes == "channels" else (2 * vector, vector)
    tiles = [min(width, ceil_div(even, unit) * unit) for unit in units]
    return next(tile for tile in tiles if longest(tile) <= (1 + UNEVEN) * min(map(longest, tiles)))


def _tile(spec: ConvSpec, machine: Machine, lanes: str, height: int, width: int) -> tuple[int, int, int]:
    """Output rows and columns of a tile, about TILE_PIXELS pixels, and the pieces whose input fits its share of the
    cache. A tile in pieces has to be larger than one in a whole: weights are then read, and rows packed, less often."""
    channel_bytes = spec.C // spec.groups * ITEMSIZE[spec.dtype]
    (down, across), (apart_down, apart_across) = spec.stride, spec.dilation
    # A pixel's inputs and sums: where they are few, a larger tile still leaves them in the first-level cache.
    pixel_bytes = channel_bytes + min(spec.K // spec.groups, PANEL_OUTPUTS) * ITEMSIZE[spec.dtype]
    pixels = max(TILE_PIXELS[lanes], min(1024, L1_SHARE // pixel_bytes))

    def tile_bytes(p: int, q: int) -> int:
        rows, columns = _axis_size(spec.R, down, apart_down, p), _axis_size(spec.S, across, apart_across, q)
        return channel_bytes * rows * columns

    budget = int(machine.l2_bytes * TILE_SHARE)
    cuts = ceil_div(width, pixels)
    tile_q = ceil_div(width, cuts)
    if height == 1:  # one long row: as many tiles for every thread
        vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
        if lanes == "pixels":  # of as many pairs of vectors as fit
            cuts = max(cuts, ceil_div(width, max(1, budget // tile_bytes(1, 2 * vector)) * 2 * vector))
        cuts = max(cuts, min(ceil_div(cuts, machine.threads) * machine.threads, width // LEAST_PIXELS))
        tile_q = _run(width, cuts, vector, lanes, machine.threads)
    tile_p = min(height, max(1, pixels // tile_q))
    whole = tile_q == width and _lies_in_rows(spec)
    if lanes == "channels" and whole and tile_bytes(1, tile_q) <= machine.l2_bytes * IMAGE_SHARE:
        return 1, tile_q, 1
    pieces, large_p, large_q = 1, tile_p, tile_q
    if lanes == "channels" and tile_bytes(tile_p, tile_q) > budget:
        most = int(machine.l2_bytes * SUMS_SHARE) // (spec.K // spec.groups * ITEMSIZE[spec.dtype])
        large_p = ceil_div(height, ceil_div(height, min(tile_p, max(1, most // tile_q))))
        pieces = min(chains(spec.depth), ceil_div(tile_bytes(large_p, tile_q), int(machine.l2_bytes * PIECE_SHARE)))
        fits = large_p * tile_q <= most and tile_bytes(large_p, tile_q) <= budget * pieces
    while tile_p > 1 and tile_bytes(tile_p, tile_q) > budget:
        tile_p -= 1
    while tile_q > 2 * machine.tile_rows and tile_bytes(tile_p, tile_q) > budget:
        tile_q = ceil_div(tile_q, 2)
    while tile_q > 1 and tile_bytes(tile_p, tile_q) > TILE_LIMIT:
        tile_q = ceil_div(tile_q, 2)
    tile_p = ceil_div(height, ceil_div(height, tile_p))
    if pieces > 1 and fits and large_p * large_q > tile_p * tile_q:
        return large_p, large_q, pieces
    return tile_p, tile_q, 1


def _runs(spec: ConvSpec, machine: Machine, lanes: str) -> list[tuple[int, int, int]]:
    """Tiles of a flat image that is read where it lies, and the pieces of each: as few runs of pixels as the cache
    allows, and as many for every thread. A small image that is too large for the cache is one tile of lanes "channels",
    in pieces, if all sums fit. None if channels are very many: an image that lies otherwise is packed."""
    itemsize, near = ITEMSIZE[spec.dtype], machine.l2_bytes
    pixels, pixel_bytes = spec.P * spec.Q, spec.depth * itemsize
    if SHORT_RUN * pixel_bytes > TILE_LIMIT:
        return []
    most = LONG_RUN if pixels <= LONG_RUN else TILE_PIXELS["pixels"]
    if pixels * pixel_bytes > near * IMAGE_SHARE:
        most = min(most, max(SHORT_RUN, int(near * TILE_SHARE) // pixel_bytes))
        sums_bytes = pixels * (spec.K // spec.groups) * itemsize
        pieces = ceil_div(pixels * pixel_bytes, int(near * PIECE_SHARE))
        small = pixels <= LONG_RUN and sums_bytes <= near * SUMS_SHARE
        if lanes == "channels" and small and pieces <= chains(spec.depth):
            return [(1, pixels, pieces)]
    few, vector = ceil_div(pixels, most), machine.vector_bytes // itemsize
    equal = ceil_div(few, machine.threads) * machine.threads
    counts = [few, equal] if few < equal and pixels >= equal * SHORT_RUN else [few]
    return [(1, _run(pixels, count, vector, lanes, machine.threads), 1) for count in counts]


def _parts(tiles: float, units: int, vectors: int, threads: int, repacking: float) -> tuple[int, float]:
    """Parts into which the units (panels or groups) of every tile are best split, and the time until the last thread
    ends, over that of threads that end together, at the price of packing again. The last tile may be a part of one.

    A part is whole units: 44 in 8 parts are 5 or 6 each, and one thread gets all the larger ones; a unit is whole
    vectors of all those of a tile. Of one tile with as many parts for every thread, the larger ones are dealt out."""
    if threads == 1:
        return 1, 1.0

    def share(most: int) -> float:
        """What so many units, the heaviest, take of a thread's share."""
        return ceil_div(vectors * most, units) / vectors * threads / tiles

    together = share(ceil_div(units, threads))

    def time(parts: int, most: int) -> tuple[float, int, float]:
        task = share(most)
        rounds = int(1 / task + 1e-9)
        waiting = rounds * task + min(threads * (1 - rounds * task), task)
        if tiles == 1 and parts % threads == 0:
            waiting = min(waiting, together)
        return waiting * (1 + parts * repacking) + UNEVEN * min(1.0, task), parts, waiting

    sizes = {ceil_div(units, parts) for parts in range(1, min(units, MOST_PARTS * threads) + 1)}
    # The fewest parts of at most so many units.
    return min(time(ceil_div(units, most), most) for most in sizes)[1:]


def _vectors(height: int, width: int, tile_p: int, tile_q: int, pitch: int, vector: int) -> int:
    """Vectors of pixels of a map's tiles, of which the last ones may be smaller; a tile is one run if its rows are
    joined, `pitch` elements apart, else (0) row by row."""

    def cut(length: int, tile: int) -> tuple:
        return (tile, length // tile), (length % tile, 1)

    return sum(
        many * more * (ceil_div((p - 1) * pitch + q, vector) if pitch else p * ceil_div(q, vector))
        for p, many in cut(height, tile_p)
        for q, more in cut(width, tile_q)
        if p and q
    )


def tiling(spec: ConvSpec, machine: Machine, lanes: str, images: int = 1, once: bool = False) -> Direct:
    """The tiling of a spec whose vectors hold `lanes`, for so many images at once.

    `once`: its weights serve one run."""
    if spec.P * spec.Q == 1:
        most = TILE_LIMIT // (spec.depth * ITEMSIZE[spec.dtype])
        return _tiling(spec, machine, lanes, images, once, (1, max(1, min(machine.tile_rows, most)), 1))
    height, width = (1, spec.P * spec.Q) if _flat(spec) else (spec.P, spec.Q)
    found = []
    if _lies_in_rows(spec) and machine.vector_bytes >= LINE_BYTES:
        runs = (_tiling(spec, machine, lanes, images, once, tile) for tile in _runs(spec, machine, lanes))
        found = [run for run in runs if run.in_place]
    return min(
        found or [_tiling(spec, machine, lanes, images, once, _tile(spec, machine, lanes, height, width))],
        key=lambda tiling: tiling.waiting + BORDERS * (tiling.tile_q < width),
    )


def _tiling(
    spec: ConvSpec, machine: Machine, lanes: str, images: int, once: bool, tile: tuple[int, int, int]
) -> Direct:
    """The tiling by tiles of a size, and their pieces; where a map is one pixel, it is a number of images."""
    tile_p, tile_q, pieces = tile
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    outputs = spec.K // spec.groups
    across_images = spec.P * spec.Q == 1
    flat = _flat(spec)
    height, width = (1, spec.P * spec.Q) if flat else (spec.P, spec.Q)
    if across_images:
        rows, columns = Axis((0,), ((0, 0),), 1), Axis((0,), ((0, 0),), tile_q)
    else:
        rows, columns = _axes(spec, tile_p, tile_q)
    spatial = ceil_div(height, tile_p) * ceil_div(width, tile_q)
    sharing, by_row = _sharing(spec, columns), tile_p * ceil_div(tile_q, vector)
    run = ceil_div((tile_p - 1) * sharing.extent + tile_q, vector)
    # Gaps are closed in registers, for less than the ends of rows cost that are no whole vectors.
    joined = lanes == "pixels" and tile_p > 1 and tile_q == width and run <= by_row
    if joined:
        columns = sharing
    vectors = ceil_div(outputs, vector)
    # Weights that one tile alone reads need not go to memory and back.
    unpacked = once and images == 1 and lanes == "channels" and spatial == 1 and not spec.preactivated
    if lanes == "pixels":
        in_registers = _ends_in_registers(spec)
        rows_end = in_registers and (not joined or columns.extent == tile_q == width)
        narrow = _narrow_panels(spec, machine, lanes, tile_q) if rows_end else 0
        # Of one long row as if threads did not cut it: programs for any number of them share packed weights.
        uncut = ceil_div(min(width, TILE_PIXELS[lanes]), vector) if height == 1 else by_row // tile_p
        panels = narrow or machine.panels(outputs, run if joined else uncut)
        widest = 1 if narrow else machine.pixel_vectors[outputs // panels - 1]
        products = spec.K * _vectors(height, width, tile_p, tile_q, columns.extent if joined else 0, vector) * vector
        # From memory, rows come faster one by one than a line of each in turn.
        near = images * spec.C * spec.H * spec.W * ITEMSIZE[spec.dtype] <= FAR_BYTES
        few = near if machine.vector_bytes >= LINE_BYTES else spec.depth <= FEW_PAGES
        # Without a look beyond a row: whole vectors, or a last register tile that overlaps the one before.
        few = few and not joined and in_registers and (tile_q % vector == 0 or tile_q > widest * vector)
    else:
        pixels = tile_p * tile_q if columns.extent == tile_q else tile_q
        narrow = 0 if unpacked or across_images else _narrow_panels(spec, machine, lanes, pixels)
        panels = narrow or ceil_div(vectors, machine.wide_vectors)  # as equal as can be, in vectors
        if height * width <= TILE_PIXELS[lanes]:  # one tile: two threads share its panels
            panels = min(vectors, panels + panels % 2)
        products = height * width * spec.groups * vectors * vector
        few = machine.vector_bytes >= LINE_BYTES or tile_q == width or (panels <= FEW_PANELS and pieces == 1)
    in_place = few and _lies_in_rows(spec)
    packing = rows.size * len(columns.starts) * (PACK_ROW + PACK_ELEMENT * columns.extent)
    if in_place:  # in pieces, every part reads it again; otherwise every panel does, in however many parts
        packing = READ_ELEMENT * tile_q if lanes == "channels" and (pieces > 1 or tile_q < width) else 0
    # Groups of channels, but not panels of one, share nothing that is packed.
    repacking = packing / (tile_p * tile_q * spec.R * spec.S * vectors) if spec.groups == 1 else 0.0
    units = spec.groups * panels if spec.groups == 1 or in_place else spec.groups
    weights = spec.groups * vectors if lanes == "channels" else units
    tiles = 1 if across_images else images * height * width / (tile_p * tile_q)
    parts, waiting = _parts(tiles, units, weights, machine.threads, repacking)
    return Direct(
        lanes, flat, across_images, joined, bool(narrow), in_place, unpacked, tile_p, tile_q, panels, parts,
        chains(spec.depth), pieces, rows, columns, far_images(spec, machine), waiting, 2 * products * spec.depth,
    )  # fmt: skip
