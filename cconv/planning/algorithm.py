"""Algorithm: which way to compute a convolution. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine.  Out: every tiling that meets the spec's precision, and the one estimated to be fastest.

The estimate counts what the kernels issue in units of one fused multiply-add of a whole vector. Its constants were
fitted to measured times (docs/kernels.md); `make bench` prints what a wrong choice costs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import inf
from typing import NamedTuple

from ..errors import ArgumentError
from . import cuda, depthwise, direct, winograd
from .depthwise import Depthwise
from .direct import LINE_BYTES, Direct
from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec
from .winograd import AnyTransform

ALGORITHMS = ("auto", "direct", "winograd")

#: Fewest input and output channels of an automatic Winograd: below, integers stay exact.
FEWEST_CHANNELS = 16
#: How much of the second-level cache the transformed input of a thread's own block of tiles may take.
BLOCK_SHARE = 0.7
#: How much of it the products of a task may take before they spill to the third level.
PRODUCTS_SHARE = 0.6
#: Bytes of transformed input that threads share at once.
HELD_BYTES = 6 << 20
#: Lanes "channels" waste none on few tiles: where a vector is less than a cache line, they are taken below this ratio
#: of work.
FEW_TILES = 0.9
#: Bytes of transformed filters beyond which they come from memory on every run.
L3_BYTES = 12 << 20
#: Bytes of the smallest block beyond which there is no Winograd: bounds the scratch of layers with very many channels.
BLOCK_LIMIT = 16 << 20
#: Into how many shared blocks tiles may be cut: enough for a choice that takes no time.
BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
#: Most vectors of tiles in a thread's own block.
BLOCK_VECTORS = 4
#: Time of a call of a register tile, of adding a chain's vector of sums to those before, and of a vector from the third
#: level and from memory, in units of the estimate.
CALL, LINK, LINE_LINK, FAR, MEMORY = 40, 3.5, 1.7, 0.7, 9
#: Time of a product in a register tile; that of lanes "channels" counts the transposition of outputs.
PRODUCT = {"pixels": 1.1, "channels": 1.25}
#: The same where a vector is a cache line (AVX-512) and 32 registers hold tiles of 28 sums; ...
LINE_PRODUCT = {"pixels": 1.05, "channels": 1.0}
#: ... there, the time of reading a vector of a panel again for the next tile, from the first level and from beyond; and
#: of a vector of products that the second level cannot hold.
AGAIN, SPILL = (1, 2.5), 6
#: Bytes of a panel, of one point, that stay in the first level; and time of reading a line of input again, for the next
#: panel, if those of all channels are more.
PANEL_BYTES, LINE = 24 << 10, 3
#: Time of a vector of transformed input that a thread leaves for others, and of one that is read from the third level,
#: shorter than a cache line or one.
SHARED, READ, LINE_READ = 4, 1.4, 0.3
#: Time of a vector of outputs that is no whole line, in maps that come from the third level and from memory (AVX-512).
SPLIT = 7, 18
#: Time of packing a weight, and of reading a tap of a filter that is transformed: they come from the third level.
WEIGHT, TAP, LINE_TAP = 1.3, 1.33, 0.67
#: Time of an operation of such a transform: panels of "pixels" have odd widths.
FILTERING, LINE_FILTERING = {"channels": 0.12, "pixels": 0.24}, {"channels": 0.085, "pixels": 0.24}


@dataclass(frozen=True, slots=True)
class Winograd:
    """A convolution as products of transformed tiles: F(m, r) down and F(m', r) across.

    A dilated one is as many convolutions as its dilation has phases, each of the outputs and inputs of one phase."""

    #: What is done down the rows of a tile, and what across its columns.
    rows: AnyTransform
    columns: AnyTransform
    #: What a vector of products holds: "pixels" (tiles), or "channels" (of the output).
    lanes: str
    #: Tiles of m x m' outputs in a block.
    tiles: int
    #: Panels into which the output channels are cut.
    panels: int
    #: Panels whose products are transformed back together.
    group: int
    #: Blocks whose transformed input the threads share at a time; 0 if every thread transforms its own.
    held: int
    #: Whether filters are transformed by the task that uses them, and not ahead.
    fused: bool
    chains: int
    #: Images from which on the result goes past the caches.
    far_images: int
    #: Multiplications and additions that the kernels issue for one image, lanes of padding included.
    executed_flops: int

    algorithm = "winograd"

    @property
    def label(self) -> str:
        """Outputs, then taps of one dimension where both are alike; else outputs down, across, and taps."""
        outputs = f"{self.rows.m}x{self.columns.m}" if self.rows.m != self.columns.m else f"{self.rows.m}"
        return f"winograd {outputs}x{self.rows.r}"

    @property
    def packing(self) -> tuple:
        """What the packed form of a weight depends on."""
        return "winograd", self.rows.stride, self.rows.m, self.columns.m, self.lanes, self.panels, self.fused

    @property
    def points(self) -> int:
        """Products of a tile, per channel."""
        return self.rows.alpha * self.columns.alpha

    def count(self, spec: ConvSpec) -> int:
        """Tiles of an image."""
        return _tiles(spec, self.rows, self.columns)


Tiling = Direct | Depthwise | Winograd | cuda.Ffma | cuda.Strips


def _tiles(spec: ConvSpec, rows: AnyTransform, columns: AnyTransform) -> int:
    """Tiles of an image, of all phases."""
    down, across = spec.dilation
    return down * across * ceil_div(ceil_div(spec.P, down), rows.m) * ceil_div(ceil_div(spec.Q, across), columns.m)


def _executed(
    spec: ConvSpec, machine: Machine, rows: AnyTransform, columns: AnyTransform, images: int
) -> dict[str, int]:
    """Lanes that may be best, and the operations that the kernels issue with them for one image of so many."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    tiles = images * _tiles(spec, rows, columns)
    across, down = ceil_div(tiles, vector) * vector * spec.K, tiles * ceil_div(spec.K, vector) * vector
    vectors = {"pixels": across, "channels": down}
    if machine.vector_bytes < LINE_BYTES:
        del vectors["pixels" if down < across * FEW_TILES else "channels"]
    return {lanes: 2 * rows.alpha * columns.alpha * spec.C * n // images for lanes, n in vectors.items()}


def _winograd(
    spec: ConvSpec, rows: AnyTransform, columns: AnyTransform, images: int, packs: bool, machine: Machine
) -> Winograd:
    """The blocking of two transforms with the least estimated time."""
    itemsize = ITEMSIZE[spec.dtype]
    vector = machine.vector_bytes // itemsize
    points = rows.alpha * columns.alpha
    tiles = images * _tiles(spec, rows, columns)
    vectors = ceil_div(tiles, vector)
    chains = winograd.chains(spec.C, rows, columns) if spec.precision == "highest" else direct.chains(spec.C)
    vector_bytes = points * spec.C * machine.vector_bytes

    @cache
    def panels_of(lanes: str, size: int) -> int:
        if lanes == "channels":
            large, kept = ceil_div(spec.K, machine.tile_vectors * vector), ceil_div(spec.K, vector)
        else:
            large, kept = machine.panels(spec.K, ceil_div(size, vector)), ceil_div(spec.K, machine.kept or 1)
        ways = (large, kept) if chains > 1 and machine.kept else (large,)
        return min(ways, key=lambda panels: _around(spec, machine, lanes, points, size, panels, chains))

    def blocking(lanes: str, size: int, held: int, group_bytes: float, equal: bool = False) -> tuple:
        """Lanes, tiles, panels, group, held, fused; if `equal`, as many panels for every thread."""
        block, panels = ceil_div(size, vector), panels_of(lanes, size)
        even = ceil_div(panels, machine.threads) * machine.threads
        if equal and lanes == "pixels" and even * direct.NARROW_SUMS[0] <= spec.K:
            panels = even
        panel_bytes = points * ceil_div(spec.K, panels) * block * machine.vector_bytes
        # The groups of a single block are all the tasks there are: none is larger than a thread's share.
        single = held > 0 and size == tiles
        most = ceil_div(panels, machine.threads) if single else panels
        group = min(most, max(1, int(group_bytes / panel_bytes)))
        group = ceil_div(panels, ceil_div(panels, group))
        # Weights that serve one run need not go to memory and back if there is but one block to read them.
        return lanes, size, panels, group, held, packs and single

    near = machine.l2_bytes * PRODUCTS_SHARE
    executed = _executed(spec, machine, rows, columns, images)
    own = max(1, min(vectors, int(machine.l2_bytes * BLOCK_SHARE) // vector_bytes, BLOCK_VECTORS))
    sizes = {min(tiles, block * vector) for block in (ceil_div(vectors, ceil_div(vectors, own)), *range(2, own + 1))}
    found = [blocking(lanes, size, 0, near * share) for lanes in executed for size in sizes for share in (0.5, 1)]
    if machine.vector_bytes >= LINE_BYTES:
        # Lanes "channels" need no whole vectors: whole register tiles, or equal blocks.
        rows_of = (min(tiles, size) for size in range(machine.tile_rows, own * vector + 1, machine.tile_rows))
        equal = (ceil_div(tiles, ceil_div(tiles, block * vector)) for block in range(1, own + 1))
        found += [blocking("channels", size, 0, near * share) for size in {*rows_of, *equal} for share in (0.5, 1)]
    for blocks in BLOCKS:
        block = ceil_div(vectors, blocks)
        if block * vector_bytes <= max(HELD_BYTES, vector_bytes) and ceil_div(vectors, block) == blocks:
            held, size = max(1, min(blocks, HELD_BYTES // (block * vector_bytes))), min(tiles, block * vector)
            ways = itertools.product(executed, (0.5, 1, 2, 4), (False, size == tiles))
            found += [blocking(lanes, size, held, near * share, equal) for lanes, share, equal in dict.fromkeys(ways)]
    arithmetic = {lanes: _arithmetic(spec, machine, rows, columns, lanes, n, images) for lanes, n in executed.items()}
    same = chains, direct.far_images(spec, machine)
    tilings = (Winograd(rows, columns, *cut, *same, executed[cut[0]]) for cut in dict.fromkeys(found))
    return min(tilings, key=lambda t: arithmetic[t.lanes] + _beyond(spec, machine, t, images, packs) / images)


def _transforms(spec: ConvSpec, machine: Machine) -> list[tuple[AnyTransform, AnyTransform]]:
    """The transforms, down and across, that fit a spec's geometry and precision."""
    (stride, other), (down, across) = spec.stride, spec.dilation
    phases_fit = down <= spec.P and across <= spec.Q and (stride == 1 or down == across == 1)
    if spec.R != spec.S or stride != other or spec.groups > 1 or not phases_fit:
        return []
    tiles = winograd.TILES.get((spec.R, stride), ())
    fit = [tuple(winograd.transform(m, spec.R, stride) for m in tile) for tile in tiles]
    most = BLOCK_LIMIT // (spec.C * machine.vector_bytes)
    return [t for t in fit if t[0].alpha * t[1].alpha <= most and winograd.within(*t, spec.precision, spec.C)]


def _check_algorithm(spec: ConvSpec, machine: Machine) -> None:
    if spec.algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {spec.algorithm!r}")
    if machine.device == "cuda" and spec.algorithm == "winograd":
        raise ArgumentError("algorithm: expected auto or direct on a GPU, got 'winograd'")


@lru_cache(maxsize=64)
def _alone(machine: Machine) -> Machine:
    """The machine with one thread."""
    return replace(machine, threads=1)


class _Way(NamedTuple):
    """A tiling still to be made, and a time below which no estimate of it can be."""

    floor: float
    tiling: Callable[[Machine], Tiling]


def _ways(spec: ConvSpec, machine: Machine, images: int, packs: bool) -> list[_Way]:
    """Every tiling; which ones there are does not depend on the machine's threads."""
    found: list[_Way] = []
    if spec.algorithm != "winograd":
        if depthwise.tiling(spec, machine):
            return [_Way(0, partial(depthwise.tiling, spec))]
        for lanes in ("channels", "pixels") if spec.P * spec.Q > 1 else ("channels",):
            way = partial(direct.tiling, spec, lanes=lanes, images=images, once=packs)
            found.append(_Way(_least(spec, machine, lanes), way))
    if spec.algorithm == "winograd" or (spec.algorithm == "auto" and min(spec.C, spec.K) >= FEWEST_CHANNELS):
        for pair in _transforms(spec, machine):
            ways = _executed(spec, machine, *pair, images).items()
            floor = min(_arithmetic(spec, machine, *pair, lanes, executed, images) for lanes, executed in ways)
            found.append(_Way(floor, partial(_winograd, spec, *pair, images, packs)))
    if not found:
        raise ArgumentError(
            f"algorithm: expected a kernel of 3x3, 5x5 or 7x7 with stride 1, or of 3x3 or 5x5 with stride 2 and "
            f"dilation 1, groups 1, a map no smaller than the dilation and not too many channels for winograd, got "
            f"{spec.R}x{spec.S} with stride {spec.stride}, dilation {spec.dilation}, groups {spec.groups}, {spec.C} "
            f"channels and precision {spec.precision}"
        )
    return found


def candidates(spec: ConvSpec, machine: Machine, images: int = 1, packs: bool = False) -> tuple[Tiling, ...]:
    """Every way to compute the spec on so many images at once; an algorithm that cannot is an ArgumentError.

    `packs`: the weights are packed for this run alone."""
    _check_algorithm(spec, machine)
    if machine.device == "cuda":
        return cuda.candidates(spec)
    return tuple(way.tiling(machine) for way in _ways(spec, machine, images, packs))


def estimate(spec: ConvSpec, machine: Machine, tiling: Tiling, images: int = 1, packs: bool = False) -> float:
    """Time of an image, one of so many at once, in units of one vector's fused multiply-add.

    `packs`: the weights are packed for this run alone."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    fma = tiling.executed_flops / 2 / vector
    maps_in, maps_out = spec.C * spec.H * spec.W / vector, spec.K * spec.P * spec.Q / vector
    if isinstance(tiling, Depthwise):
        return fma + maps_in + 2 * maps_out
    if isinstance(tiling, Winograd):
        how = tiling.rows, tiling.columns, tiling.lanes, tiling.executed_flops
        return _arithmetic(spec, machine, *how, images) + _beyond(spec, machine, tiling, images, packs) / images
    weights = WEIGHT * spec.K * spec.depth + (0 if tiling.unpacked else _ahead(spec.K * spec.depth / vector, machine))
    packing = packs * weights / images
    # Rows of the image that two tiles share are packed twice.
    if not tiling.in_place:
        packing += 3 * maps_in * (1 + (spec.R - 1) / tiling.tile_p)
    return _direct(spec, tiling.lanes, fma * tiling.waiting, packing, vector)


def _direct(spec: ConvSpec, lanes: str, fma: float, packing: float, vector: int) -> float:
    """Time of an image's products, of what is packed for them, and of ending their sums."""
    chains, maps_out = direct.chains(spec.depth), spec.K * spec.P * spec.Q / vector
    if lanes == "pixels":
        return fma * 1.05 + packing + 5 * chains * maps_out
    # A vector of outputs alone leaves too few sums in flight.
    slower = 1.05 if spec.K // spec.groups > vector else 1.3
    return fma * slower + packing + (2 * chains + 18) * maps_out


def _least(spec: ConvSpec, machine: Machine, lanes: str) -> float:
    """A time below which no direct tiling is: pixels without padding, and nothing packed."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    outputs = spec.K // spec.groups
    if lanes == "channels":
        outputs = ceil_div(outputs, vector) * vector
    return _direct(spec, lanes, spec.P * spec.Q * spec.groups * outputs * spec.depth / vector, 0.0, vector)


def _transforming(spec: ConvSpec, machine: Machine, rows: AnyTransform, columns: AnyTransform, images: int) -> float:
    """Time of transforming the tiles of so many images, input and output, by whole vectors."""
    vectors = ceil_div(images * _tiles(spec, rows, columns), machine.vector_bytes // ITEMSIZE[spec.dtype])
    # Tiles 2 or 4 apart are sorted into lanes by shuffling, others by a transposition.
    return (8 if columns.m in (2, 4) else 12) * rows.alpha * columns.alpha * vectors * (spec.C + spec.K)


def _arithmetic(
    spec: ConvSpec, machine: Machine, rows: AnyTransform, columns: AnyTransform, lanes: str, executed: int, images: int
) -> float:
    """Time of an image's products and transforms, whatever the blocking, where so many are computed at once."""
    products = executed / 2 / (machine.vector_bytes // ITEMSIZE[spec.dtype])
    each = (PRODUCT if machine.vector_bytes < LINE_BYTES else LINE_PRODUCT)[lanes]
    return products * each + _transforming(spec, machine, rows, columns, images) / images


def _beyond(spec: ConvSpec, machine: Machine, tiling: Winograd, images: int, packs: bool) -> float:
    """Time beyond the arithmetic of so many images: what depends on the blocking."""
    time = _passing(spec, machine, tiling, images)
    if packs:
        rows, columns, filters = tiling.rows, tiling.columns, spec.C * spec.K
        vectors = tiling.points * filters / (machine.vector_bytes // ITEMSIZE[spec.dtype])
        # Down, then across; a point is converted and stored.
        operations = spec.S * rows.filter_operations + rows.alpha * columns.filter_operations + 2 * tiling.points
        lines = machine.vector_bytes >= LINE_BYTES
        tap, each = (LINE_TAP, LINE_FILTERING) if lines else (TAP, FILTERING)
        time += filters * (tap * spec.R * spec.S + each[tiling.lanes] * operations)
        time += 0 if tiling.fused else _ahead(vectors, machine)
    return time


def _streamed(vectors: float, machine: Machine) -> float:
    """Time of reading or writing so many vectors in the third level, or in memory as far as they are too many."""
    near = min(vectors, L3_BYTES / machine.vector_bytes)
    return near * FAR + (vectors - near) * MEMORY


def _ahead(vectors: float, machine: Machine) -> float:
    """Time of writing so many vectors of packed weights, which push out what lay where they go, to be read once."""
    return 2 * vectors * (FAR if 2 * vectors * machine.vector_bytes <= L3_BYTES else MEMORY)


def _around(spec: ConvSpec, machine: Machine, lanes: str, points: int, tiles: int, panels: int, chains: int) -> float:
    """What the register tiles of a block cost beyond their products: calls, ends of chains whose totals wait in memory,
    and panels and input that the first level does not hold until they are read again."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    block, outputs, time = ceil_div(tiles, vector), ceil_div(spec.K, panels), 0.0
    if lanes == "pixels":
        kept = chains > 1 and outputs <= machine.kept
        calls = block if kept else ceil_div(block, machine.pixel_vectors[outputs - 1])
    else:
        calls, across = ceil_div(tiles, machine.tile_rows), ceil_div(outputs, vector)
        kept = ceil_div(tiles, calls) * across <= machine.kept
        if machine.vector_bytes >= LINE_BYTES:
            again = AGAIN[spec.C * across * machine.vector_bytes > PANEL_BYTES]
            time = spec.C * spec.K / vector * (calls - 1) * again
            if spec.C * LINE_BYTES > PANEL_BYTES:
                time += spec.C * calls * panels * LINE
    ends = 0 if kept else (chains - 1) * spec.K * block * (LINK if machine.vector_bytes < LINE_BYTES else LINE_LINK)
    return points * (time + panels * calls * CALL + ends)


def _passing(spec: ConvSpec, machine: Machine, tiling: Winograd, images: int) -> float:
    """What a blocking costs beyond its arithmetic, of all images: weights, input and products that pass through the
    caches, what register tiles cost beyond their products, and threads that wait for the last one's task."""
    lanes = machine.vector_bytes // ITEMSIZE[spec.dtype]
    points, tiles = tiling.points, images * tiling.count(spec)
    blocks, block = ceil_div(tiles, tiling.tiles), ceil_div(tiling.tiles, lanes)
    groups = ceil_div(tiling.panels, tiling.group)
    filters, data = points * spec.C * spec.K / lanes, points * spec.C * blocks * block
    products = points * spec.K * blocks * block
    time = 0 if tiling.fused else _streamed(filters, machine) * blocks
    if tiling.held:
        near = block * points * spec.C * machine.vector_bytes <= machine.l2_bytes / 2
        read = READ if machine.vector_bytes < LINE_BYTES else LINE_READ
        time += data * (SHARED + read * (1 if near else groups))
    if products / blocks / groups * machine.vector_bytes > machine.l2_bytes * PRODUCTS_SHARE:
        time += products * (FAR * 2 if machine.vector_bytes < LINE_BYTES else SPILL)
    time += blocks * _around(spec, machine, tiling.lanes, points, tiling.tiles, tiling.panels, tiling.chains)
    maps_in, maps_out = images * spec.C * spec.H * spec.W, images * spec.K * spec.P * spec.Q
    near = (maps_in + maps_out) * ITEMSIZE[spec.dtype] <= 2 * machine.l2_bytes
    if machine.vector_bytes >= LINE_BYTES and not near and not _in_lines(spec, tiling):
        time += maps_out / lanes * SPLIT[images >= tiling.far_images]
    if tiling.held:
        rounds = (tiling.held * groups, blocks // tiling.held), (blocks % tiling.held * groups, 1)
        idle = sum(many * (-tasks % machine.threads) for tasks, many in rounds)
        longest = ceil_div(tiling.panels * ceil_div(groups, machine.threads), groups)
        waiting = idle / (blocks * groups) if blocks > 1 else longest * machine.threads / tiling.panels - 1
    else:
        waiting = _waiting(tiles, tiling.tiles, machine.threads)
    if not waiting:
        return time
    work = images * tiling.executed_flops / 2 / lanes
    work += _transforming(spec, machine, tiling.rows, tiling.columns, images)
    return time + waiting * work


def _in_lines(spec: ConvSpec, tiling: Winograd) -> bool:
    """Whether outputs are written by whole lines, a map at a time: others are read first and push out what is near."""
    m, itemsize = tiling.columns.m, ITEMSIZE[spec.dtype]
    whole = not (spec.Q * itemsize % LINE_BYTES or tiling.tiles * m * itemsize % LINE_BYTES or spec.Q % m)
    return whole and tiling.lanes == "pixels" and spec.dilation == (1, 1)


def _waiting(parts: int, task: int, threads: int) -> float:
    """Time for which threads wait for the longest of them, over their work, if they share so many parts by tasks of
    `task`, of which the last may be smaller."""
    whole, rest = divmod(parts, task)
    longest = max(ceil_div(whole, threads) * task, whole // threads * task + rest)
    return longest * threads / parts - 1


def batch_class(images: int, device: str = "cpu") -> int:
    """The number of images that a plan for so many is made for: 1, 2, 4 ... 32, so that plans are few; ... 1024 on a
    GPU, whose tiles grow until its multiprocessors have several each."""
    return 1 << min(5 if device == "cpu" else 10, max(1, images).bit_length() - 1)


def choose(spec: ConvSpec, machine: Machine, images: int = 1, packs: bool = False) -> Tiling:
    """The candidate with the least estimated time on one thread: which one it is does not depend on the number of
    threads, so that no bit of a result does, and weights of direct kernels are packed once for all. On a GPU it may: no
    tile there changes a bit."""
    _check_algorithm(spec, machine)
    if machine.device == "cuda":
        return cuda.choose(spec, machine, images)
    alone = _alone(machine)
    best, least, chosen = None, inf, None
    for way in sorted(_ways(spec, machine, images, packs), key=lambda way: way.floor):
        if way.floor < least and (time := estimate(spec, alone, tiling := way.tiling(alone), images, packs)) < least:
            best, least, chosen = way, time, tiling
    return chosen if machine == alone else best.tiling(machine)
