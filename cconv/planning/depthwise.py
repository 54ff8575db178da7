"""Depthwise: convolutions with one input channel per group, whose maps are read in place.

In: a ConvSpec and a Machine.  Out: their tiling, which cpu/_depthwise.pyx executes, if it reaches them.
"""

from dataclasses import dataclass

from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec

#: Filters that have a kernel, and most outputs of an input map: tiles of direct convolutions load it once for all.
SIZES, MOST_OUTPUTS = (3, 5), 3


@dataclass(frozen=True, slots=True)
class Depthwise:
    """One output map from one input map, read in place."""

    #: Parts into which the rows of a map are split for the threads.
    row_parts: int
    executed_flops: int

    algorithm = "direct"
    label = "direct depthwise"
    packing = ("depthwise",)


def tiling(spec: ConvSpec, machine: Machine) -> Depthwise | None:
    """The tiling of a layer with one input channel per group; None where there is no kernel, or direct ones are faster.

    Which is faster was measured (docs/kernels.md) and is not estimated."""
    few = spec.groups == spec.C and spec.K <= MOST_OUTPUTS * spec.C and not spec.preactivated
    sizes = spec.R == spec.S and spec.R in SIZES and spec.padding[1] <= spec.S // 2
    if not few or not sizes or spec.stride not in ((1, 1), (2, 2)) or spec.dilation != (1, 1):
        return None
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    parts = min(ceil_div(spec.P, 16), 1 if machine.threads == 1 else ceil_div(8 * machine.threads, spec.K))
    return Depthwise(parts, 2 * spec.K * spec.P * ceil_div(spec.Q, vector) * vector * spec.depth)
