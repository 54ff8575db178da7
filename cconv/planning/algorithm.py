"""Algorithm: which way to compute a convolution. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine.  Out: every tiling that meets the spec's precision, and the one estimated to be fastest.

The estimate counts what the kernels issue in units of one fused multiply-add of a whole vector. Its constants were
fitted to measured times (docs/kernels.md); `make bench` prints what a wrong choice costs.
"""

from dataclasses import dataclass

from ..errors import ArgumentError
from . import direct, winograd
from .direct import Depthwise, Direct
from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec
from .winograd import Transform

ALGORITHMS = ("auto", "direct", "winograd")

#: Fewest input and output channels of an automatic Winograd: below, integers stay exact.
FEWEST_CHANNELS = 16
#: How much of the second-level cache the transformed input of a block of tiles may take.
BLOCK_SHARE = 0.7
#: Lanes "channels" waste none on few tiles, but their products have to be transposed: taken below this ratio of work.
FEW_TILES = 0.9
#: Bytes of transformed filters beyond which they come from memory on every run.
L3_BYTES = 20 << 20
#: Bytes of the smallest block beyond which there is no Winograd: bounds the scratch of layers with very many channels.
BLOCK_LIMIT = 16 << 20
#: Most vectors of tiles in a block.
BLOCK_VECTORS = 4


@dataclass(frozen=True, slots=True)
class Winograd:
    """A convolution as products of transformed tiles: F(m, r)."""

    transform: Transform
    #: What a vector of products holds: "pixels" (tiles), or "channels" (of the output) where tiles are few.
    lanes: str
    #: Tiles of m x m outputs in a block.
    tiles: int
    #: Panels into which the output channels are cut.
    panels: int
    chains: int
    #: Multiplications and additions that the kernels issue for one image, lanes of padding included.
    executed_flops: int

    algorithm = "winograd"

    @property
    def label(self) -> str:
        return f"winograd {self.transform.m}x{self.transform.r}"

    @property
    def packing(self) -> tuple:
        """What the packed form of a weight depends on."""
        return "winograd", self.transform.m, self.lanes, self.panels


Tiling = Direct | Depthwise | Winograd


def _winograd(spec: ConvSpec, machine: Machine, transform: Transform, images: int) -> Winograd:
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    points, m = transform.alpha**2, transform.m
    tiles = images * ceil_div(spec.P, m) * ceil_div(spec.Q, m)
    fit = int(machine.l2_bytes * BLOCK_SHARE) // (points * spec.C * machine.vector_bytes)
    vectors = max(1, min(ceil_div(tiles, vector), fit, BLOCK_VECTORS))
    chains = winograd.chains(spec.C, transform, transform) if spec.precision == "highest" else direct.chains(spec.C)
    across, down = ceil_div(tiles, vector) * vector * spec.K, tiles * ceil_div(spec.K, vector) * vector
    if down < across * FEW_TILES:
        lanes, block = "channels", ceil_div(tiles, ceil_div(tiles, vectors * vector))
        panels = ceil_div(spec.K, vector * machine.tile_vectors)
    else:
        lanes, block, panels = "pixels", vectors * vector, machine.panels(spec.K, vectors)
    executed = 2 * points * spec.C * (down if lanes == "channels" else across) // images
    return Winograd(transform, lanes, block, panels, chains, executed)


def _transforms(spec: ConvSpec, machine: Machine) -> list[Transform]:
    """The transforms that fit a spec's geometry and precision."""
    if (spec.stride, spec.dilation, spec.groups) != ((1, 1), (1, 1), 1) or spec.R != spec.S:
        return []
    fit = [winograd.transform(m, r) for m, r in winograd.SUPPORTED if r == spec.R]
    block = spec.C * machine.vector_bytes
    return [
        t for t in fit if t.alpha**2 * block <= BLOCK_LIMIT and winograd.meets(t.m, t.r, spec.precision, spec.depth)
    ]


def candidates(spec: ConvSpec, machine: Machine, images: int = 1) -> tuple[Tiling, ...]:
    """Every way to compute the spec on so many images at once; an algorithm that cannot is an ArgumentError."""
    if spec.algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {spec.algorithm!r}")
    found: list[Tiling] = []
    if spec.algorithm != "winograd":
        found.append(direct.tiling(spec, machine, "channels"))
        if spec.P * spec.Q > 1:
            found.append(direct.tiling(spec, machine, "pixels"))
        if depthwise := direct.depthwise(spec, machine):
            found.append(depthwise)
    if spec.algorithm == "winograd" or (spec.algorithm == "auto" and min(spec.C, spec.K) >= FEWEST_CHANNELS):
        found += [_winograd(spec, machine, transform, images) for transform in _transforms(spec, machine)]
    if not found:
        raise ArgumentError(
            f"algorithm: expected a kernel of 3x3, 5x5 or 7x7 with stride 1, dilation 1, groups 1 and not too many "
            f"channels for winograd, got {spec.R}x{spec.S} with stride {spec.stride}, dilation {spec.dilation}, groups "
            f"{spec.groups}, {spec.C} channels and precision {spec.precision}"
        )
    return tuple(found)


def estimate(spec: ConvSpec, machine: Machine, tiling: Tiling, images: int = 1, packs: bool = False) -> float:
    """Time of an image, one of so many at once, in units of one vector's fused multiply-add.

    `packs`: the weights are packed for this run alone."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    fma = tiling.executed_flops / 2 / vector
    maps_in, maps_out = spec.C * spec.H * spec.W / vector, spec.K * spec.P * spec.Q / vector
    if isinstance(tiling, Depthwise):
        return fma + maps_in + 2 * maps_out
    if isinstance(tiling, Winograd):
        transform = tiling.transform
        tiles = ceil_div(spec.P, transform.m) * ceil_div(spec.Q, transform.m) / vector
        # Tiles 2 or 4 apart are sorted into lanes by shuffling, others by a transposition.
        transforms = (8 if transform.m in (2, 4) else 12) * transform.alpha**2 * tiles * (spec.C + spec.K)
        filters = transform.alpha**2 * spec.C * spec.K
        streamed = filters / vector / images * (1 if filters * ITEMSIZE[spec.dtype] <= L3_BYTES else 3)
        return fma * 1.1 + transforms + streamed + packs * 2.5 * filters / images
    # Rows of the image that two tiles share are packed twice.
    packing = 3 * maps_in * (1 + (spec.R - 1) / tiling.tile_p) + packs * 0.5 * spec.K * spec.depth / images
    if tiling.lanes == "pixels":
        return fma * 1.05 + packing + 4 * tiling.chains * maps_out
    return fma * 1.1 + packing + (2 * tiling.chains + 12) * maps_out


def batch_class(images: int) -> int:
    """The number of images that a plan for so many is made for: 1, 2, 4 ... 32, so that plans are few."""
    return 1 << min(5, max(1, images).bit_length() - 1)


def choose(spec: ConvSpec, machine: Machine, images: int = 1, packs: bool = False) -> Tiling:
    """The candidate with the least estimated time."""
    return min(candidates(spec, machine, images), key=lambda tiling: estimate(spec, machine, tiling, images, packs))
