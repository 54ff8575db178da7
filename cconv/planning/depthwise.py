"""Depthwise: convolutions with one input channel per group, whose maps are read in place.

In: a ConvSpec and a Machine.  Out: their tiling, which cpu/_depthwise.pyx executes, if it reaches them.
"""

from dataclasses import dataclass

from .direct import CHAIN
from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec


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
    """The tiling of a layer with one input channel per group, None where its kernel does not reach."""
    if spec.groups != spec.C or spec.stride[1] > 2 or spec.R * spec.S > CHAIN:
        return None
    vector = machine.vector_bytes // ITEMSIZE[spec.dtype]
    parts = min(ceil_div(spec.P, 16), 1 if machine.threads == 1 else ceil_div(8 * machine.threads, spec.K))
    return Depthwise(parts, 2 * spec.K * spec.P * ceil_div(spec.Q, vector) * vector * spec.depth)
