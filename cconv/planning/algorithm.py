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
#: Most vectors of tiles in a block.
BLOCK_VECTORS = 4


@dataclass(frozen=True, slots=True)
class Winograd:
    """A convolution as products of transformed tiles: F(m, r)."""

    transform: Transform
    #: Tiles of m x m outputs in a block, whole vectors.
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
        return "winograd", self.transform.m, self.panels


Tiling = Direct | Depthwise | Winograd


def _winograd(spec: ConvSpec, machine: Machine, transform: Transform) -> Winograd:
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    points, m = transform.alpha**2, transform.m
    tiles = ceil_div(spec.P, m) * ceil_div(spec.Q, m)
    fit = int(machine.l2_bytes * BLOCK_SHARE) // (points * spec.C * machine.vector_bytes)
    vectors = max(1, min(ceil_div(tiles, vector), fit, BLOCK_VECTORS))
    panels = machine.panels(spec.K, vectors)
    executed = 2 * points * spec.C * spec.K * ceil_div(tiles, vector) * vector
    chains = winograd.chains(spec.C, transform, transform) if spec.precision == "highest" else direct.chains(spec.C)
    return Winograd(transform, vectors * vector, panels, chains, executed)


def _transforms(spec: ConvSpec) -> list[Transform]:
    """The transforms that fit a spec's geometry and precision."""
    if (spec.stride, spec.dilation, spec.groups) != ((1, 1), (1, 1), 1) or spec.R != spec.S:
        return []
    fit = [winograd.transform(m, r) for m, r in winograd.SUPPORTED if r == spec.R]
    return [t for t in fit if winograd.meets(t.m, t.r, spec.precision, spec.depth)]


def candidates(spec: ConvSpec, machine: Machine) -> tuple[Tiling, ...]:
    """Every way to compute the spec; an unknown algorithm, or one that cannot, is an ArgumentError."""
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
        found += [_winograd(spec, machine, transform) for transform in _transforms(spec)]
    if not found:
        raise ArgumentError(
            f"algorithm: expected a kernel of 3x3 or 5x5 with stride 1, dilation 1 and groups 1 for winograd, got "
            f"{spec.R}x{spec.S} with stride {spec.stride}, dilation {spec.dilation} and groups {spec.groups}"
        )
    return tuple(found)


def estimate(spec: ConvSpec, machine: Machine, tiling: Tiling) -> float:
    """Time of one image in units of one vector's fused multiply-add."""
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    fma = tiling.executed_flops / 2 / vector
    maps_in, maps_out = spec.C * spec.H * spec.W / vector, spec.K * spec.P * spec.Q / vector
    if isinstance(tiling, Depthwise):
        return fma + maps_in + 2 * maps_out
    if isinstance(tiling, Winograd):
        transform = tiling.transform
        groups = ceil_div(ceil_div(spec.P, transform.m) * ceil_div(spec.Q, transform.m), vector)
        streamed = transform.alpha**2 * spec.C * spec.K / vector
        return fma * 1.1 + 8 * transform.alpha**2 * groups * (spec.C + spec.K) + streamed
    # Rows of the image that two tiles share are packed twice.
    packing = 3 * maps_in * (1 + (spec.R - 1) / tiling.tile_p)
    if tiling.lanes == "pixels":
        return fma * 1.05 + packing + 4 * tiling.chains * maps_out
    return fma * 1.1 + packing + (2 * tiling.chains + 12) * maps_out


def choose(spec: ConvSpec, machine: Machine) -> Tiling:
    """The candidate with the least estimated time."""
    return min(candidates(spec, machine), key=lambda tiling: estimate(spec, machine, tiling))
